"""The MLP on CUDA: the bias of its first product is added by GELU's kernel, forward and backward.

Only the product itself is kept for the backward, of the two arrays of a block that are widest.
"""

from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.draws import Rng
from pvt_ref.kernels.cuda.launch import (
    THREADS,
    Cuda,
    Function,
    Kernel,
    blocks_for,
    is_float32,
    packed,
)
from pvt_ref.kernels.cuda.sum_rows import add_parts, number_of_parts
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.linear import LinearCache, LinearParams, linear
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record

BIAS_GELU = Function("mlp.cu", "bias_gelu")
BIAS_GELU_BACKWARD = Function("mlp.cu", "bias_gelu_backward")


@record
class MLPCache:
    """What :func:`mlp_backward` needs: the input x, and the product h = x W_1^T without bias."""

    x: Array
    h: Array


def mlp_forward(
    p: MLPParams,
    x: Array,
    ops: Ops,
    drop_rate: float = 0.0,
    rng: Rng = None,
    keep: bool = True,
    *,
    cuda: Cuda,
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.blocks.mlp.mlp_forward`, which computes where there is dropout."""
    dropped = rng is not None and drop_rate > 0.0
    if dropped or p.fc1.bias is None or p.fc1.bias.size % 4 or not is_float32(x) or not x.size:
        return mlp.forward(p, x, ops, drop_rate, rng, keep)
    product = LinearParams(p.fc1.weight, None)
    h = packed(linear.forward(product, x, ops, keep=False)[0])  # (B, n, E*C)
    hidden = array_module(x).empty_like(h)
    count, columns = h.size // 4, h.shape[-1] // 4
    arguments = (h, packed(p.fc1.bias), hidden, count, columns)
    cuda.launch(BIAS_GELU, (blocks_for(count),), (THREADS,), arguments)
    y, _ = linear.forward(p.fc2, hidden, ops, keep=False)  # (B, n, C)
    return y, MLPCache(x, h) if keep else None


def mlp_backward(
    p: MLPParams, cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, MLPParams]:
    """As :func:`pvt_ref.blocks.mlp.mlp_backward`, the sum for fc1's bias included."""
    if not isinstance(cache, MLPCache):
        return mlp.backward(p, cache, dy, ops)
    xp, width = array_module(dy), cache.h.shape[-1]
    dy_rows = xp.reshape(dy, (-1, dy.shape[-1]))  # (rows, C)
    # y = fc2(hidden), as far as hidden need not be known
    dh = packed(dy_rows @ p.fc2.weight)  # (rows, E*C), dL/dhidden so far
    dbias2 = None
    if p.fc2.bias is not None:
        dbias2, _ = ops[sum_rows].forward(None, dy_rows, ops, keep=False)
    # hidden = gelu(h + bias)
    hidden, rows = xp.empty_like(dh), len(dh)
    parts = xp.empty((number_of_parts(rows, width // 4, cuda), width), xp.float64)
    grid, threads = (blocks_for(width // 4, 32), len(parts)), (32, 8)
    arguments = (cache.h, packed(_bias_of(p.fc1)), dh, hidden, parts, rows, width // 4)
    cuda.launch(BIAS_GELU_BACKWARD, grid, threads, arguments)
    dbias1 = add_parts(parts, cuda)
    # y = fc2(hidden), the rest; h = x W_1^T
    dfc2 = LinearParams(xp.matrix_transpose(dy_rows) @ hidden, dbias2)
    product = LinearParams(p.fc1.weight, None)
    dh = xp.reshape(dh, cache.h.shape)  # (B, n, E*C)
    dx, dproduct = linear.backward(product, LinearCache(cache.x), dh, ops)
    return dx, MLPParams(LinearParams(dproduct.weight, dbias1), dfc2)


def _bias_of(p: LinearParams) -> Array:
    assert p.bias is not None  # or the forward would have left it to the readable one
    return p.bias


mlp_kernel = Kernel(mlp, mlp_forward, mlp_backward, (linear, gelu, dropout, sum_rows))
