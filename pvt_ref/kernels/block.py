"""A whole transformer block in two sweeps over the tokens, forward and backward.

Everything in a block belongs to one token, except that a query looks at the keys and values of its
whole image. So the forward first makes all keys and values (there are few), then takes one block of
rows after the other through all the rest: norm, queries, attention, projection, sum, norm, MLP,
sum. Nothing but the tokens, the keys and the values exists at full length. The backward goes the
same way back: first the rows, then the keys and values; last, the products that give the weights'
gradients, over all tokens at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref import block as readable
from pvt_ref.block import BlockParams
from pvt_ref.config import StageConfig
from pvt_ref.kernels.attention import attend_backward_rows, attend_rows
from pvt_ref.kernels.blocking import Blocking, by_group
from pvt_ref.kernels.layer_norm import (
    add_sums,
    affine_rows,
    layer_norm_backward_rows,
    layer_norm_rows,
    normalize_rows,
    zero_sums,
)
from pvt_ref.kernels.linear import column_sums, linear_rows, weight_gradients
from pvt_ref.kernels.mlp import HiddenCache, empty_hidden, mlp_backward_rows, mlp_rows
from pvt_ref.kernels.patch_embed import (
    EmbeddedCache,
    as_blocks,
    embed_backward_rows,
    embed_rows,
    empty_embedded,
)
from pvt_ref.kernels.threads import Scratch
from pvt_ref.layers.drop import drop_path_forward
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.mlp import MLPParams
from pvt_ref.layers.patch_embed import kernel_to_matrix, matrix_to_kernel
from pvt_ref.layers.sra import SRAParams
from pvt_ref.ops import Ops


@dataclass(frozen=True, slots=True, eq=False)
class RowsCache:
    """What the second sweep leaves of every token for the backward."""

    x_hat1: np.ndarray  # (B*n, C), norm1
    rstd1: np.ndarray  # (B*n, 1)
    q: np.ndarray  # (B*n, C)
    heads: np.ndarray  # (B*n, C), attention's result before W^O
    x_hat2: np.ndarray  # (B*n, C), norm2
    rstd2: np.ndarray  # (B*n, 1)
    hidden: HiddenCache


@dataclass(frozen=True, slots=True, eq=False)
class BlockCache:
    """What the backward needs."""

    shape: tuple[int, int, int]  # (B, n, C)
    grid: tuple[int, int]
    reduced: np.ndarray  # (B*m, C), SR(norm1(x)): keys and values are made of it
    embedded: EmbeddedCache | None  # of the spatial reduction; None if R = 1
    kv: np.ndarray  # (B*m, 2C)
    rows: RowsCache
    gain1: np.ndarray | None  # (B, 1, 1), what drop path multiplied by; None if nothing
    gain2: np.ndarray | None


@dataclass(frozen=True, slots=True)
class _Lines:
    """The tokens of a batch as lines of R x R blocks: what spatial reduction is cut along."""

    count: int  # in the batch
    keys: int  # of a line
    tokens: int  # of a line
    R: int

    def rows(self, lines: slice) -> slice:
        """Their tokens."""
        return slice(lines.start * self.tokens, lines.stop * self.tokens)

    def key_rows(self, lines: slice) -> slice:
        """Their keys."""
        return slice(lines.start * self.keys, lines.stop * self.keys)

    def at_once(self, blocking: Blocking) -> int:
        """How many go through the reduction together: a quarter of a block's rows in keys."""
        return max(1, blocking.rows // (self.keys * min(self.R, 4)))

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        """Tokens (lines*tokens, C) seen as (lines, keys, R, R, C), the same memory."""
        C = rows.shape[-1]
        as_map = rows.reshape(1, -1, self.keys * self.R, C)
        return as_blocks(as_map, self.R)[0]


def _lines_of(B: int, n: int, grid: tuple[int, int], R: int) -> _Lines:
    if R == 1:  # tokens are keys, the cls token too: a line is one token
        return _Lines(B * n, 1, 1, 1)
    H, W = grid
    return _Lines(B * H // R, W // R, R * W, R)


def _reduction(p: SRAParams) -> LinearParams | None:
    """W^S as a matrix; None if R = 1."""
    if p.sr is None:
        return None
    return LinearParams(kernel_to_matrix(p.sr.weight), p.sr.bias)


def _per_head(rows: np.ndarray, N: int) -> np.ndarray:
    """(rows, C) seen as (N, rows, d)."""
    return rows.reshape(len(rows), N, -1).transpose(1, 0, 2)


def _keys_and_values(kv: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    """(m, 2C) of one image seen as k and v, (N, m, d) each."""
    C = kv.shape[1] // 2
    return _per_head(kv[:, :C], N), _per_head(kv[:, C:], N)


def _scale_samples(branch: np.ndarray, gain: np.ndarray | None, rows: slice, n: int) -> None:
    """Drop path: every row times the gain of its sample."""
    if gain is not None:
        for b, _, part in by_group(rows, n):
            branch[part] *= gain[b, 0, 0]


def block_forward(
    p: BlockParams,
    x: np.ndarray,
    ops: Ops,
    grid: tuple[int, int],
    stage: StageConfig,
    drop_path_rate: float = 0.0,
    rng: np.random.Generator | None = None,
    keep: bool = True,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.block.block_forward`, which computes where there is dropout."""
    if rng is not None and (stage.drop_rate > 0.0 or stage.attn_drop_rate > 0.0):
        return readable.block_forward(p, x, ops, grid, stage, drop_path_rate, rng, keep)
    gain1, gain2 = (_draw_gain(x, drop_path_rate, rng) for _ in range(2))
    tokens = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    reduced, embedded, kv = _sweep_keys(p, tokens, x.shape, grid, stage, keep, blocking)
    y, rows_cache = _sweep_rows(p, tokens, kv, x.shape, stage, (gain1, gain2), keep, blocking)
    y = y.reshape(x.shape)
    if rows_cache is None:
        return y, None
    return y, BlockCache(x.shape, grid, reduced, embedded, kv, rows_cache, gain1, gain2)


def _draw_gain(x: np.ndarray, rate: float, rng: np.random.Generator | None) -> np.ndarray | None:
    """Drop path's factor of every sample (B, 1, 1), drawn as the readable operation draws it."""
    ones = np.ones((x.shape[0], 1, 1), x.dtype)
    gain, cache = drop_path_forward(ones, rate, rng)
    return None if cache is None else gain


def _sweep_keys(
    p: BlockParams,
    tokens: np.ndarray,
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    stage: StageConfig,
    keep: bool,
    blocking: Blocking,
) -> tuple[np.ndarray, EmbeddedCache | None, np.ndarray]:
    """Keys and values of all images: KV(SR(norm1(x))), and what the backward needs of them."""
    B, n, C = shape
    lines = _lines_of(B, n, grid, stage.sr_ratio)
    keys = lines.count * lines.keys
    proj = _reduction(p.attn)
    kv = np.empty((keys, 2 * C), tokens.dtype)
    reduced = np.empty((keys if keep else 0, C), tokens.dtype)
    embedded = None
    if proj is not None and keep:
        embedded = empty_embedded(keys, proj.weight.shape[1], C, tokens.dtype)

    def work(piece: slice, scratch: Scratch) -> None:
        for part in blocking.cut(piece, lines.at_once(blocking)):
            rows, key_rows = lines.rows(part), lines.key_rows(part)
            count = key_rows.stop - key_rows.start
            normed = scratch("normed", rows.stop - rows.start, C, dtype=tokens.dtype)
            layer_norm_rows(p.norm1, tokens[rows], stage.norm_eps, normed)
            result = normed
            if keep:
                result = reduced[key_rows]
            elif proj is not None:
                result = scratch("reduced", count, C, dtype=tokens.dtype)
            if proj is None:
                result[...] = normed
            else:
                assert p.attn.norm is not None
                width = proj.weight.shape[1]
                if embedded is None:
                    blocks = scratch("blocks", count, width, dtype=tokens.dtype)
                else:
                    blocks = embedded.blocks[key_rows]
                cut_up = lines.blocks(normed)
                blocks.reshape(cut_up.shape)[...] = cut_up
                embed_rows(
                    proj, p.attn.norm, blocks, stage.projection_norm_eps, result, key_rows, embedded
                )
            linear_rows(p.attn.kv, result, kv[key_rows])

    blocking.run(work, lines.count, lines.tokens * C, rows=lines.at_once(blocking))
    return reduced, embedded, kv


def _sweep_rows(
    p: BlockParams,
    tokens: np.ndarray,
    kv: np.ndarray,
    shape: tuple[int, int, int],
    stage: StageConfig,
    gains: tuple[np.ndarray | None, np.ndarray | None],
    keep: bool,
    blocking: Blocking,
) -> tuple[np.ndarray, RowsCache | None]:
    """Everything but keys and values, one block of rows after the other."""
    B, n, C = shape
    N, dtype = stage.num_heads, tokens.dtype
    kv = kv.reshape(B, -1, 2 * C)
    y = np.empty_like(tokens)
    cache = _empty_rows_cache(p, B * n, C, dtype) if keep else None

    def work(piece: slice, scratch: Scratch) -> None:
        for rows in blocking.cut(piece):
            size = rows.stop - rows.start
            x, out = tokens[rows], y[rows]
            normed = scratch("normed", size, C, dtype=dtype)
            if cache is None:
                x_hat = normed
                q, heads = (scratch(name, size, C, dtype=dtype) for name in ("q", "heads"))
                hidden = None
            else:
                x_hat, q, heads = cache.x_hat1[rows], cache.q[rows], cache.heads[rows]
                hidden = cache.hidden
            # x = x + droppath(sra(norm1(x)))
            rstd = normalize_rows(x, stage.norm_eps, x_hat)
            affine_rows(p.norm1, x_hat, normed)
            if cache is not None:
                cache.rstd1[rows] = rstd
            linear_rows(p.attn.q, normed, q)
            q_heads, y_heads = _per_head(q, N), _per_head(heads, N)
            for b, _, part in by_group(rows, n):
                k, v = _keys_and_values(kv[b], N)
                attend_rows(
                    q_heads[:, part], k, v, stage.scale, y_heads[:, part], scratch, blocking
                )
            linear_rows(p.attn.proj, heads, out)
            _scale_samples(out, gains[0], rows, n)
            out += x
            # x = x + droppath(mlp(norm2(x)))
            if cache is not None:
                x_hat = cache.x_hat2[rows]
            rstd = normalize_rows(out, stage.norm_eps, x_hat)
            affine_rows(p.norm2, x_hat, normed)
            if cache is not None:
                cache.rstd2[rows] = rstd
            branch = scratch("branch", size, C, dtype=dtype)
            mlp_rows(p.mlp, normed, branch, rows, hidden, scratch)
            _scale_samples(branch, gains[1], rows, n)
            out += branch

    blocking.run(work, B * n, p.mlp.fc1.weight.shape[0])
    return y, cache


def _empty_rows_cache(p: BlockParams, rows: int, C: int, dtype: np.dtype) -> RowsCache:
    def empty(width: int) -> np.ndarray:
        return np.empty((rows, width), dtype)

    return RowsCache(
        x_hat1=empty(C),
        rstd1=empty(1),
        q=empty(C),
        heads=empty(C),
        x_hat2=empty(C),
        rstd2=empty(1),
        hidden=empty_hidden(p.mlp, rows, dtype),
    )


# Backward -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _RowSums:
    """What the rows of a piece add to the gradients of biases and norms, in float64."""

    fc1: np.ndarray  # (E*C,)
    fc2: np.ndarray  # (C,)
    proj: np.ndarray  # (C,)
    q: np.ndarray  # (C,)
    norm2: LayerNormParams


@dataclass(frozen=True, slots=True, eq=False)
class _KeySums:
    """The same of keys and values."""

    kv: np.ndarray  # (2C,)
    sr: np.ndarray  # (C,)
    sr_norm: LayerNormParams | None
    norm1: LayerNormParams


@dataclass(frozen=True, slots=True, eq=False)
class _RowGradients:
    """Gradients of every token that the second sweep back, or a weight, needs."""

    dx: np.ndarray  # (B*n, C), of what norm2 and its skip were given
    dnormed1: np.ndarray  # (B*n, C), of norm1's result, by way of the queries so far
    dq: np.ndarray  # (B*n, C)
    dproj: np.ndarray  # (B*n, C), of W^O's result; dx itself where nothing was dropped
    dfc2: np.ndarray  # (B*n, C), of fc2's result; dy itself where nothing was dropped
    dhidden: np.ndarray  # (B*n, E*C), of fc1's result


def block_backward(
    p: BlockParams,
    cache: Any,
    dy: np.ndarray,
    ops: Ops,
    stage: StageConfig,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, BlockParams]:
    """As :func:`pvt_ref.block.block_backward`."""
    if not isinstance(cache, BlockCache):
        return readable.block_backward(p, cache, dy, ops, stage)
    dy_rows = np.ascontiguousarray(dy).reshape(-1, dy.shape[-1])
    dkv, g, row_sums = _sweep_rows_back(p, cache, dy_rows, stage, blocking)
    dx, dprojected, key_sums = _sweep_keys_back(p, cache, dkv, g, stage, blocking)
    return dx.reshape(dy.shape), _gradients(p, cache, dkv, dprojected, g, row_sums, key_sums, blocking)


def _sweep_rows_back(
    p: BlockParams, cache: BlockCache, dy: np.ndarray, stage: StageConfig, blocking: Blocking
) -> tuple[np.ndarray, _RowGradients, list[_RowSums]]:
    """Back through MLP and attention to the queries; returns dkv (B*m, 2C) beside."""
    (B, n, C), rows_cache, dtype = cache.shape, cache.rows, dy.dtype
    N = stage.num_heads
    kv = cache.kv.reshape(B, -1, 2 * C)
    dx = np.empty_like(dy)
    g = _RowGradients(
        dx=dx,
        dnormed1=np.empty_like(dy),
        dq=np.empty_like(dy),
        dproj=dx if cache.gain1 is None else np.empty_like(dy),
        dfc2=dy if cache.gain2 is None else np.empty_like(dy),
        dhidden=np.empty_like(rows_cache.hidden.slope),
    )

    def work(piece: slice, scratch: Scratch) -> tuple[_RowSums, list[tuple[int, np.ndarray]]]:
        sums = _RowSums(
            np.zeros(g.dhidden.shape[1]), *(np.zeros(C) for _ in range(3)), zero_sums(p.norm2)
        )
        # the gradients of keys and values, for each image that the piece has tokens of
        dkvs = {b: np.zeros(kv.shape[1:], dtype) for b, _, _ in by_group(piece, n)}
        for rows in blocking.cut(piece):
            dx = g.dx[rows]
            # x = x + droppath(mlp(norm2(x)))
            if cache.gain2 is not None:
                g.dfc2[rows] = dy[rows]
                _scale_samples(g.dfc2[rows], cache.gain2, rows, n)
            mlp_backward_rows(
                p.mlp, rows_cache.hidden.slope[rows], g.dfc2[rows], g.dhidden[rows], dx,
                sums.fc1, sums.fc2,
            )  # fmt: skip
            layer_norm_backward_rows(
                p.norm2, rows_cache.x_hat2[rows], rows_cache.rstd2[rows], dx, dx, sums.norm2, scratch
            )
            dx += dy[rows]  # branch + skip
            # x = x + droppath(heads W^O)
            if cache.gain1 is not None:
                g.dproj[rows] = dx
                _scale_samples(g.dproj[rows], cache.gain1, rows, n)
            sums.proj[...] += column_sums(g.dproj[rows])
            dheads = scratch("dheads", *dx.shape, dtype=dtype)
            np.matmul(g.dproj[rows], p.attn.proj.weight, out=dheads)
            # heads = Attention(q, k, v)
            q, dq = _per_head(rows_cache.q[rows], N), _per_head(g.dq[rows], N)
            dheads = _per_head(dheads, N)
            for b, _, part in by_group(rows, n):
                attend_backward_rows(
                    q[:, part], *_keys_and_values(kv[b], N), stage.scale, dheads[:, part],
                    dq[:, part], *_keys_and_values(dkvs[b], N), scratch, blocking,
                )  # fmt: skip
            # q = norm1(x) W^Q
            sums.q[...] += column_sums(g.dq[rows])
            np.matmul(g.dq[rows], p.attn.q.weight, out=g.dnormed1[rows])
        return sums, list(dkvs.items())

    results = blocking.run(work, B * n, g.dhidden.shape[1])
    dkv = np.zeros_like(kv)
    for _, parts in results:
        for b, part in parts:
            dkv[b] += part
    return dkv.reshape(cache.kv.shape), g, [sums for sums, _ in results]


def _sweep_keys_back(
    p: BlockParams,
    cache: BlockCache,
    dkv: np.ndarray,
    g: _RowGradients,
    stage: StageConfig,
    blocking: Blocking,
) -> tuple[np.ndarray, np.ndarray, list[_KeySums]]:
    """Back through keys, values and norm1: dL/dx, and the gradient of W^S's result (B*m, C)."""
    B, n, C = cache.shape
    dtype, attn = dkv.dtype, p.attn
    lines = _lines_of(B, n, cache.grid, stage.sr_ratio)
    proj = _reduction(attn)
    dx = g.dnormed1  # becomes norm1's, then the sum of branch and skip
    dprojected = np.empty_like(cache.reduced) if proj is not None else cache.reduced[:0]

    def work(piece: slice, scratch: Scratch) -> _KeySums:
        sums = _KeySums(
            np.zeros(2 * C),
            np.zeros(C),
            None if attn.norm is None else zero_sums(attn.norm),
            zero_sums(p.norm1),
        )
        for part in blocking.cut(piece, lines.at_once(blocking)):
            rows, key_rows = lines.rows(part), lines.key_rows(part)
            # kv = reduced W^KV
            sums.kv[...] += column_sums(dkv[key_rows])
            dreduced = scratch("dreduced", key_rows.stop - key_rows.start, C, dtype=dtype)
            np.matmul(dkv[key_rows], attn.kv.weight, out=dreduced)
            dnormed = dx[rows]  # norm1(x) fed the queries, and these
            if proj is None:
                dnormed += dreduced
            else:
                assert cache.embedded is not None
                assert attn.norm is not None
                assert sums.sr_norm is not None
                dblocks = scratch("dblocks", len(dreduced), proj.weight.shape[1], dtype=dtype)
                embed_backward_rows(
                    proj, attn.norm, cache.embedded, key_rows, dreduced, dprojected[key_rows],
                    dblocks, sums.sr, sums.sr_norm, scratch,
                )  # fmt: skip
                target = lines.blocks(dnormed)
                target += dblocks.reshape(target.shape)
            layer_norm_backward_rows(
                p.norm1, cache.rows.x_hat1[rows], cache.rows.rstd1[rows], dnormed, dnormed,
                sums.norm1, scratch,
            )  # fmt: skip
            dnormed += g.dx[rows]  # branch + skip
        return sums

    sums = blocking.run(work, lines.count, lines.tokens * C, rows=lines.at_once(blocking))
    return dx, dprojected, sums


def _weight_through_norm(
    dy_x_hat: np.ndarray, dbias: np.ndarray, norm: LayerNormParams
) -> np.ndarray:
    """dW of a linear layer whose input x = x_hat * weight + bias was not kept, from dy^T x_hat.

    dW = dy^T x = (dy^T x_hat) * weight + (dy^T 1) bias^T, and dy^T 1 is the bias's gradient.
    """
    dy_x_hat *= norm.weight
    dy_x_hat += np.outer(dbias, norm.bias)
    return dy_x_hat


def _gradients(
    p: BlockParams,
    cache: BlockCache,
    dkv: np.ndarray,
    dprojected: np.ndarray,
    g: _RowGradients,
    row_sums: list[_RowSums],
    key_sums: list[_KeySums],
    blocking: Blocking,
) -> BlockParams:
    """The gradients of all weights, from those of the rows."""
    dtype, rows, attn = dkv.dtype, cache.rows, p.attn

    def bias(parts: list[np.ndarray]) -> np.ndarray:
        return sum(parts).astype(dtype)

    db1, db2 = bias([s.fc1 for s in row_sums]), bias([s.fc2 for s in row_sums])
    dbq, dbo = bias([s.q for s in row_sums]), bias([s.proj for s in row_sums])
    dbkv = bias([s.kv for s in key_sums])
    pairs = [
        (g.dhidden, rows.x_hat2),
        (g.dfc2, rows.hidden.y),
        (g.dq, rows.x_hat1),
        (g.dproj, rows.heads),
        (dkv, cache.reduced),
    ]
    if cache.embedded is not None:
        pairs.append((dprojected, cache.embedded.blocks))
    dW1, dW2, dWq, dWo, dWkv, *dWs = weight_gradients(pairs, blocking)
    dsr, dsr_norm = None, None
    if attn.sr is not None:
        dkernel = matrix_to_kernel(dWs[0], attn.sr.weight.shape)
        dsr = LinearParams(dkernel, bias([s.sr for s in key_sums]))
        dsr_norm = add_sums([s.sr_norm for s in key_sums if s.sr_norm is not None], dtype)
    return BlockParams(
        norm1=add_sums([s.norm1 for s in key_sums], dtype),
        attn=SRAParams(
            q=LinearParams(
                _weight_through_norm(dWq, dbq, p.norm1), None if attn.q.bias is None else dbq
            ),
            kv=LinearParams(dWkv, None if attn.kv.bias is None else dbkv),
            proj=LinearParams(dWo, dbo),
            sr=dsr,
            norm=dsr_norm,
        ),
        norm2=add_sums([s.norm2 for s in row_sums], dtype),
        mlp=MLPParams(
            LinearParams(_weight_through_norm(dW1, db1, p.norm2), db1), LinearParams(dW2, db2)
        ),
    )
