"""Exponential moving average of the weights: the model that is saved.

The weights of single steps fluctuate around their trend. Their average over about the last
``1 / (1 - decay)`` steps is closer to it and usually classifies better (after Polyak and Juditsky
1992, SIAM J. Control Optim. 30, 838-855, who average all steps equally).
"""

from typing import Any

from pvt_ref.arrays import Array, dtype_name
from pvt_ref.checks import check_number
from pvt_ref.train.checks import check_alike
from pvt_ref.tree import map_arrays


def ema_decay_of_step(step: int, decay: float) -> float:
    """Decay at a step, as TensorFlow has it: ``min(decay, (1 + step) / (10 + step))``.
    Raises: RangeError if a number is outside its range.

    A new average forgets faster; otherwise it would keep the random first weights for long.

    Args:
        step: counted from 0.
        decay: in [0, 1), the most.

    Returns:
        The decay of this step, in [0, 1).
    """
    step = check_number("step", step, least=0, whole=True)
    decay = check_number("decay", decay, least=0, below=1)
    return min(decay, (1 + step) / (10 + step))


def ema_step(average: Any, params: Any, decay: float) -> Any:
    """The average after a step: ``decay * average + (1 - decay) * params``, running statistics too.
    Raises: RangeError if decay is outside its range; ArrayTypeError or ShapeError if the two differ
    in type, dtype, device, keys or shapes.

    Args:
        average: the average so far.
        params: the weights after the step, of the same shapes.
        decay: in [0, 1).

    Returns:
        The new average, of the same shapes and dtypes; with decay 0, params itself.
    """
    decay = check_number("decay", decay, least=0, below=1)
    check_alike("average", average, params)
    if decay == 0:
        return params

    def move(a: Array, w: Array) -> Array:
        counts = not dtype_name(w).startswith("float")  # of batches that norms have seen
        return w if counts else a + (1 - decay) * (w - a)

    return map_arrays(move, average, params)
