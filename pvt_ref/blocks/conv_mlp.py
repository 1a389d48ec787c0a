"""The MLP of PVT v2's blocks (arXiv 2106.13797), with a 3 x 3 depth-wise convolution inside.

Its zero padding tells tokens their position: PVT v2 has no position tables.
"""

from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.draws import Rng
from pvt_ref.layers.conv import ConvParams
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.relu import relu
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class DWConvParams:
    """The kernel (E*C, 1, 3, 3) and its bias, one level down, as in the authors' keys."""

    dwconv: ConvParams


@record
class ConvMLPParams:
    """fc1 with a weight (E*C, C), the depth-wise convolution, fc2 with (C, E*C); or gradients."""

    fc1: LinearParams
    dwconv: DWConvParams
    fc2: LinearParams


@record
class ConvMLPCache:
    """The caches of the parts, None where there was no ReLU or dropout; and the grid (H_i, W_i)."""

    fc1: Any
    relu: Any
    dwconv: Any
    gelu: Any
    drop1: Any
    fc2: Any
    drop2: Any
    grid: Grid


def conv_mlp_forward(
    p: ConvMLPParams,
    x: Array,
    ops: Ops,
    grid: Grid,
    has_relu: bool = False,
    drop_rate: float = 0.0,
    rng: Rng = None,
    keep: bool = True,
) -> tuple[Array, ConvMLPCache | None]:
    """y = drop(fc2(drop(GELU(DWConv(fc1(x)))))), the paper's convolutional feed-forward layer.

    Args:
        p: fc1.weight (E*C, C), dwconv.dwconv.weight (E*C, 1, 3, 3), fc2.weight (C, E*C), and a bias
            of each.
        x: tokens (B, n, C), of the weights' dtype, without a cls token.
        ops: the table of operations.
        grid: (H_i, W_i) of the tokens.
        has_relu: whether a ReLU follows fc1, as in the released code next to linear SRA.
        drop_rate: dropout after the GELU and after fc2, in [0, 1).
        rng: source of the dropout masks; None for inference.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, n, C) of x's dtype, and the cache.
    """
    xp = array_module(x)
    hidden, fc1_cache = ops[linear].forward(p.fc1, x, ops, keep=keep)  # (B, n, E*C)
    tokens_shape = hidden.shape  # (B, n, E*C)
    relu_cache = None
    if has_relu:
        hidden, relu_cache = ops[relu].forward(None, hidden, ops, keep=keep)  # (B, n, E*C)
    hidden = xp.reshape(hidden, (x.shape[0], *grid, hidden.shape[-1]))  # (B, H_i, W_i, E*C)
    hidden, dwconv_cache = ops[depthwise_conv].forward(p.dwconv.dwconv, hidden, ops, keep=keep)
    hidden = xp.reshape(hidden, tokens_shape)  # (B, n, E*C)
    hidden, gelu_cache = ops[gelu].forward(None, hidden, ops, keep=keep)  # (B, n, E*C)
    hidden, drop1_cache = ops[dropout].forward(None, hidden, ops, drop_rate, rng, keep)
    y, fc2_cache = ops[linear].forward(p.fc2, hidden, ops, keep=keep)  # (B, n, C)
    y, drop2_cache = ops[dropout].forward(None, y, ops, drop_rate, rng, keep)
    if not keep:
        return y, None
    return y, ConvMLPCache(
        fc1_cache, relu_cache, dwconv_cache, gelu_cache, drop1_cache, fc2_cache, drop2_cache, grid
    )


def conv_mlp_backward(
    p: ConvMLPParams, cache: ConvMLPCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, ConvMLPParams]:
    """Gradients of :func:`conv_mlp_forward`: the backward of each step, in reverse order.

    Args:
        p: the forward's weights, fc1.weight (E*C, C).
        cache: from the forward, grid (H_i, W_i).
        dy: dL/dy (B, n, C).
        ops: the table that the forward was given.

    Returns:
        dx (B, n, C) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    xp = array_module(dy)
    # y = dropout(fc2(hidden))
    dy, _ = ops[dropout].backward(None, cache.drop2, dy, ops)  # (B, n, C)
    dhidden, dfc2 = ops[linear].backward(p.fc2, cache.fc2, dy, ops)  # (B, n, E*C)
    # hidden = dropout(gelu(dwconv(hidden)))
    dhidden, _ = ops[dropout].backward(None, cache.drop1, dhidden, ops)  # (B, n, E*C)
    dhidden, _ = ops[gelu].backward(None, cache.gelu, dhidden, ops)  # (B, n, E*C)
    tokens_shape = dhidden.shape  # (B, n, E*C)
    dmap = xp.reshape(dhidden, (dy.shape[0], *cache.grid, tokens_shape[-1]))  # (B, H_i, W_i, E*C)
    dmap, dconv = ops[depthwise_conv].backward(p.dwconv.dwconv, cache.dwconv, dmap, ops)
    dhidden = xp.reshape(dmap, tokens_shape)  # (B, n, E*C)
    # hidden = relu(fc1(x)), or without relu
    if cache.relu is not None:
        dhidden, _ = ops[relu].backward(None, cache.relu, dhidden, ops)  # (B, n, E*C)
    dx, dfc1 = ops[linear].backward(p.fc1, cache.fc1, dhidden, ops)  # (B, n, C)
    return dx, ConvMLPParams(dfc1, DWConvParams(dconv), dfc2)


conv_mlp = Operation(conv_mlp_forward, conv_mlp_backward)
