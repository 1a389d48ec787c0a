"""Windows of a map on CUDA, and back: one launch each, for convolutions and patch embeddings.

The products are those of the table's ``linear``.
"""

from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.kernels.cuda.launch import (
    MOST_NUMBERS,
    THREADS,
    Cuda,
    Function,
    Kernel,
    address,
    blocks_for,
    is_float32,
    packed,
)
from pvt_ref.layers.conv import ConvParams, conv, windows_along
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import (
    PatchEmbedParams,
    kernel_to_matrix,
    matrix_to_kernel,
    patch_embed,
)
from pvt_ref.ops import Ops
from pvt_ref.tree import record


def _function(name: str, width: int) -> Function:
    """The kernel for pieces of width numbers: 4 or 1."""
    return Function("windows.cu", name, (("PIECE", "float4" if width == 4 else "float"),))


def _piece(x: Array) -> int:
    """How many numbers of a map x (B, H, W, C) can be read at once: 4 or 1."""
    width = 4 * x.itemsize
    together = x.shape[3] % 4 == 0 and x.strides[3] == x.itemsize
    aligned = address(x) % width == 0 and all(step % width == 0 for step in x.strides[:3])
    return 4 if together and aligned else 1


def _are_pixels(k: Grid, stride: int, padding: int) -> bool:
    """Whether each window is a pixel of the map, and each pixel a window."""
    return tuple(k) == (1, 1) and stride == 1 and padding == 0


def unfold(x: Array, k: Grid, stride: int, padding: int, cuda: Cuda) -> Array:
    """As :func:`pvt_ref.layers.conv.unfold`, for a map (B, H, W, C) in any memory layout.

    If windows are single pixels, the result is a view of the map where its layout allows that.
    """
    (B, H, W, C), width = x.shape, _piece(x)
    if _are_pixels(k, stride, padding):
        return array_module(x).reshape(x, (B, H * W, C))
    h, w = windows_along((H, W), k, stride, padding)
    windows = array_module(x).empty((B, h * w, k[0] * k[1] * C), x.dtype)
    steps = [step // x.itemsize for step in x.strides]
    # counted in pieces; from a piece of four channels to the next is a step of 1
    steps = [step // width for step in steps[:3]] + [steps[3]]
    count = windows.size // width
    sizes = (count, H, W, C // width, h, w, *k, stride, padding)
    cuda.launch(
        _function("unfold", width), (blocks_for(count),), (THREADS,), (x, windows, *sizes, *steps)
    )
    return windows  # (B, h*w, k_h*k_w*C)


def fold(windows: Array, size: Grid, k: Grid, stride: int, padding: int, cuda: Cuda) -> Array:
    """As :func:`pvt_ref.layers.conv.fold`, with the same bits."""
    xp = array_module(windows)
    (B, _, D), (H, W) = windows.shape, size
    if _are_pixels(k, stride, padding):
        return xp.reshape(windows, (B, H, W, D))
    C = D // (k[0] * k[1])
    h, w = windows_along(size, k, stride, padding)
    windows = packed(windows)
    x = xp.empty((B, H, W, C), windows.dtype)
    width = _piece(x)
    count = x.size // width
    sizes = (count, H, W, C // width, h, w, *k, stride, padding)
    cuda.launch(_function("fold", width), (blocks_for(count),), (THREADS,), (windows, x, *sizes))
    return x  # (B, H, W, C)


# Convolution --------------------------------------------------------------------------------------


def _can_unfold(x: Array, k: Grid, stride: int, padding: int) -> bool:
    """Whether an int of the kernels can count the windows' numbers, and x has positive strides."""
    (B, H, W, C), (k_h, k_w) = x.shape, k
    h, w = windows_along((H, W), k, stride, padding)
    count = B * h * w * k_h * k_w * C
    return is_float32(x) and 0 < count <= MOST_NUMBERS and min(x.strides) > 0


@record
class ConvCache:
    """The cache of the product, which holds the windows; size (H, W) of x, stride and padding."""

    linear: Any
    size: Grid
    stride: int
    padding: int


def conv_forward(
    p: ConvParams,
    x: Array,
    ops: Ops,
    stride: int,
    padding: int,
    keep: bool = True,
    *,
    cuda: Cuda,
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.layers.conv.conv_forward`."""
    (B, H, W, _), (C_out, _, *k) = x.shape, p.weight.shape
    if not _can_unfold(x, (k[0], k[1]), stride, padding):
        return conv.forward(p, x, ops, stride, padding, keep)
    h, w = windows_along((H, W), (k[0], k[1]), stride, padding)
    matrix = LinearParams(kernel_to_matrix(p.weight), p.bias)  # (C_out, k_h*k_w*C_in)
    windows = unfold(x, (k[0], k[1]), stride, padding, cuda)  # (B, h*w, k_h*k_w*C_in)
    y, linear_cache = ops[linear].forward(matrix, windows, ops, keep=keep)  # (B, h*w, C_out)
    y = array_module(x).reshape(y, (B, h, w, C_out))  # (B, h, w, C_out)
    return y, ConvCache(linear_cache, (H, W), stride, padding) if keep else None


def conv_backward(
    p: ConvParams, cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, ConvParams]:
    """As :func:`pvt_ref.layers.conv.conv_backward`."""
    if not isinstance(cache, ConvCache):
        return conv.backward(p, cache, dy, ops)
    B, h, w, C_out = dy.shape
    matrix = LinearParams(kernel_to_matrix(p.weight), p.bias)
    dy_rows = array_module(dy).reshape(dy, (B, h * w, C_out))  # (B, h*w, C_out)
    dwindows, dmatrix = ops[linear].backward(matrix, cache.linear, dy_rows, ops)
    grads = ConvParams(matrix_to_kernel(dmatrix.weight, p.weight.shape), dmatrix.bias)
    dx = fold(dwindows, cache.size, p.weight.shape[2:], cache.stride, cache.padding, cuda)
    return dx, grads  # (B, H, W, C_in)


# Patch embedding ----------------------------------------------------------------------------------


@record
class PatchEmbedCache:
    """The caches of the parts, and the size (H, W) of x."""

    linear: Any
    norm: Any
    size: Grid


def patch_embed_forward(
    p: PatchEmbedParams, x: Array, ops: Ops, eps: float, keep: bool = True, *, cuda: Cuda
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.layers.patch_embed.patch_embed_forward`: patches are windows."""
    P = p.proj.weight.shape[-1]
    if not _can_unfold(x, (P, P), P, 0):
        return patch_embed.forward(p, x, ops, eps, keep)
    matrix = LinearParams(kernel_to_matrix(p.proj.weight), p.proj.bias)  # (C_out, P*P*C_in)
    patches = unfold(x, (P, P), P, 0, cuda)  # (B, n, P*P*C_in)
    y, linear_cache = ops[linear].forward(matrix, patches, ops, keep=keep)  # (B, n, C_out)
    del patches  # not needed while the norm runs
    norm_cache = None
    if p.norm is not None:
        y, norm_cache = ops[layer_norm].forward(p.norm, y, ops, eps, keep=keep)  # (B, n, C_out)
    return y, PatchEmbedCache(linear_cache, norm_cache, x.shape[1:3]) if keep else None


def patch_embed_backward(
    p: PatchEmbedParams, cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, PatchEmbedParams]:
    """As :func:`pvt_ref.layers.patch_embed.patch_embed_backward`."""
    if not isinstance(cache, PatchEmbedCache):
        return patch_embed.backward(p, cache, dy, ops)
    shape = p.proj.weight.shape
    matrix = LinearParams(kernel_to_matrix(p.proj.weight), p.proj.bias)
    dnorm = None
    if p.norm is not None:
        dy, dnorm = ops[layer_norm].backward(p.norm, cache.norm, dy, ops)  # (B, n, C_out)
    dpatches, dmatrix = ops[linear].backward(matrix, cache.linear, dy, ops)  # (B, n, P*P*C_in)
    dproj = LinearParams(matrix_to_kernel(dmatrix.weight, shape), dmatrix.bias)
    dx = fold(dpatches, cache.size, shape[2:], shape[-1], 0, cuda)  # (B, H, W, C_in)
    return dx, PatchEmbedParams(dproj, dnorm)


conv_kernel = Kernel(conv, conv_forward, conv_backward)
patch_embed_kernel = Kernel(patch_embed, patch_embed_forward, patch_embed_backward)
