"""Labelled images as a training wants them, and how often the model is right about them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.api import forward
from pvt_ref.arrays import Array, from_host
from pvt_ref.checks import check_number, check_type
from pvt_ref.data.preprocessing import Preprocessing
from pvt_ref.errors import TrainingError
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.tree import first_array, to_numpy

#: Pixels that go through the network together in :func:`evaluate`: 256 images of 64x64, say.
_PIXELS_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Raw pixels and what they show, on the host.

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

    def __len__(self) -> int:
        return len(self.labels)

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
        C = self.images.shape[1]
        if config.in_chans != C:
            wanted = f"the configuration has in_chans={config.in_chans}"
            raise TrainingError(f"{name}: images have {C} channels, and {wanted}")
        config.grids(*self.images.shape[2:])  # refuses sizes that would lose pixels

    def batch(self, chosen: np.ndarray | slice, like: Array) -> Array:
        """The images at some places, normalised.

        Args:
            chosen: (B,) integers, or a slice.
            like: an array of float32 or float64, of any shape.

        Returns:
            (B, C, H, W) of like's library, device and dtype.
        """
        return self.preprocessing.normalize(self.images[chosen], like)


def evaluate(
    params: Any, config: Any, data: LabelledImages, batch_size: int | None = None
) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers over all of data, without augmentation.

    Only the images of one batch are made floats, so memory does not grow with data.

    Args:
        params: the weights, arrays of NumPy or CuPy.
        config: their configuration.
        data: what to look at.
        batch_size: samples at once. None takes as many as have 1,048,576 pixels, at most 256.

    Returns:
        loss, without label smoothing, and accuracy in [0, 1].

    Raises:
        PVTError: as :func:`pvt_ref.forward`; a RangeError for batch_size or a label.
    """
    if batch_size is None:
        H, W = data.images.shape[2:]
        batch_size = max(1, min(256, _PIXELS_AT_ONCE // (H * W)))
    count = check_number("batch_size", batch_size, least=1, whole=True)
    loss, hits, like = 0.0, 0, first_array(params)
    for start in range(0, len(data), count):
        chosen = slice(start, start + count)
        logits = forward(params, data.batch(chosen, like), config)
        labels = data.labels[chosen]
        targets = from_host(labels.astype(np.int64), like=logits)
        loss += float(cross_entropy(logits, targets, reduction="sum")[0])
        hits += int(np.sum(to_numpy(logits).argmax(axis=1) == labels))
    return loss / len(data), hits / len(data)
