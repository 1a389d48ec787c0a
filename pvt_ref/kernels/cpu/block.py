"""A whole transformer block in two sweeps over the tokens, forward and backward.

Everything in a block belongs to one token, except that a query looks at the keys and values of its
whole image. So the forward first makes all keys and values (there are few), then takes one block of
rows after the other through all the rest: queries, attention, projection, sum, norm, MLP, sum.
Nothing but the tokens, the keys and the values exists at full length. The backward goes the same
way back: first the rows, then the keys and values; last, the products that give the weights'
gradients, over all tokens at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

import pvt_ref.blocks.transformer as readable
from pvt_ref.blocks.mlp import MLPParams
from pvt_ref.blocks.sra import SRAParams
from pvt_ref.blocks.transformer import BlockParams, BlockSettings
from pvt_ref.kernels.cpu.attention import attend_backward_rows, attend_rows
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
from pvt_ref.kernels.cpu.mlp import HiddenCache, empty_hidden, mlp_backward_rows, mlp_rows
from pvt_ref.kernels.cpu.patch_embed import (
    EmbeddedCache,
    as_blocks,
    embed_backward_rows,
    embed_rows,
    empty_embedded_cache,
)
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.layers.dropout import drop_path_forward
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import kernel_to_matrix, matrix_to_kernel
from pvt_ref.ops import REFERENCE, Ops
from pvt_ref.tree import record


@record
class RowsCache:
    """What is kept of every token for the backward.

    Attributes:
        norm1: of the first norm, over (B*n, C).
        q: (B*n, C), the queries.
        heads: (B*n, C), attention's result before W^O.
        norm2: of the second norm, over (B*n, C).
        hidden: of the MLP, (B*n, E*C).
    """

    norm1: LayerNormCache
    q: np.ndarray  # (B*n, C)
    heads: np.ndarray  # (B*n, C), attention's result before W^O
    norm2: LayerNormCache
    hidden: HiddenCache


@record
class KeysCache:
    """What is kept of every key.

    Attributes:
        embedded: of the spatial reduction, over (B*m, R*R*C); None if R = 1.
        reduced: (B*m, C), SR(norm1(x)).
    """

    embedded: EmbeddedCache | None  # of the spatial reduction; None if R = 1
    reduced: np.ndarray  # (B*m, C), SR(norm1(x)): keys and values are made of it


@record
class BlockCache:
    """What the backward needs.

    Attributes:
        shape: (B, n, C).
        grid: (H_i, W_i) of the tokens.
        rows: of every token.
        keys: of every key.
        kv: (B*m, 2C), keys beside values.
        gain1: (B, 1, 1), what drop path multiplied attention by; None if nothing was dropped.
        gain2: (B, 1, 1), what drop path multiplied the MLP by; None if nothing was dropped.
    """

    shape: tuple[int, int, int]  # (B, n, C)
    grid: tuple[int, int]
    rows: RowsCache
    keys: KeysCache
    kv: np.ndarray  # (B*m, 2C)
    gain1: np.ndarray | None  # (B, 1, 1), what drop path multiplied by; None if nothing
    gain2: np.ndarray | None
    settings: BlockSettings


def _empty_caches(
    p: BlockParams, rows: int, keys: int, dtype: np.dtype
) -> tuple[RowsCache, KeysCache]:
    """Room for so many tokens and keys."""
    C = p.norm1.weight.shape[0]
    rows_cache = RowsCache(
        norm1=empty_layer_norm_cache(rows, C, dtype),
        q=np.empty((rows, C), dtype),
        heads=np.empty((rows, C), dtype),
        norm2=empty_layer_norm_cache(rows, C, dtype),
        hidden=empty_hidden(p.mlp, rows, dtype),
    )
    embedded = None
    if p.attn.sr is not None:
        embedded = empty_embedded_cache(keys, p.attn.sr.weight[0].size, C, dtype)
    return rows_cache, KeysCache(embedded, np.empty((keys, C), dtype))


@dataclass(frozen=True, slots=True)
class _Lines:
    """The tokens of a batch as lines of R x R blocks: spatial reduction is cut between them."""

    count: int  # in the batch
    keys: int  # of a line
    tokens: int  # of a line
    R: int

    @classmethod
    def of(cls, p: SRAParams, shape: tuple[int, int, int], grid: tuple[int, int]) -> "_Lines":
        B, n, _ = shape
        if p.sr is None:  # tokens are keys, the cls token too: a line is one token
            return cls(B * n, 1, 1, 1)
        (H, W), R = grid, p.sr.weight.shape[-1]
        return cls(B * H // R, W // R, R * W, R)

    def rows(self, lines: slice) -> slice:
        """Their tokens."""
        return slice(lines.start * self.tokens, lines.stop * self.tokens)

    def key_rows(self, lines: slice) -> slice:
        """Their keys."""
        return slice(lines.start * self.keys, lines.stop * self.keys)

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        """Tokens (lines*tokens, C) seen as (lines, keys, R, R, C), the same memory."""
        as_map = rows.reshape(1, -1, self.keys * self.R, rows.shape[-1])
        return as_blocks(as_map, self.R)[0]

    def run(self, blocking: Blocking, work: Any, C: int) -> list[Any]:
        """work(blocks of lines, scratch), shared among threads."""
        at_once = blocking.rows(C) // self.tokens or 1
        return blocking.run(work, self.count, at_once, self.tokens)


def _reduction(p: SRAParams) -> tuple[LinearParams, LayerNormParams] | None:
    """W^S as a matrix, and the norm after it; None if R = 1."""
    if p.sr is None or p.norm is None:
        return None
    return LinearParams(kernel_to_matrix(p.sr.weight), p.sr.bias), p.norm


def _per_head(rows: np.ndarray, N: int) -> np.ndarray:
    """(rows, C) seen as (N, rows, d)."""
    return rows.reshape(len(rows), N, -1).transpose(1, 0, 2)


def _keys_and_values(kv: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    """(m, 2C) of one image seen as k and v, (N, m, d) each."""
    C = kv.shape[1] // 2
    return _per_head(kv[:, :C], N), _per_head(kv[:, C:], N)


def _draw_gain(x: np.ndarray, rate: float, rng: np.random.Generator | None) -> np.ndarray | None:
    """Drop path's factor of every sample (B, 1, 1), drawn as the readable operation draws it."""
    ones = np.ones((x.shape[0], 1, 1), x.dtype)
    gain, cache = drop_path_forward(None, ones, REFERENCE, rate, rng)
    return None if cache is None else gain


def _scale_samples(branch: np.ndarray, gain: np.ndarray | None, rows: slice, n: int) -> None:
    """Drop path: every row of a block times the gain of its sample."""
    if gain is not None:
        for b, _, part in by_group(rows, n):
            branch[part] *= gain[b, 0, 0]


def _drops(settings: BlockSettings) -> bool:
    """Whether elements are dropped: then the readable block computes."""
    attn = settings.attn
    return settings.drop_rate > 0.0 or attn.drop_rate > 0.0 or attn.attn_drop_rate > 0.0


def block_forward(
    p: BlockParams,
    x: np.ndarray,
    ops: Ops,
    grid: tuple[int, int],
    settings: BlockSettings,
    rng: np.random.Generator | None = None,
    keep: bool = True,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.blocks.transformer.block_forward`, which computes where there is dropout.

    Args:
        p: the weights.
        x: tokens (B, n, C).
        ops: the record of operations, for the readable function.
        grid: (H_i, W_i) of the tokens, multiples of R.
        settings: of the block.
        rng: source of the dropout and drop-path masks; None for inference.
        keep: whether a cache for the backward is returned; without it, it is None.
        blocking: the settings.

    Returns:
        (B, n, C) and the cache.
    """
    if rng is not None and _drops(settings):
        return readable.block_forward(p, x, ops, grid, settings, rng, keep)
    B, n, C = x.shape
    gain1 = _draw_gain(x, settings.drop_path_rate, rng)
    gain2 = _draw_gain(x, settings.drop_path_rate, rng)
    tokens = np.ascontiguousarray(x).reshape(B * n, C)
    y = np.empty_like(tokens)
    lines = _Lines.of(p.attn, x.shape, grid)
    kv = np.empty((lines.count * lines.keys, 2 * C), x.dtype)
    rows_cache, keys_cache = _empty_caches(p, len(y), len(kv), x.dtype) if keep else (None, None)
    _sweep_keys(p, tokens, y, kv, lines, settings, rows_cache, keys_cache, blocking)
    _sweep_rows(p, tokens, y, kv, x.shape, settings, (gain1, gain2), rows_cache, blocking)
    y = y.reshape(x.shape)
    if rows_cache is None or keys_cache is None:
        return y, None
    return y, BlockCache(x.shape, grid, rows_cache, keys_cache, kv, gain1, gain2, settings)


def _sweep_keys(
    p: BlockParams,
    tokens: np.ndarray,
    normed: np.ndarray,
    kv: np.ndarray,
    lines: _Lines,
    settings: BlockSettings,
    rows_cache: RowsCache | None,
    keys_cache: KeysCache | None,
    blocking: Blocking,
) -> None:
    """normed becomes norm1(x), and kv the keys and values made of SR(normed), of all images."""
    C, reduction = tokens.shape[1], _reduction(p.attn)
    norm1 = None if rows_cache is None else rows_cache.norm1

    def work(blocks: list[slice], scratch: Scratch) -> None:
        for part in blocks:
            rows, key_rows = lines.rows(part), lines.key_rows(part)
            layer_norm_rows(p.norm1, tokens[rows], settings.norm_eps, normed[rows], rows, norm1)
            if keys_cache is None:
                reduced = scratch("reduced", key_rows.stop - key_rows.start, C, dtype=kv.dtype)
            else:
                reduced = keys_cache.reduced[key_rows]
            if reduction is None:
                reduced[...] = normed[rows]
            else:
                embed_rows(
                    *reduction, [lines.blocks(normed[rows])], settings.attn.norm_eps, reduced,
                    key_rows, None if keys_cache is None else keys_cache.embedded, scratch,
                )  # fmt: skip
            linear_rows(p.attn.kv, reduced, kv[key_rows], scratch)

    lines.run(blocking, work, C)


def _sweep_rows(
    p: BlockParams,
    tokens: np.ndarray,
    y: np.ndarray,
    kv: np.ndarray,
    shape: tuple[int, int, int],
    settings: BlockSettings,
    gains: tuple[np.ndarray | None, np.ndarray | None],
    cache: RowsCache | None,
    blocking: Blocking,
) -> None:
    """y, norm1(x) so far, becomes the block's result, some rows after the other."""
    B, n, C = shape
    N = settings.attn.num_heads
    kv = kv.reshape(B, -1, 2 * C)

    def work(blocks: list[slice], scratch: Scratch) -> None:
        for rows in blocks:
            x, y_rows = tokens[rows], y[rows]
            if cache is None:
                q = scratch("q", *x.shape, dtype=x.dtype)
                heads = scratch("heads", *x.shape, dtype=x.dtype)
            else:
                q, heads = cache.q[rows], cache.heads[rows]
            # x = x + droppath(sra(norm1(x)))
            linear_rows(p.attn.q, y_rows, q, scratch)
            q_heads, y_heads = _per_head(q, N), _per_head(heads, N)
            for b, _, part in by_group(rows, n):
                k, v = _keys_and_values(kv[b], N)
                attend_rows(
                    q_heads[:, part], k, v, settings.attn.scale, y_heads[:, part], scratch, blocking
                )
            linear_rows(p.attn.proj, heads, y_rows, scratch)
            _scale_samples(y_rows, gains[0], rows, n)
            y_rows += x
            # x = x + droppath(mlp(norm2(x)))
            normed, branch = heads if cache is None else q, q
            if cache is not None:
                normed = scratch("normed", *x.shape, dtype=x.dtype)
                branch = scratch("branch", *x.shape, dtype=x.dtype)
            layer_norm_rows(
                p.norm2,
                y_rows,
                settings.norm_eps,
                normed,
                rows,
                None if cache is None else cache.norm2,
            )
            mlp_rows(p.mlp, normed, branch, rows, None if cache is None else cache.hidden, scratch)
            _scale_samples(branch, gains[1], rows, n)
            y_rows += branch

    blocking.run(work, B * n, blocking.rows(p.mlp.fc1.weight.shape[0]))


# Backward -------------------------------------------------------------------------------------


@record
class _RowGradients:
    """Gradients of every token that the second sweep back, or a weight, needs."""

    dx: np.ndarray  # (B*n, C), of what norm2 and its skip were given
    dnormed1: np.ndarray  # (B*n, C), of norm1's result, by way of the queries
    dq: np.ndarray  # (B*n, C)
    dproj: np.ndarray  # (B*n, C), of W^O's result; dx itself where nothing was dropped
    dfc2: np.ndarray  # (B*n, C), of fc2's result; dy itself where nothing was dropped
    dhidden: np.ndarray  # (B*n, E*C), of fc1's result


@record
class _RowSums:
    """What the rows of a piece add to the gradients of biases and norms, in float64."""

    fc1: np.ndarray  # (E*C,)
    fc2: np.ndarray  # (C,)
    proj: np.ndarray  # (C,)
    q: np.ndarray  # (C,)
    norm2: LayerNormParams


@record
class _KeySums:
    """The same of keys and values."""

    kv: np.ndarray  # (2C,)
    sr: np.ndarray  # (C,)
    sr_norm: LayerNormParams
    norm1: LayerNormParams


def block_backward(
    p: BlockParams, cache: Any, dy: np.ndarray, ops: Ops, *, blocking: Blocking
) -> tuple[np.ndarray, BlockParams]:
    """As :func:`pvt_ref.blocks.transformer.block_backward`.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dy (B, n, C).
        ops: the record of operations, for the readable function.
        blocking: the settings.

    Returns:
        dx (B, n, C) and the gradients of the weights, in their shapes.
    """
    if not isinstance(cache, BlockCache):
        return readable.block_backward(p, cache, dy, ops)
    dy_rows = np.ascontiguousarray(dy).reshape(-1, dy.shape[-1])
    g, dkv, row_sums = _sweep_rows_back(p, cache, dy_rows, blocking)
    dx, dprojected, key_sums = _sweep_keys_back(p, cache, g, dkv, blocking)
    grads = _weight_gradients(p, cache, g, dkv, dprojected, row_sums, key_sums, blocking)
    return dx.reshape(dy.shape), grads


def _sweep_rows_back(
    p: BlockParams, cache: BlockCache, dy: np.ndarray, blocking: Blocking
) -> tuple[_RowGradients, np.ndarray, list[_RowSums]]:
    """Back through MLP and attention to the queries; dkv (B*m, 2C) beside."""
    (B, n, C), kept = cache.shape, cache.rows
    attn = cache.settings.attn
    N = attn.num_heads
    kv = cache.kv.reshape(B, -1, 2 * C)
    dx = np.empty_like(dy)
    g = _RowGradients(
        dx=dx,
        dnormed1=np.empty_like(dy),
        dq=np.empty_like(dy),
        dproj=dx if cache.gain1 is None else np.empty_like(dy),
        dfc2=dy if cache.gain2 is None else np.empty_like(dy),
        dhidden=np.empty_like(kept.hidden.slope),
    )

    def work(blocks: list[slice], scratch: Scratch) -> tuple[_RowSums, dict[int, np.ndarray]]:
        sums = _RowSums(
            np.zeros(g.dhidden.shape[1]), np.zeros(C), np.zeros(C), np.zeros(C), zero_sums(p.norm2)
        )
        dkvs: dict[int, np.ndarray] = {}  # of the images that the piece has tokens of
        for rows in blocks:
            dx = g.dx[rows]
            # x = x + droppath(mlp(norm2(x)))
            if cache.gain2 is not None:
                g.dfc2[rows] = dy[rows]
                _scale_samples(g.dfc2[rows], cache.gain2, rows, n)
            mlp_backward_rows(
                p.mlp, kept.hidden.slope[rows], g.dfc2[rows], g.dhidden[rows], dx,
                sums.fc1, sums.fc2, scratch,
            )  # fmt: skip
            layer_norm_backward_rows(p.norm2, kept.norm2, rows, dx, dx, sums.norm2, scratch)
            dx += dy[rows]  # branch + skip
            # x = x + droppath(heads W^O)
            if cache.gain1 is not None:
                g.dproj[rows] = dx
                _scale_samples(g.dproj[rows], cache.gain1, rows, n)
            sums.proj[...] += column_sums(g.dproj[rows])
            dheads = scratch("dheads", *dx.shape, dtype=dx.dtype)
            times_weight_rows(g.dproj[rows], p.attn.proj, dheads, scratch)
            # heads = Attention(q, k, v)
            q, dq = _per_head(kept.q[rows], N), _per_head(g.dq[rows], N)
            dy_heads = _per_head(dheads, N)
            for b, _, part in by_group(rows, n):
                if b not in dkvs:
                    dkvs[b] = np.zeros_like(kv[b])
                attend_backward_rows(
                    q[:, part], *_keys_and_values(kv[b], N), attn.scale, dy_heads[:, part],
                    dq[:, part], *_keys_and_values(dkvs[b], N), scratch, blocking,
                )  # fmt: skip
            # q = norm1(x) W^Q
            sums.q[...] += column_sums(g.dq[rows])
            times_weight_rows(g.dq[rows], p.attn.q, g.dnormed1[rows], scratch)
        return sums, dkvs

    results = blocking.run(work, B * n, blocking.rows(g.dhidden.shape[1]))
    dkv = np.zeros_like(kv)
    for _, dkvs in results:
        for b, part in dkvs.items():
            dkv[b] += part
    return g, dkv.reshape(cache.kv.shape), [sums for sums, _ in results]


def _sweep_keys_back(
    p: BlockParams,
    cache: BlockCache,
    g: _RowGradients,
    dkv: np.ndarray,
    blocking: Blocking,
) -> tuple[np.ndarray, np.ndarray, list[_KeySums]]:
    """Back through keys, values and norm1: dL/dx, and the gradient of W^S's result (B*m, C)."""
    C, reduction = dkv.shape[1] // 2, _reduction(p.attn)
    lines = _Lines.of(p.attn, cache.shape, cache.grid)
    dx = g.dnormed1  # becomes norm1's whole gradient, then the sum of branch and skip
    dprojected = np.empty((0 if reduction is None else len(dkv), C), dkv.dtype)

    def work(blocks: list[slice], scratch: Scratch) -> _KeySums:
        sums = _KeySums(np.zeros(2 * C), np.zeros(C), zero_sums(p.norm1), zero_sums(p.norm1))
        for part in blocks:
            rows, key_rows = lines.rows(part), lines.key_rows(part)
            dnormed = dx[rows]  # norm1(x) fed the queries, and these:
            # kv = reduced W^KV
            sums.kv[...] += column_sums(dkv[key_rows])
            dreduced = scratch("dreduced", key_rows.stop - key_rows.start, C, dtype=dkv.dtype)
            times_weight_rows(dkv[key_rows], p.attn.kv, dreduced, scratch)
            # reduced = SR(norm1(x))
            if reduction is None:
                dnormed += dreduced
            else:
                assert cache.keys.embedded is not None
                dblocks = embed_backward_rows(
                    *reduction, cache.keys.embedded, key_rows, dreduced, dprojected[key_rows],
                    sums.sr, sums.sr_norm, scratch,
                )  # fmt: skip
                target = lines.blocks(dnormed)
                target += dblocks.reshape(target.shape)
            layer_norm_backward_rows(
                p.norm1, cache.rows.norm1, rows, dnormed, dnormed, sums.norm1, scratch
            )
            dnormed += g.dx[rows]  # branch + skip
        return sums

    return dx, dprojected, lines.run(blocking, work, C)


def _through_norm(dy_x_hat: np.ndarray, dbias: np.ndarray, norm: LayerNormParams) -> np.ndarray:
    """dW of a linear layer whose input x = x_hat * weight + bias was not kept, from dy^T x_hat.

    dW = dy^T x = (dy^T x_hat) * weight + (dy^T 1) bias^T, and dy^T 1 is the gradient of the layer's
    own bias.
    """
    dy_x_hat *= norm.weight
    dy_x_hat += np.outer(dbias, norm.bias)
    return dy_x_hat


def _weight_gradients(
    p: BlockParams,
    cache: BlockCache,
    g: _RowGradients,
    dkv: np.ndarray,
    dprojected: np.ndarray,
    row_sums: list[_RowSums],
    key_sums: list[_KeySums],
    blocking: Blocking,
) -> BlockParams:
    """The gradients of all weights, from those of the rows."""
    dtype, kept, keys, attn = dkv.dtype, cache.rows, cache.keys, p.attn

    def added(parts: list[np.ndarray]) -> np.ndarray:
        return add_up(parts, dtype)

    def linear(p: LinearParams, dweight: np.ndarray, dbias: np.ndarray) -> LinearParams:
        return LinearParams(dweight, None if p.bias is None else dbias)

    db1, db2 = added([s.fc1 for s in row_sums]), added([s.fc2 for s in row_sums])
    dbq, dbo = added([s.q for s in row_sums]), added([s.proj for s in row_sums])
    dbkv = added([s.kv for s in key_sums])
    pairs = [
        (g.dhidden, kept.norm2.x_hat),
        (g.dfc2, kept.hidden.y),
        (g.dq, kept.norm1.x_hat),
        (g.dproj, kept.heads),
        (dkv, keys.reduced),
    ]
    if keys.embedded is not None:
        pairs.append((dprojected, keys.embedded.blocks))
    dW1, dW2, dWq, dWo, dWkv, *dWs = weight_gradients(pairs, blocking)
    dsr, dsr_norm = None, None
    if attn.sr is not None:
        dkernel = matrix_to_kernel(dWs[0], attn.sr.weight.shape)
        dsr = linear(attn.sr, dkernel, added([s.sr for s in key_sums]))
        dsr_norm = add_sums([s.sr_norm for s in key_sums], dtype)
    return BlockParams(
        norm1=add_sums([s.norm1 for s in key_sums], dtype),
        attn=SRAParams(
            q=linear(attn.q, _through_norm(dWq, dbq, p.norm1), dbq),
            kv=linear(attn.kv, dWkv, dbkv),
            proj=linear(attn.proj, dWo, dbo),
            sr=dsr,
            norm=dsr_norm,
        ),
        norm2=add_sums([s.norm2 for s in row_sums], dtype),
        mlp=MLPParams(
            fc1=linear(p.mlp.fc1, _through_norm(dW1, db1, p.norm2), db1),
            fc2=linear(p.mlp.fc2, dW2, db2),
        ),
    )
