"""Patch embedding by rows of blocks: cut, flattened, projected and normalised while in cache."""

from dataclasses import dataclass

import numpy as np

from pvt_ref.kernels.blocking import Blocking, by_group
from pvt_ref.kernels.layer_norm import (
    add_sums,
    affine_rows,
    layer_norm_backward_rows,
    normalize_rows,
    zero_sums,
)
from pvt_ref.kernels.linear import column_sums, linear_rows, weight_gradients
from pvt_ref.kernels.threads import Scratch
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import PatchEmbedParams, kernel_to_matrix, matrix_to_kernel
from pvt_ref.ops import Ops


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedCache:
    """What the backward needs of all blocks, n of them in the batch."""

    blocks: np.ndarray  # (n, P*P*C_in)
    x_hat: np.ndarray  # (n, C_out)
    rstd: np.ndarray  # (n, 1)


def empty_embedded(n: int, width: int, C_out: int, dtype: np.dtype) -> EmbeddedCache:
    """Room for n blocks of so many numbers, and their embeddings."""
    return EmbeddedCache(
        np.empty((n, width), dtype), np.empty((n, C_out), dtype), np.empty((n, 1), dtype)
    )


def embed_rows(
    proj: LinearParams,
    norm: LayerNormParams,
    blocks: np.ndarray,
    eps: float,
    y: np.ndarray,
    rows: slice,
    cache: EmbeddedCache | None,
) -> None:
    """y becomes LN(blocks W^T + b), for some rows of blocks.

    Args:
        proj: the projection as a matrix (C_out, P*P*C_in).
        norm: the norm.
        blocks: (rows, P*P*C_in).
        eps: of the norm.
        y: (rows, C_out), written.
        rows: which rows of the cache these are.
        cache: keeps the normalised embedding; None if nobody needs it afterwards.
    """
    linear_rows(proj, blocks, y)
    if cache is None:
        normalize_rows(y, eps, y)
        affine_rows(norm, y, y)
    else:
        cache.rstd[rows] = normalize_rows(y, eps, cache.x_hat[rows])
        affine_rows(norm, cache.x_hat[rows], y)


def as_blocks(x: np.ndarray, P: int) -> np.ndarray:
    """A map (B, H, W, C) seen as blocks (B, H/P, W/P, P, P, C), the same memory."""
    B, H, W, C = x.shape
    return x.reshape(B, H // P, P, W // P, P, C).transpose(0, 1, 3, 2, 4, 5)


def patch_embed_forward(
    p: PatchEmbedParams,
    x: np.ndarray,
    ops: Ops,
    eps: float,
    keep: bool = True,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, tuple[EmbeddedCache, tuple[int, ...]] | None]:
    """As :func:`pvt_ref.layers.patch_embed.patch_embed_forward`."""
    del ops  # whole as it is
    C_out, C_in, P, _ = p.proj.weight.shape
    proj = LinearParams(kernel_to_matrix(p.proj.weight), p.proj.bias)
    source = as_blocks(x, P)
    B, h, w = source.shape[:3]
    width = P * P * C_in
    y = np.empty((B * h * w, C_out), x.dtype)
    cache = empty_embedded(len(y), width, C_out, x.dtype) if keep else None
    lines = max(1, blocking.rows // w)  # of w blocks each, at once

    def work(piece: slice, scratch: Scratch) -> None:
        for part in blocking.cut(piece, lines):
            rows = slice(part.start * w, part.stop * w)
            if cache is None:
                blocks = scratch("blocks", rows.stop - rows.start, width, dtype=x.dtype)
            else:
                blocks = cache.blocks[rows]
            view = blocks.reshape(-1, w, P, P, C_in)
            for b, image_lines, block_lines in by_group(part, h):
                view[block_lines] = source[b, image_lines]
            embed_rows(proj, p.norm, blocks, eps, y[rows], rows, cache)

    blocking.run(work, B * h, w * width, rows=lines)
    return y.reshape(B, h * w, C_out), None if cache is None else (cache, x.shape)


def embed_backward_rows(
    proj: LinearParams,
    norm: LayerNormParams,
    cache: EmbeddedCache,
    rows: slice,
    dy: np.ndarray,
    dprojected: np.ndarray,
    dblocks: np.ndarray,
    dbias: np.ndarray,
    norm_sums: LayerNormParams,
    scratch: Scratch,
) -> None:
    """The gradients of some blocks, and what they add to those of bias and norm.

    Args:
        proj, norm, cache, rows: as in :func:`embed_rows`.
        dy: dL/dy (rows, C_out).
        dprojected: (rows, C_out), becomes the gradient before the norm; the weight needs it.
        dblocks: (rows, P*P*C_in), written.
        dbias: float64 (C_out,), added to.
        norm_sums: float64, added to.
        scratch: memory of this thread.
    """
    layer_norm_backward_rows(
        norm, cache.x_hat[rows], cache.rstd[rows], dy, dprojected, norm_sums, scratch
    )
    dbias += column_sums(dprojected)
    np.matmul(dprojected, proj.weight, out=dblocks)


def patch_embed_backward(
    p: PatchEmbedParams,
    cache: tuple[EmbeddedCache, tuple[int, ...]],
    dy: np.ndarray,
    ops: Ops,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, PatchEmbedParams]:
    """As :func:`pvt_ref.layers.patch_embed.patch_embed_backward`."""
    del ops
    embedded, map_shape = cache
    C_out, C_in, P, _ = p.proj.weight.shape
    proj = LinearParams(kernel_to_matrix(p.proj.weight), p.proj.bias)
    dx = np.empty(map_shape, dy.dtype)
    target = as_blocks(dx, P)
    B, h, w = target.shape[:3]
    dy_rows = dy.reshape(B * h * w, C_out)
    dprojected = np.empty_like(embedded.x_hat)
    lines = max(1, blocking.rows // w)

    def work(piece: slice, scratch: Scratch) -> tuple[np.ndarray, LayerNormParams]:
        dbias, norm_sums = np.zeros(C_out), zero_sums(p.norm)
        for part in blocking.cut(piece, lines):
            rows = slice(part.start * w, part.stop * w)
            dblocks = scratch("dblocks", rows.stop - rows.start, P * P * C_in, dtype=dy.dtype)
            embed_backward_rows(
                proj, p.norm, embedded, rows, dy_rows[rows], dprojected[rows], dblocks, dbias,
                norm_sums, scratch,
            )  # fmt: skip
            view = dblocks.reshape(-1, w, P, P, C_in)
            for b, image_lines, block_lines in by_group(part, h):
                target[b, image_lines] = view[block_lines]
        return dbias, norm_sums

    results = blocking.run(work, B * h, w * P * P * C_in, rows=lines)
    dbiases, norm_sums = zip(*results, strict=True)
    (dmatrix,) = weight_gradients([(dprojected, embedded.blocks)], blocking)
    dweight = matrix_to_kernel(dmatrix, p.proj.weight.shape)
    dproj = LinearParams(dweight, sum(dbiases).astype(dy.dtype))
    return dx, PatchEmbedParams(dproj, add_sums(list(norm_sums), dy.dtype))
