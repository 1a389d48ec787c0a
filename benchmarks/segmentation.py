"""Times Semantic FPN on PVT-Tiny against PyTorch eager on this CPU, and measures both memories.

    make bench                            does this at its end
    python benchmarks/segmentation.py     only this, some minutes

The network is fpn_pvt_tiny as released: 256 channels in the neck, 128 in the head, 150 classes. One
image of 512 x 512 pixels goes forward; the logits have a quarter of its sides in both, and are not
enlarged further. First both must give the numbers of the readable layers in float64. Then each is
timed in its own process while the other sleeps, round after round. Memory is measured in fresh
processes that have run once on a small image: the peak of a run less the memory before it. Results
go to docs/results/: cpu_segmentation.json and cpu_segmentation.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from in_turn import RESULTS, Worker, check_equality, make_weights, say, time_in_turn
from machine import describe_machine
from report import RIVAL, machine_line, markdown, ratio, spread, time_tables

MODEL, SIDE, THREADS = "fpn_pvt_tiny", 512, 2
NAMES = ("pvt_ref", RIVAL)
#: The targets: speed as a multiple of the rival's, and fraction of its memory growth.
SPEED, MEMORY = 0.8, 0.5


def measure(side: int, threads: int, rounds: int, seconds: float, folder: Path) -> dict[str, Any]:
    """The run: machine, versions, errors, times, and MiB by which a run raises each process."""
    weights = str(make_weights(MODEL, folder))
    order = {"weights": weights, "model": MODEL, "size": side, "batch": 1, "train": False}
    result: dict[str, Any] = {"machine": describe_machine(threads), "versions": {}}
    workers = [Worker(name, threads) for name in NAMES]
    result["errors"] = check_equality(workers, [order], folder)
    result["times"] = time_in_turn(workers, [order], rounds, seconds)
    for worker in workers:
        worker.close()
    growth: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            worker = Worker(name, threads)
            answer = worker.ask(do="growth", **order)
            growth[name].append(answer["growth"])
            result["versions"][name] = answer["versions"]
            worker.close()
    shown = ", ".join(f"{name} {statistics.median(mib):.0f}" for name, mib in growth.items())
    say(f"  {MODEL} forward at {side}, growth in MiB: {shown}")
    return result | {"growth": [{"model": MODEL, "size": side, "mib": growth}]}


def page(run: dict[str, Any]) -> str:
    """cpu_segmentation.md."""
    (case,), (grown,) = run["times"], run["growth"]
    mib = grown["mib"]
    middle, low, high = ratio(case, NAMES[0])
    share = statistics.median(mib[NAMES[0]]) / statistics.median(mib[RIVAL])
    worst = max(error["error"] for error in run["errors"])
    rows = [
        [
            f"speed, as a multiple of {RIVAL}'s",
            f"at least {SPEED}",
            f"{middle:.2f} ({low:.2f}-{high:.2f})" + ("" if middle >= SPEED else ": missed"),
        ],
        [
            f"memory growth, as a fraction of {RIVAL}'s",
            f"at most {MEMORY}",
            f"{share:.2f}" + ("" if share <= MEMORY else ": missed"),
        ],
    ]
    sizes = [[name, spread(values, 0)] for name, values in mib.items()]
    side = case["size"]
    return f"""# Segmentation on a CPU

The network is {MODEL}, [Semantic FPN](../course/semantic_fpn.md) on PVT-Tiny with the released
sizes: one image of {side}×{side} pixels, forward to the small logits.
`python benchmarks/segmentation.py` wrote this page. It first compares both libraries with the
readable layers in float64 (relative error at most {worst:.0e}).

{markdown(["", "target", "here"], rows)}
{machine_line(run)}
{time_tables(run)}
MiB that one run adds to a process that has loaded the network and has run once on a small image:
median over fresh processes (smallest-largest).

{markdown(["", "MiB"], sizes)}"""


def bench(
    threads: int = THREADS,
    rounds: int = 5,
    seconds: float = 2.0,
    out: Path = RESULTS,
    side: int = SIDE,
) -> None:
    """Measures, and writes both files."""
    say(f"Segmentation: {MODEL} at {side} x {side}, on {threads} threads")
    with tempfile.TemporaryDirectory() as temporary:
        run = measure(side, threads, rounds, seconds, Path(temporary))
    (out / "cpu_segmentation.json").write_text(json.dumps(run, indent=1) + "\n")
    (out / "cpu_segmentation.md").write_text(page(run), encoding="utf-8")
    say(f"Written to {out}: cpu_segmentation.json and cpu_segmentation.md")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=SIDE, help="side, a multiple of 32")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of timing per round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    bench(args.threads, args.rounds, args.seconds, args.out, args.size)


if __name__ == "__main__":
    main()
