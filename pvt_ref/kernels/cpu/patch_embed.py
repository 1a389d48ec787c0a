"""Patch embedding by lines of blocks: cut, flattened, projected and normalised while in cache."""

import numpy as np

from pvt_ref.kernels.cpu.blocking import Blocking, by_group
from pvt_ref.kernels.cpu.layer_norm import (
    LayerNormCache,
    add_sums,
    empty_layer_norm_cache,
    layer_norm_backward_rows,
    layer_norm_rows,
    zero_sums,
)
from pvt_ref.kernels.cpu.linear import (
    add_up,
    column_sums,
    linear_rows,
    times_weight_rows,
    weight_gradients,
)
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import (
    PatchEmbedParams,
    kernel_to_matrix,
    matrix_to_kernel,
    patch_embed,
)
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class EmbeddedCache:
    """What the backward needs of all blocks, n of them in the batch.

    Attributes:
        blocks: (n, P*P*C_in), one flattened block a row.
        norm: of the norm over (n, C_out).
    """

    blocks: np.ndarray  # (n, P*P*C_in)
    norm: LayerNormCache


def empty_embedded_cache(n: int, width: int, C_out: int, dtype: np.dtype) -> EmbeddedCache:
    """Room for n blocks of so many numbers, and their embeddings.

    Args:
        n: blocks in the batch.
        width: P*P*C_in.
        C_out: channels of an embedding.
        dtype: float32 or float64.

    Returns:
        A cache of arrays (n, width), (n, C_out) and (n, 1), with arbitrary values.
    """
    return EmbeddedCache(np.empty((n, width), dtype), empty_layer_norm_cache(n, C_out, dtype))


def embed_rows(
    proj: LinearParams,
    norm: LayerNormParams,
    sources: list[np.ndarray],
    eps: float,
    y: np.ndarray,
    rows: slice,
    cache: EmbeddedCache | None,
    scratch: Scratch,
) -> None:
    """y becomes LN(blocks W^T + b), for some of the blocks.

    Args:
        proj: the projection as a matrix (C_out, P*P*C_in).
        norm: the norm, (C_out,).
        sources: views of maps as :func:`as_blocks` makes them, (lines, blocks, P, P, C_in) each,
            that hold the blocks one after the other.
        eps: of the norm.
        y: (blocks, C_out), written.
        rows: which rows of the cache these blocks have.
        cache: keeps the blocks and the norm's share; None if nobody needs them.
        scratch: memory of this thread.
    """
    if cache is None:
        blocks = scratch("embed.blocks", len(y), proj.weight.shape[1], dtype=y.dtype)
    else:
        blocks = cache.blocks[rows]
    lines = blocks.reshape(-1, *sources[0].shape[1:])
    start = 0
    for source in sources:
        lines[start : start + len(source)] = source
        start += len(source)
    linear_rows(proj, blocks, y, scratch)
    layer_norm_rows(norm, y, eps, y, rows, None if cache is None else cache.norm)


def embed_backward_rows(
    proj: LinearParams,
    norm: LayerNormParams,
    cache: EmbeddedCache,
    rows: slice,
    dy: np.ndarray,
    dprojected: np.ndarray,
    dbias: np.ndarray,
    norm_sums: LayerNormParams,
    scratch: Scratch,
) -> np.ndarray:
    """The gradients of some blocks, and what they add to those of bias and norm.

    Args:
        proj: as in :func:`embed_rows`.
        norm: as in :func:`embed_rows`.
        cache: as in :func:`embed_rows`, but not None.
        rows: as in :func:`embed_rows`.
        dy: dL/dy (blocks, C_out).
        dprojected: (blocks, C_out), becomes the gradient before the norm; the weight needs it.
        dbias: float64 (C_out,), added to.
        norm_sums: float64 (C_out,) each, added to.
        scratch: memory of this thread.

    Returns:
        (blocks, P*P*C_in), in the thread's memory.
    """
    layer_norm_backward_rows(norm, cache.norm, rows, dy, dprojected, norm_sums, scratch)
    dbias += column_sums(dprojected)
    dblocks = scratch("embed.dblocks", len(dy), proj.weight.shape[1], dtype=dy.dtype)
    times_weight_rows(dprojected, proj, dblocks, scratch)
    return dblocks


def as_blocks(x: np.ndarray, P: int) -> np.ndarray:
    """A map seen as blocks, the same memory.

    Args:
        x: (B, H, W, C), H and W multiples of P.
        P: side of a block.

    Returns:
        (B, H/P, W/P, P, P, C), a view of x.
    """
    B, H, W, C = x.shape
    return x.reshape(B, H // P, P, W // P, P, C).transpose(0, 1, 3, 2, 4, 5)


@record
class PatchEmbedCache:
    """The blocks, and the map that they were cut from.

    Attributes:
        embedded: the blocks and the norm.
        map_shape: (B, H, W, C_in).
    """

    embedded: EmbeddedCache
    map_shape: tuple[int, ...]  # (B, H, W, C_in)


def patch_embed_forward(
    p: PatchEmbedParams,
    x: np.ndarray,
    ops: Ops,
    eps: float,
    keep: bool = True,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, PatchEmbedCache | None]:
    """As :func:`pvt_ref.layers.patch_embed.patch_embed_forward`.

    Args:
        p: projection weight (C_out, C_in, P, P), its bias (C_out,), and the norm.
        x: (B, H, W, C_in), H and W multiples of P.
        ops: asked for a projection without a norm.
        eps: of the norm.
        keep: whether a cache for the backward is returned; without it, it is None.
        blocking: the settings.

    Returns:
        tokens (B, (H/P)(W/P), C_out) and the cache.
    """
    norm = p.norm
    if norm is None:  # what is left is a linear layer, which has a kernel of its own
        return patch_embed.forward(p, x, ops, eps, keep)
    proj = LinearParams(kernel_to_matrix(p.proj.weight), p.proj.bias)
    C_out, width = proj.weight.shape
    source = as_blocks(x, p.proj.weight.shape[-1])
    B, h, w = source.shape[:3]
    y = np.empty((B * h * w, C_out), x.dtype)
    embedded = empty_embedded_cache(len(y), width, C_out, x.dtype) if keep else None

    def work(pieces: list[slice], scratch: Scratch) -> None:
        for lines in pieces:
            rows = slice(lines.start * w, lines.stop * w)
            sources = [source[b, part] for b, part, _ in by_group(lines, h)]
            embed_rows(proj, norm, sources, eps, y[rows], rows, embedded, scratch)

    blocking.run(work, B * h, blocking.rows(width) // w or 1, tokens=w)
    cache = None if embedded is None else PatchEmbedCache(embedded, x.shape)
    return y.reshape(B, h * w, C_out), cache


def patch_embed_backward(
    p: PatchEmbedParams, cache: PatchEmbedCache, dy: np.ndarray, ops: Ops, *, blocking: Blocking
) -> tuple[np.ndarray, PatchEmbedParams]:
    """As :func:`pvt_ref.layers.patch_embed.patch_embed_backward`.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dtokens (B, (H/P)(W/P), C_out).
        ops: not asked for anything.
        blocking: the settings.

    Returns:
        dx (B, H, W, C_in) and the gradients of projection, (C_out, C_in, P, P) and (C_out,), and
        norm, (C_out,) twice.
    """
    norm = p.norm
    if norm is None:
        return patch_embed.backward(p, cache, dy, ops)
    proj = LinearParams(kernel_to_matrix(p.proj.weight), p.proj.bias)
    C_out, width = proj.weight.shape
    dx = np.empty(cache.map_shape, dy.dtype)
    target = as_blocks(dx, p.proj.weight.shape[-1])
    B, h, w = target.shape[:3]
    dy_rows = dy.reshape(B * h * w, C_out)
    dprojected = np.empty(dy_rows.shape, dy.dtype)

    def work(pieces: list[slice], scratch: Scratch) -> tuple[np.ndarray, LayerNormParams]:
        dbias, norm_sums = np.zeros(C_out), zero_sums(norm)
        for lines in pieces:
            rows = slice(lines.start * w, lines.stop * w)
            dblocks = embed_backward_rows(
                proj, norm, cache.embedded, rows, dy_rows[rows], dprojected[rows], dbias,
                norm_sums, scratch,
            )  # fmt: skip
            dblocks = dblocks.reshape(-1, *target.shape[2:])
            for b, part, within in by_group(lines, h):
                target[b, part] = dblocks[within]
        return dbias, norm_sums

    results = blocking.run(work, B * h, blocking.rows(width) // w or 1, tokens=w)
    dbiases, norm_sums = zip(*results, strict=True)
    (dmatrix,) = weight_gradients([(dprojected, cache.embedded.blocks)], blocking)
    dproj = LinearParams(
        matrix_to_kernel(dmatrix, p.proj.weight.shape),
        None if p.proj.bias is None else add_up(dbiases, dy.dtype),
    )
    return dx, PatchEmbedParams(dproj, add_sums(list(norm_sums), dy.dtype))
