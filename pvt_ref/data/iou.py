"""How well a segmentation agrees with the truth: mean intersection over union, pixel accuracy.

Everything follows from the confusion matrix, which is added up picture by picture; averaging the
scores of pictures would be another number. As mmsegmentation: pixels whose label is to be ignored
are left out beforehand, also where their class is predicted.
"""

import math

import numpy as np

from pvt_ref.checks import check_number
from pvt_ref.errors import ArrayTypeError, RangeError, ShapeError

#: The label of pixels that count nowhere.
IGNORED = 255


def count_pixels(
    answers: np.ndarray, labels: np.ndarray, num_classes: int, ignored: int = IGNORED
) -> np.ndarray:
    """How many pixels of each class were taken for which.

    Args:
        answers: (...) integers in [0, K), classes that were predicted.
        labels: true classes, of the same shape.
        num_classes: K.
        ignored: the label of pixels that do not count.

    Returns:
        (K, K) int64: row the true class, column the answer. Add those of all pictures.

    Raises:
        ArrayTypeError, ShapeError: if the two are not NumPy arrays of integers of one shape.
        RangeError: if a class is outside of [0, K).
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
            what = f"{name} run from {x.min()} to {x.max()}, and classes are 0 to {num_classes - 1}"
            raise RangeError(f"{what}. Labels of pixels that do not count must be {ignored}")
    cells = np.bincount(true * num_classes + answer, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)  # (K, K)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, (K,) float64; NaN for one that is nowhere.

    Args:
        counts: (K, K) of :func:`count_pixels`.

    Returns:
        n_kk / (sum of row k + sum of column k - n_kk).

    Raises:
        ArrayTypeError, ShapeError: if counts are no such matrix.
    """
    _check_counts(counts)
    hits = counts.diagonal().astype(np.float64)
    union = counts.sum(axis=0) + counts.sum(axis=1) - hits
    return np.where(union > 0, hits / np.where(union > 0, union, 1), np.nan)


def mean_iou(counts: np.ndarray) -> float:
    """The mean over the classes that are somewhere, of :func:`class_iou`; NaN if there is none.
    Raises: ArrayTypeError, ShapeError as there.

    Args:
        counts: (K, K) of :func:`count_pixels`.

    Returns:
        A number from 0 to 1.
    """
    iou = class_iou(counts)
    there = iou[~np.isnan(iou)]
    return float(there.mean()) if there.size else math.nan


def pixel_accuracy(counts: np.ndarray) -> float:
    """The share of pixels that are right among all that count; NaN if none does.
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
    """Refuses what is no confusion matrix. Raises: ArrayTypeError or ShapeError."""
    if not isinstance(counts, np.ndarray) or counts.dtype.kind not in "iu":
        kind = getattr(counts, "dtype", type(counts).__name__)
        raise ArrayTypeError(f"counts are {kind}; they must be integers (K, K), of count_pixels")
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ShapeError(f"counts have shape {counts.shape}; they must be (K, K), of count_pixels")
