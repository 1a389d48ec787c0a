"""How long each stage takes, on whatever device the arrays are."""

import dataclasses
import itertools
import statistics
import time
from typing import Any

from pvt_ref.api import choose_ops, forward, forward_pyramid
from pvt_ref.arrays import Array, synchronize
from pvt_ref.checks import is_whole
from pvt_ref.errors import RangeError, shown
from pvt_ref.models.architecture import architecture_of as check_config
from pvt_ref.models.pvt.config import NUM_STAGES, PVTConfig
from pvt_ref.models.pvt.params import PVTParams
from pvt_ref.ops import Ops


def time_stages(
    params: PVTParams,
    images: Array,
    config: PVTConfig,
    repeats: int = 5,
    *,
    ops: Ops | None = None,
) -> list[float]:
    """Median time of each stage in a forward pass, and of what follows the last block.

    Args:
        params: the weights, NumPy or CuPy.
        images: (B, in_chans, H, W) normalised floats, as for :func:`pvt_ref.forward`.
        config: the configuration of the weights. Without a classifier the pyramid is run.
        repeats: timed passes, after one that warms up.
        ops: a record of operations; None takes the default.

    Returns:
        Five times in seconds: stages 1 to 4, each with its patch embedding, and the classifier.

    Raises:
        RangeError: if repeats is no positive whole number; also as :func:`pvt_ref.forward`.
        ArrayTypeError: as :func:`pvt_ref.forward`.
        ShapeError: as :func:`pvt_ref.forward`.
    """
    if not is_whole(repeats) or repeats < 1:
        raise RangeError(f"repeats is {shown(repeats)}; it must be a whole number, at least 1")
    check_config(config)
    ops = choose_ops(ops, images)
    ends: list[float] = []  # when each block was done

    def timed_block(*args: Any, **kwargs: Any) -> Any:
        result = ops.block.forward(*args, **kwargs)
        synchronize(images)
        ends.append(time.perf_counter())
        return result

    timed = dataclasses.replace(ops, block=dataclasses.replace(ops.block, forward=timed_block))
    run = forward if config.has_classifier else forward_pyramid
    passes: list[list[float]] = []
    for _ in range(repeats + 1):
        ends.clear()
        synchronize(images)
        marks = [time.perf_counter()]
        run(params, images, config, ops=timed)
        synchronize(images)
        finish = time.perf_counter()
        done = 0
        for i in range(NUM_STAGES):
            done += config.depths[i]
            marks.append(ends[done - 1])  # a stage ends with its last block
        marks.append(finish)
        passes.append([b - a for a, b in itertools.pairwise(marks)])
    return [statistics.median(times) for times in zip(*passes[1:], strict=True)]
