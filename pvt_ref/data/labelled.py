"""Labelled images in memory for training, and the evaluation of a model on them."""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pvt_ref.api import forward
from pvt_ref.arrays import Array, from_host
from pvt_ref.checks import check_number, check_type
from pvt_ref.data.ahead import in_order
from pvt_ref.data.preprocessing import Preprocessing
from pvt_ref.data.samples import Samples
from pvt_ref.errors import TrainingError
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.ops import Ops
from pvt_ref.tree import digest, first_array, to_numpy

#: Pixels that go through the network together in :func:`evaluate`: 256 images of 64x64, say.
_PIXELS_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages(Samples):
    """Raw pixels and their labels, in memory.

    Attributes:
        images: (N, C, H, W) uint8, at least one.
        labels: (N,) integers, from 0.
        preprocessing: how pixels become numbers.

    Raises:
        TrainingError: if they do not fit together.
    """

    images: np.ndarray
    labels: np.ndarray
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray):
            kinds = f"a {type(images).__name__} and a {type(labels).__name__}"
            why = "both must be NumPy arrays on the host (batches are moved to the device)"
            raise TrainingError(f"images and labels are {kinds}; {why}")
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            given = f"images have dtype {images.dtype} and shape {images.shape}"
            raise TrainingError(f"{given}; they must be pixels, (N, C, H, W) uint8, at least one")
        check_type("preprocessing", self.preprocessing, Preprocessing, error=TrainingError)
        C = self.preprocessing.channels
        if images.shape[1] != C:
            last = ". They look channels-last: images.transpose(0, 3, 1, 2) moves the channels"
            raise TrainingError(
                f"images have shape {images.shape}; mode {self.preprocessing.mode!r} has {C} "
                f"channels, so they must be (N, {C}, H, W)" + last * (images.shape[3] == C)
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            given = f"labels have dtype {labels.dtype} and shape {labels.shape}"
            N = len(images)
            raise TrainingError(f"{given}; for {N} images they must be {N} integers")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.images.shape[2], self.images.shape[3]

    def pixels(self, chosen: np.ndarray | slice) -> np.ndarray:
        """The images with some indices.

        Args:
            chosen: (B,) integers, or a slice.

        Returns:
            (B, C, H, W) uint8.
        """
        return self.images[chosen]

    def drawn_pixels(self, chosen: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """As :meth:`pixels`: a recipe augments these images after normalisation.

        Args:
            chosen: (B,) integers.
            seed: not used.
            epoch: not used.

        Returns:
            (B, C, H, W) uint8.
        """
        return self.images[chosen]

    def describe(self) -> dict[str, Any]:
        """The number of images, and the SHA-256 of pixels, labels and preprocessing."""
        samples = {"images": self.images, "labels": self.labels.astype(np.int64)}
        return {"samples": len(self), "sha256": digest(samples, asdict(self.preprocessing))}


def evaluate(
    params: Any,
    config: Any,
    data: Samples,
    batch_size: int | None = None,
    ranks: Any = None,
    ops: Ops | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over all of data, without augmentation.

    Only one batch at a time is converted to floats, so memory does not grow with data.

    Args:
        params: the weights, arrays of NumPy or CuPy.
        config: their configuration.
        data: the samples.
        batch_size: samples at once. None takes as many as have 1,048,576 pixels, at most 256.
        ranks: :class:`~pvt_ref.train.data_parallel.Ranks` that share the batches; the result is the
        same for any number of them. With None this process does all.
        ops: a table of operations; None takes the default.

    Returns:
        loss, without label smoothing, and accuracy in [0, 1].

    Raises:
        PVTError: as :func:`pvt_ref.forward`; a RangeError for batch_size or a label.
    """
    found: list[tuple[float, int]] = []
    for labels, images in batches(data, batch_size, first_array(params), ranks):
        logits = forward(params, images, config, ops=ops)
        targets = from_host(labels.astype(np.int64), like=logits)
        loss = float(cross_entropy(logits, targets, reduction="sum")[0])
        found.append((loss, int(np.sum(to_numpy(logits).argmax(axis=1) == labels))))
    if ranks is not None:
        found = [of_batch for of_rank in ranks.gather(found) for of_batch in of_rank]
    loss, hits = 0.0, 0
    for of_loss, of_hits in found:  # in order, so that rounding is the same for any ranks
        loss, hits = loss + of_loss, hits + of_hits
    return loss / len(data), hits / len(data)


def confusion_matrix(params: Any, config: Any, data: Samples) -> np.ndarray:
    """Counts of each pair of true and predicted class.

    Args:
        params: the weights, arrays of NumPy or CuPy.
        config: their configuration, of K classes.
        data: the samples.

    Returns:
        (K, K) int64: rows are true classes, columns predictions.

    Raises:
        PVTError: as :func:`evaluate`.
    """
    data.check_fits(config, "data")
    counts = np.zeros((config.num_classes, config.num_classes), np.int64)
    for labels, images in batches(data, None, first_array(params)):
        answers = to_numpy(forward(params, images, config)).argmax(axis=1)
        np.add.at(counts, (labels, answers), 1)
    return counts


def batches(
    data: Samples, batch_size: int | None, like: Array, ranks: Any = None
) -> Iterator[tuple[np.ndarray, Array]]:
    """Labels and normalised images of all samples in order, batch by batch.

    Args:
        data: the samples. Files are read ahead by at most one batch.
        batch_size: samples at once. None takes as many as have 1,048,576 pixels, at most 256.
        like: an array of the wanted library, device and dtype.
        ranks: None for all batches; else only those of this rank.
    """
    if batch_size is None:
        batch_size = max(1, min(256, _PIXELS_AT_ONCE // math.prod(data.size)))
    count = check_number("batch_size", batch_size, least=1, whole=True)
    places = [slice(start, start + count) for start in range(0, len(data), count)]
    if ranks is not None:
        places = [places[i] for i in ranks.share(len(places))]
    if not data.from_files:
        for chosen in places:
            yield data.labels[chosen], data.batch(chosen, like)
        return
    samples = (np.array([i]) for chosen in places for i in range(*chosen.indices(len(data))))
    with closing(in_order(data.pixels, samples, count)) as pixels:
        for chosen in places:
            labels = data.labels[chosen]
            read = np.concatenate([next(pixels) for _ in labels])
            yield labels, data.preprocessing.normalize(read, like)
