"""Times each step of the ladders of kernels on a CUDA device, beside the device's bound.

    python benchmarks/gpu_ladder.py                  a minute or two; needs CuPy

The steps are those of pvt_ref/kernels/cuda/ladder/, which the course builds up. First all steps of
a ladder must agree with float64. A step is timed by device events, in calls that follow each
other without a gap on arrays that together are larger than the device's cache. The bound beside it
is the measured rate of the same device for copies and multiplications. Results go to
docs/results/gpu_ladder.json, and gpu_report.py makes a page of them.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpu import RESULTS, describe, write
from gpu_clock import Clock, CupyClock, time_in_a_row
from gpu_report import write_kernels_page
from in_turn import ROOT, say

from pvt_ref import REFERENCE
from pvt_ref.arrays import import_cupy
from pvt_ref.kernels.cuda.ladder import attention, product, sum_rows
from pvt_ref.kernels.cuda.ladder.step import Step
from pvt_ref.kernels.cuda.launch import Cuda
from pvt_ref.layers.attention import attention as attention_layer

sys.path.insert(0, str(ROOT / "docs" / "tools"))
LADDERS: dict[str, tuple[Step, ...]] = {
    "sum_rows": sum_rows.STEPS,
    "attention": attention.STEPS,
    "product": product.STEPS,
}

#: Largest relative error (L2) to float64 at which a step is timed.
ALLOWED = 3e-6

#: Total bytes of the arrays of a timing: several times the cache of current devices.
BEYOND_CACHE = 2**29


class Case(NamedTuple):
    """Arguments of a ladder, and the fewest bytes and operations that it needs."""

    ladder: str
    name: str
    make: Callable[[], tuple[Any, ...]]  # on the host
    exact: Callable[..., np.ndarray]  # the result for these arguments in float64
    bytes: int
    operations: int


def sums(rows: int, C: int) -> Case:
    """A sum over rows: every number is read once."""

    def make() -> tuple[np.ndarray]:
        return (np.random.default_rng(0).standard_normal((rows, C), dtype=np.float32),)

    def exact(x: np.ndarray) -> np.ndarray:
        return x.sum(axis=0, dtype=np.float64)

    return Case("sum_rows", f"{rows:,} × {C}", make, exact, 4 * (rows * C + C), rows * C)


def attentions(B: int, N: int, n: int, m: int, d: int) -> Case:
    """Attention: q, k and v are read once and y is written; 2 d operations a score, twice."""

    def make() -> tuple[Any, ...]:
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((B, N, r, d), dtype=np.float32) for r in (n, m, m))
        return q, k, v, d**-0.5

    def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
        wide = tuple(x.astype(np.float64) for x in (q, k, v))
        return attention_layer.forward(None, wide, REFERENCE, scale, keep=False)[0]

    moved, name = 4 * B * N * d * (2 * n + 2 * m), f"B {B}, N {N}, n {n:,}, m {m}, d {d}"
    return Case("attention", name, make, exact, moved, 4 * B * N * n * m * d)


def products(M: int, N: int, K: int) -> Case:
    """A product of a layer's tokens and its weight."""

    def make() -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(0)
        return tuple(rng.standard_normal((rows, K), dtype=np.float32) for rows in (M, N))

    def exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a.astype(np.float64) @ b.astype(np.float64).T

    moved = 4 * (M * K + N * K + M * N)
    return Case("product", f"{M:,} × {K} → {N}", make, exact, moved, 2 * M * N * K)


#: Sums, attentions and products of pvt_small at 224 x 224, with 64 images and with one.
CASES = (
    sums(200_704, 64), sums(200_704, 512), sums(12_544, 320), sums(3_136, 64),
    attentions(64, 1, 3136, 49, 64), attentions(64, 5, 196, 49, 64), attentions(1, 1, 3136, 49, 64),
    products(200_704, 512, 64), products(12_544, 320, 320), products(3_136, 64, 64),
)  # fmt: skip


def ceilings(cupy: Any, clock: Clock) -> dict[str, float]:
    """Measured bytes and float32 operations a second of this device."""
    x, n = cupy.zeros(2**28, "float32"), 8192
    y, a = cupy.empty_like(x), cupy.ones((n, n), "float32")
    copy = statistics.median(time_in_a_row([lambda: cupy.copyto(y, x)], clock, repeats=5))
    product = statistics.median(time_in_a_row([lambda: a @ a], clock, repeats=2))
    return {"bytes_per_second": 2 * x.nbytes / copy, "operations_per_second": 2 * n**3 / product}


def times_of(
    case: Case, steps: tuple[Step, ...], clock: Clock, there: Callable[[Any], Any], cuda: Cuda
) -> Iterator[dict]:
    """A row for each step of a ladder, in one case; errors first."""
    host = case.make()
    exact = case.exact(*host)
    size = sum(x.nbytes for x in host if isinstance(x, np.ndarray))
    copies = [
        tuple(there(x) if isinstance(x, np.ndarray) else x for x in host)
        for _ in range(min(max(BEYOND_CACHE // size, 1), 32))
    ]
    for step in steps:
        row = {"ladder": case.ladder, "step": step.title, "case": case.name}
        row |= {"bytes": case.bytes, "operations": case.operations}
        found = step.run(*copies[0], cuda)
        found = found.get() if hasattr(found, "get") else found
        error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        if not error <= ALLOWED:
            yield row | {"not_run": f"it is off by {error:.1e}"}
            continue

        def call(given: tuple, run: Callable[..., Any] = step.run) -> Callable[[], Any]:
            return lambda: run(*given, cuda)

        rounds = time_in_a_row([call(given) for given in copies], clock)
        spread = [min(rounds), max(rounds)]
        yield row | {"error": error, "seconds": statistics.median(rounds), "spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--commit", help="the commit of this code, if git is not available")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    cupy = import_cupy()
    clock = CupyClock(cupy)
    result: dict = {"machine": describe(args.commit), "ceilings": ceilings(cupy, clock), "rows": []}
    args.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        for row in times_of(case, LADDERS[case.ladder], clock, cupy.asarray, Cuda()):
            result["rows"].append(row)
            write(args.out / "gpu_ladder.json", result)
            told = row.get("not_run") or f"{1e6 * row['seconds']:,.1f} µs"
            say(f"  {case.ladder}, {case.name}, {row['step']}: {told}")
        cupy.get_default_memory_pool().free_all_blocks()
    write_kernels_page(args.out)
    say(f"Written to {args.out}: gpu_ladder.json and gpu_kernels.md")


if __name__ == "__main__":
    main()
