"""The cost of replacing one operation of the default table, for every operation of a model.

    python benchmarks/replaced.py [--models pvt_tiny pvt_small] [--batches 1 8] [--repeats 9]

Replacing an operation drops the twins that compute it themselves. Here a wrapper that computes the
same replaces it: once around the table's own twin, which shows the cost of running the others in
parts, and once around the readable operation, which is itself slower. A ratio compares two medians
of forwards that run in turn. The first column must be at most 1.5.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

import pvt_ref
from pvt_ref import VARIANTS, Operation
from pvt_ref.models.architecture import architecture_of

REQUIRED = 1.5


def wrapped(op: Operation) -> Operation:
    """The same operation behind new functions; it absorbs nothing."""

    def forward(*args, **kwargs):
        return op.forward(*args, **kwargs)

    def backward(*args, **kwargs):
        return op.backward(*args, **kwargs)

    return Operation(forward, backward)


def in_turn(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if repeat:  # the first one warms up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def measure(name: str, batch: int, repeats: int) -> list[tuple[str, float, float]]:
    """Operation, ratio with its own twin, ratio with the readable one."""
    config = VARIANTS[name]
    params = pvt_ref.init_params(config, np.random.default_rng(0))
    shape = (batch, config.in_chans, config.img_size, config.img_size)
    images = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    model, default = pvt_ref.prepare(params, config), pvt_ref.blocked_ops()
    operations = sorted(architecture_of(config).operations, key=lambda op: op.name)
    rows = []
    for op in operations:
        runs = [
            lambda ops=ops: pvt_ref.forward(model, images, ops=ops)
            for ops in (default, *(default.replace(op, wrapped(o)) for o in (default[op], op)))
        ]
        usual, own, readable = in_turn(runs, repeats)
        rows.append((op.name, own / usual, readable / usual))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["pvt_tiny", "pvt_small"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print("| model | B | replaced | its twin, wrapped | the readable one, wrapped |")
    print("|---|---|---|---|---|")
    for name in args.models:
        for batch in args.batches:
            for op, own, readable in measure(name, batch, args.repeats):
                mark = "" if own <= REQUIRED else " (too slow)"
                print(f"| {name} | {batch} | {op} | {own:.2f}{mark} | {readable:.2f} |", flush=True)


if __name__ == "__main__":
    main()
