"""Patch embedding (paper section 3.2): cut a map into patches, flatten, project, normalise.

The windows of a convolution whose kernel equals its stride never overlap. It is therefore just a
rearrangement followed by a matrix multiplication, hence "without convolutions". Spatial reduction
(eq. 3) is the same operation with R for P, and uses this file.
"""

from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class PatchEmbedParams:
    """proj, a kernel (C_out, C_in, P, P) with a bias, and the norm or None; or their gradients."""

    proj: LinearParams
    norm: LayerNormParams | None


@record
class PatchEmbedCache:
    """The caches of the parts, and the grid (H/P, W/P) of the patches."""

    linear: Any
    norm: Any
    grid: Grid


def patchify(x: Array, P: int) -> Array:
    """Cuts a map x (B, H, W, C) into P x P patches, one flattened patch per row (section 3.2).

    In raster order; within a patch, rows, then columns, then channels. New memory.
    """
    xp = array_module(x)
    B, H, W, C = x.shape
    x = xp.reshape(x, (B, H // P, P, W // P, P, C))  # (B, H/P, P, W/P, P, C)
    # assigned, not reshaped: with P = 1 a reshape would be a view of the caller's array, and a
    # cache with that view would change with the array
    patches = xp.empty((B, H // P, W // P, P, P, C), dtype=x.dtype)
    patches[...] = xp.permute_dims(x, (0, 1, 3, 2, 4, 5))  # (B, H/P, W/P, P, P, C)
    return xp.reshape(patches, (B, (H // P) * (W // P), P * P * C))  # (B, n, P*P*C)


def unpatchify(patches: Array, P: int, grid: Grid) -> Array:
    """Puts patches (B, h*w, P*P*C) back on their grid (h, w): the inverse of :func:`patchify`.

    That is a permutation, so its inverse is also its transpose.
    """
    xp = array_module(patches)
    h, w = grid
    B, _, PPC = patches.shape
    C = PPC // (P * P)
    x = xp.reshape(patches, (B, h, w, P, P, C))  # (B, h, w, P, P, C)
    x = xp.permute_dims(x, (0, 1, 3, 2, 4, 5))  # (B, h, P, w, P, C)
    return xp.reshape(x, (B, h * P, w * P, C))  # (B, h*P, w*P, C)


def kernel_to_matrix(weight: Array) -> Array:
    """A kernel weight (C_out, C_in, k_h, k_w) as a matrix, columns in the order of patchify."""
    xp = array_module(weight)
    weight = xp.permute_dims(weight, (0, 2, 3, 1))  # (C_out, k_h, k_w, C_in)
    return xp.reshape(weight, (weight.shape[0], -1))  # (C_out, k_h*k_w*C_in)


def matrix_to_kernel(matrix: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of kernel_to_matrix, to the kernel's shape (C_out, C_in, k_h, k_w)."""
    xp = array_module(matrix)
    C_out, C_in, k_h, k_w = shape
    kernel = xp.reshape(matrix, (C_out, k_h, k_w, C_in))  # (C_out, k_h, k_w, C_in)
    return xp.permute_dims(kernel, (0, 3, 1, 2))  # (C_out, C_in, k_h, k_w)


def patch_embed_forward(
    p: PatchEmbedParams, x: Array, ops: Ops, eps: float, keep: bool = True
) -> tuple[Array, PatchEmbedCache | None]:
    """Tokens of the P x P patches of a map: LN(patches W^T + b) (paper section 3.2).

    Args:
        p: proj.weight (C_out, C_in, P, P), proj.bias (C_out,), and the norm, which may be absent.
        x: (B, H, W, C_in), H and W multiples of P, of the weights' dtype.
        ops: the table of operations.
        eps: of the norm.
        keep: whether to return a cache for the backward.

    Returns:
        tokens (B, (H/P)(W/P), C_out) of x's dtype, and the cache.
    """
    P = p.proj.weight.shape[-1]
    grid = (x.shape[1] // P, x.shape[2] // P)
    matrix = LinearParams(kernel_to_matrix(p.proj.weight), p.proj.bias)  # (C_out, P*P*C_in)
    patches = patchify(x, P)  # (B, n, P*P*C_in)
    y, linear_cache = ops[linear].forward(matrix, patches, ops, keep=keep)  # (B, n, C_out)
    del patches  # not needed while the norm runs
    norm_cache = None
    if p.norm is not None:
        y, norm_cache = ops[layer_norm].forward(p.norm, y, ops, eps, keep=keep)  # (B, n, C_out)
    return y, PatchEmbedCache(linear_cache, norm_cache, grid) if keep else None


def patch_embed_backward(
    p: PatchEmbedParams, cache: PatchEmbedCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, PatchEmbedParams]:
    """Gradients of :func:`patch_embed_forward`.

    patchify only moves numbers: it is a permutation matrix Pi, y = LN(Pi x W^T + b). A
    permutation's transpose is its inverse, so dL/dx = Pi^T dL/dpatches is unpatchify.

    Args:
        p: the forward's weights, proj.weight (C_out, C_in, P, P).
        cache: from the forward, grid (H/P, W/P).
        dy: dL/dtokens (B, (H/P)(W/P), C_out).
        ops: the table that the forward was given.

    Returns:
        dx (B, H, W, C_in) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    kernel_shape = p.proj.weight.shape
    matrix = LinearParams(kernel_to_matrix(p.proj.weight), p.proj.bias)
    # y = LN(y)
    dnorm = None
    if p.norm is not None:
        dy, dnorm = ops[layer_norm].backward(p.norm, cache.norm, dy, ops)  # (B, n, C_out)
    # y = patches W^T + b
    dpatches, dmatrix = ops[linear].backward(matrix, cache.linear, dy, ops)  # (B, n, P*P*C_in)
    dproj = LinearParams(matrix_to_kernel(dmatrix.weight, kernel_shape), dmatrix.bias)
    # patches = patchify(x)
    dx = unpatchify(dpatches, kernel_shape[-1], cache.grid)  # (B, H, W, C_in)
    return dx, PatchEmbedParams(dproj, dnorm)


patch_embed = Operation(patch_embed_forward, patch_embed_backward)
