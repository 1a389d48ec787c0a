"""Exponential moving average of the weights (Polyak averaging): the model that is kept.

The weights of single steps dance around where they are heading. Their average over the last
``1 / (1 - decay)`` steps or so stands nearer to it, and usually classifies better.
"""

from pvt_ref.arrays import map_arrays
from pvt_ref.params import PVTParams


def ema_decay_of_step(step: int, decay: float) -> float:
    """Decay at a step (counted from 0): ``min(decay, (1 + step) / (10 + step))``.

    A young average forgets faster, or it would remember the random first weights for long.
    """
    return min(decay, (1 + step) / (10 + step))


def ema_step(average: PVTParams, params: PVTParams, decay: float) -> PVTParams:
    """``decay * average + (1 - decay) * params``; with decay 0, params itself."""
    if decay == 0:
        return params
    return map_arrays(lambda a, w: a + (1 - decay) * (w - a), average, params)
