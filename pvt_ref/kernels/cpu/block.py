"""A whole transformer block in two sweeps over the tokens, forward and backward.

Everything in a block is computed token by token, except that a query uses the keys and values of
its whole image. So the forward first computes all keys and values (there are few). Then it takes
one tile of rows after the other through all the rest: queries, attention, projection, sum, norm,
MLP, sum. Only the tokens, the keys and the values exist for all tokens at once. The backward goes
in reverse: first the rows, then the keys and values, and last the products for the gradients of the
weights, over all tokens at once.

A convolution in the MLP reads tokens of other tiles, so PVT v2's MLP follows as a separate sweep.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pvt_ref.arrays import Grid
from pvt_ref.blocks.conv_mlp import ConvMLPParams, conv_mlp
from pvt_ref.blocks.mha import MHAParams, mha
from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.blocks.sra import SRAParams, sra
from pvt_ref.blocks.transformer import BlockParams, BlockSettings, block
from pvt_ref.draws import Rng
from pvt_ref.kernels.cpu.attention import attend_backward_rows, attend_rows, attention_kernel
from pvt_ref.kernels.cpu.conv_mlp import (
    conv_mlp_backward,
    conv_mlp_forward,
    conv_mlp_kernel,
)
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
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, by_group, rows_of, times
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import drop_path
from pvt_ref.layers.layer_norm import LayerNormCache
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.ops import REFERENCE, Ops
from pvt_ref.tree import record


@record
class KeptCache:
    """What the backward needs, with all tokens or keys of the batch as rows."""

    norm1: LayerNormCache  # over (B*n, C)
    q: np.ndarray  # (B*n, C)
    heads: np.ndarray  # (B*n, C), attention's result before W^O
    norm2: LayerNormCache  # over (B*n, C)
    hidden: Any  # HiddenCache (B*n, E*C), or the cache of an MLP with a convolution
    reduction: Projection | None  # None if R = 1, like the next
    embedded: EmbeddedCache | None  # over (B*m, R*R*C)
    reduced: np.ndarray  # (B*m, C), SR(norm1(x)), from which come keys and values
    kv: np.ndarray  # (B*m, 2C), keys beside values
    gains: tuple[np.ndarray | None, np.ndarray | None]  # drop path's, of attention and MLP
    grid: Grid  # (H_i, W_i)
    settings: BlockSettings


@dataclass(frozen=True, slots=True)
class _Lines:
    """The tokens of a batch as lines of R x R patches: tiles of keys are cut between the lines."""

    count: int
    keys: int  # of a line
    tokens: int  # of a line
    R: int

    @classmethod
    def of(cls, p: SRAParams, shape: tuple[int, ...], grid: Grid) -> "_Lines":
        B, n, _ = shape
        if p.sr is None:  # tokens are keys, the cls token too: a line is one token
            return cls(B * n, 1, 1, 1)
        (H, W), R = grid, p.sr.weight.shape[-1]
        return cls(B * H // R, W // R, R * W, R)

    def patches(self, rows: np.ndarray, projection: Projection) -> np.ndarray:
        """A view of tokens (lines*tokens, C) as (lines, keys) patches."""
        as_map = np.reshape(rows, (1, -1, self.keys * self.R, rows.shape[-1]), copy=False)
        return as_patches(as_map, projection)[0]


def _per_head(rows: np.ndarray, N: int) -> np.ndarray:
    """A view of (rows, C) as (N, rows, d)."""
    return np.reshape(rows, (len(rows), N, -1), copy=False).transpose(1, 0, 2)


def _keys_and_values(kv: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of (m, 2C), from one image, as k and v, (N, m, d) each."""
    C = kv.shape[1] // 2
    return _per_head(kv[:, :C], N), _per_head(kv[:, C:], N)


def _draw_gain(x: np.ndarray, rate: float, rng: Rng) -> np.ndarray | None:
    """Drop path's factor for each sample (B, 1, 1), drawn as the readable operation draws it."""
    ones = np.ones((x.shape[0], 1, 1), x.dtype)
    gain, cache = drop_path.forward(None, ones, REFERENCE, rate, rng)
    return None if cache is None else gain


def _scale_samples(branch: np.ndarray, gain: np.ndarray | None, rows: slice, n: int) -> None:
    """Drop path: multiplies every row of a tile by the gain of its sample."""
    if gain is not None:
        for b, _, part in by_group(rows, n):
            branch[part] *= gain[b, 0, 0]


def _with_separate_qkv(p: BlockParams) -> BlockParams:
    """A ViT's block in the form of a PVT's with R = 1: q and kv are views of rows of its qkv."""
    if not isinstance(p.attn, MHAParams):
        return p
    (weight, bias), C = (p.attn.qkv.weight, p.attn.qkv.bias), p.norm1.weight.shape[0]
    q, kv = (
        LinearParams(weight[rows], None if bias is None else bias[rows])
        for rows in (slice(0, C), slice(C, None))
    )
    return replace(p, attn=SRAParams(q, kv, p.attn.proj, sr=None, norm=None))


def _glued(q: LinearParams, kv: LinearParams) -> LinearParams:
    """The gradient of qkv from those of q and kv."""
    bias = None if q.bias is None or kv.bias is None else np.concatenate((q.bias, kv.bias))
    return LinearParams(np.concatenate((q.weight, kv.weight)), bias)


def block_forward(
    p: BlockParams,
    x: np.ndarray,
    ops: Ops,
    grid: Grid,
    settings: BlockSettings,
    rng: Rng = None,
    keep: bool = True,
    *,
    tiling: Tiling,
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.blocks.transformer.block_forward`.

    That function is used if there is dropout, or for other kinds of attention or MLP.
    """
    attn = settings.attn
    known = isinstance(p.attn, SRAParams | MHAParams) and type(p.mlp) in (MLPParams, ConvMLPParams)
    drops = rng is not None and (settings.drop_rate or attn.drop_rate or attn.attn_drop_rate)
    if drops or not known:
        return block.forward(p, x, ops, grid, settings, rng, keep)
    p = _with_separate_qkv(p)
    B, n, C = x.shape
    N, eps = attn.num_heads, settings.norm_eps
    rate = settings.drop_path_rate
    gains = (_draw_gain(x, rate, rng), _draw_gain(x, rate, rng))
    tokens = np.ascontiguousarray(x).reshape(B * n, C)
    y = np.empty_like(tokens)
    normed2 = np.empty_like(tokens) if isinstance(p.mlp, ConvMLPParams) else None
    lines = _Lines.of(p.attn, x.shape, grid)
    m = lines.count * lines.keys // B
    kv = np.empty((B, m, 2 * C), x.dtype)
    kv_rows = kv.reshape(-1, 2 * C)
    reduction, sr, sr_norm = None, p.attn.sr, p.attn.norm
    if sr is not None and sr_norm is not None:
        reduction = projection(sr, sr_norm, B * m, tiling)
    kept, norm1, norm2, hidden, embedded = None, None, None, None, None
    if keep:
        norm1, norm2 = (empty_layer_norm_cache(B * n, C, x.dtype) for _ in range(2))
        q, heads, reduced = (np.empty((rows, C), x.dtype) for rows in (B * n, B * n, B * m))
        hidden = empty_hidden(p.mlp, B * n, x.dtype) if isinstance(p.mlp, MLPParams) else None
        if reduction is not None:
            embedded = empty_embedded_cache(B * m, reduction)
        kept = KeptCache(
            norm1, q, heads, norm2, hidden, reduction, embedded, reduced, kv, gains, grid, settings
        )

    def make_keys(tiles: list[slice], scratch: Scratch) -> None:
        """Writes norm1(x) to y, and the keys and values from SR(y) to kv."""
        for part in tiles:
            rows, keys = times(part, lines.tokens), times(part, lines.keys)
            normed = y[rows]
            layer_norm_rows(p.norm1, tokens[rows], eps, normed, rows_of(norm1, rows))
            if kept is None:
                reduced = scratch("reduced", keys.stop - keys.start, C, dtype=x.dtype)
            else:
                reduced = kept.reduced[keys]
            if reduction is None:
                reduced[...] = normed
            else:
                patches, parts = [lines.patches(normed, reduction)], rows_of(embedded, keys)
                embed_rows(reduction, patches, attn.norm_eps, reduced, parts, scratch)
            linear_rows(kv_params, reduced, kv_rows[keys], scratch)

    def make_rows(tiles: list[slice], scratch: Scratch) -> None:
        """Replaces y, which is norm1(x) so far, by the result of the block."""
        for rows in tiles:
            x_rows, y_rows = tokens[rows], y[rows]
            normed = scratch("normed", *x_rows.shape, dtype=x.dtype)
            branch = scratch("branch", *x_rows.shape, dtype=x.dtype)
            # without a cache, q and heads use memory that is otherwise needed only later
            q, heads = (branch, normed) if kept is None else (kept.q[rows], kept.heads[rows])
            # x = x + droppath(sra(norm1(x)))
            linear_rows(q_params, y_rows, q, scratch)
            q_heads, y_heads = _per_head(q, N), _per_head(heads, N)
            for b, _, part in by_group(rows, n):
                qkv = (q_heads[:, part], *_keys_and_values(kv[b], N))
                attend_rows(qkv, attn.scale, y_heads[:, part], scratch, tiling)
            linear_rows(proj, heads, y_rows, scratch)
            _scale_samples(y_rows, gains[0], rows, n)
            y_rows += x_rows
            # x = x + droppath(mlp(norm2(x)))
            normed = normed if normed2 is None else normed2[rows]
            layer_norm_rows(p.norm2, y_rows, eps, normed, rows_of(norm2, rows))
            if mlp_params is not None:
                mlp_rows(mlp_params, normed, branch, rows_of(hidden, rows), scratch)
                _scale_samples(branch, gains[1], rows, n)
                y_rows += branch

    q_params, proj = for_many_rows(p.attn.q, B * n), for_many_rows(p.attn.proj, B * n)
    kv_params = for_many_rows(p.attn.kv, B * m)
    mlp_params = None
    if isinstance(p.mlp, MLPParams):
        mlp_params = MLPParams(for_many_rows(p.mlp.fc1, B * n), for_many_rows(p.mlp.fc2, B * n))
    tiling.run_lines(make_keys, lines.count, lines.tokens, C)
    tiling.run(make_rows, B * n, tiling.rows(p.mlp.fc1.weight.shape[0]))
    y = y.reshape(x.shape)
    if normed2 is not None and isinstance(p.mlp, ConvMLPParams):
        x2, has_relu = normed2.reshape(x.shape), settings.has_relu
        branch, hidden = conv_mlp_forward(p.mlp, x2, ops, grid, has_relu, keep=keep, tiling=tiling)
        y += branch if gains[1] is None else branch * gains[1]
        kept = None if kept is None else replace(kept, hidden=hidden)
    return y, kept


def block_backward(
    p: BlockParams, cache: Any, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, BlockParams]:
    """As :func:`pvt_ref.blocks.transformer.block_backward`."""
    if not isinstance(cache, KeptCache):
        return block.backward(p, cache, dy, ops)
    of_vit, p = isinstance(p.attn, MHAParams), _with_separate_qkv(p)
    (B, n, C), kv, reduction = dy.shape, cache.kv, cache.reduction
    attn, (gain1, gain2) = cache.settings.attn, cache.gains
    N, dtype = attn.num_heads, dy.dtype
    dy_rows = np.ascontiguousarray(dy).reshape(-1, C)
    lines = _Lines.of(p.attn, dy.shape, cache.grid)
    dfc2 = dy_rows if gain2 is None else (dy * gain2).reshape(-1, C)
    # dx: the gradient of the input of norm2 and its skip
    if isinstance(p.mlp, ConvMLPParams):
        dtokens, dmlp = conv_mlp_backward(
            p.mlp, cache.hidden, dfc2.reshape(dy.shape), ops, tiling=tiling
        )
        dx, dhidden = dtokens.reshape(-1, C), None
    else:
        dx, dhidden, dmlp = np.empty_like(dy_rows), np.empty_like(cache.hidden.slope), None
    dq, dnormed1 = np.empty_like(dy_rows), np.empty_like(dy_rows)
    dproj = dx if gain1 is None else np.empty_like(dy_rows)
    dprojected = np.empty((0 if reduction is None else len(cache.reduced), C), dtype)  # by W^S

    def back_through_rows(
        tiles: list[slice], scratch: Scratch
    ) -> tuple[Sums, dict[int, np.ndarray]]:
        """Back through MLP and attention to the queries; returns dkv of the tiles' images."""
        sums, dkvs = Sums(), defaultdict(lambda: np.zeros_like(kv[0]))
        for rows in tiles:
            dx_rows, dproj_rows, dq_rows = dx[rows], dproj[rows], dq[rows]
            # x = x + droppath(mlp(norm2(x)))
            if dhidden is not None:
                slope, dfc2_rows = cache.hidden.slope[rows], dfc2[rows]
                sums.add("fc2", column_sums(dfc2_rows))
                of_fc1 = mlp_backward_rows(p.mlp, slope, dfc2_rows, dhidden[rows], dx_rows, scratch)
                sums.add("fc1", of_fc1)
            norm2 = rows_of(cache.norm2, rows)
            layer_norm_backward_rows(p.norm2, norm2, dx_rows, dx_rows, sums, "norm2", scratch)
            dx_rows += dy_rows[rows]  # branch + skip
            # x = x + droppath(heads W^O)
            if gain1 is not None:
                dproj_rows[...] = dx_rows
                _scale_samples(dproj_rows, gain1, rows, n)
            sums.add("proj", column_sums(dproj_rows))
            dheads = scratch("dheads", *dx_rows.shape, dtype=dtype)
            times_weight_rows(p.attn.proj, dproj_rows, dheads, scratch)
            # heads = Attention(q, k, v)
            heads = [_per_head(each, N) for each in (cache.q[rows], dheads, dq_rows)]
            for b, _, part in by_group(rows, n):
                q_part, dy_part, dq_part = (each[:, part] for each in heads)
                qkv = (q_part, *_keys_and_values(kv[b], N))
                dqkv = (dq_part, *_keys_and_values(dkvs[b], N))
                attend_backward_rows(qkv, attn.scale, dy_part, dqkv, scratch, tiling)
            # q = norm1(x) W^Q
            sums.add("q", column_sums(dq_rows))
            times_weight_rows(p.attn.q, dq_rows, dnormed1[rows], scratch)
        return sums, dkvs

    results = tiling.run(back_through_rows, B * n, tiling.rows(len(p.mlp.fc1.weight)))
    row_sums = [sums for sums, _ in results]
    dkv = np.zeros_like(kv)
    for _, dkvs in results:
        for b, part in dkvs.items():
            dkv[b] += part
    dkv = dkv.reshape(-1, 2 * C)

    def back_through_keys(tiles: list[slice], scratch: Scratch) -> Sums:
        """Back through keys, values and norm1; replaces dnormed1 by dL/dx of the block."""
        sums = Sums()
        for part in tiles:
            rows, keys = times(part, lines.tokens), times(part, lines.keys)
            dnormed, dkv_rows = dnormed1[rows], dkv[keys]  # norm1(x) is the input to q, k and v
            # kv = reduced W^KV
            sums.add("kv", column_sums(dkv_rows))
            dreduced = scratch("dreduced", len(dkv_rows), C, dtype=dtype)
            times_weight_rows(p.attn.kv, dkv_rows, dreduced, scratch)
            # reduced = SR(norm1(x))
            if reduction is None:
                dnormed += dreduced
            else:
                kept, dpart = rows_of((cache.embedded, dprojected), keys)
                dpatches = embed_backward_rows(reduction, kept, dreduced, dpart, sums, scratch)
                target = lines.patches(dnormed, reduction)
                target += dpatches.reshape(target.shape)
            norm1 = rows_of(cache.norm1, rows)
            layer_norm_backward_rows(p.norm1, norm1, dnormed, dnormed, sums, "norm1", scratch)
            dnormed += dx[rows]  # branch + skip
        return sums

    key_sums = tiling.run_lines(back_through_keys, lines.count, lines.tokens, C)
    biases = {name: add_up(row_sums, name, dtype) for name in ("proj", "q")}
    biases["kv"] = add_up(key_sums, "kv", dtype)
    layers = {  # by name: the gradient of the layer's result, its input, and the input's norm
        "q": (dq, cache.norm1.x_hat, (p.norm1, biases["q"])),
        "proj": (dproj, cache.heads, None),
        "kv": (dkv, cache.reduced, None),
    }
    if dhidden is not None:
        biases |= {name: add_up(row_sums, name, dtype) for name in ("fc1", "fc2")}
        layers["fc1"] = (dhidden, cache.norm2.x_hat, (p.norm2, biases["fc1"]))
        layers["fc2"] = (dfc2, cache.hidden.y, None)
    if cache.embedded is not None:
        layers["sr"] = (dprojected, cache.embedded.patches, None)
    weights = dict(zip(layers, weight_gradients(list(layers.values()), tiling), strict=True))

    def gradients(name: str, p: LinearParams) -> LinearParams:
        return LinearParams(weights[name], None if p.bias is None else biases[name])

    dsr, dsr_norm = None, None
    if reduction is not None and p.attn.sr is not None:
        dsr, dsr_norm = embed_gradients(p.attn.sr, reduction, weights["sr"], key_sums)
    dq_params, dkv_params = gradients("q", p.attn.q), gradients("kv", p.attn.kv)
    dproj_params = gradients("proj", p.attn.proj)
    dattn = SRAParams(dq_params, dkv_params, dproj_params, dsr, dsr_norm)
    return dnormed1.reshape(dy.shape), BlockParams(
        norm1=add_up_norm(key_sums, "norm1", dtype),
        attn=MHAParams(_glued(dq_params, dkv_params), dproj_params) if of_vit else dattn,
        norm2=add_up_norm(row_sums, "norm2", dtype),
        mlp=dmlp or MLPParams(gradients("fc1", p.mlp.fc1), gradients("fc2", p.mlp.fc2)),
    )


block_kernel = Kernel(
    block,
    block_forward,
    block_backward,
    absorbs=(
        *(sra, mha, attention, *attention_kernel.absorbs),
        *(patch_embed, *patch_embed_kernel.absorbs),
        *(mlp, *mlp_kernel.absorbs, conv_mlp, *conv_mlp_kernel.absorbs, drop_path),
    ),
)
