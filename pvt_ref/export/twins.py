"""Operations for which ONNX has a node of its own.

All others are made of these or of plain expressions, and run as written. Maps are channels last
here and channels first in ONNX; two transpositions in turn cancel.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, Grid
from pvt_ref.export.symbols import Dim, Symbol
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams, batch_norm
from pvt_ref.layers.conv import ConvParams, conv, windows_along
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import (
    PatchEmbedParams,
    kernel_to_matrix,
    patch_embed,
    patchify,
)
from pvt_ref.layers.pool import pool
from pvt_ref.layers.position import position, positions
from pvt_ref.layers.relu import relu
from pvt_ref.layers.resize import resize
from pvt_ref.layers.softmax import softmax
from pvt_ref.models.pvt.model import channels_first, channels_last
from pvt_ref.ops import Operation, Ops

Result = tuple[Symbol, None]


def _linear(p: LinearParams, x: Symbol, ops: Ops, keep: bool = False) -> Result:
    C_out, C_in = p.weight.shape
    rows = x.graph.reshape(x, (-1, C_in))
    weights = [p.weight] if p.bias is None else [p.weight, p.bias]
    y = x.graph.node("Gemm", [rows, *weights], (rows.shape[0], C_out), transB=1)
    return x.graph.reshape(y, (*x.shape[:-1], C_out)), None


def _layer_norm(p: LayerNormParams, x: Symbol, ops: Ops, eps: float, keep: bool = False) -> Result:
    inputs = [x, p.weight, p.bias]
    return x.graph.node("LayerNormalization", inputs, x.shape, axis=-1, epsilon=eps), None


def _batch_norm(
    p: BatchNormParams,
    x: Symbol,
    ops: Ops,
    buffers: BatchNormBuffers,
    batch_statistics: bool,
    eps: float = 1e-5,
    keep: bool = False,
) -> Result:
    x = channels_first(x)
    inputs = [x, p.weight, p.bias, buffers.running_mean, buffers.running_var]
    return channels_last(x.graph.node("BatchNormalization", inputs, x.shape, epsilon=eps)), None


def _gelu(p: None, x: Symbol, ops: Ops, keep: bool = False) -> Result:
    return x.graph.elementwise("Gelu", x), None  # the exact one, unless told otherwise


def _relu(p: None, x: Symbol, ops: Ops, keep: bool = False) -> Result:
    return x.graph.elementwise("Relu", x), None


def _softmax(p: None, x: Symbol, ops: Ops, keep: bool = False) -> Result:
    return x.graph.node("Softmax", [x], x.shape, axis=-1), None


def _convolution(
    p: ConvParams | LinearParams, x: Symbol, stride: int, padding: Grid, **group: int
) -> Symbol:
    """A map (B, H, W, C_in) to (B, h, w, C_out)."""
    k, x = p.weight.shape[2:], channels_first(x)
    h, w = (
        windows_along((int(n), 1), (k_n, 1), stride, pad)[0]
        for n, k_n, pad in zip(x.shape[2:], k, padding, strict=True)
    )
    weights = [p.weight] if p.bias is None else [p.weight, p.bias]
    shape = (x.shape[0], p.weight.shape[0], h, w)
    told: dict[str, Any] = {"kernel_shape": list(k), "pads": [*padding, *padding], **group}
    y = x.graph.node("Conv", [x, *weights], shape, strides=[stride, stride], **told)
    free = [isinstance(n, Dim) for n in x.shape]
    y.shape = tuple(x.graph.dim(y, i) if free[i] else n for i, n in enumerate(shape))
    return channels_last(y)


def _conv(
    p: ConvParams, x: Symbol, ops: Ops, stride: int, padding: int, keep: bool = False
) -> Result:
    return _convolution(p, x, stride, (padding, padding)), None


def _depthwise_conv(p: ConvParams, x: Symbol, ops: Ops, keep: bool = False) -> Result:
    k_h, k_w = p.weight.shape[2:]
    return _convolution(p, x, 1, (k_h // 2, k_w // 2), group=x.shape[-1]), None


def _patch_embed(
    p: PatchEmbedParams, x: Symbol, ops: Ops, eps: float, keep: bool = False
) -> Result:
    y = _convolution(p.proj, x, p.proj.weight.shape[-1], (0, 0))  # (B, H/P, W/P, C_out)
    _, h, w, C_out = y.shape
    y = y.graph.reshape(y, (y.shape[0], h * w, C_out))  # (B, n, C_out)
    return (y, None) if p.norm is None else ops[layer_norm].forward(p.norm, y, ops, eps, keep=keep)


def _cut_patches(
    p: PatchEmbedParams, x: Symbol, ops: Ops, eps: float, keep: bool = False
) -> Result:
    """The same as it is written: a size that patches do not fill cannot be reshaped.

    A convolution would leave the last pixels out in silence.
    """
    matrix = x.graph.called(kernel_to_matrix(p.proj.weight), like=p.proj.weight)
    patches = patchify(x, p.proj.weight.shape[-1])  # (B, n, P*P*C_in)
    y, _ = ops[linear].forward(LinearParams(matrix, p.proj.bias), patches, ops, keep=keep)
    return (y, None) if p.norm is None else ops[layer_norm].forward(p.norm, y, ops, eps, keep=keep)


def _position(
    p: Array,
    x: Symbol,
    ops: Ops,
    grid: Grid,
    table_grid: Grid,
    cls: bool,
    mode: str = "bilinear",
    keep: bool = False,
) -> Result:
    rows: np.ndarray = positions(p, grid, table_grid, cls, mode)  # a constant: the grid is known
    return x + x.graph.called(rows[None], like=p), None


_FORWARDS: Sequence[tuple[Operation, Any]] = (
    (linear, _linear),
    (layer_norm, _layer_norm),
    (batch_norm, _batch_norm),
    (gelu, _gelu),
    (relu, _relu),
    (softmax, _softmax),
    (conv, _conv),
    (depthwise_conv, _depthwise_conv),
    (patch_embed, _patch_embed),
    (position, _position),
)

#: The table that a network is exported with. Nothing has a cache, so no backward can follow.
SYMBOLIC = Ops({op: Operation(forward, op.backward) for op, forward in _FORWARDS}, name="onnx")

#: The same for images of any size.
ANY_SIZE = Ops(
    {**SYMBOLIC.twins, patch_embed: Operation(_cut_patches, patch_embed.backward)}, name="onnx"
)

#: Operations that need the size of their map when the graph is written, for a table or a matrix.
SIZED = frozenset({position, pool, resize})
