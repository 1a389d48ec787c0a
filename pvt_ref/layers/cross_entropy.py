"""Softmax cross-entropy with label smoothing: what a classifier is trained on.

Label smoothing is that of Szegedy et al. 2016 (arXiv 1512.00567, section 7).
"""

from numbers import Real

import numpy as np

from pvt_ref.arrays import (
    FLOAT_DTYPES,
    Array,
    array_module,
    dtype_name,
    from_host,
    is_array,
    library_and_dtype,
    same_library,
)
from pvt_ref.errors import ArrayTypeError, RangeError, ShapeError


def cross_entropy(
    logits: Array, targets: Array, label_smoothing: float = 0.0, reduction: str = "mean"
) -> tuple[Array, Array]:
    """Loss and its gradient together, since they share the softmax.

    With t the target distribution, smoothed to ``(1 - s) t + s / K`` (Szegedy et al. 2016, arXiv
    1512.00567, section 7), and p = Softmax(logits)::

        L            = -1/B sum_b sum_k t_k log p_k
        dL/dlogits_j = -1/B sum_k t_k (1[k = j] - p_j)
                     =  1/B (p_j sum_k t_k - t_j)         (p - t) / B if t sums to 1

    where 1/B is left out if reduction is "sum".

    Args:
        logits: (B, K) float32 or float64.
        targets: (B,) integers in [0, K), or (B, K) floats, a distribution a row (mixup).
        label_smoothing: s in [0, 1].
        reduction: ``"mean"`` over the batch, or ``"sum"``.

    Returns:
        loss, a scalar array, and dlogits (B, K), both of the logits' dtype.

    Raises:
        ArrayTypeError: if logits or targets are no arrays, have another dtype, or lie on different
            devices.
        ShapeError: if logits are not (B, K) or are empty, or targets do not have their shape.
        RangeError: for a label outside [0, K), an s outside [0, 1], or another reduction.
    """
    xp = array_module(logits)
    t = _distribution(logits, targets, label_smoothing)  # (B, K)
    if reduction not in ("mean", "sum"):
        raise RangeError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    share = 1 / logits.shape[0] if reduction == "mean" else 1.0
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)  # (B, K)
    p = xp.exp(shifted)  # (B, K), not yet divided by its sum
    total = xp.sum(p, axis=-1, keepdims=True)  # (B, 1)
    p /= total
    log_p = shifted - xp.log(total)  # (B, K)
    log_p = xp.where(t == 0, xp.zeros_like(log_p), log_p)  # 0 log 0 = 0: a masked class costs 0
    loss = -xp.sum(t * log_p) * share  # ()
    # d log_p_k / d logits_j = 1[j = k] - p_j
    dlogits = (p * xp.sum(t, axis=-1, keepdims=True) - t) * share  # (B, K)
    return loss, dlogits


def _distribution(logits: Array, targets: Array, smoothing: float) -> Array:
    """Checked and smoothed targets (B, K)."""
    if dtype_name(logits) not in FLOAT_DTYPES:
        raise ArrayTypeError(f"logits have dtype {logits.dtype}; they must be float32 or float64")
    if logits.ndim != 2 or 0 in logits.shape:
        raise ShapeError(f"logits have shape {tuple(logits.shape)}; they must be (B, K), not empty")
    if not isinstance(smoothing, Real) or not 0 <= smoothing <= 1:
        raise RangeError(f"label_smoothing is {smoothing!r}; it must be in [0, 1]")
    B, K = logits.shape
    if not is_array(targets):
        raise ArrayTypeError(
            f"targets are a {type(targets).__name__}; they must be an array: (B,) integer labels "
            f"or (B, K) floats. numpy.asarray(targets) makes one of numbers"
        )
    if not same_library(logits, targets):
        raise ArrayTypeError(
            f"logits are {library_and_dtype(logits)} and targets {library_and_dtype(targets)}; "
            f"both must lie on one device. Move one with to_device or to_numpy"
        )
    xp = array_module(logits)
    if xp.isdtype(targets.dtype, "integral"):
        if tuple(targets.shape) != (B,):
            raise ShapeError(
                f"integer targets have shape {tuple(targets.shape)}; for logits {(B, K)} they "
                f"must be ({B},), one label a sample"
            )
        low, high = int(xp.min(targets)), int(xp.max(targets))
        if low < 0 or high >= K:
            raise RangeError(
                f"labels run from {low} to {high}, but logits {(B, K)} know classes 0 to {K - 1}. "
                f"Is the label one-based, or num_classes of another data set?"
            )
        labels = xp.expand_dims(xp.astype(targets, xp.int64), axis=-1)  # (B, 1)
        t = xp.astype(labels == from_host(np.arange(K), like=logits), logits.dtype)  # one-hot
    elif xp.isdtype(targets.dtype, "real floating"):
        if tuple(targets.shape) != (B, K):
            raise ShapeError(
                f"soft targets have shape {tuple(targets.shape)}; for logits {(B, K)} they must "
                f"be the same, a distribution a row"
            )
        t = xp.astype(targets, logits.dtype)
    else:
        raise ArrayTypeError(
            f"targets have dtype {targets.dtype}; they must be integer labels (B,) or floats (B, K)"
        )
    if smoothing == 0.0:
        return t
    smoothing = float(smoothing)  # a NumPy double would widen float32
    return t * (1 - smoothing) + smoothing / K
