"""Scores of a segmentation: mean intersection over union, pixel accuracy.

All follow from the confusion matrix, accumulated over the pictures; averaging the scores of
single pictures would give another number. As in mmsegmentation, pixels with an ignored label are
left out first, whatever was predicted there.
"""

import math

import numpy as np

from pvt_ref.checks import check_number
from pvt_ref.errors import ArrayTypeError, RangeError, ShapeError

#: The label of ignored pixels.
IGNORED = 255


def count_pixels(
    answers: np.ndarray, labels: np.ndarray, num_classes: int, ignored: int = IGNORED
) -> np.ndarray:
    """The confusion matrix of predicted and true classes, in pixels.

    Args:
        answers: (...) integers in [0, K), the predicted classes.
        labels: true classes, of the same shape.
        num_classes: K.
        ignored: the label of pixels that do not count.

    Returns:
        (K, K) int64: rows are true classes, columns predictions. Add those of all pictures.

    Raises:
        ArrayTypeError, ShapeError: if the two are not NumPy arrays of integers of one shape.
        RangeError: if a class is outside [0, K).
    """
    num_classes = check_number("num_classes", num_classes, least=1, most=2**12, whole=True)
    ignored = check_number("ignored", ignored, least=-(2**31), most=2**31, whole=True)
    for name, x in (("answers", answers), ("labels", labels)):
        if not isinstance(x, np.ndarray) or x.dtype.kind not in "iu":
            kind = getattr(x, "dtype", type(x).__name__)
            raise ArrayTypeError(f"{name} are {kind}; they must be a NumPy array of integers")
    if answers.shape != labels.shape:
        what = f"answers have shape {answers.shape} and labels {labels.shape}"
        raise ShapeError(f"{what}; both must be of one size. Resize the logits, not the labels")
    counted = labels != ignored
    true, answer = labels[counted].astype(np.int64), answers[counted].astype(np.int64)
    for name, x in (("labels", true), ("answers", answer)):
        if x.size and not 0 <= x.min() <= x.max() < num_classes:
            what = f"{name} run from {x.min()} to {x.max()}, but classes are 0 to {num_classes - 1}"
            raise RangeError(f"{what}. Labels of pixels that do not count must be {ignored}")
    cells = np.bincount(true * num_classes + answer, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)  # (K, K)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, (K,) float64; NaN for a class that never occurs.

    Args:
        counts: (K, K) of :func:`count_pixels`.

    Returns:
        counts_kk / (sum of row k + sum of column k - counts_kk).

    Raises:
        ArrayTypeError, ShapeError: if counts are not such a matrix.
    """
    _check_counts(counts)
    hits = counts.diagonal().astype(np.float64)
    union = counts.sum(axis=0) + counts.sum(axis=1) - hits
    return np.where(union > 0, hits / np.where(union > 0, union, 1), np.nan)


def mean_iou(counts: np.ndarray) -> float:
    """The mean of :func:`class_iou` over the classes that occur; NaN if there is none.
    Raises: ArrayTypeError, ShapeError as that function.

    Args:
        counts: (K, K) of :func:`count_pixels`.

    Returns:
        A number from 0 to 1.
    """
    iou = class_iou(counts)
    there = iou[~np.isnan(iou)]
    return float(there.mean()) if there.size else math.nan


def pixel_accuracy(counts: np.ndarray) -> float:
    """The share of correct pixels among those that count; NaN if none does.
    Raises: ArrayTypeError, ShapeError as :func:`class_iou`.

    Args:
        counts: (K, K) of :func:`count_pixels`.

    Returns:
        A number from 0 to 1.
    """
    _check_counts(counts)
    total = int(counts.sum())
    return int(counts.diagonal().sum()) / total if total else math.nan


def _check_counts(counts: np.ndarray) -> None:
    """Refuses anything but a confusion matrix. Raises: ArrayTypeError or ShapeError."""
    if not isinstance(counts, np.ndarray) or counts.dtype.kind not in "iu":
        kind = getattr(counts, "dtype", type(counts).__name__)
        raise ArrayTypeError(f"counts are {kind}; they must be integers (K, K), of count_pixels")
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ShapeError(f"counts have shape {counts.shape}; they must be (K, K), of count_pixels")
