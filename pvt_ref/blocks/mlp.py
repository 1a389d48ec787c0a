"""The MLP of a block: expand each token E times, apply GELU, project back.

Paper section 3.3; from Vaswani et al. 2017 (arXiv 1706.03762, section 3.3), with GELU for ReLU.
"""

from typing import Any

from pvt_ref.arrays import Array
from pvt_ref.draws import Rng
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class MLPParams:
    """fc1 with a weight (E*C, C), and fc2 with (C, E*C), or their gradients."""

    fc1: LinearParams
    fc2: LinearParams


@record
class MLPCache:
    """The caches of the parts; that of a dropout (drop1, drop2) is None if nothing was dropped."""

    fc1: Any
    gelu: Any
    drop1: Any
    fc2: Any
    drop2: Any


def mlp_forward(
    p: MLPParams, x: Array, ops: Ops, drop_rate: float = 0.0, rng: Rng = None, keep: bool = True
) -> tuple[Array, MLPCache | None]:
    """y = drop(fc2(drop(GELU(fc1(x))))), the feed-forward layer of paper section 3.3.

    Args:
        p: fc1.weight (E*C, C), fc1.bias (E*C,), fc2.weight (C, E*C) and fc2.bias (C,).
        x: tokens (B, n, C), of the weights' dtype.
        ops: the table of operations.
        drop_rate: dropout after the GELU and after fc2, in [0, 1).
        rng: source of the dropout masks; None for inference.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, n, C) of x's dtype, and the cache.
    """
    hidden, fc1_cache = ops[linear].forward(p.fc1, x, ops, keep=keep)  # (B, n, E*C)
    hidden, gelu_cache = ops[gelu].forward(None, hidden, ops, keep=keep)  # (B, n, E*C)
    hidden, drop1_cache = ops[dropout].forward(None, hidden, ops, drop_rate, rng, keep)
    y, fc2_cache = ops[linear].forward(p.fc2, hidden, ops, keep=keep)  # (B, n, C)
    y, drop2_cache = ops[dropout].forward(None, y, ops, drop_rate, rng, keep)
    if not keep:
        return y, None
    return y, MLPCache(fc1_cache, gelu_cache, drop1_cache, fc2_cache, drop2_cache)


def mlp_backward(
    p: MLPParams, cache: MLPCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, MLPParams]:
    """Gradients of :func:`mlp_forward`: the backward of each step, in reverse order.

    With mask_1 and mask_2 the factors of the two dropouts::

        dhidden = ((mask_2 * dy) W_2) * mask_1 * GELU'(fc1(x))      dx = dhidden W_1

    Args:
        p: the forward's weights, fc1.weight (E*C, C).
        cache: from the forward.
        dy: dL/dy (B, n, C).
        ops: the table that the forward was given.

    Returns:
        dx (B, n, C) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    # y = dropout(fc2(hidden))
    dy, _ = ops[dropout].backward(None, cache.drop2, dy, ops)  # (B, n, C)
    dhidden, dfc2 = ops[linear].backward(p.fc2, cache.fc2, dy, ops)  # (B, n, E*C)
    # hidden = dropout(gelu(fc1(x)))
    dhidden, _ = ops[dropout].backward(None, cache.drop1, dhidden, ops)  # (B, n, E*C)
    dhidden, _ = ops[gelu].backward(None, cache.gelu, dhidden, ops)  # (B, n, E*C)
    dx, dfc1 = ops[linear].backward(p.fc1, cache.fc1, dhidden, ops)  # (B, n, C)
    return dx, MLPParams(dfc1, dfc2)


mlp = Operation(mlp_forward, mlp_backward)
