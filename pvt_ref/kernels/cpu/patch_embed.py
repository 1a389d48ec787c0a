"""Patch embedding by lines of patches: cut out, projected and normalised while in cache."""

from typing import Any

import numpy as np

from pvt_ref.kernels.cpu.layer_norm import (
    add_up_norm,
    empty_layer_norm_cache,
    layer_norm_backward_rows,
    layer_norm_rows,
)
from pvt_ref.kernels.cpu.linear import (
    Sums,
    add_up,
    column_sums,
    linear_rows,
    times_weight_rows,
    weight_gradients,
)
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, by_group, rows_of, times
from pvt_ref.layers.layer_norm import LayerNormCache, LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import PatchEmbedParams, matrix_to_kernel, patch_embed
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class Projection:
    """The projection of P x P patches, and the norm after it."""

    proj: LinearParams  # the weight as a matrix (C_out, P*P*C_in), columns in a patch's order
    norm: LayerNormParams
    P: int
    channels_first: bool  # the order of a patch: the kernel's, (C_in, P, P), or the map's


def projection(
    proj: LinearParams, norm: LayerNormParams, patches: int, tiling: Tiling
) -> Projection:
    """The projection from a kernel; for many patches, its weight is put in the map's order."""
    C_out, C_in, P, _ = proj.weight.shape
    if patches <= C_out:  # it is less work to put the patches in the kernel's order
        return Projection(LinearParams(proj.weight.reshape(C_out, -1), proj.bias), norm, P, True)
    matrix = np.empty((C_out, P, P, C_in), proj.weight.dtype)
    in_order = proj.weight.transpose(0, 2, 3, 1)  # (C_out, P, P, C_in)

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for rows in tiles:
            matrix[rows] = in_order[rows]

    tiling.run(work, C_out, C_out, tokens=C_in * P * P // 512)
    return Projection(LinearParams(matrix.reshape(C_out, -1), proj.bias), norm, P, False)


@record
class EmbeddedCache:
    """What the backward needs: all patches (n, P*P*C_in), and the norm over (n, C_out)."""

    patches: np.ndarray
    norm: LayerNormCache


def empty_embedded_cache(n: int, projection: Projection) -> EmbeddedCache:
    """Memory for n patches and their embeddings."""
    (C_out, width), dtype = projection.proj.weight.shape, projection.proj.weight.dtype
    return EmbeddedCache(np.empty((n, width), dtype), empty_layer_norm_cache(n, C_out, dtype))


def embed_rows(
    projection: Projection,
    sources: list[np.ndarray],
    eps: float,
    y: np.ndarray,
    cache: EmbeddedCache | None,
    scratch: Scratch,
) -> None:
    """Writes LN(patches W^T + b) to y (patches, C_out), and fills the cache, if it is not None.

    sources are views made by :func:`as_patches`, (lines, patches, ...) each, which together hold
    the patches in order.
    """
    if cache is None:
        patches = scratch("embed.patches", len(y), projection.proj.weight.shape[1], dtype=y.dtype)
    else:
        patches = cache.patches
    np.concatenate(sources, out=np.reshape(patches, (-1, *sources[0].shape[1:]), copy=False))
    linear_rows(projection.proj, patches, y, scratch)
    layer_norm_rows(projection.norm, y, eps, y, None if cache is None else cache.norm)


def embed_backward_rows(
    projection: Projection,
    cache: EmbeddedCache,
    dy: np.ndarray,
    dprojected: np.ndarray,
    sums: Sums,
    scratch: Scratch,
) -> np.ndarray:
    """The gradient of the patches (patches, P*P*C_in), in the thread's memory; adds to sums.

    dprojected (patches, C_out) gets the gradient before the norm, which dW is computed from.
    """
    proj, norm = projection.proj, projection.norm
    layer_norm_backward_rows(norm, cache.norm, dy, dprojected, sums, "embed.norm", scratch)
    sums.add("embed", column_sums(dprojected))
    dpatches = scratch("embed.dpatches", len(dy), proj.weight.shape[1], dtype=dy.dtype)
    times_weight_rows(proj, dprojected, dpatches, scratch)
    return dpatches


def embed_gradients(
    proj: LinearParams, projection: Projection, dmatrix: np.ndarray, pieces: list[Sums]
) -> tuple[LinearParams, LayerNormParams]:
    """The gradients of the kernel, the bias and the norm."""
    dbias = None if proj.bias is None else add_up(pieces, "embed", dmatrix.dtype)
    in_order = np.reshape if projection.channels_first else matrix_to_kernel
    dproj = LinearParams(in_order(dmatrix, proj.weight.shape), dbias)
    return dproj, add_up_norm(pieces, "embed.norm", dmatrix.dtype)


def as_patches(x: np.ndarray, projection: Projection) -> np.ndarray:
    """A view of a map (B, H, W, C) as (B, H/P, W/P) patches, in the projection's order."""
    (B, H, W, C), P = x.shape, projection.P
    lines = np.reshape(x, (B, H // P, P, W // P, P, C), copy=False)
    return lines.transpose(0, 1, 3, *((5, 2, 4) if projection.channels_first else (2, 4, 5)))


@record
class PatchEmbedCache:
    """What :func:`patch_embed_backward` needs; map_shape is (B, H, W, C_in)."""

    embedded: EmbeddedCache
    projection: Projection
    map_shape: tuple[int, ...]


def patch_embed_forward(
    p: PatchEmbedParams, x: np.ndarray, ops: Ops, eps: float, keep: bool = True, *, tiling: Tiling
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.layers.patch_embed.patch_embed_forward`."""
    if p.norm is None:  # the rest is a linear layer, which has a twin of its own
        return patch_embed.forward(p, x, ops, eps, keep)
    C_out, C_in, P, _ = p.proj.weight.shape
    B, h, w = x.shape[0], x.shape[1] // P, x.shape[2] // P
    weights = projection(p.proj, p.norm, B * h * w, tiling)
    source = as_patches(x, weights)
    y = np.empty((B * h * w, C_out), x.dtype)
    embedded = empty_embedded_cache(len(y), weights) if keep else None

    def work(pieces: list[slice], scratch: Scratch) -> None:
        for lines in pieces:
            rows = times(lines, w)
            sources = [source[b, part] for b, part, _ in by_group(lines, h)]
            embed_rows(weights, sources, eps, y[rows], rows_of(embedded, rows), scratch)

    tiling.run_lines(work, B * h, w, C_in * P * P)
    cache = None if embedded is None else PatchEmbedCache(embedded, weights, x.shape)
    return y.reshape(B, h * w, C_out), cache


def patch_embed_backward(
    p: PatchEmbedParams, cache: Any, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, PatchEmbedParams]:
    """As :func:`pvt_ref.layers.patch_embed.patch_embed_backward`."""
    if not isinstance(cache, PatchEmbedCache):
        return patch_embed.backward(p, cache, dy, ops)
    embedded, weights = cache.embedded, cache.projection
    C_out, width = weights.proj.weight.shape
    dx = np.empty(cache.map_shape, dy.dtype)
    target = as_patches(dx, weights)
    B, h, w = target.shape[:3]
    dy_rows = dy.reshape(B * h * w, C_out)
    dprojected = np.empty(dy_rows.shape, dy.dtype)

    def work(pieces: list[slice], scratch: Scratch) -> Sums:
        sums = Sums()
        for lines in pieces:
            rows = times(lines, w)
            kept, dy_part, dpart = rows_of((embedded, dy_rows, dprojected), rows)
            dpatches = embed_backward_rows(weights, kept, dy_part, dpart, sums, scratch)
            dlines = dpatches.reshape(-1, *target.shape[2:])
            for b, part, within in by_group(lines, h):
                target[b, part] = dlines[within]
        return sums

    pieces = tiling.run_lines(work, B * h, w, width)
    (dmatrix,) = weight_gradients([(dprojected, embedded.patches, None)], tiling)
    return dx, PatchEmbedParams(*embed_gradients(p.proj, weights, dmatrix, pieces))


patch_embed_kernel = Kernel(
    patch_embed, patch_embed_forward, patch_embed_backward, (linear, layer_norm, sum_rows)
)
