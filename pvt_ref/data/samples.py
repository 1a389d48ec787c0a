"""The interface of a training's samples."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from pvt_ref.arrays import Array
from pvt_ref.data.preprocessing import Preprocessing
from pvt_ref.errors import TrainingError


class Samples(ABC):
    """Samples for training: images of one size with labels, in memory or in files.

    Attributes:
        labels: (N,) integers, from 0.
        preprocessing: how pixels become numbers.
    """

    __slots__ = ()
    labels: np.ndarray
    preprocessing: Preprocessing
    #: Whether pixels must be read and decoded; then threads do so ahead of the step.
    from_files: ClassVar[bool] = False
    #: Whether the labels are a class for every pixel, stored as a last channel of pixels.
    has_label_maps: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(H, W) of every image, in pixels."""

    @abstractmethod
    def pixels(self, chosen: np.ndarray | slice) -> np.ndarray:
        """The images with some indices, (B, C, H, W) uint8, on the host."""

    @abstractmethod
    def drawn_pixels(self, chosen: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """As :meth:`pixels`, for a training step: random changes of the picture itself are drawn
        from seed, epoch and sample.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values, fit for JSON, that identify the samples when a training is resumed."""

    def batch(self, chosen: np.ndarray | slice, like: Array) -> Array:
        """The images with some indices, normalised.

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
            TrainingError: if a label is not a class of the model, or the channels do not fit it.
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
            raise TrainingError(f"{name}: images have {C} channels, but {wanted}")
        config.grids(*self.size)  # refuses sizes that would lose pixels
