"""Layer norm over the channels of each token (Ba et al. 2016, arXiv 1607.06450), with ddof 0."""

from pvt_ref.arrays import Array, array_module
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class LayerNormParams:
    """Scale (weight) and shift (bias), (C,) each, or their gradients; 1 and 0 when drawn."""

    weight: Array
    bias: Array


@record
class LayerNormCache:
    """x_hat (..., C), the normalised tokens before weight and bias, and rstd (..., 1)."""

    x_hat: Array
    rstd: Array


def layer_norm_forward(
    p: LayerNormParams, x: Array, ops: Ops, eps: float, keep: bool = True
) -> tuple[Array, LayerNormCache | None]:
    """y = weight * (x - mean) / sqrt(variance + eps) + bias, token by token.

    Args:
        p: weight and bias, (C,) each.
        x: (..., C), of the weights' dtype: float32 or float64.
        ops: not used.
        eps: added to the variance.
        keep: whether to return a cache for the backward.

    Returns:
        y (..., C) of x's dtype, and the cache.
    """
    xp = array_module(x)
    x_hat = x - xp.mean(x, axis=-1, keepdims=True)  # (..., C), centred so far
    # rather than var, which takes |x|^2: the tests differentiate with complex numbers
    variance = xp.mean(x_hat * x_hat, axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / xp.sqrt(variance + eps)  # (..., 1)
    x_hat *= rstd
    if not keep:
        x_hat *= p.weight
        x_hat += p.bias
        return x_hat, None
    return x_hat * p.weight + p.bias, LayerNormCache(x_hat, rstd)


def layer_norm_backward(
    p: LayerNormParams, cache: LayerNormCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, LayerNormParams]:
    """Gradients of :func:`layer_norm_forward`.

    x enters x_hat three times: as itself, through the mean and through the variance. With
    g = dL/dx_hat, every mean over the C channels of one token, and u the centred token::

        u     = x - mean(x)
        rstd  = (mean(u^2) + eps)^(-1/2)      d rstd / d u_j = -rstd^3 u_j / C
        x_hat = u * rstd

        dL/du_j = g_j rstd + sum_k g_k u_k * (-rstd^3 u_j / C)      as itself, and by rstd
                = rstd * (g_j - x_hat_j mean(g * x_hat))            since u = x_hat / rstd
        dL/dx_j = dL/du_j - mean(dL/du)                             since du_k/dx_j = 1[k = j] - 1/C
                = rstd * (g_j - mean(g) - x_hat_j mean(g * x_hat))  since mean(x_hat) = 0

    Args:
        p: the forward's weight and bias, (C,) each.
        cache: from the forward.
        dy: dL/dy (..., C).
        ops: the table of operations; sums over rows come from it.

    Returns:
        dx (..., C) and the gradients of weight and bias, (C,) each, all of dy's dtype.
    """
    xp = array_module(dy)
    rows = (-1, dy.shape[-1])
    # y = x_hat * weight + bias
    dbias, _ = ops[sum_rows].forward(None, xp.reshape(dy, rows), ops, keep=False)  # (C,)
    products = xp.reshape(dy * cache.x_hat, rows)  # (rows, C)
    dweight, _ = ops[sum_rows].forward(None, products, ops, keep=False)  # (C,)
    dx_hat = dy * p.weight  # (..., C)
    # x_hat = (x - mean) * rstd
    along_x_hat = xp.mean(dx_hat * cache.x_hat, axis=-1, keepdims=True)  # (..., 1)
    dx = dx_hat - xp.mean(dx_hat, axis=-1, keepdims=True)  # (..., C)
    dx -= cache.x_hat * along_x_hat
    dx *= cache.rstd
    return dx, LayerNormParams(dweight, dbias)


layer_norm = Operation(layer_norm_forward, layer_norm_backward)
