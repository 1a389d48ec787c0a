"""A whole transformer block in two sweeps over the tokens, forward and backward.

Everything in a block belongs to one token, except that a query looks at the keys and values of its
whole image. So the forward first makes all keys and values (there are few), then takes one tile of
rows after the other through all the rest: queries, attention, projection, sum, norm, MLP, sum.
Nothing but the tokens, the keys and the values exists at full length. The backward goes the same
way back: first the rows, then the keys and values; last, the products that give the weights'
gradients, over all tokens at once.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pvt_ref.blocks.mha import MHAParams, mha
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
    for_many_rows,
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
class KeptCache:
    """What is kept of every token and key for the backward.

    Attributes:
        norm1: of the first norm, over (B*n, C).
        q: (B*n, C), the queries.
        heads: (B*n, C), attention's result before W^O.
        norm2: of the second norm, over (B*n, C).
        hidden: of the MLP, (B*n, E*C).
        embedded: of the spatial reduction, over (B*m, R*R*C); None if R = 1.
        reduced: (B*m, C), SR(norm1(x)): keys and values are made of it.
    """

    norm1: LayerNormCache
    q: np.ndarray
    heads: np.ndarray
    norm2: LayerNormCache
    hidden: HiddenCache
    embedded: EmbeddedCache | None
    reduced: np.ndarray


@record
class BlockCache:
    """What the backward needs.

    Attributes:
        shape: (B, n, C).
        grid: (H_i, W_i) of the tokens.
        kept: of every token and key.
        kv: (B*m, 2C), keys beside values.
        gains: (B, 1, 1) each, what drop path multiplied attention and MLP by; None where nothing
            was dropped.
        settings: of the block.
    """

    shape: tuple[int, int, int]
    grid: tuple[int, int]
    kept: KeptCache
    kv: np.ndarray
    gains: tuple[np.ndarray | None, np.ndarray | None]
    settings: BlockSettings


def _empty_cache(
    p: BlockParams, rows: int, keys: int, reduction: Projection | None, dtype: np.dtype
) -> KeptCache:
    """Room for so many tokens and keys."""
    C = p.norm1.weight.shape[0]
    return KeptCache(
        norm1=empty_layer_norm_cache(rows, C, dtype),
        q=np.empty((rows, C), dtype),
        heads=np.empty((rows, C), dtype),
        norm2=empty_layer_norm_cache(rows, C, dtype),
        hidden=empty_hidden(p.mlp, rows, dtype),
        embedded=None if reduction is None else empty_embedded_cache(keys, reduction),
        reduced=np.empty((keys, C), dtype),
    )


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

    def patches(self, rows: np.ndarray, projection: Projection) -> np.ndarray:
        """Tokens (lines*tokens, C) seen as (lines, keys) patches, the same memory."""
        as_map = np.reshape(rows, (1, -1, self.keys * self.R, rows.shape[-1]), copy=False)
        return as_patches(as_map, projection)[0]

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


def _with_separate_qkv(p: BlockParams) -> BlockParams:
    """A ViT's block as that of a PVT with R = 1: q and kv are rows of its qkv, not copies."""
    if not isinstance(p.attn, MHAParams):
        return p
    (weight, bias), C = (p.attn.qkv.weight, p.attn.qkv.bias), p.norm1.weight.shape[0]
    q, kv = (
        LinearParams(weight[rows], None if bias is None else bias[rows])
        for rows in (slice(0, C), slice(C, None))
    )
    return replace(p, attn=SRAParams(q, kv, p.attn.proj, sr=None, norm=None))


def _glued(q: LinearParams, kv: LinearParams) -> LinearParams:
    """Of the gradients of q and kv, that of qkv."""
    bias = None if q.bias is None or kv.bias is None else np.concatenate((q.bias, kv.bias))
    return LinearParams(np.concatenate((q.weight, kv.weight)), bias)


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
    """As :func:`pvt_ref.blocks.transformer.block_forward`.

    Which runs where there is dropout, and for attention that is not known here.
    """
    attn = settings.attn
    dropout = rng is not None and (settings.drop_rate or attn.drop_rate or attn.attn_drop_rate)
    if dropout or not isinstance(p.attn, SRAParams | MHAParams):
        return block.forward(p, x, ops, grid, settings, rng, keep)
    p = _with_separate_qkv(p)
    B, n, C = x.shape
    N, eps = attn.num_heads, settings.norm_eps
    gain1 = _draw_gain(x, settings.drop_path_rate, rng)
    gain2 = _draw_gain(x, settings.drop_path_rate, rng)
    tokens = np.ascontiguousarray(x).reshape(B * n, C)
    y = np.empty_like(tokens)
    lines = _Lines.of(p.attn, x.shape, grid)
    kv = np.empty((lines.count * lines.keys, 2 * C), x.dtype)
    reduction, sr, sr_norm = None, p.attn.sr, p.attn.norm
    if sr is not None and sr_norm is not None:
        reduction = projection(sr, sr_norm, len(kv), tiling)
    kept, norm1, norm2, hidden, embedded = None, None, None, None, None
    if keep:
        kept = _empty_cache(p, len(y), len(kv), reduction, x.dtype)
        norm1, norm2, hidden, embedded = kept.norm1, kept.norm2, kept.hidden, kept.embedded

    def make_keys(tiles: list[slice], scratch: Scratch) -> None:
        """y becomes norm1(x), and kv the keys and values made of SR(y)."""
        for part in tiles:
            rows, key_rows = lines.rows(part), lines.key_rows(part)
            normed = y[rows]
            layer_norm_rows(p.norm1, tokens[rows], eps, normed, rows, norm1)
            if kept is None:
                reduced = scratch("reduced", key_rows.stop - key_rows.start, C, dtype=x.dtype)
            else:
                reduced = kept.reduced[key_rows]
            if reduction is None:
                reduced[...] = normed
            else:
                patches = [lines.patches(normed, reduction)]
                embed_rows(reduction, patches, attn.norm_eps, reduced, key_rows, embedded, scratch)
            linear_rows(kv_params, reduced, kv[key_rows], scratch)

    def make_rows(tiles: list[slice], scratch: Scratch) -> None:
        """y, norm1(x) so far, becomes the block's result."""
        for rows in tiles:
            x_rows, y_rows = tokens[rows], y[rows]
            if kept is None:
                q, heads = (scratch(name, *x_rows.shape, dtype=x.dtype) for name in ("q", "heads"))
                normed, branch = heads, q  # free again by the time
            else:
                q, heads = kept.q[rows], kept.heads[rows]
                normed = scratch("normed", *x_rows.shape, dtype=x.dtype)
                branch = scratch("branch", *x_rows.shape, dtype=x.dtype)
            # x = x + droppath(sra(norm1(x)))
            linear_rows(q_params, y_rows, q, scratch)
            q_heads, y_heads = _per_head(q, N), _per_head(heads, N)
            for b, _, part in by_group(rows, n):
                k, v = _keys_and_values(kv[b * m : (b + 1) * m], N)
                attend_rows(q_heads[:, part], k, v, attn.scale, y_heads[:, part], scratch, tiling)
            linear_rows(proj, heads, y_rows, scratch)
            _scale_samples(y_rows, gain1, rows, n)
            y_rows += x_rows
            # x = x + droppath(mlp(norm2(x)))
            layer_norm_rows(p.norm2, y_rows, eps, normed, rows, norm2)
            mlp_rows(mlp_params, normed, branch, rows, hidden, scratch)
            _scale_samples(branch, gain2, rows, n)
            y_rows += branch

    m = len(kv) // B
    q_params, proj = for_many_rows(p.attn.q, B * n), for_many_rows(p.attn.proj, B * n)
    kv_params = for_many_rows(p.attn.kv, B * m)
    mlp_params = MLPParams(for_many_rows(p.mlp.fc1, B * n), for_many_rows(p.mlp.fc2, B * n))
    lines.run(tiling, make_keys, C)
    tiling.run(make_rows, B * n, tiling.rows(p.mlp.fc1.weight.shape[0]))
    cache = None
    if kept is not None:
        cache = BlockCache(x.shape, grid, kept, kv, (gain1, gain2), settings)
    return y.reshape(x.shape), cache


# Backward -------------------------------------------------------------------------------------


def block_backward(
    p: BlockParams, cache: Any, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, BlockParams]:
    """As :func:`pvt_ref.blocks.transformer.block_backward`."""
    if not isinstance(cache, BlockCache):
        return block.backward(p, cache, dy, ops)
    of_vit, p = isinstance(p.attn, MHAParams), _with_separate_qkv(p)
    (B, n, C), kept, kv = cache.shape, cache.kept, cache.kv
    attn, (gain1, gain2), embedded = cache.settings.attn, cache.gains, cache.kept.embedded
    N, m, dtype = attn.num_heads, len(kv) // B, dy.dtype
    dy_rows = np.ascontiguousarray(dy).reshape(-1, C)
    lines = _Lines.of(p.attn, cache.shape, cache.grid)
    dx = np.empty_like(dy_rows)  # of what norm2 and its skip were given
    dq, dnormed1 = np.empty_like(dy_rows), np.empty_like(dy_rows)
    dproj = dx if gain1 is None else np.empty_like(dy_rows)
    dfc2 = dy_rows if gain2 is None else np.empty_like(dy_rows)
    dhidden = np.empty_like(kept.hidden.slope)  # before GELU
    dprojected = np.empty((0 if embedded is None else len(kv), C), dtype)  # of W^S's result

    def back_through_rows(
        tiles: list[slice], scratch: Scratch
    ) -> tuple[Sums, dict[int, np.ndarray]]:
        """Through MLP and attention to the queries; dkv of the images that the tiles belong to."""
        sums, dkvs = Sums(), {}
        for rows in tiles:
            dx_rows, dfc2_rows, dproj_rows, dq_rows = dx[rows], dfc2[rows], dproj[rows], dq[rows]
            # x = x + droppath(mlp(norm2(x)))
            if gain2 is not None:
                dfc2_rows[...] = dy_rows[rows]
                _scale_samples(dfc2_rows, gain2, rows, n)
            slope = kept.hidden.slope[rows]
            sums.add("fc2", column_sums(dfc2_rows))
            dfc1_bias = mlp_backward_rows(p.mlp, slope, dfc2_rows, dhidden[rows], dx_rows, scratch)
            sums.add("fc1", dfc1_bias)
            layer_norm_backward_rows(
                p.norm2, kept.norm2, rows, dx_rows, dx_rows, sums, "norm2", scratch
            )
            dx_rows += dy_rows[rows]  # branch + skip
            # x = x + droppath(heads W^O)
            if gain1 is not None:
                dproj_rows[...] = dx_rows
                _scale_samples(dproj_rows, gain1, rows, n)
            sums.add("proj", column_sums(dproj_rows))
            dheads = scratch("dheads", *dx_rows.shape, dtype=dtype)
            times_weight_rows(dproj_rows, p.attn.proj, dheads, scratch)
            # heads = Attention(q, k, v)
            q_heads, dq_heads = _per_head(kept.q[rows], N), _per_head(dq_rows, N)
            dy_heads = _per_head(dheads, N)
            for b, _, part in by_group(rows, n):
                image = kv[b * m : (b + 1) * m]
                if b not in dkvs:
                    dkvs[b] = np.zeros_like(image)
                attend_backward_rows(
                    q_heads[:, part], *_keys_and_values(image, N), attn.scale, dy_heads[:, part],
                    dq_heads[:, part], *_keys_and_values(dkvs[b], N), scratch, tiling,
                )  # fmt: skip
            # q = norm1(x) W^Q
            sums.add("q", column_sums(dq_rows))
            times_weight_rows(dq_rows, p.attn.q, dnormed1[rows], scratch)
        return sums, dkvs

    results = tiling.run(back_through_rows, B * n, tiling.rows(dhidden.shape[1]))
    row_sums = [sums for sums, _ in results]
    dkv = np.zeros_like(kv)
    for _, dkvs in results:
        for b, part in dkvs.items():
            dkv[b * m : (b + 1) * m] += part

    def back_through_keys(tiles: list[slice], scratch: Scratch) -> Sums:
        """Through keys, values and norm1; dnormed1 becomes dL/dx of the block."""
        sums = Sums()
        for part in tiles:
            rows, key_rows = lines.rows(part), lines.key_rows(part)
            dnormed, dkv_rows = dnormed1[rows], dkv[key_rows]  # norm1(x) fed the queries, and these
            # kv = reduced W^KV
            sums.add("kv", column_sums(dkv_rows))
            dreduced = scratch("dreduced", len(dkv_rows), C, dtype=dtype)
            times_weight_rows(dkv_rows, p.attn.kv, dreduced, scratch)
            # reduced = SR(norm1(x))
            if embedded is None:
                dnormed += dreduced
            else:
                dpatches = embed_backward_rows(
                    embedded, key_rows, dreduced, dprojected[key_rows], sums, scratch
                )
                target = lines.patches(dnormed, embedded.projection)
                target += dpatches.reshape(target.shape)
            layer_norm_backward_rows(
                p.norm1, kept.norm1, rows, dnormed, dnormed, sums, "norm1", scratch
            )
            dnormed += dx[rows]  # branch + skip
        return sums

    key_sums = lines.run(tiling, back_through_keys, C)
    biases = {name: add_up(row_sums, name, dtype) for name in ("fc1", "fc2", "proj", "q")}
    biases["kv"] = add_up(key_sums, "kv", dtype)
    layers = {  # by name: the gradient of the layer's result, its input, the norm of that
        "fc1": (dhidden, kept.norm2.x_hat, (p.norm2, biases["fc1"])),
        "fc2": (dfc2, kept.hidden.y, None),
        "q": (dq, kept.norm1.x_hat, (p.norm1, biases["q"])),
        "proj": (dproj, kept.heads, None),
        "kv": (dkv, kept.reduced, None),
    }
    if embedded is not None:
        layers["sr"] = (dprojected, embedded.patches, None)
    weights = dict(zip(layers, weight_gradients(list(layers.values()), tiling), strict=True))

    def gradients(name: str, p: LinearParams) -> LinearParams:
        return LinearParams(weights[name], None if p.bias is None else biases[name])

    dsr, dsr_norm = None, None
    if embedded is not None and p.attn.sr is not None:
        projected = embedded.projection
        dsr, dsr_norm = embed_gradients(p.attn.sr, projected, weights["sr"], key_sums)
    dq_params, dkv_params = gradients("q", p.attn.q), gradients("kv", p.attn.kv)
    dproj_params = gradients("proj", p.attn.proj)
    dattn = SRAParams(dq_params, dkv_params, dproj_params, dsr, dsr_norm)
    return dnormed1.reshape(dy.shape), BlockParams(
        norm1=add_up_norm(key_sums, "norm1", dtype),
        attn=MHAParams(_glued(dq_params, dkv_params), dproj_params) if of_vit else dattn,
        norm2=add_up_norm(row_sums, "norm2", dtype),
        mlp=MLPParams(gradients("fc1", p.mlp.fc1), gradients("fc2", p.mlp.fc2)),
    )


block_kernel = Kernel(
    block,
    block_forward,
    block_backward,
    absorbs=(
        *(sra, mha, attention, *attention_kernel.absorbs),
        *(patch_embed, *patch_embed_kernel.absorbs),
        *(mlp, *mlp_kernel.absorbs, drop_path, sum_rows),
    ),
)
