"""The MLP on CUDA: GELU's kernel adds the bias of the first product, forward and backward.

Where nothing is kept, the product's kernel does both if it can. Of the two widest arrays of a
block, the product and its GELU, only the product is kept for the backward.
"""

from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.draws import Rng, Source
from pvt_ref.kernels.cuda.launch import (
    THREADS,
    Cuda,
    Function,
    Kernel,
    blocks_for,
    is_float32,
    packed,
)
from pvt_ref.kernels.cuda.linear import linear_rows
from pvt_ref.kernels.cuda.product import fuses_gelu, multiply
from pvt_ref.kernels.cuda.sum_rows import add_parts, number_of_parts
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.linear import LinearParams, linear
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


def can_mlp(p: MLPParams, x: Array, drop_rate: float, rng: Source) -> bool:
    """Whether the kernels can compute it: the width fits, and nothing is dropped."""
    fits = p.fc1.bias is not None and p.fc1.bias.size % 4 == 0 and is_float32(x) and x.size > 0
    return fits and (rng is None or drop_rate == 0.0)


def mlp_rows(
    p: MLPParams, x: Array, keep: bool, cuda: Cuda, residual: Array | None = None
) -> tuple[Array, MLPCache | None]:
    """The MLP of x (B, n, C), to which a residual of the same shape is added, and its cache."""
    if not keep and fuses_gelu(x, p.fc1.weight.shape[0], cuda):
        hidden = linear_rows(p.fc1, x, cuda, has_gelu=True)  # (B, n, E*C)
        return linear_rows(p.fc2, hidden, cuda, residual), None  # (B, n, C)
    h = packed(linear_rows(LinearParams(p.fc1.weight, None), x, cuda))  # (B, n, E*C)
    hidden = array_module(x).empty_like(h)
    count, columns = h.size // 4, h.shape[-1] // 4
    arguments = (h, packed(_bias_of(p.fc1)), hidden, count, columns)
    cuda.launch(BIAS_GELU, (blocks_for(count),), (THREADS,), arguments)
    y = linear_rows(p.fc2, hidden, cuda, residual)  # (B, n, C)
    return y, MLPCache(x, h) if keep else None


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
    """As :func:`pvt_ref.blocks.mlp.mlp_forward`, which is used if there is dropout."""
    if not can_mlp(p, x, drop_rate, rng):
        return mlp.forward(p, x, ops, drop_rate, rng, keep)
    return mlp_rows(p, x, keep, cuda)


def mlp_backward(
    p: MLPParams, cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, MLPParams]:
    """As :func:`pvt_ref.blocks.mlp.mlp_backward`, the sum for fc1's bias included."""
    if not isinstance(cache, MLPCache):
        return mlp.backward(p, cache, dy, ops)
    xp, width = array_module(dy), cache.h.shape[-1]
    dy_rows = xp.reshape(dy, (-1, dy.shape[-1]))  # (rows, C)
    # y = fc2(hidden), the part that does not need hidden
    dh = packed(multiply(dy_rows, p.fc2.weight, cuda))  # (rows, E*C), dL/dhidden so far
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
    dfc2 = LinearParams(multiply(xp.matrix_transpose(dy_rows), hidden, cuda), dbias2)
    x_rows = xp.reshape(cache.x, (rows, -1))  # (rows, C)
    dfc1 = LinearParams(multiply(xp.matrix_transpose(dh), x_rows, cuda), dbias1)
    dx = xp.reshape(multiply(dh, p.fc1.weight, cuda), cache.x.shape)  # (B, n, C)
    return dx, MLPParams(dfc1, dfc2)


def _bias_of(p: LinearParams) -> Array:
    assert p.bias is not None  # else the readable forward would have computed
    return p.bias


mlp_kernel = Kernel(mlp, mlp_forward, mlp_backward, (linear, gelu, dropout, sum_rows))
