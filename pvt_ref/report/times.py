"""How long stages and operations take, on whatever device the arrays are."""

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from pvt_ref.api import choose_ops, forward, forward_pyramid
from pvt_ref.arrays import Array, synchronize
from pvt_ref.checks import is_whole
from pvt_ref.errors import RangeError, shown
from pvt_ref.models.architecture import Place, architecture_of
from pvt_ref.ops import Call, Ops
from pvt_ref.report.items import watch_items


def time_stages(
    params: Any, images: Array, config: Any, repeats: int = 5, *, ops: Ops | None = None
) -> list[float]:
    """Median seconds of every stage in a forward (or pyramid), and of what follows the last."""
    row, table, run = _run(params, images, config, repeats, ops)
    ends = [0.0] * (len(config.channels) + 1)  # of each stage; from 0, the beginning

    def after(call: Call) -> None:
        place = row.place(call.path)
        if place is not None and place.stage:
            ends[place.stage] = _now(images)

    watched = table.watched(after, params=params)
    passes: list[list[float]] = []
    for _ in range(repeats + 1):
        ends[0] = _now(images)
        run(watched)
        passes.append([b - a for a, b in itertools.pairwise([*ends, _now(images)])])
    return [statistics.median(times) for times in zip(*passes[1:], strict=True)]


def time_operations(
    params: Any, images: Array, config: Any, repeats: int = 5, *, ops: Ops | None = None
) -> dict[tuple[int, str], float]:
    """Median seconds by stage and operation, named as in :func:`pvt_ref.count_cost`.

    In the default table one kernel may compute a whole block; REFERENCE shows its parts.
    """
    row, table, run = _run(params, images, config, repeats, ops)
    passes: list[Counter[tuple[int, str]]] = []
    begun = 0.0

    def begin(place: Place) -> None:
        nonlocal begun
        begun = _now(images)

    def end(place: Place, call: Call) -> None:
        passes[-1][place.stage, place.part] += _now(images) - begun  # type: ignore[assignment]

    watched = watch_items(row, table, params, begin, end)
    for _ in range(repeats + 1):
        passes.append(Counter())
        run(watched)
    return {key: statistics.median(times[key] for times in passes[1:]) for key in passes[0]}


def _now(images: Array) -> float:
    synchronize(images)
    return time.perf_counter()


def _run(
    params: Any, images: Array, config: Any, repeats: int, ops: Ops | None
) -> tuple[Any, Ops, Callable[[Ops], Any]]:
    """Row of the network, table of operations, and the pass of a table that is watched."""
    if not is_whole(repeats) or repeats < 1:
        raise RangeError(f"repeats is {shown(repeats)}; it must be a whole number, at least 1")
    row = architecture_of(config)
    run = forward if config.has_classifier else forward_pyramid
    return row, choose_ops(ops, images, row), lambda ops: run(params, images, config, ops=ops)
