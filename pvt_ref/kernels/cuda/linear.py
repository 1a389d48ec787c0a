"""Linear on CUDA: the forward's product also adds the bias; the backward is two products."""

from pvt_ref.arrays import Array, array_module
from pvt_ref.kernels.cuda.launch import Cuda, Kernel
from pvt_ref.kernels.cuda.product import multiply
from pvt_ref.layers.linear import LinearCache, LinearParams, linear
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops


def linear_rows(
    p: LinearParams, x: Array, cuda: Cuda, residual: Array | None = None, has_gelu: bool = False
) -> Array:
    """x W^T + b (..., C_out), then GELU if has_gelu, then + residual (..., C_out)."""
    xp, (C_out, C_in) = array_module(x), p.weight.shape
    rows = xp.reshape(x, (-1, C_in))  # (rows, C_in)
    if residual is not None:
        residual = xp.reshape(residual, (-1, C_out))  # (rows, C_out)
    y = multiply(rows, xp.matrix_transpose(p.weight), cuda, p.bias, residual, has_gelu)
    return xp.reshape(y, (*x.shape[:-1], C_out))


def linear_forward(
    p: LinearParams, x: Array, ops: Ops, keep: bool = True, *, cuda: Cuda
) -> tuple[Array, LinearCache | None]:
    """As :func:`pvt_ref.layers.linear.linear_forward`."""
    return linear_rows(p, x, cuda), LinearCache(x) if keep else None


def linear_backward(
    p: LinearParams, cache: LinearCache, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, LinearParams]:
    """As :func:`pvt_ref.layers.linear.linear_backward`."""
    xp = array_module(dy)
    C_out, C_in = p.weight.shape
    dy_rows = xp.reshape(dy, (-1, C_out))  # (rows, C_out)
    x_rows = xp.reshape(cache.x, (-1, C_in))  # (rows, C_in)
    dbias = None
    if p.bias is not None:
        dbias, _ = ops[sum_rows].forward(None, dy_rows, ops, keep=False)  # (C_out,)
    dweight = multiply(xp.matrix_transpose(dy_rows), x_rows, cuda)  # (C_out, C_in)
    dx = xp.reshape(multiply(dy_rows, p.weight, cuda), cache.x.shape)  # (..., C_in)
    return dx, LinearParams(dweight, dbias)


linear_kernel = Kernel(linear, linear_forward, linear_backward)
