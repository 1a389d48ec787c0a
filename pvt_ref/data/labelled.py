"""Labelled images as a training wants them, and how often the model is right about them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from pvt_ref.api import forward
from pvt_ref.arrays import Array, from_host
from pvt_ref.checks import check_number, check_type
from pvt_ref.data.ahead import Pool, Waited, in_order
from pvt_ref.data.preprocessing import Preprocessing
from pvt_ref.errors import TrainingError
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.tree import digest, first_array, to_numpy

#: Pixels that go through the network together in :func:`evaluate`: 256 images of 64x64, say.
_PIXELS_AT_ONCE = 2**20


class Samples(ABC):
    """What a training learns from: images of one size and what they show, wherever they lie.

    Attributes:
        labels: (N,) integers, from 0.
        preprocessing: how pixels become numbers.
    """

    __slots__ = ()
    labels: np.ndarray
    preprocessing: Preprocessing
    #: Whether pixels have to be read and decoded: then threads do so ahead of the step.
    from_files: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(H, W) of every image, in pixels."""

    @abstractmethod
    def pixels(self, chosen: np.ndarray | slice) -> np.ndarray:
        """The images at some places, (B, C, H, W) uint8, on the host."""

    @abstractmethod
    def drawn_pixels(self, chosen: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """As :meth:`pixels`, for a step of a training: what is changed at random before they are
        numbers is changed by the draws of seed, epoch and sample.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """By what they are known again when a training goes on: plain values, fit for JSON."""

    def batch(self, chosen: np.ndarray | slice, like: Array) -> Array:
        """The images at some places, normalised.

        Args:
            chosen: (B,) integers, or a slice.
            like: an array of float32 or float64, of any shape.

        Returns:
            (B, C, H, W) of like's library, device and dtype.
        """
        return self.preprocessing.normalize(self.pixels(chosen), like)

    def check_fits(self, config: Any, name: str) -> None:
        """Refuses samples that a model cannot be trained on.

        Args:
            config: of the model.
            name: of the samples, for the message.

        Raises:
            TrainingError: if a label is no class of the model, or the channels are not its.
            ShapeError: if the model cannot take images of that size.
        """
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= config.num_classes:
            raise TrainingError(
                f"{name}: labels run from {low} to {high}, but the model knows classes 0 to "
                f"{config.num_classes - 1}. Are they one-based, or is num_classes from other data?"
            )
        C = self.preprocessing.channels
        if config.in_chans != C:
            wanted = f"the configuration has in_chans={config.in_chans}"
            raise TrainingError(f"{name}: images have {C} channels, and {wanted}")
        config.grids(*self.size)  # refuses sizes that would lose pixels


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages(Samples):
    """Raw pixels and what they show, in memory.

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
            last = ". They look channels-last: images.transpose(0, 3, 1, 2) turns them"
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
        """The images at some places.

        Args:
            chosen: (B,) integers, or a slice.

        Returns:
            (B, C, H, W) uint8.
        """
        return self.images[chosen]

    def drawn_pixels(self, chosen: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """The same: a recipe changes them as numbers.

        Args:
            chosen: (B,) integers.
            seed: not asked.
            epoch: not asked.

        Returns:
            (B, C, H, W) uint8.
        """
        return self.images[chosen]

    def describe(self) -> dict[str, Any]:
        """How many, and the SHA-256 of pixels, labels and preprocessing."""
        samples = {"images": self.images, "labels": self.labels.astype(np.int64)}
        return {"samples": len(self), "sha256": digest(samples, asdict(self.preprocessing))}


class Ahead(Samples):
    """Samples whose pixels of coming steps are read and decoded while the present one computes.

    Those that are in memory pass through untouched. A context manager, which ends its threads.

    Args:
        data: the samples.
        workers: threads; None takes :func:`pvt_ref.data.ahead.default_workers`.
    """

    __slots__ = ("_data", "_futures", "_pool", "_waited", "labels", "preprocessing")

    def __init__(self, data: Samples, workers: int | None = None) -> None:
        self._data, self.labels, self.preprocessing = data, data.labels, data.preprocessing
        self._pool = Pool(workers) if data.from_files else None
        self._futures: dict[tuple[int, int, int], Future[np.ndarray]] = {}
        self._waited = Waited()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._futures.clear()
        if self._pool is not None:
            self._pool.__exit__()

    @property
    def waited(self) -> float:
        """Seconds that steps have waited for pixels so far."""
        return self._waited.seconds

    def share_waited(self) -> float:
        """The share of the time, since this was asked last, that steps waited for pixels."""
        return self._waited.share()

    def expect(self, chosen: np.ndarray, seed: int, epoch: int) -> None:
        """Has samples read, if they are not being read yet: a coming step will draw them."""
        if self._pool is None:
            return
        for i in chosen.tolist():
            if (seed, epoch, i) not in self._futures:
                drawn = self._pool.submit(self._data.drawn_pixels, np.array([i]), seed, epoch)
                self._futures[seed, epoch, i] = drawn

    @property
    def size(self) -> tuple[int, int]:
        """As of the samples."""
        return self._data.size

    def pixels(self, chosen: np.ndarray | slice) -> np.ndarray:
        """As of the samples."""
        return self._data.pixels(chosen)

    def drawn_pixels(self, chosen: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """As of the samples; waits for what is still being read."""
        if self._pool is None:
            return self._data.drawn_pixels(chosen, seed, epoch)
        self.expect(chosen, seed, epoch)
        futures = [self._futures.pop((seed, epoch, i)) for i in chosen.tolist()]
        return np.concatenate([self._waited.result(future) for future in futures])

    def describe(self) -> dict[str, Any]:
        """As of the samples."""
        return self._data.describe()


def evaluate(
    params: Any, config: Any, data: Samples, batch_size: int | None = None, ranks: Any = None
) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers over all of data, without augmentation.

    Only the images of one batch are made floats, so memory does not grow with data.

    Args:
        params: the weights, arrays of NumPy or CuPy.
        config: their configuration.
        data: what to look at.
        batch_size: samples at once. None takes as many as have 1,048,576 pixels, at most 256.
        ranks: :class:`~pvt_ref.train.data_parallel.Ranks` that share the batches; the result is the
            same for any number of them. None: this process does all.

    Returns:
        loss, without label smoothing, and accuracy in [0, 1].

    Raises:
        PVTError: as :func:`pvt_ref.forward`; a RangeError for batch_size or a label.
    """
    found = []
    for labels, images in batches(data, batch_size, first_array(params), ranks):
        logits = forward(params, images, config)
        targets = from_host(labels.astype(np.int64), like=logits)
        loss = float(cross_entropy(logits, targets, reduction="sum")[0])
        found.append((loss, int(np.sum(to_numpy(logits).argmax(axis=1) == labels))))
    if ranks is not None:
        found = [of_batch for of_rank in ranks.gather(found) for of_batch in of_rank]
    loss, hits = 0.0, 0
    for of_loss, of_hits in found:  # in order, so that they are rounded alike
        loss, hits = loss + of_loss, hits + of_hits
    return loss / len(data), hits / len(data)


def confusion_matrix(params: Any, config: Any, data: Samples) -> np.ndarray:
    """How often a class was taken for which.

    Args:
        params: the weights, arrays of NumPy or CuPy.
        config: their configuration, of K classes.
        data: what to look at.

    Returns:
        (K, K) int64: row the true class, column the answer.

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
    """Labels and normalised images, batch by batch, of all samples in their order.

    Args:
        data: the samples. Those that are read from files are read ahead, a batch at most.
        batch_size: samples at once. None takes as many as have 1,048,576 pixels, at most 256.
        like: an array that says where to, and of which dtype.
        ranks: None for all; else those that the rank takes.
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
