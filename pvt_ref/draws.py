"""Random numbers of training by counter.

Each place that draws makes its own generator from the numbers that identify it. So ranks,
micro-batches, restarts and devices draw the same in any order, and no generator needs saving.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral
from typing import TypeAlias

import numpy as np

from pvt_ref.errors import RangeError, shown

# a string here and elsewhere, since numpy.random is slow to import and many users draw nothing
Generator: TypeAlias = "np.random.Generator"
#: What masks are drawn from; None for inference.
Rng: TypeAlias = "Generator | None"


class What(IntEnum):
    """What is drawn; the comments name the numbers that identify its place beside the seed."""

    FIRST_WEIGHTS = 1  # none
    ORDER = 2  # epoch
    AUGMENTATION = 3  # epoch, sample: independent of the batch that the sample is in
    MIXUP = 4  # step, micro-batch
    STAGE_DROPOUT = 5  # step, micro-batch, stage
    BLOCK = 6  # step, micro-batch, block
    PHOTO = 7  # epoch, sample: changes of a photo before it becomes numbers
    SPLIT = 8  # class: which of its samples are held out


def generator(seed: int, what: What, *where: int) -> Generator:
    """The generator of one place."""
    # NumPy pads the seed with zeros, so no two kinds may share a number, whatever their places
    return np.random.default_rng([seed, what, *where])


@dataclass(frozen=True, slots=True)
class Draws:
    """The draws of one micro-batch of one step. Raises a RangeError unless all are at least 0."""

    seed: int  # of the training
    step: int  # steps done before
    micro_batch: int = 0  # of the step, counted over all ranks

    def __post_init__(self) -> None:
        for name in ("seed", "step", "micro_batch"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 0:
                raise RangeError(f"{name} is {shown(value)}; it must be a whole number at least 0")

    def at(self, what: What, where: int = 0) -> Generator:
        """The generator of one place: of a block or a stage, by its number."""
        return generator(self.seed, what, self.step, self.micro_batch, where)


#: The same, or the draws of a step, from which every place takes its own generator.
Source: TypeAlias = "Rng | Draws"


class SampleDraws:
    """The generators of several samples behind the interface of one: each draws its own number."""

    def __init__(self, seed: int, epoch: int, samples: Iterable[int]) -> None:
        self._each = [generator(seed, What.AUGMENTATION, epoch, int(i)) for i in samples]

    def __len__(self) -> int:
        return len(self._each)

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        """(size,) integers in [low, high); size is the number of samples."""
        return np.array([rng.integers(low, high) for rng in self._each])

    def random(self, size: int) -> np.ndarray:
        """(size,) floats in [0, 1); size is the number of samples."""
        return np.array([rng.random() for rng in self._each])


def generator_at(rng: Source, what: What, where: int) -> Rng:
    """The generator of a place; a plain generator, or None, is passed on."""
    return rng.at(what, where) if isinstance(rng, Draws) else rng
