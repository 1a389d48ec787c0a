"""Every operation of the package as one kind of test case, so that one test can hold for all.

A case has named inputs (x, weights), our forward and backward, and PyTorch's forward, whose
derivative is autograd's. Nothing in the PyTorch side is written by us beyond naming its functions.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from strategies import normal, seeds

from pvt_ref.arrays import array_module, dtype_name, from_host
from pvt_ref.blocks import conv_mlp as conv_mlp_file
from pvt_ref.blocks import linear_sra as linear_sra_file
from pvt_ref.blocks import mha as mha_file
from pvt_ref.blocks import mlp as mlp_file
from pvt_ref.blocks import sra as sra_file
from pvt_ref.blocks import transformer
from pvt_ref.blocks.conv_mlp import ConvMLPParams, DWConvParams
from pvt_ref.blocks.linear_sra import LinearSRAParams
from pvt_ref.blocks.mha import MHAParams
from pvt_ref.blocks.mlp import MLPParams
from pvt_ref.blocks.sra import SRAParams, SRASettings
from pvt_ref.blocks.transformer import BlockParams, BlockSettings
from pvt_ref.heads import conv_unit as conv_unit_file
from pvt_ref.heads import fpn as fpn_file
from pvt_ref.heads import mla as mla_file
from pvt_ref.heads import scale_head as scale_head_file
from pvt_ref.heads import semantic_fpn as semantic_fpn_file
from pvt_ref.heads import setr as setr_file
from pvt_ref.heads.conv_unit import ConvUnitBuffers, ConvUnitParams
from pvt_ref.heads.fpn import FPNConvParams, FPNParams
from pvt_ref.heads.mla import (
    MLAHeadBuffers,
    MLAHeadParams,
    MLANeckBuffers,
    MLANeckParams,
    MLAUnitsBuffers,
    MLAUnitsParams,
)
from pvt_ref.heads.semantic_fpn import SemanticFPNBuffers, SemanticFPNParams
from pvt_ref.heads.setr import SETRBuffers, SETRParams
from pvt_ref.kernels.cpu.table import blocked_ops
from pvt_ref.layers import attention as attention_file
from pvt_ref.layers import batch_norm as batch_norm_file
from pvt_ref.layers import conv as conv_file
from pvt_ref.layers import depthwise_conv as depthwise_conv_file
from pvt_ref.layers import dropout as dropout_file
from pvt_ref.layers import gelu as gelu_file
from pvt_ref.layers import layer_norm as layer_norm_file
from pvt_ref.layers import linear as linear_file
from pvt_ref.layers import patch_embed as patch_embed_file
from pvt_ref.layers import pool as pool_file
from pvt_ref.layers import position as position_file
from pvt_ref.layers import relu as relu_file
from pvt_ref.layers import resize as resize_file
from pvt_ref.layers import softmax as softmax_file
from pvt_ref.layers import sum_rows as sum_rows_file
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams
from pvt_ref.layers.conv import ConvParams
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import PatchEmbedParams
from pvt_ref.ops import REFERENCE, Operation, Ops

Inputs = dict[str, Any]

#: The readable operations by name.
READABLE: dict[str, Operation] = {
    name: getattr(file, name)
    for file, names in {
        linear_file: ["linear"],
        layer_norm_file: ["layer_norm"],
        batch_norm_file: ["batch_norm"],
        gelu_file: ["gelu"],
        relu_file: ["relu"],
        softmax_file: ["softmax"],
        sum_rows_file: ["sum_rows"],
        dropout_file: ["dropout", "drop_path", "dropout_channels"],
        patch_embed_file: ["patch_embed"],
        conv_file: ["conv"],
        depthwise_conv_file: ["depthwise_conv"],
        resize_file: ["resize"],
        pool_file: ["pool"],
        position_file: ["position"],
        attention_file: ["attention"],
        sra_file: ["sra"],
        linear_sra_file: ["linear_sra"],
        mha_file: ["mha"],
        mlp_file: ["mlp"],
        conv_mlp_file: ["conv_mlp"],
        transformer: ["block", "blocks"],
        conv_unit_file: ["conv_unit"],
        scale_head_file: ["scale_head"],
        fpn_file: ["fpn"],
        semantic_fpn_file: ["semantic_fpn"],
        setr_file: ["setr"],
        mla_file: ["mla_neck", "mla_head"],
    }.items()
    for name in names
}


def table_under_test() -> Ops:
    """What the fixture ``table`` of conftest.py says, by PVT_REF_OPS.

    With rows of a few numbers and three threads, small arrays go every way that large ones go.
    """
    reference = os.environ.get("PVT_REF_OPS") == "reference"
    return REFERENCE if reference else blocked_ops(3, elements=16)


def forward(name: str, p: Any, x: Any, *settings: Any, keep: bool = True) -> Any:
    """The forward of an operation in the table under test."""
    table = table_under_test()
    return table[READABLE[name]].forward(p, x, table, *settings, keep=keep)


def backward(name: str, p: Any, cache: Any, dy: Any) -> Any:
    """Its backward."""
    table = table_under_test()
    return table[READABLE[name]].backward(p, cache, dy, table)


@dataclass(frozen=True)
class OpCase:
    name: str
    facts: str  # what was drawn, for the reproducer
    inputs: Inputs
    forward: Callable[..., Any]  # (inputs, keep) -> y, cache
    backward: Callable[..., Inputs]  # (inputs, cache, dy) -> gradients by the inputs' names
    torch: Callable[[Inputs], torch.Tensor]

    def __repr__(self) -> str:
        return f"{self.name}({self.facts})"

    def cast(self, convert: Callable[[np.ndarray], Any]) -> Inputs:
        return {name: convert(x) for name, x in self.inputs.items()}


def sra_settings(N: int, scale: float, eps: float) -> SRASettings:
    return SRASettings(num_heads=N, scale=scale, norm_eps=eps)


def _linear(i: Inputs, name: str) -> LinearParams:
    return LinearParams(i[f"{name}.weight"], i.get(f"{name}.bias"))


def _norm(i: Inputs, name: str) -> LayerNormParams:
    return LayerNormParams(i[f"{name}.weight"], i[f"{name}.bias"])


def _named(record: Any, name: str) -> Inputs:
    """weight and bias of a record under the names they have among the inputs."""
    pairs = {f"{name}.weight": record.weight, f"{name}.bias": record.bias}
    return {key: x for key, x in pairs.items() if x is not None}


def _random(seed: int, **shapes: tuple[int, ...]) -> Inputs:
    """Inputs by name (two underscores for a dot), norms around one, weights of fan-in size."""
    inputs = {}
    for k, (name, shape) in enumerate(shapes.items()):
        name, x = name.replace("__", "."), normal(seed + k, *shape)
        if name.endswith("weight") and "norm" in name:
            x = 1 + 0.3 * x
        elif name.endswith("weight"):
            x = x / math.sqrt(math.prod(shape[1:]))
        inputs[name] = x
    return inputs


small = st.integers(1, 4)


@st.composite
def linear(draw) -> OpCase:
    B, n, C_in, C_out = draw(small), draw(small), draw(small), draw(small)
    bias, seed = draw(st.booleans()), draw(seeds)
    shapes = {"x": (B, n, C_in), "p__weight": (C_out, C_in)} | (
        {"p__bias": (C_out,)} if bias else {}
    )

    def gradients(i, cache, dy):
        dx, d = backward("linear", _linear(i, "p"), cache, dy)
        return {"x": dx, **_named(d, "p")}

    return OpCase(
        "linear",
        f"{shapes}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("linear", _linear(i, "p"), i["x"], keep=keep),
        gradients,
        lambda i: F.linear(i["x"], i["p.weight"], i.get("p.bias")),
    )


@st.composite
def layer_norm(draw) -> OpCase:
    B, n, C = draw(small), draw(small), draw(st.integers(3, 8))
    eps, seed = draw(st.sampled_from([1e-6, 1e-5, 1e-1])), draw(seeds)
    shapes = {"x": (B, n, C), "norm__weight": (C,), "norm__bias": (C,)}

    def gradients(i, cache, dy):
        dx, d = backward("layer_norm", _norm(i, "norm"), cache, dy)
        return {"x": dx, **_named(d, "norm")}

    return OpCase(
        "layer_norm",
        f"{shapes}, eps={eps}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("layer_norm", _norm(i, "norm"), i["x"], eps, keep=keep),
        gradients,
        lambda i: F.layer_norm(i["x"], (C,), i["norm.weight"], i["norm.bias"], eps),
    )


def constant(x: np.ndarray, like: Any) -> Any:
    """A number that nobody differentiates by, in the library and precision of like."""
    narrow = dtype_name(like) == "float32"
    return from_host(x.astype(np.float32 if narrow else np.float64), like=like)


def running(seed: int, C: int) -> tuple[np.ndarray, np.ndarray]:
    """A running mean and variance, exact in float32."""
    pair = 0.3 * normal(seed, C), 0.5 + np.abs(normal(seed + 1, C))
    mean, variance = (x.astype(np.float32).astype(np.float64) for x in pair)
    return mean, variance


def buffers_of(seed: int, C: int, like: Any) -> BatchNormBuffers:
    """Those of :func:`running`."""
    mean, variance = (constant(x, like) for x in running(seed, C))
    return BatchNormBuffers(mean, variance, from_host(np.array(7), like=like))


def _batch_norm(i: Inputs, name: str) -> BatchNormParams:
    return BatchNormParams(i[f"{name}.weight"], i[f"{name}.bias"])


def _torch_batch_norm(i: Inputs, x, name: str, seed: int, in_batch: bool, eps: float = 1e-5):
    """batch_norm of a map (B, C, H, W), with the statistics of :func:`running`."""
    mean, variance = (torch.tensor(s).to(x.dtype) for s in running(seed, x.shape[1]))
    weight, bias = i[f"{name}.weight"], i[f"{name}.bias"]
    return F.batch_norm(x, mean, variance, weight, bias, training=in_batch, eps=eps)


@st.composite
def batch_norm(draw) -> OpCase:
    B, C, sides = draw(small), draw(small), st.integers(2, 4)
    H, W, in_batch = draw(sides), draw(sides), draw(st.booleans())
    eps, seed = draw(st.sampled_from([1e-5, 1e-1])), draw(seeds)
    shapes = {"x": (B, H, W, C), "norm__weight": (C,), "norm__bias": (C,)}

    def compute(i, keep=True):
        buffers = buffers_of(seed, C, like=i["x"])
        p = _batch_norm(i, "norm")
        return forward("batch_norm", p, i["x"], buffers, in_batch, eps, keep=keep)

    def gradients(i, cache, dy):
        dx, d = backward("batch_norm", _batch_norm(i, "norm"), cache, dy)
        return {"x": dx, **_named(d, "norm")}

    def reference(i):
        x = channels_first(i["x"])
        return channels_last(_torch_batch_norm(i, x, "norm", seed, in_batch, eps))

    return OpCase(
        "batch_norm",
        f"{shapes}, in_batch={in_batch}, eps={eps}, seed={seed}",
        _random(seed, **shapes),
        compute,
        gradients,
        reference,
    )


@st.composite
def gelu(draw) -> OpCase:
    shape, seed = (draw(small), draw(small), draw(small)), draw(seeds)
    scale = draw(st.sampled_from([0.1, 1.0, 4.0]))
    return OpCase(
        "gelu",
        f"{shape}, scale={scale}, seed={seed}",
        {"x": normal(seed, *shape, scale=scale)},
        lambda i, keep=True: forward("gelu", None, i["x"], keep=keep),
        lambda i, cache, dy: {"x": backward("gelu", None, cache, dy)[0]},
        lambda i: F.gelu(i["x"]),
    )


@st.composite
def softmax(draw) -> OpCase:
    shape, seed = (draw(small), draw(small), draw(small), draw(st.integers(2, 6))), draw(seeds)
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    return OpCase(
        "softmax",
        f"{shape}, scale={scale}, seed={seed}",
        {"x": normal(seed, *shape, scale=scale)},
        lambda i, keep=True: forward("softmax", None, i["x"], keep=keep),
        lambda i, cache, dy: {"x": backward("softmax", None, cache, dy)[0]},
        lambda i: F.softmax(i["x"], dim=-1),
    )


@st.composite
def patch_embed(draw) -> OpCase:
    P, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    B, C_in, C, seed = draw(small), draw(small), draw(st.integers(3, 6)), draw(seeds)
    eps = draw(st.sampled_from([1e-5, 1e-1]))
    shapes = {
        "x": (B, h * P, w * P, C_in),
        "proj__weight": (C, C_in, P, P),
        "proj__bias": (C,),
        "norm__weight": (C,),
        "norm__bias": (C,),
    }

    def params(i):
        return PatchEmbedParams(_linear(i, "proj"), _norm(i, "norm"))

    def gradients(i, cache, dy):
        dx, d = backward("patch_embed", params(i), cache, dy)
        return {"x": dx, **_named(d.proj, "proj"), **_named(d.norm, "norm")}

    def reference(i):
        y = F.conv2d(i["x"].permute(0, 3, 1, 2), i["proj.weight"], i["proj.bias"], stride=P)
        y = y.flatten(2).transpose(1, 2)
        return F.layer_norm(y, (C,), i["norm.weight"], i["norm.bias"], eps)

    return OpCase(
        "patch_embed",
        f"{shapes}, eps={eps}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("patch_embed", params(i), i["x"], eps, keep=keep),
        gradients,
        reference,
    )


@st.composite
def relu(draw) -> OpCase:
    shape, seed = (draw(small), draw(small), draw(small)), draw(seeds)
    return OpCase(
        "relu",
        f"{shape}, seed={seed}",
        # away from 0, where the tests' differences would straddle the kink
        {"x": (x := normal(seed, *shape)) + 1e-3 * np.sign(x)},
        lambda i, keep=True: forward("relu", None, i["x"], keep=keep),
        lambda i, cache, dy: {"x": backward("relu", None, cache, dy)[0]},
        lambda i: F.relu(i["x"]),
    )


def _conv_params(i: Inputs) -> ConvParams:
    return ConvParams(i["conv.weight"], i.get("conv.bias"))


def channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


@st.composite
def conv(draw) -> OpCase:
    k_h, k_w = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride, padding = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    # from one window down and to the right, and rows that no window reaches among them
    H = max(1, k_h - 2 * padding) + draw(st.integers(0, 5))
    W = max(1, k_w - 2 * padding) + draw(st.integers(0, 5))
    B, C_in, C_out, bias = draw(small), draw(small), draw(small), draw(st.booleans())
    seed = draw(seeds)
    shapes = {"x": (B, H, W, C_in), "conv__weight": (C_out, C_in, k_h, k_w)}
    shapes |= {"conv__bias": (C_out,)} if bias else {}

    def gradients(i, cache, dy):
        dx, d = backward("conv", _conv_params(i), cache, dy)
        return {"x": dx, **_named(d, "conv")}

    def reference(i):
        x, weight, bias = channels_first(i["x"]), i["conv.weight"], i.get("conv.bias")
        return channels_last(F.conv2d(x, weight, bias, stride=stride, padding=padding))

    return OpCase(
        "conv",
        f"{shapes}, stride={stride}, padding={padding}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("conv", _conv_params(i), i["x"], stride, padding, keep=keep),
        gradients,
        reference,
    )


@st.composite
def depthwise_conv(draw) -> OpCase:
    k = tuple(draw(st.sampled_from([1, 3, 5])) for _ in range(2))
    sides = st.integers(1, 6)  # a map may be smaller than the kernel
    B, H, W, C = draw(small), draw(sides), draw(sides), draw(small)
    bias, seed = draw(st.booleans()), draw(seeds)
    shapes = {"x": (B, H, W, C), "conv__weight": (C, 1, *k)} | (
        {"conv__bias": (C,)} if bias else {}
    )

    def gradients(i, cache, dy):
        dx, d = backward("depthwise_conv", _conv_params(i), cache, dy)
        return {"x": dx, **_named(d, "conv")}

    def reference(i):
        x, weight, bias = channels_first(i["x"]), i["conv.weight"], i.get("conv.bias")
        same = (k[0] // 2, k[1] // 2)
        return channels_last(F.conv2d(x, weight, bias, padding=same, groups=C))

    return OpCase(
        "depthwise_conv",
        f"{shapes}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("depthwise_conv", _conv_params(i), i["x"], keep=keep),
        gradients,
        reference,
    )


#: Where PyTorch forms the nearest index as we do: it rounds in/out to float32.
NEAREST_SIDES = st.integers(1, 9)


@st.composite
def resize(draw) -> OpCase:
    sides = NEAREST_SIDES
    old, size = (draw(sides), draw(sides)), (draw(sides), draw(sides))
    mode = draw(st.sampled_from(["nearest", "bilinear", "bicubic"]))
    align_corners = mode != "nearest" and draw(st.booleans())
    B, C, seed = draw(small), draw(small), draw(seeds)

    def reference(i):
        corners = None if mode == "nearest" else align_corners
        y = F.interpolate(channels_first(i["x"]), size=size, mode=mode, align_corners=corners)
        return channels_last(y)

    return OpCase(
        "resize",
        f"{(B, *old, C)} to {size}, {mode}, align_corners={align_corners}, seed={seed}",
        {"x": normal(seed, B, *old, C)},
        lambda i, keep=True: forward("resize", None, i["x"], size, mode, align_corners, keep=keep),
        lambda i, cache, dy: {"x": backward("resize", None, cache, dy)[0]},
        reference,
    )


@st.composite
def pool(draw) -> OpCase:
    sides = st.integers(1, 9)
    old, size = (draw(sides), draw(sides)), (draw(sides), draw(sides))
    B, C, seed = draw(small), draw(small), draw(seeds)
    return OpCase(
        "pool",
        f"{(B, *old, C)} to {size}, seed={seed}",
        {"x": normal(seed, B, *old, C)},
        lambda i, keep=True: forward("pool", None, i["x"], size, keep=keep),
        lambda i, cache, dy: {"x": backward("pool", None, cache, dy)[0]},
        lambda i: channels_last(F.adaptive_avg_pool2d(channels_first(i["x"]), size)),
    )


@st.composite
def position(draw) -> OpCase:
    sizes = st.integers(1, 5)
    grid, table_grid = (draw(sizes), draw(sizes)), (draw(sizes), draw(sizes))
    if draw(st.integers(0, 3)) == 0:
        table_grid = grid
    B, C, seed = draw(small), draw(small), draw(seeds)
    in_table = draw(st.booleans())
    cls = in_table and draw(st.booleans())
    mode = draw(st.sampled_from(["bilinear", "bicubic"]))
    shapes = {
        "x": (B, grid[0] * grid[1] + cls, C),
        "table": (1, table_grid[0] * table_grid[1] + in_table, C),
    }

    def gradients(i, cache, dy):
        dx, dtable = backward("position", i["table"], cache, dy)
        return {"x": dx, "table": dtable}

    def reference(i):
        rows = i["table"][:, in_table:]
        square = rows.reshape(1, *table_grid, C).permute(0, 3, 1, 2)
        rows = F.interpolate(square, size=grid, mode=mode, align_corners=False)
        rows = rows.permute(0, 2, 3, 1).reshape(1, -1, C)
        if cls:
            rows = torch.cat([i["table"][:, :1], rows], dim=1)
        return i["x"] + rows

    return OpCase(
        "position",
        f"{shapes}, grid={grid}, table_grid={table_grid}, cls={cls}, {mode}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward(
            "position", i["table"], i["x"], grid, table_grid, cls, mode, keep=keep
        ),
        gradients,
        reference,
    )


@st.composite
def attention(draw) -> OpCase:
    B, N, n, m, d = draw(small), draw(small), draw(small), draw(st.integers(2, 5)), draw(small)
    scale, seed = draw(st.sampled_from([1 / math.sqrt(d), 0.3, 2.0])), draw(seeds)
    shapes = {"q": (B, N, n, d), "k": (B, N, m, d), "v": (B, N, m, d)}

    def gradients(i, cache, dy):
        return dict(zip("qkv", backward("attention", None, cache, dy)[0], strict=True))

    return OpCase(
        "attention",
        f"{shapes}, scale={scale}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("attention", None, (i["q"], i["k"], i["v"]), scale, keep=keep),
        gradients,
        lambda i: F.scaled_dot_product_attention(i["q"], i["k"], i["v"], scale=scale),
    )


def _sra_shapes(C: int, R: int, bias: bool, prefix: str = "") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "q__weight": (C, C),
        "kv__weight": (2 * C, C),
        "proj__weight": (C, C),
    }
    shapes["proj__bias"] = (C,)
    if bias:
        shapes |= {"q__bias": (C,), "kv__bias": (2 * C,)}
    if R > 1:
        shapes |= {"sr__weight": (C, C, R, R), "sr__bias": (C,)}
        shapes |= {"norm__weight": (C,), "norm__bias": (C,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def _sra_params(i: Inputs, prefix: str = "", kind: type = SRAParams) -> Any:
    reduced = f"{prefix}sr.weight" in i
    return kind(
        _linear(i, f"{prefix}q"),
        _linear(i, f"{prefix}kv"),
        _linear(i, f"{prefix}proj"),
        _linear(i, f"{prefix}sr") if reduced else None,
        _norm(i, f"{prefix}norm") if reduced else None,
    )


def _sra_gradients(d: Any, prefix: str = "") -> Inputs:
    named = {}
    for name in ("q", "kv", "proj", "sr", "norm"):
        record = getattr(d, name)
        named |= {} if record is None else _named(record, prefix + name)
    return named


def _torch_sra(i: Inputs, x, grid, N: int, eps: float, prefix: str = "", linear: bool = False):
    """conv2d, layer_norm and PyTorch's own multi-head attention with separate projections."""
    B, _, C = x.shape
    keys = x
    if f"{prefix}sr.weight" in i:
        weight, bias = i[f"{prefix}sr.weight"], i[f"{prefix}sr.bias"]
        as_map = x.transpose(1, 2).reshape(B, C, *grid)
        if linear:
            as_map = F.adaptive_avg_pool2d(as_map, 7)
        keys = F.conv2d(as_map, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        keys = F.layer_norm(keys, (C,), i[f"{prefix}norm.weight"], i[f"{prefix}norm.bias"], eps)
        keys = F.gelu(keys) if linear else keys
    kv = i[f"{prefix}kv.weight"]
    in_bias = None
    if f"{prefix}q.bias" in i:
        in_bias = torch.cat([i[f"{prefix}q.bias"], i[f"{prefix}kv.bias"]])
    y, _ = F.multi_head_attention_forward(
        x.transpose(0, 1),
        keys.transpose(0, 1),
        keys.transpose(0, 1),
        C,
        N,
        None,
        in_bias,
        None,
        None,
        False,
        0.0,
        i[f"{prefix}proj.weight"],
        i[f"{prefix}proj.bias"],
        training=False,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=i[f"{prefix}q.weight"],
        k_proj_weight=kv[:C],
        v_proj_weight=kv[C:],
    )
    return y.transpose(0, 1)


@st.composite
def sra(draw) -> OpCase:
    R, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    N, d, B = draw(st.integers(1, 3)), draw(st.integers(2, 3)), draw(small)
    bias, seed, eps = draw(st.booleans()), draw(seeds), draw(st.sampled_from([1e-5, 1e-1]))
    C, grid = N * d + (N == 1), (h * R, w * R)
    cls = R == 1 and draw(st.booleans())
    shapes = {"x": (B, grid[0] * grid[1] + cls, C), **_sra_shapes(C, R, bias)}
    scale = 1 / math.sqrt(C // N)
    attn = sra_settings(N, scale, eps)

    def gradients(i, cache, dy):
        dx, d = backward("sra", _sra_params(i), cache, dy)
        return {"x": dx, **_sra_gradients(d)}

    return OpCase(
        "sra",
        f"{shapes}, grid={grid}, N={N}, R={R}, eps={eps}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("sra", _sra_params(i), i["x"], grid, attn, keep=keep),
        gradients,
        lambda i: _torch_sra(i, i["x"], grid, N, eps),
    )


def _torch_mha(i: Any, x, N: int, prefix: str = ""):
    """PyTorch's own multi-head attention, whose in_proj is our qkv."""
    C, (in_weight, in_bias, weight, bias) = (
        x.shape[-1],
        (i.get(f"{prefix}{key}") for key in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")),
    )
    x = x.transpose(0, 1)
    y, _ = F.multi_head_attention_forward(
        *(x, x, x, C, N, in_weight, in_bias, None, None, False, 0.0, weight, bias),
        training=False,
        need_weights=False,
    )
    return y.transpose(0, 1)


def _mha_shapes(C: int, bias: bool, prefix: str = "") -> dict[str, tuple[int, ...]]:
    shapes = {"qkv__weight": (3 * C, C), "proj__weight": (C, C), "proj__bias": (C,)}
    shapes |= {"qkv__bias": (3 * C,)} if bias else {}
    return {prefix + name: shape for name, shape in shapes.items()}


@st.composite
def mha(draw) -> OpCase:
    B, n, N, d = draw(small), draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(small)
    bias, seed = draw(st.booleans()), draw(seeds)
    C = N * max(d, 2)
    shapes = {"x": (B, n, C), **_mha_shapes(C, bias)}
    settings = sra_settings(N, 1 / math.sqrt(C // N), 1e-6)

    def params(i):
        return MHAParams(_linear(i, "qkv"), _linear(i, "proj"))

    def gradients(i, cache, dy):
        dx, d = backward("mha", params(i), cache, dy)
        return {"x": dx, **_named(d.qkv, "qkv"), **_named(d.proj, "proj")}

    return OpCase(
        "mha",
        f"{shapes}, N={N}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("mha", params(i), i["x"], (1, n), settings, keep=keep),
        gradients,
        lambda i: _torch_mha(i, i["x"], N),
    )


@st.composite
def linear_sra(draw) -> OpCase:
    N, d, B = draw(st.integers(1, 3)), draw(st.integers(2, 3)), draw(small)
    grid = (draw(st.integers(1, 16)), draw(st.integers(1, 9)))
    bias, seed, eps = draw(st.booleans()), draw(seeds), draw(st.sampled_from([1e-5, 1e-1]))
    C = N * d + (N == 1)
    shapes = {"x": (B, grid[0] * grid[1], C), **_sra_shapes(C, 2, bias)}
    shapes["sr__weight"] = (C, C, 1, 1)
    attn = sra_settings(N, 1 / math.sqrt(C // N), eps)

    def params(i):
        return _sra_params(i, kind=LinearSRAParams)

    def gradients(i, cache, dy):
        dx, d = backward("linear_sra", params(i), cache, dy)
        return {"x": dx, **_sra_gradients(d)}

    return OpCase(
        "linear_sra",
        f"{shapes}, grid={grid}, N={N}, eps={eps}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("linear_sra", params(i), i["x"], grid, attn, keep=keep),
        gradients,
        lambda i: _torch_sra(i, i["x"], grid, N, eps, linear=True),
    )


@st.composite
def mlp(draw) -> OpCase:
    B, n, C, hidden, seed = (
        draw(small),
        draw(small),
        draw(small),
        draw(st.integers(1, 6)),
        draw(seeds),
    )
    shapes = {
        "x": (B, n, C),
        "fc1__weight": (hidden, C),
        "fc1__bias": (hidden,),
        "fc2__weight": (C, hidden),
        "fc2__bias": (C,),
    }

    def params(i):
        return MLPParams(_linear(i, "fc1"), _linear(i, "fc2"))

    def gradients(i, cache, dy):
        dx, d = backward("mlp", params(i), cache, dy)
        return {"x": dx, **_named(d.fc1, "fc1"), **_named(d.fc2, "fc2")}

    def reference(i):
        hidden = F.gelu(F.linear(i["x"], i["fc1.weight"], i["fc1.bias"]))
        return F.linear(hidden, i["fc2.weight"], i["fc2.bias"])

    return OpCase(
        "mlp",
        f"{shapes}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("mlp", params(i), i["x"], keep=keep),
        gradients,
        reference,
    )


@st.composite
def conv_mlp(draw) -> OpCase:
    B, C, hidden, seed = draw(small), draw(small), draw(st.integers(1, 6)), draw(seeds)
    grid, has_relu = (draw(small), draw(small)), draw(st.booleans())
    shapes = {
        "x": (B, grid[0] * grid[1], C),
        "fc1__weight": (hidden, C),
        "fc1__bias": (hidden,),
        "dwconv__weight": (hidden, 1, 3, 3),
        "dwconv__bias": (hidden,),
        "fc2__weight": (C, hidden),
        "fc2__bias": (C,),
    }

    def params(i):
        dwconv = DWConvParams(ConvParams(i["dwconv.weight"], i["dwconv.bias"]))
        return ConvMLPParams(_linear(i, "fc1"), dwconv, _linear(i, "fc2"))

    def gradients(i, cache, dy):
        dx, d = backward("conv_mlp", params(i), cache, dy)
        named = _named(d.fc1, "fc1") | _named(d.dwconv.dwconv, "dwconv") | _named(d.fc2, "fc2")
        return {"x": dx, **named}

    def reference(i):
        y = F.linear(i["x"], i["fc1.weight"], i["fc1.bias"])
        y = (F.relu(y) if has_relu else y).transpose(1, 2).reshape(B, hidden, *grid)
        y = F.conv2d(y, i["dwconv.weight"], i["dwconv.bias"], padding=1, groups=hidden)
        y = F.gelu(y.flatten(2).transpose(1, 2))
        return F.linear(y, i["fc2.weight"], i["fc2.bias"])

    return OpCase(
        "conv_mlp",
        f"{shapes}, grid={grid}, has_relu={has_relu}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("conv_mlp", params(i), i["x"], grid, has_relu, keep=keep),
        gradients,
        reference,
    )


@st.composite
def block(draw, of_vit: bool = False) -> OpCase:
    """Of a PVT; or of a ViT, whose attention has one matrix qkv, and which has a cls token."""
    R = 1 if of_vit else draw(st.integers(1, 2))
    h, w = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    N, d, B, E = draw(st.integers(1, 2)), draw(st.integers(2, 3)), draw(st.integers(1, 3)), 2
    bias, seed = draw(st.booleans()), draw(seeds)
    eps, projection_eps = draw(st.permutations([1e-6, 1e-2]))
    C, grid = N * d + (N == 1), (h * R, w * R)
    shapes = {
        "x": (B, grid[0] * grid[1] + of_vit, C),
        "norm1__weight": (C,),
        "norm1__bias": (C,),
        "norm2__weight": (C,),
        "norm2__bias": (C,),
        "fc1__weight": (E * C, C),
        "fc1__bias": (E * C,),
        "fc2__weight": (C, E * C),
        "fc2__bias": (C,),
        **(_mha_shapes(C, bias, "attn__") if of_vit else _sra_shapes(C, R, bias, "attn__")),
    }
    block_settings = BlockSettings(eps, sra_settings(N, 1 / math.sqrt(C // N), projection_eps))

    def params(i):
        mha = MHAParams(_linear(i, "attn.qkv"), _linear(i, "attn.proj")) if of_vit else None
        return BlockParams(
            _norm(i, "norm1"),
            mha or _sra_params(i, "attn."),
            _norm(i, "norm2"),
            MLPParams(_linear(i, "fc1"), _linear(i, "fc2")),
        )

    def gradients(i, cache, dy):
        dx, g = backward("block", params(i), cache, dy)
        named = {"x": dx, **_named(g.norm1, "norm1"), **_named(g.norm2, "norm2")}
        named |= _named(g.mlp.fc1, "fc1") | _named(g.mlp.fc2, "fc2")
        if of_vit:
            return named | _named(g.attn.qkv, "attn.qkv") | _named(g.attn.proj, "attn.proj")
        return named | _sra_gradients(g.attn, "attn.")

    def reference(i):
        x = i["x"]
        normed = F.layer_norm(x, (C,), i["norm1.weight"], i["norm1.bias"], eps)
        if of_vit:
            x = x + _torch_mha(i, normed, N, "attn.")
        else:
            x = x + _torch_sra(i, normed, grid, N, projection_eps, "attn.")
        normed = F.layer_norm(x, (C,), i["norm2.weight"], i["norm2.bias"], eps)
        hidden = F.gelu(F.linear(normed, i["fc1.weight"], i["fc1.bias"]))
        return x + F.linear(hidden, i["fc2.weight"], i["fc2.bias"])

    return OpCase(
        "block",
        f"{shapes}, grid={grid}, N={N}, eps={eps, projection_eps}, seed={seed}",
        _random(seed, **shapes),
        lambda i, keep=True: forward("block", params(i), i["x"], grid, block_settings, keep=keep),
        gradients,
        reference,
    )


@st.composite
def sum_rows(draw) -> OpCase:
    shape, seed = (draw(st.integers(1, 9)), draw(small)), draw(seeds)
    return OpCase(
        "sum_rows",
        f"{shape}, seed={seed}",
        {"x": normal(seed, *shape)},
        lambda i, keep=True: forward("sum_rows", None, i["x"], keep=keep),
        lambda i, cache, dy: {"x": backward("sum_rows", None, cache, dy)[0]},
        lambda i: i["x"].sum(dim=0),
    )


@st.composite
def dropped(draw) -> OpCase:
    """Dropout of any kind with a fixed mask: linear, so everything about operations applies."""
    shape = (draw(st.integers(2, 5)), draw(small), draw(small))
    masks = {
        "dropout": shape,
        "drop_path": (shape[0], 1, 1),
        "dropout_channels": (shape[0], 1, shape[2]),
    }
    name, mask_shape = draw(st.sampled_from(sorted(masks.items())))
    rate, mask_seed, seed = draw(st.sampled_from([0.0, 0.25, 0.6])), draw(seeds), draw(seeds)

    def reference(i):
        kept = np.random.default_rng(mask_seed).random(mask_shape, dtype=np.float32) >= rate
        return i["x"] * torch.tensor(kept).to(i["x"].dtype) / (1 - rate)

    return OpCase(
        name,
        f"{shape}, rate={rate}, mask_seed={mask_seed}, seed={seed}",
        {"x": normal(seed, *shape)},
        lambda i, keep=True: forward(
            name, None, i["x"], rate, np.random.default_rng(mask_seed), keep=keep
        ),
        lambda i, cache, dy: {"x": backward(name, None, cache, dy)[0]},
        reference,
    )


# Heads ----------------------------------------------------------------------------------------

#: What a head has in a place: a unit, C_in and C_out channels and a kernel k; or an enlargement.
Step = tuple[int, int, int] | None


def _unit_shapes(name: str, C_in: int, C_out: int, k: int) -> dict[str, tuple[int, ...]]:
    shapes = {"conv__weight": (C_out, C_in, k, k), "norm__weight": (C_out,), "norm__bias": (C_out,)}
    return {f"{name}__{key}": shape for key, shape in shapes.items()}


def _steps_shapes(name: str, steps: list[Step]) -> dict[str, tuple[int, ...]]:
    named = [(f"{name}{k}", step) for k, step in enumerate(steps)]
    return {
        key: x for place, step in named if step for key, x in _unit_shapes(place, *step).items()
    }


def _alive(seed: int, **shapes: tuple[int, ...]) -> Inputs:
    """Inputs with which no ReLU stops everything: channel 0 of each unit is mostly above 0."""
    inputs = _random(seed, **shapes)
    for name, x in inputs.items():
        if name.endswith(".norm.bias"):
            x[0] = 3 + np.abs(x[0])
    return inputs


def _unit(i: Inputs, name: str) -> ConvUnitParams:
    return ConvUnitParams(
        ConvParams(i[f"{name}.conv.weight"], None), _batch_norm(i, f"{name}.norm")
    )


def _unit_gradients(d: ConvUnitParams, name: str) -> Inputs:
    return _named(d.conv, f"{name}.conv") | _named(d.bn, f"{name}.norm")


def _unit_buffers(seed: int, C: int, like: Any) -> ConvUnitBuffers:
    return ConvUnitBuffers(buffers_of(seed, C, like))


def _torch_unit(i: Inputs, x, name: str, seed: int, in_batch: bool):
    """On maps (B, C, H, W)."""
    weight = i[f"{name}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return F.relu(_torch_batch_norm(i, x, f"{name}.norm", seed, in_batch))


def _steps(i: Inputs, name: str, steps: list[Step]) -> tuple[ConvUnitParams | None, ...]:
    return tuple(_unit(i, f"{name}{k}") if step else None for k, step in enumerate(steps))


def _steps_buffers(seed: int, steps: list[Step], like: Any):
    return tuple(step and _unit_buffers(seed, step[1], like) for step in steps)


def _steps_gradients(d: tuple[ConvUnitParams | None, ...], name: str) -> Inputs:
    named: Inputs = {}
    for k, step in enumerate(d):
        named |= _unit_gradients(step, f"{name}{k}") if step else {}
    return named


def _torch_steps(i: Inputs, x, name: str, steps, scale: int, seed: int, in_batch: bool):
    for k, step in enumerate(steps):
        if step is None:
            x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        else:
            x = _torch_unit(i, x, f"{name}{k}", seed, in_batch)
    return x


@st.composite
def conv_unit(draw) -> OpCase:
    B, C_in, C_out, k = draw(small), draw(small), draw(small), draw(st.sampled_from([1, 3]))
    H, W, in_batch, seed = draw(st.integers(2, 4)), draw(small), draw(st.booleans()), draw(seeds)
    shapes = {"x": (B, H, W, C_in), **_unit_shapes("unit", C_in, C_out, k)}

    def compute(i, keep=True):
        buffers = _unit_buffers(seed, C_out, i["x"])
        return forward("conv_unit", _unit(i, "unit"), i["x"], buffers, in_batch, keep=keep)

    def gradients(i, cache, dy):
        dx, d = backward("conv_unit", _unit(i, "unit"), cache, dy)
        return {"x": dx, **_unit_gradients(d, "unit")}

    return OpCase(
        "conv_unit",
        f"{shapes}, in_batch={in_batch}, seed={seed}",
        _alive(seed, **shapes),
        compute,
        gradients,
        lambda i: channels_last(_torch_unit(i, channels_first(i["x"]), "unit", seed, in_batch)),
    )


@st.composite
def scale_head(draw) -> OpCase:
    C, widths = draw(small), [draw(small), draw(small)]
    steps: list[Step] = [(C, widths[0], 3), (*widths, 1), None]
    steps = draw(st.sampled_from([steps, steps[:1], [steps[0], None, *steps[1:]]]))
    # batch norm of two values cancels all but eps, and with it every digit of float32
    B, (H, W), scale = draw(st.integers(1, 2)), draw(st.sampled_from([(2, 3), (3, 2)])), draw(small)
    in_batch, seed = draw(st.booleans()), draw(seeds)
    shapes = {"x": (B, H, W, C), **_steps_shapes("", steps)}

    def compute(i, keep=True):
        p, buffers = _steps(i, "", steps), _steps_buffers(seed, steps, i["x"])
        return forward("scale_head", p, i["x"], buffers, in_batch, scale, keep=keep)

    def gradients(i, cache, dy):
        dx, d = backward("scale_head", _steps(i, "", steps), cache, dy)
        return {"x": dx, **_steps_gradients(d, "")}

    def reference(i):
        x = channels_first(i["x"])
        return channels_last(_torch_steps(i, x, "", steps, scale, seed, in_batch))

    return OpCase(
        "scale_head",
        f"{shapes}, steps={steps}, scale={scale}, in_batch={in_batch}, seed={seed}",
        _alive(seed, **shapes),
        compute,
        gradients,
        reference,
    )


def _maps(i: Inputs) -> list[Any]:
    """Inputs x1, x2 and so on."""
    return [x for name, x in i.items() if re.fullmatch(r"x\d", name)]


def _named_maps(maps: Sequence[Any]) -> Inputs:
    return {f"x{k}": x for k, x in enumerate(maps, 1)}


def in_one(maps: Sequence[Any]) -> Any:
    """Maps as one flat array, since the tests of all operations look at one."""
    xp = array_module(maps[0])
    return xp.concat([xp.reshape(x, (-1,)) for x in maps])


def apart(flat: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The inverse, to maps of these shapes."""
    xp, start, maps = array_module(flat), 0, []
    for shape in shapes:
        stop = start + math.prod(shape)
        maps.append(xp.reshape(flat[start:stop], shape))
        start = stop
    return maps


def _torch_in_one(maps) -> torch.Tensor:
    return torch.cat([channels_last(x).reshape(-1) for x in maps])


def _plain_conv(i: Inputs, name: str) -> ConvParams:
    return ConvParams(i[f"{name}.weight"], i[f"{name}.bias"])


def _torch_conv(i: Inputs, x, name: str):
    weight = i[f"{name}.weight"]
    return F.conv2d(x, weight, i[f"{name}.bias"], padding=weight.shape[-1] // 2)


#: Sides of four levels: halves, and halves of odd sides, rounded up as strides do.
HEIGHTS, WIDTHS = (
    st.sampled_from([(8, 4, 2, 1), (5, 3, 2, 1), (2, 1, 1, 1)]),
    st.sampled_from([(9, 5, 3, 2), (6, 3, 2, 2)]),
)


@st.composite
def fpn(draw) -> OpCase:
    B, C, seed, count = draw(st.integers(1, 2)), draw(small), draw(seeds), draw(st.integers(1, 4))
    grids = list(zip(draw(HEIGHTS), draw(WIDTHS), strict=True))[:count]
    shapes: dict[str, tuple[int, ...]] = {}
    for k, grid in enumerate(grids, 1):
        C_k = draw(small)
        shapes |= {f"x{k}": (B, *grid, C_k), f"lateral{k}__weight": (C, C_k, 1, 1)}
        shapes |= {f"fpn{k}__weight": (C, C, 3, 3)}
        shapes |= {f"{kind}{k}__bias": (C,) for kind in ("lateral", "fpn")}
    levels = range(1, count + 1)

    def params(i):
        kinds = ([_plain_conv(i, f"{kind}{k}") for k in levels] for kind in ("lateral", "fpn"))
        return FPNParams(*(tuple(map(FPNConvParams, convs)) for convs in kinds))

    def compute(i, keep=True):
        maps, cache = forward("fpn", params(i), _maps(i), keep=keep)
        return in_one(maps), cache

    def gradients(i, cache, dy):
        dx, d = backward("fpn", params(i), cache, apart(dy, [(B, *grid, C) for grid in grids]))
        named = _named_maps(dx)
        for k, lateral, own in zip(levels, d.lateral_convs, d.fpn_convs, strict=True):
            named |= _named(lateral.conv, f"lateral{k}") | _named(own.conv, f"fpn{k}")
        return named

    def reference(i):
        maps = [_torch_conv(i, channels_first(i[f"x{k}"]), f"lateral{k}") for k in levels]
        for k in range(count - 1, 0, -1):
            told = F.interpolate(maps[k], size=maps[k - 1].shape[2:], mode="nearest")
            maps[k - 1] = maps[k - 1] + told
        return _torch_in_one([_torch_conv(i, maps[k - 1], f"fpn{k}") for k in levels])

    return OpCase(
        "fpn", f"{shapes}, seed={seed}", _alive(seed, **shapes), compute, gradients, reference
    )


@st.composite
def semantic_fpn(draw) -> OpCase:
    B, C, D, K, seed = draw(st.integers(2, 3)), draw(small), draw(small), draw(small), draw(seeds)
    grids, in_batch = zip(draw(HEIGHTS), draw(WIDTHS), strict=True), draw(st.booleans())
    unit, more = (C, D, 3), (D, D, 3)
    heads: list[list[Step]] = [
        *([unit], [unit, None], [unit, None, more, None]),
        [unit, None, more, None, more, None],
    ]
    shapes = {f"x{k}": (B, *grid, C) for k, grid in enumerate(grids, 1)}
    shapes |= {"seg__weight": (K, D, 1, 1), "seg__bias": (K,)}
    for k, steps in enumerate(heads):
        shapes |= _steps_shapes(f"head{k}_", steps)

    def params(i):
        levels = (_steps(i, f"head{k}_", steps) for k, steps in enumerate(heads))
        return SemanticFPNParams(_plain_conv(i, "seg"), tuple(levels))

    def compute(i, keep=True):
        levels = (_steps_buffers(seed, steps, i["x1"]) for steps in heads)
        buffers = SemanticFPNBuffers(tuple(levels))
        return forward("semantic_fpn", params(i), _maps(i), buffers, in_batch, keep=keep)

    def gradients(i, cache, dy):
        dx, d = backward("semantic_fpn", params(i), cache, dy)
        named = _named_maps(dx) | _named(d.conv_seg, "seg")
        for k, head in enumerate(d.scale_heads):
            named |= _steps_gradients(head, f"head{k}_")
        return named

    def reference(i):
        maps = [
            _torch_steps(i, channels_first(x), f"head{k}_", heads[k], 2, seed, in_batch)
            for k, x in enumerate(_maps(i))
        ]
        size = maps[0].shape[2:]
        total = sum(F.interpolate(x, size=size, mode="bilinear") for x in maps)
        return channels_last(_torch_conv(i, total, "seg"))

    return OpCase(
        "semantic_fpn",
        f"{shapes}, in_batch={in_batch}, seed={seed}",
        _alive(seed, **shapes),
        compute,
        gradients,
        reference,
    )


@st.composite
def setr(draw) -> OpCase:
    B, H, W, C, D = 2, draw(st.integers(1, 2)), draw(st.integers(2, 3)), 5, draw(small)
    k, scale = draw(st.sampled_from([(1, 4), (3, 2)]))
    pairs: list[list[Step]] = [[(C, D, k), None], [(D, D, k), None]][: 1 if k == 1 else 2]
    in_batch, seed = draw(st.booleans()), draw(seeds)
    shapes = {"x": (B, H, W, C), "norm__weight": (C,), "norm__bias": (C,)}
    shapes |= {"seg__weight": (3, D, 1, 1), "seg__bias": (3,)}
    for j, steps in enumerate(pairs):
        shapes |= _steps_shapes(f"up{j}_", steps)

    def params(i):
        up = tuple(_steps(i, f"up{j}_", steps) for j, steps in enumerate(pairs))
        return SETRParams(_plain_conv(i, "seg"), _norm(i, "norm"), up)

    def compute(i, keep=True):
        buffers = SETRBuffers(tuple(_steps_buffers(seed, steps, i["x"]) for steps in pairs))
        return forward("setr", params(i), i["x"], buffers, in_batch, scale, keep=keep)

    def gradients(i, cache, dy):
        dx, d = backward("setr", params(i), cache, dy)
        named = {"x": dx} | _named(d.conv_seg, "seg") | _named(d.norm, "norm")
        for j, pair in enumerate(d.up_convs):
            named |= _steps_gradients(pair, f"up{j}_")
        return named

    def reference(i):
        x = F.layer_norm(i["x"], (C,), i["norm.weight"], i["norm.bias"], 1e-6)
        x = channels_first(x)
        for j, steps in enumerate(pairs):
            x = _torch_steps(i, x, f"up{j}_", steps, scale, seed, in_batch)
        return channels_last(_torch_conv(i, x, "seg"))

    return OpCase(
        "setr",
        f"{shapes}, k={k}, in_batch={in_batch}, seed={seed}",
        _alive(seed, **shapes),
        compute,
        gradients,
        reference,
    )


@st.composite
def mla_neck(draw) -> OpCase:
    B, H, W, C, D, L = 2, draw(small), draw(st.integers(2, 3)), 5, draw(small), draw(small)
    in_batch, seed = draw(st.booleans()), draw(seeds)
    shapes = {f"x{k}": (B, H, W, C) for k in range(1, L + 1)}
    for k in range(L):
        shapes |= {f"norm{k}__{leaf}": (C,) for leaf in ("weight", "bias")}
        shapes |= _unit_shapes(f"proj{k}", C, D, 1) | _unit_shapes(f"feat{k}", D, D, 3)

    def params(i):
        kinds = (tuple(_unit(i, f"{kind}{k}") for k in range(L)) for kind in ("proj", "feat"))
        norms = tuple(_norm(i, f"norm{k}") for k in range(L))
        return MLANeckParams(norms, MLAUnitsParams(*kinds))

    def compute(i, keep=True):
        each = (_unit_buffers(seed, D, i["x1"]),) * L
        buffers = MLANeckBuffers(MLAUnitsBuffers(each, each))
        maps, cache = forward("mla_neck", params(i), _maps(i), buffers, in_batch, keep=keep)
        return in_one(maps), cache

    def gradients(i, cache, dy):
        dx, d = backward("mla_neck", params(i), cache, apart(dy, [(B, H, W, D)] * L))
        named = _named_maps(dx)
        for k in range(L):
            named |= _named(d.norm[k], f"norm{k}")
            named |= _unit_gradients(d.mla.channel_proj[k], f"proj{k}")
            named |= _unit_gradients(d.mla.feat_extract[k], f"feat{k}")
        return named

    def reference(i):
        maps = []
        for k, x in enumerate(_maps(i)):
            x = F.layer_norm(x, (C,), i[f"norm{k}.weight"], i[f"norm{k}.bias"], 1e-6)
            maps.append(_torch_unit(i, channels_first(x), f"proj{k}", seed, in_batch))
        sums = [sum(maps[L - 1 - k :]) for k in range(L)]
        return _torch_in_one(
            [_torch_unit(i, x, f"feat{k}", seed, in_batch) for k, x in enumerate(sums)]
        )

    return OpCase(
        "mla_neck",
        f"{shapes}, in_batch={in_batch}, seed={seed}",
        _alive(seed, **shapes),
        compute,
        gradients,
        reference,
    )


@st.composite
def mla_head(draw) -> OpCase:
    B, H, W, D, L = 2, draw(st.integers(1, 2)), draw(st.integers(2, 3)), draw(small), draw(small)
    M, in_batch, seed = draw(st.integers(1, 2)), draw(st.booleans()), draw(seeds)
    steps: list[Step] = [(D, M, 3), (M, M, 3), None]
    shapes = {f"x{k}": (B, H, W, D) for k in range(1, L + 1)}
    shapes |= {"seg__weight": (3, L * M, 1, 1), "seg__bias": (3,)}
    for k in range(L):
        shapes |= _steps_shapes(f"up{k}_", steps)

    def params(i):
        return MLAHeadParams(
            _plain_conv(i, "seg"), tuple(_steps(i, f"up{k}_", steps) for k in range(L))
        )

    def compute(i, keep=True):
        buffers = MLAHeadBuffers((_steps_buffers(seed, steps, i["x1"]),) * L)
        return forward("mla_head", params(i), _maps(i), buffers, in_batch, keep=keep)

    def gradients(i, cache, dy):
        dx, d = backward("mla_head", params(i), cache, dy)
        named = _named_maps(dx) | _named(d.conv_seg, "seg")
        for k, up in enumerate(d.up_convs):
            named |= _steps_gradients(up, f"up{k}_")
        return named

    def reference(i):
        large = [
            _torch_steps(i, channels_first(x), f"up{k}_", steps, 4, seed, in_batch)
            for k, x in enumerate(_maps(i))
        ]
        return channels_last(_torch_conv(i, torch.cat(large, dim=1), "seg"))

    return OpCase(
        "mla_head",
        f"{shapes}, in_batch={in_batch}, seed={seed}",
        _alive(seed, **shapes),
        compute,
        gradients,
        reference,
    )


OPERATIONS = {
    "linear": linear(),
    "layer_norm": layer_norm(),
    "batch_norm": batch_norm(),
    "gelu": gelu(),
    "relu": relu(),
    "softmax": softmax(),
    "patch_embed": patch_embed(),
    "conv": conv(),
    "depthwise_conv": depthwise_conv(),
    "resize": resize(),
    "pool": pool(),
    "position": position(),
    "attention": attention(),
    "sra": sra(),
    "linear_sra": linear_sra(),
    "mha": mha(),
    "mlp": mlp(),
    "conv_mlp": conv_mlp(),
    "block": block(),
    "vit block": block(of_vit=True),
    "sum_rows": sum_rows(),
    "drop": dropped(),
    "conv_unit": conv_unit(),
    "scale_head": scale_head(),
    "fpn": fpn(),
    "semantic_fpn": semantic_fpn(),
    "setr": setr(),
    "mla_neck": mla_neck(),
    "mla_head": mla_head(),
}
