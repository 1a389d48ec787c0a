"""Softmax cross-entropy with label smoothing: what a classifier is trained on.

Label smoothing is that of Szegedy et al. 2016 (arXiv 1512.00567, section 7).
"""

import math
from numbers import Real
from typing import Any

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
from pvt_ref.checks import is_whole
from pvt_ref.errors import ArrayTypeError, RangeError, ShapeError, shown


def cross_entropy(
    logits: Array,
    targets: Array,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    *,
    ignore_index: int | None = None,
    class_weights: Array | None = None,
) -> tuple[Array, Array]:
    """Loss and its gradient together, since they share the softmax.

    With t the target distribution, smoothed to ``(1 - s) t + s / K``, and p = Softmax(logits)::

        L            = -1/B sum_b sum_k t_k log p_k
        dL/dlogits_j = -1/B sum_k t_k (1[k = j] - p_j)
                     =  1/B (p_j sum_k t_k - t_j)         (p - t) / B if t sums to 1

    where 1/B is left out if reduction is "sum". In a map of logits every cell is a sample of its
    own, so B H W stands for B. Samples with the label ignore_index are not counted in B and add
    nothing to L; if there are no others, L and its gradient are 0 (PyTorch's mean is NaN there).
    MMSegmentation counts them, so that they make the others weigh less: "mean_of_all".

    With class weights w, t_k is multiplied by w_k, and the sum of the labels' weights stands for B.
    It does not with "mean_of_all", nor if targets are distributions.

    Args:
        logits: (B, K) float32 or float64; or maps (B, K, H, W).
        targets: (B,) integers in [0, K), or (B, K) floats, a distribution a row (mixup); for maps
            (B, H, W) or (B, K, H, W).
        label_smoothing: s in [0, 1].
        reduction: ``"mean"`` over the samples that count, ``"mean_of_all"``, or ``"sum"``.
        ignore_index: a label to leave out, such as 255 or -100; None leaves out none.
        class_weights: (K,) floats, at least 0; None weighs all classes alike.

    Returns:
        loss, a scalar array, and dlogits, in the logits' shape, both of their dtype.

    Raises:
        ArrayTypeError: if an argument is no array, of another dtype, or on another device.
        ShapeError: if a shape is another, or logits are empty.
        RangeError: for a label outside [0, K), an s outside [0, 1], another reduction, a weight
            below 0 or not finite, or an ignore_index that is no whole number or comes with targets
            that are no labels.
    """
    xp = array_module(logits)
    _check(logits, label_smoothing, reduction, ignore_index)
    if class_weights is not None:
        class_weights = _check_weights(class_weights, logits)
    smoothing = float(label_smoothing)
    t, counted = distribution(logits, targets, smoothing, ignore_index, class_weights)
    shape, logits = logits.shape, _to_rows(logits)  # (rows, K), a row a sample
    divisor = {"mean": counted, "mean_of_all": logits.shape[0], "sum": 1}[reduction]
    share = 1 / (divisor or 1)  # without a sample that counts, what is divided is 0
    log_p = logits - xp.max(logits, axis=-1, keepdims=True)  # (rows, K), not yet normalised
    p = xp.exp(log_p)  # (rows, K), not yet divided by its sum
    total = xp.sum(p, axis=-1, keepdims=True)  # (rows, 1)
    p /= total
    log_p -= xp.log(total)  # (rows, K)
    log_p = xp.where(t == 0, xp.zeros_like(total), log_p)  # 0 log 0 = 0: a masked class costs 0
    loss = -xp.sum(t * log_p) * share  # ()
    # d log_p_k / d logits_j = 1[j = k] - p_j
    dlogits = (p * xp.sum(t, axis=-1, keepdims=True) - t) * share  # (rows, K)
    return loss, _from_rows(dlogits, shape)


def _to_rows(x: Array) -> Array:
    """x (B, K) as it is; a map x (B, K, H, W) as (B*H*W, K)."""
    if x.ndim == 2:
        return x
    xp = array_module(x)
    return xp.reshape(xp.permute_dims(x, (0, 2, 3, 1)), (-1, x.shape[1]))  # (B*H*W, K)


def _from_rows(rows: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of :func:`_to_rows`, to an array of that shape."""
    if len(shape) == 2:
        return rows
    xp = array_module(rows)
    B, K, H, W = shape
    return xp.permute_dims(xp.reshape(rows, (B, H, W, K)), (0, 3, 1, 2))  # (B, K, H, W)


def _check(logits: Array, smoothing: Any, reduction: Any, ignore_index: Any) -> None:
    if dtype_name(logits) not in FLOAT_DTYPES:
        raise ArrayTypeError(f"logits have dtype {logits.dtype}; they must be float32 or float64")
    if logits.ndim not in (2, 4) or 0 in logits.shape:
        raise ShapeError(
            f"logits have shape {tuple(logits.shape)}; they must be (B, K), not empty, or maps "
            f"(B, K, H, W)"
        )
    if not isinstance(smoothing, Real) or not 0 <= smoothing <= 1:  # type: ignore[operator]
        raise RangeError(f"label_smoothing is {shown(smoothing)}; it must be in [0, 1]")
    if not isinstance(reduction, str) or reduction not in ("mean", "mean_of_all", "sum"):
        given = shown(reduction)
        raise RangeError(f"reduction is {given}; it must be 'mean', 'mean_of_all' or 'sum'")
    if ignore_index is not None and not is_whole(ignore_index):
        given = shown(ignore_index)
        raise RangeError(f"ignore_index is {given}; it must be a whole number or None")


def _check_weights(weights: Any, logits: Array) -> Array:
    """Class weights (K,) in the dtype of the logits."""
    shape, K = tuple(logits.shape), logits.shape[1]
    advice = "numpy.ones(K, dtype=numpy.float32) weighs all classes alike, and so does None"
    if not is_array(weights) or not same_library(weights, logits):
        given = library_and_dtype(weights) if is_array(weights) else f"a {type(weights).__name__}"
        raise ArrayTypeError(
            f"class_weights are {given}, and logits {library_and_dtype(logits)}; weights must be "
            f"an array beside the logits, ({K},) floats. {advice}"
        )
    xp = array_module(logits)
    if not xp.isdtype(weights.dtype, "real floating"):
        raise ArrayTypeError(
            f"class_weights have dtype {weights.dtype}; they must be floats. {advice}"
        )
    if tuple(weights.shape) != (K,):
        raise ShapeError(
            f"class_weights have shape {tuple(weights.shape)}; for logits {shape} they must be "
            f"({K},), one for each class. {advice}"
        )
    if not bool(xp.all(xp.isfinite(weights) & (weights >= 0))):
        raise RangeError(
            "class_weights hold numbers below 0, or that are not finite: the inverse frequency of "
            "a class that never occurs is infinite. Give such a class 0"
        )
    return xp.astype(weights, logits.dtype)


def distribution(
    logits: Array,
    targets: Array,
    smoothing: float,
    ignore_index: int | None,
    class_weights: Array | None,
) -> tuple[Array, float]:
    """Targets, smoothed and weighted, and what a mean divides by: how many rows count.

    The targets are (rows, K) for logits (B, K) or (B, K, H, W). Rows of labels count by weight.
    """
    shape, K = tuple(logits.shape), logits.shape[1]
    cells = (shape[0], *shape[2:])  # (B,) or (B, H, W)
    count = math.prod(cells)
    if not is_array(targets):
        raise ArrayTypeError(
            f"targets are a {type(targets).__name__}; they must be an array: (B,) integer labels "
            f"or (B, K) floats, for maps (B, H, W) or (B, K, H, W). numpy.asarray(targets) makes "
            f"one of numbers"
        )
    if not same_library(logits, targets):
        raise ArrayTypeError(
            f"logits are {library_and_dtype(logits)} and targets {library_and_dtype(targets)}; "
            f"both must lie on one device. Move one with to_device or to_numpy"
        )
    xp = array_module(logits)
    if xp.isdtype(targets.dtype, "real floating"):
        if tuple(targets.shape) != shape:
            raise ShapeError(
                f"soft targets have shape {tuple(targets.shape)}; for logits {shape} they must "
                f"be the same, a distribution a row"
            )
        if ignore_index is not None:
            raise RangeError(
                f"ignore_index is {ignore_index}, and the targets are no labels but distributions. "
                f"A row of zeros ignores a sample; divide by the count yourself (reduction='sum')"
            )
        t = xp.astype(targets, logits.dtype)
        t = _smooth(_to_rows(t), smoothing)  # (rows, K)
        return t if class_weights is None else t * class_weights, count
    if not xp.isdtype(targets.dtype, "integral"):
        raise ArrayTypeError(
            f"targets have dtype {targets.dtype}; they must be integer labels (B,) or floats "
            f"(B, K), for maps (B, H, W) or (B, K, H, W)"
        )
    if tuple(targets.shape) != cells:
        raise ShapeError(
            f"integer targets have shape {tuple(targets.shape)}; for logits {shape} they must be "
            f"{cells}, one label a sample"
        )
    labels = xp.reshape(targets, (-1, 1))  # (rows, 1)
    ignored = None
    limits = xp.iinfo(labels.dtype)
    if ignore_index is not None and limits.min <= ignore_index <= limits.max:
        ignored = labels == int(ignore_index)  # (rows, 1)
        labels = xp.where(ignored, xp.zeros_like(labels), labels)  # any class: its row is cleared
        count -= int(xp.sum(xp.astype(ignored, xp.int64)))
    low, high = int(xp.min(labels)), int(xp.max(labels))
    if low < 0 or high >= K:
        raise RangeError(
            f"labels run from {low} to {high}, but logits {shape} know classes 0 to {K - 1}. Is "
            f"the label one-based, num_classes of another data set, or a label to be left out "
            f"(ignore_index)?"
        )
    labels = xp.astype(labels, xp.int64)
    one_hot = xp.astype(labels == from_host(np.arange(K), like=logits), logits.dtype)  # (rows, K)
    t = _smooth(one_hot, smoothing)
    if ignored is not None:
        t = xp.where(ignored, xp.zeros_like(t), t)
    if class_weights is None:
        return t, count
    weight = xp.take(class_weights, xp.reshape(labels, (-1,)), axis=0)  # (rows,)
    if ignored is not None:
        weight = xp.where(xp.reshape(ignored, (-1,)), xp.zeros_like(weight), weight)  # (rows,)
    return t * class_weights, float(xp.sum(weight, dtype=xp.float64))


def _smooth(t: Array, smoothing: float) -> Array:
    """(1 - s) t + s / K."""
    return t if smoothing == 0.0 else t * (1 - smoothing) + smoothing / t.shape[-1]
