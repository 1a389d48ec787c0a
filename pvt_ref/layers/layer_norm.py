"""Layer norm over the channels of each token (Ba et al. 2016), variance with ddof 0."""

from dataclasses import dataclass

from pvt_ref.arrays import Array, array_module, sum_in_float64


@dataclass(frozen=True, slots=True, eq=False)
class LayerNormParams:
    """Scale and shift, or their gradients."""

    weight: Array  # (C,)
    bias: Array  # (C,)


@dataclass(frozen=True, slots=True, eq=False)
class LayerNormCache:
    x_hat: Array  # (..., C), the normalised tokens
    rstd: Array  # (..., 1), 1 / sqrt(variance + eps)


def layer_norm_forward(
    p: LayerNormParams, x: Array, eps: float, keep: bool = True
) -> tuple[Array, LayerNormCache | None]:
    """y = weight * (x - mean) / sqrt(variance + eps) + bias, token by token.

    Args:
        p: weight and bias, (C,) each.
        x: (..., C).
        eps: added to the variance.
        keep: whether a cache for the backward is returned; without it, it is None.

    Returns:
        y (..., C) and the cache.
    """
    xp = array_module(x)
    x_hat = x - xp.mean(x, axis=-1, keepdims=True)  # (..., C), centred so far
    # not abs(): a complex step must pass through
    variance = xp.mean(x_hat * x_hat, axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / xp.sqrt(variance + eps)  # (..., 1)
    x_hat *= rstd
    if not keep:
        x_hat *= p.weight
        x_hat += p.bias
        return x_hat, None
    return x_hat * p.weight + p.bias, LayerNormCache(x_hat, rstd)


def layer_norm_backward(
    p: LayerNormParams, cache: LayerNormCache, dy: Array
) -> tuple[Array, LayerNormParams]:
    """Gradients of :func:`layer_norm_forward`.

    x enters x_hat three times: as itself, through the mean and through the variance. With
    g = dL/dx_hat and means over the C channels of the token, the three add up to::

        dL/dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))

    Args:
        dy: dL/dy (..., C).

    Returns:
        dx (..., C) and the gradients of weight and bias.
    """
    xp = array_module(dy)
    tokens = tuple(range(dy.ndim - 1))  # every axis but the channels
    # y = x_hat * weight + bias
    dbias = sum_in_float64(dy, axis=tokens)  # (C,)
    dweight = sum_in_float64(dy * cache.x_hat, axis=tokens)  # (C,)
    dx_hat = dy * p.weight  # (..., C)
    # x_hat = (x - mean) * rstd
    along_x_hat = xp.mean(dx_hat * cache.x_hat, axis=-1, keepdims=True)  # (..., 1)
    dx = dx_hat - xp.mean(dx_hat, axis=-1, keepdims=True)  # (..., C)
    dx -= cache.x_hat * along_x_hat
    dx *= cache.rstd
    return dx, LayerNormParams(dweight, dbias)
