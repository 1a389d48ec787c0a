"""A whole transformer block in two sweeps over the tokens, forward and backward.

Everything in a block belongs to one token, except that a query looks at the keys and values of its
whole image. So the forward first makes all keys and values (there are few), then takes one tile of
rows after the other through all the rest: queries, attention, projection, sum, norm, MLP, sum.
Nothing but the tokens, the keys and the values exists at full length. The backward goes the same
way back: first the rows, then the keys and values; last, the products that give the weights'
gradients, over all tokens at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.blocks.sra import SRAParams, sra
from pvt_ref.blocks.transformer import BlockParams, BlockSettings, block
from pvt_ref.kernels.cpu.attention import attend_backward_rows, attend_rows, attention_kernel
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
from pvt_ref.kernels.cpu.mlp import (
    HiddenCache,
    empty_hidden,
    mlp_backward_rows,
    mlp_kernel,
    mlp_rows,
)
from pvt_ref.kernels.cpu.patch_embed import (
    EmbeddedCache,
    Projection,
    as_patches,
    embed_backward_rows,
    embed_gradients,
    embed_rows,
    empty_embedded_cache,
    patch_embed_kernel,
    projection,
)
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, by_group
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import drop_path
from pvt_ref.layers.layer_norm import LayerNormCache
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.sum_rows import sum_rows
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
    q: np.ndarray
    heads: np.ndarray
    norm2: LayerNormCache
    hidden: HiddenCache


@record
class KeysCache:
    """What is kept of every key.

    Attributes:
        embedded: of the spatial reduction, over (B*m, R*R*C); None if R = 1.
        reduced: (B*m, C), SR(norm1(x)): keys and values are made of it.
    """

    embedded: EmbeddedCache | None
    reduced: np.ndarray


@record
class BlockCache:
    """What the backward needs.

    Attributes:
        shape: (B, n, C).
        grid: (H_i, W_i) of the tokens.
        rows: of every token.
        keys: of every key.
        kv: (B*m, 2C), keys beside values.
        gains: (B, 1, 1) each, what drop path multiplied attention and MLP by; None where nothing
            was dropped.
        settings: of the block.
    """

    shape: tuple[int, int, int]
    grid: tuple[int, int]
    rows: RowsCache
    keys: KeysCache
    kv: np.ndarray
    gains: tuple[np.ndarray | None, np.ndarray | None]
    settings: BlockSettings


def _empty_caches(
    p: BlockParams, rows: int, keys: int, reduction: Projection | None, dtype: np.dtype
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
    embedded = None if reduction is None else empty_embedded_cache(keys, reduction)
    return rows_cache, KeysCache(embedded, np.empty((keys, C), dtype))


@dataclass(frozen=True, slots=True)
class _Lines:
    """The tokens of a batch as lines of R x R patches: spatial reduction is cut between them.

    Attributes:
        count: of lines in the batch.
        keys: of a line.
        tokens: of a line.
        R: side of a patch.
    """

    count: int
    keys: int
    tokens: int
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

    def patches(self, rows: np.ndarray) -> np.ndarray:
        """Tokens (lines*tokens, C) seen as (lines, keys, R, R, C), the same memory."""
        as_map = np.reshape(rows, (1, -1, self.keys * self.R, rows.shape[-1]), copy=False)
        return as_patches(as_map, self.R)[0]

    def run(self, tiling: Tiling, work: Any, C: int) -> list[Any]:
        """work(tiles of lines, scratch), shared among threads."""
        at_once = tiling.rows(C) // self.tokens or 1
        return tiling.run(work, self.count, at_once, self.tokens)


def _per_head(rows: np.ndarray, N: int) -> np.ndarray:
    """(rows, C) seen as (N, rows, d)."""
    return np.reshape(rows, (len(rows), N, -1), copy=False).transpose(1, 0, 2)


def _keys_and_values(kv: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    """(m, 2C) of one image seen as k and v, (N, m, d) each."""
    C = kv.shape[1] // 2
    return _per_head(kv[:, :C], N), _per_head(kv[:, C:], N)


def _draw_gain(x: np.ndarray, rate: float, rng: np.random.Generator | None) -> np.ndarray | None:
    """Drop path's factor of every sample (B, 1, 1), drawn as the readable operation draws it."""
    ones = np.ones((x.shape[0], 1, 1), x.dtype)
    gain, cache = drop_path.forward(None, ones, REFERENCE, rate, rng)
    return None if cache is None else gain


def _scale_samples(branch: np.ndarray, gain: np.ndarray | None, rows: slice, n: int) -> None:
    """Drop path: every row of a tile times the gain of its sample."""
    if gain is not None:
        for b, _, part in by_group(rows, n):
            branch[part] *= gain[b, 0, 0]


def block_forward(
    p: BlockParams,
    x: np.ndarray,
    ops: Ops,
    grid: tuple[int, int],
    settings: BlockSettings,
    rng: np.random.Generator | None = None,
    keep: bool = True,
    *,
    tiling: Tiling,
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.blocks.transformer.block_forward`, which runs where there is dropout."""
    attn = settings.attn
    if rng is not None and (settings.drop_rate or attn.drop_rate or attn.attn_drop_rate):
        return block.forward(p, x, ops, grid, settings, rng, keep)
    B, n, C = x.shape
    gain1 = _draw_gain(x, settings.drop_path_rate, rng)
    gain2 = _draw_gain(x, settings.drop_path_rate, rng)
    tokens = np.ascontiguousarray(x).reshape(B * n, C)
    y = np.empty_like(tokens)
    lines = _Lines.of(p.attn, x.shape, grid)
    kv = np.empty((lines.count * lines.keys, 2 * C), x.dtype)
    reduction, sr, sr_norm = None, p.attn.sr, p.attn.norm
    if sr is not None and sr_norm is not None:
        reduction = projection(sr, sr_norm, tiling)
    rows_cache, keys_cache = None, None
    if keep:
        rows_cache, keys_cache = _empty_caches(p, len(y), len(kv), reduction, x.dtype)
    _sweep_keys(p, tokens, y, kv, lines, reduction, settings, rows_cache, keys_cache, tiling)
    _sweep_rows(p, tokens, y, kv, x.shape, settings, (gain1, gain2), rows_cache, tiling)
    y = y.reshape(x.shape)
    if rows_cache is None or keys_cache is None:
        return y, None
    return y, BlockCache(x.shape, grid, rows_cache, keys_cache, kv, (gain1, gain2), settings)


def _sweep_keys(
    p: BlockParams,
    tokens: np.ndarray,
    normed: np.ndarray,
    kv: np.ndarray,
    lines: _Lines,
    reduction: Projection | None,
    settings: BlockSettings,
    rows_cache: RowsCache | None,
    keys_cache: KeysCache | None,
    tiling: Tiling,
) -> None:
    """normed becomes norm1(x), and kv the keys and values made of SR(normed), of all images."""
    C = tokens.shape[1]
    norm1 = None if rows_cache is None else rows_cache.norm1

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for part in tiles:
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
                    reduction, [lines.patches(normed[rows])], settings.attn.norm_eps, reduced,
                    key_rows, None if keys_cache is None else keys_cache.embedded, scratch,
                )  # fmt: skip
            linear_rows(p.attn.kv, reduced, kv[key_rows], scratch)

    lines.run(tiling, work, C)


def _sweep_rows(
    p: BlockParams,
    tokens: np.ndarray,
    y: np.ndarray,
    kv: np.ndarray,
    shape: tuple[int, int, int],
    settings: BlockSettings,
    gains: tuple[np.ndarray | None, np.ndarray | None],
    cache: RowsCache | None,
    tiling: Tiling,
) -> None:
    """y, norm1(x) so far, becomes the block's result, some rows after the other."""
    B, n, C = shape
    N = settings.attn.num_heads
    kv = kv.reshape(B, -1, 2 * C)
    norm2, hidden = (None, None) if cache is None else (cache.norm2, cache.hidden)

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for rows in tiles:
            x, y_rows = tokens[rows], y[rows]
            if cache is None:
                q = scratch("q", *x.shape, dtype=x.dtype)
                heads = scratch("heads", *x.shape, dtype=x.dtype)
                normed, branch = heads, q  # free again by the time
            else:
                q, heads = cache.q[rows], cache.heads[rows]
                normed = scratch("normed", *x.shape, dtype=x.dtype)
                branch = scratch("branch", *x.shape, dtype=x.dtype)
            # x = x + droppath(sra(norm1(x)))
            linear_rows(p.attn.q, y_rows, q, scratch)
            q_heads, y_heads = _per_head(q, N), _per_head(heads, N)
            for b, _, part in by_group(rows, n):
                k, v = _keys_and_values(kv[b], N)
                attend_rows(
                    q_heads[:, part], k, v, settings.attn.scale, y_heads[:, part], scratch, tiling
                )
            linear_rows(p.attn.proj, heads, y_rows, scratch)
            _scale_samples(y_rows, gains[0], rows, n)
            y_rows += x
            # x = x + droppath(mlp(norm2(x)))
            layer_norm_rows(p.norm2, y_rows, settings.norm_eps, normed, rows, norm2)
            mlp_rows(p.mlp, normed, branch, rows, hidden, scratch)
            _scale_samples(branch, gains[1], rows, n)
            y_rows += branch

    tiling.run(work, B * n, tiling.rows(p.mlp.fc1.weight.shape[0]))


# Backward -------------------------------------------------------------------------------------


@record
class _RowGradients:
    """Gradients of every token that the second sweep back, or a weight, needs.

    Attributes:
        dx: (B*n, C), of what norm2 and its skip were given.
        dnormed1: (B*n, C), of norm1's result, by way of the queries.
        dq: (B*n, C).
        dproj: (B*n, C), of W^O's result; dx itself where nothing was dropped.
        dfc2: (B*n, C), of fc2's result; dy itself where nothing was dropped.
        dhidden: (B*n, E*C), of fc1's result.
    """

    dx: np.ndarray
    dnormed1: np.ndarray
    dq: np.ndarray
    dproj: np.ndarray
    dfc2: np.ndarray
    dhidden: np.ndarray


def block_backward(
    p: BlockParams, cache: Any, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, BlockParams]:
    """As :func:`pvt_ref.blocks.transformer.block_backward`."""
    if not isinstance(cache, BlockCache):
        return block.backward(p, cache, dy, ops)
    dy_rows = np.ascontiguousarray(dy).reshape(-1, dy.shape[-1])
    g, dkv, row_sums = _sweep_rows_back(p, cache, dy_rows, tiling)
    dx, dprojected, key_sums = _sweep_keys_back(p, cache, g, dkv, tiling)
    grads = _weight_gradients(p, cache, g, dkv, dprojected, row_sums, key_sums, tiling)
    return dx.reshape(dy.shape), grads


def _sweep_rows_back(
    p: BlockParams, cache: BlockCache, dy: np.ndarray, tiling: Tiling
) -> tuple[_RowGradients, np.ndarray, list[Sums]]:
    """Back through MLP and attention to the queries; dkv (B*m, 2C) beside."""
    (B, n, C), kept = cache.shape, cache.rows
    attn, (gain1, gain2) = cache.settings.attn, cache.gains
    N = attn.num_heads
    kv = cache.kv.reshape(B, -1, 2 * C)
    dx = np.empty_like(dy)
    g = _RowGradients(
        dx=dx,
        dnormed1=np.empty_like(dy),
        dq=np.empty_like(dy),
        dproj=dx if gain1 is None else np.empty_like(dy),
        dfc2=dy if gain2 is None else np.empty_like(dy),
        dhidden=np.empty_like(kept.hidden.slope),
    )

    def work(tiles: list[slice], scratch: Scratch) -> tuple[Sums, dict[int, np.ndarray]]:
        sums = Sums()
        dkvs: dict[int, np.ndarray] = {}  # of the images that the piece has tokens of
        for rows in tiles:
            dx, dfc2, dproj, dq = g.dx[rows], g.dfc2[rows], g.dproj[rows], g.dq[rows]
            # x = x + droppath(mlp(norm2(x)))
            if gain2 is not None:
                dfc2[...] = dy[rows]
                _scale_samples(dfc2, gain2, rows, n)
            slope, dhidden = kept.hidden.slope[rows], g.dhidden[rows]
            sums.add("fc2", column_sums(dfc2))
            sums.add("fc1", mlp_backward_rows(p.mlp, slope, dfc2, dhidden, dx, scratch))
            layer_norm_backward_rows(p.norm2, kept.norm2, rows, dx, dx, sums, "norm2", scratch)
            dx += dy[rows]  # branch + skip
            # x = x + droppath(heads W^O)
            if gain1 is not None:
                dproj[...] = dx
                _scale_samples(dproj, gain1, rows, n)
            sums.add("proj", column_sums(dproj))
            dheads = scratch("dheads", *dx.shape, dtype=dx.dtype)
            times_weight_rows(dproj, p.attn.proj, dheads, scratch)
            # heads = Attention(q, k, v)
            q_heads, dq_heads = _per_head(kept.q[rows], N), _per_head(dq, N)
            dy_heads = _per_head(dheads, N)
            for b, _, part in by_group(rows, n):
                if b not in dkvs:
                    dkvs[b] = np.zeros_like(kv[b])
                attend_backward_rows(
                    q_heads[:, part], *_keys_and_values(kv[b], N), attn.scale, dy_heads[:, part],
                    dq_heads[:, part], *_keys_and_values(dkvs[b], N), scratch, tiling,
                )  # fmt: skip
            # q = norm1(x) W^Q
            sums.add("q", column_sums(dq))
            times_weight_rows(dq, p.attn.q, g.dnormed1[rows], scratch)
        return sums, dkvs

    results = tiling.run(work, B * n, tiling.rows(g.dhidden.shape[1]))
    dkv = np.zeros_like(kv)
    for _, dkvs in results:
        for b, part in dkvs.items():
            dkv[b] += part
    return g, dkv.reshape(cache.kv.shape), [sums for sums, _ in results]


def _sweep_keys_back(
    p: BlockParams, cache: BlockCache, g: _RowGradients, dkv: np.ndarray, tiling: Tiling
) -> tuple[np.ndarray, np.ndarray, list[Sums]]:
    """Back through keys, values and norm1: dL/dx, and the gradient of W^S's result (B*m, C)."""
    C, embedded = dkv.shape[1] // 2, cache.keys.embedded
    lines = _Lines.of(p.attn, cache.shape, cache.grid)
    dx = g.dnormed1  # becomes norm1's whole gradient, then the sum of branch and skip
    dprojected = np.empty((0 if embedded is None else len(dkv), C), dkv.dtype)

    def work(tiles: list[slice], scratch: Scratch) -> Sums:
        sums = Sums()
        for part in tiles:
            rows, key_rows = lines.rows(part), lines.key_rows(part)
            dnormed = dx[rows]  # norm1(x) fed the queries, and these:
            # kv = reduced W^KV
            sums.add("kv", column_sums(dkv[key_rows]))
            dreduced = scratch("dreduced", key_rows.stop - key_rows.start, C, dtype=dkv.dtype)
            times_weight_rows(dkv[key_rows], p.attn.kv, dreduced, scratch)
            # reduced = SR(norm1(x))
            if embedded is None:
                dnormed += dreduced
            else:
                dpatches = embed_backward_rows(
                    embedded, key_rows, dreduced, dprojected[key_rows], sums, scratch
                )
                target = lines.patches(dnormed)
                target += dpatches.reshape(target.shape)
            layer_norm_backward_rows(
                p.norm1, cache.rows.norm1, rows, dnormed, dnormed, sums, "norm1", scratch
            )
            dnormed += g.dx[rows]  # branch + skip
        return sums

    return dx, dprojected, lines.run(tiling, work, C)


def _weight_gradients(
    p: BlockParams,
    cache: BlockCache,
    g: _RowGradients,
    dkv: np.ndarray,
    dprojected: np.ndarray,
    row_sums: list[Sums],
    key_sums: list[Sums],
    tiling: Tiling,
) -> BlockParams:
    """The gradients of all weights, from those of the rows."""
    dtype, kept, keys, attn = dkv.dtype, cache.rows, cache.keys, p.attn
    biases = {name: add_up(row_sums, name, dtype) for name in ("fc1", "fc2", "proj", "q")}
    biases["kv"] = add_up(key_sums, "kv", dtype)
    layers = {  # name: dy, x, norm of x
        "fc1": (g.dhidden, kept.norm2.x_hat, (p.norm2, biases["fc1"])),
        "fc2": (g.dfc2, kept.hidden.y, None),
        "q": (g.dq, kept.norm1.x_hat, (p.norm1, biases["q"])),
        "proj": (g.dproj, kept.heads, None),
        "kv": (dkv, keys.reduced, None),
    }
    if keys.embedded is not None:
        layers["sr"] = (dprojected, keys.embedded.patches, None)
    weights = dict(zip(layers, weight_gradients(list(layers.values()), tiling), strict=True))

    def linear(name: str, p: LinearParams) -> LinearParams:
        return LinearParams(weights[name], None if p.bias is None else biases[name])

    dsr, dsr_norm = None, None
    if attn.sr is not None:
        dsr, dsr_norm = embed_gradients(attn.sr, weights["sr"], key_sums)
    return BlockParams(
        norm1=add_up_norm(key_sums, "norm1", dtype),
        attn=SRAParams(
            q=linear("q", attn.q),
            kv=linear("kv", attn.kv),
            proj=linear("proj", attn.proj),
            sr=dsr,
            norm=dsr_norm,
        ),
        norm2=add_up_norm(row_sums, "norm2", dtype),
        mlp=MLPParams(fc1=linear("fc1", p.mlp.fc1), fc2=linear("fc2", p.mlp.fc2)),
    )


block_kernel = Kernel(
    block,
    block_forward,
    block_backward,
    absorbs=(
        *(sra, attention, *attention_kernel.absorbs),
        *(patch_embed, *patch_embed_kernel.absorbs),
        *(mlp, *mlp_kernel.absorbs, drop_path, sum_rows),
    ),
)
