"""Random numbers of training by counter.

A generator that is carried along makes every draw depend on all draws before it. Here each place
that draws makes its own generator of the numbers that name the place: seed, step, micro-batch, what
is drawn, and where. Ranks, micro-batches, restarts and devices then draw the same, in any order,
and no generator has to be saved.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class What(IntEnum):
    """What is drawn. Part of the key, so a number is never given twice."""

    ORDER = 0
    AUGMENTATION = 1
    MIXUP = 2
    STAGE_DROPOUT = 3
    BLOCK = 4


@dataclass(frozen=True, slots=True)
class Draws:
    """The draws of one micro-batch of one step.

    Attributes:
        seed: of the training.
        step: steps done before.
        micro_batch: of the step, counted over all ranks.
    """

    seed: int
    step: int
    micro_batch: int = 0

    def at(self, what: What, where: int = 0) -> np.random.Generator:
        """The generator of one place: of a block, a stage or a sample, by its number."""
        return np.random.default_rng([self.seed, self.step, self.micro_batch, what, where])


def generator_at(
    rng: np.random.Generator | Draws | None, what: What, where: int
) -> np.random.Generator | None:
    """The generator of a place; a plain generator, or None, is passed on."""
    return rng.at(what, where) if isinstance(rng, Draws) else rng
