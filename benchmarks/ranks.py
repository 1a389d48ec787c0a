"""Steps of a training on 1, 2 and 4 ranks of MPI, and what ImageNet would take at that speed.

    python benchmarks/ranks.py

Each number of ranks trains pvt_tiny at 224 x 224 on random pixels, a micro-batch of 8 in each rank
and one thread in each, for a few steps; the first is not counted. Writes ranks.md and ranks.json
into docs/results/. Figures for more ranks than there are cores here are calculated, and the
page says so.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from machine import cores, describe_machine
from PIL import Image

import pvt_ref
from pvt_ref.data.image import read_rgb
from pvt_ref.train import LabelledImages, PhotoAugment, Recipe, start_training, train_step
from pvt_ref.train.data_parallel import Ranks, ranks_here

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PHOTO = ROOT / "docs" / "results", ROOT / "examples" / "chelsea.jpg"
MODEL, SIDE, MICRO_BATCH = "pvt_tiny", 224, 8
IMAGENET, EPOCHS = 1_281_167, 300  # training photos; epochs of the paper (section 5.1)


class Timed(Ranks):
    """Ranks that record how long they exchanged gradients."""

    def __init__(self, inner: Ranks) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.seconds = 0.0

    def gather(self, value: object) -> list:
        return self.inner.gather(value)

    def sum(self, parts: list, count: int) -> object:
        self.inner.gather(None)  # waiting for the slowest is not the exchange
        start = time.perf_counter()
        total = self.inner.sum(parts, count)
        self.seconds += time.perf_counter() - start
        return total


def worker(steps: int) -> None:
    """One rank; the first prints what was measured, as JSON."""
    ranks = Timed(ranks_here())
    config = pvt_ref.VARIANTS[MODEL]
    recipe = Recipe(epochs=9, batch_size=MICRO_BATCH * ranks.size, accumulate=ranks.size)
    rng = np.random.default_rng(0)
    samples = recipe.batch_size * 2
    pixels = rng.integers(0, 256, (samples, 3, SIDE, SIDE), np.uint8)
    data = LabelledImages(pixels, rng.integers(0, 1000, samples), pvt_ref.Preprocessing())
    state = start_training(pvt_ref.init_params(config, rng), samples, 0)
    times, exchanged = [], []
    for _ in range(steps + 1):
        ranks.seconds = 0.0
        start = time.perf_counter()
        state, _ = train_step(state, data, config, recipe, ranks)
        times.append(time.perf_counter() - start)
        exchanged.append(ranks.seconds)
    if ranks.is_first:
        print(json.dumps({"seconds": times[1:], "exchange": exchanged[1:]}))


def measure(ranks: int, steps: int) -> dict:
    """Seconds a step, and of it the exchange, on that number of ranks."""
    command = [sys.executable, __file__, "--worker", "--steps", str(steps)]
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    done = subprocess.run(
        [mpiexec, "-n", str(ranks), *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    return {"ranks": ranks, **json.loads(done.stdout)}


def report(found: dict) -> str:
    """The page."""
    machine, runs, decoding = found["machine"], found["runs"], found["decode_ms"]
    parameters = pvt_ref.count_cost(pvt_ref.VARIANTS[MODEL]).parameters
    megabytes = 4 * parameters / 1e6
    rows, rate = [], {}
    for run in runs:
        ranks, seconds = run["ranks"], statistics.median(run["seconds"])
        rate[ranks] = ranks * MICRO_BATCH / seconds
        share = statistics.median(run["exchange"]) / seconds
        spread = f"{min(run['seconds']):.2f}-{max(run['seconds']):.2f}"
        rows.append(
            f"| {ranks} | {seconds:.2f} ({spread}) | {rate[ranks]:.2f} | "
            f"{rate[ranks] / rate[1]:.2f} | {share:.1%} |"
        )
    by_core = rate[min(2, machine["cores"])] / min(2, machine["cores"])
    calculated = []
    for ranks in (1, 8, 64):
        days = IMAGENET * EPOCHS / (by_core * ranks) / 86400
        step = MICRO_BATCH / by_core
        traffic = 2 * megabytes * (ranks - 1) / ranks
        calculated.append(
            f"| {ranks} | {by_core * ranks:,.1f} | {days:,.0f} | {traffic:.0f} MB | "
            f"{traffic / step:.0f} MB/s |"
        )
    lines = "\n".join(rows)
    machine_line = f"{machine['cores']} cores of: {machine['processor']}"
    versions = f"pvt_ref {machine['pvt_ref']} (commit {machine['commit']})"
    return f"""# What ImageNet would cost

`python benchmarks/ranks.py` trains {MODEL} at {SIDE}×{SIDE} on several
[ranks](../training.md#many-machines), each with a micro-batch of {MICRO_BATCH} and one thread.

Measured {machine["date"]} on {machine_line}. {versions},
Python {machine["python"]}, {"; ".join(machine["blas"])}.

| ranks | seconds a step | images/s | relative to one rank | exchanging gradients |
| --- | --- | --- | --- | --- |
{lines}

Seconds: median (smallest-largest). With more ranks than cores, ranks share a core.

## Calculated from it

ImageNet has {IMAGENET:,} training photos, and the paper trains for {EPOCHS} epochs (section 5.1).
**None of this was run.** The calculation uses the speed of a core while a second core is busy, as
measured above, and assumes that no rank waits for the network:

| ranks, one core each | images/s | days | sent by a rank in a step | network load |
| --- | --- | --- | --- | --- |
{chr(10).join(calculated)}

A rank sends its {megabytes:.0f} MB of gradients in slices, and its slice of the sums to all others.
Gigabit Ethernet carries 125 MB/s in each direction, so with such slow cores it is not the
bottleneck. Decoding a photo of 500×375 pixels, a typical size in ImageNet, and
cropping it to 224×224 took {decoding:.1f} ms of a core here,
{decoding * by_core / 1000:.1%} of the time of a step for each photo.
"""


def decode_ms() -> float:
    """Milliseconds of a core to decode and randomly crop a photo of ImageNet's usual size."""
    image = Image.open(PHOTO).convert("RGB").resize((500, 375))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    augment, times = PhotoAugment(), []
    for i in range(30):
        start = time.perf_counter()
        augment(read_rgb(file), (SIDE, SIDE), np.random.default_rng(i))
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    if args.worker:
        worker(args.steps)
        return
    runs = [measure(ranks, args.steps) for ranks in (1, 2, 4)]
    found = {
        "machine": describe_machine(1) | {"cores": cores()},
        "runs": runs,
        "decode_ms": decode_ms(),
    }
    (args.out / "ranks.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "ranks.md").write_text(report(found), encoding="utf-8")


if __name__ == "__main__":
    main()
