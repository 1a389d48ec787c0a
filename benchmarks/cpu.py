"""Times this project against PyTorch, transformers, ONNX Runtime and OpenVINO on the CPU.

    make bench                                       everything; about an hour
    make bench ARGS="--quick"                        pvt_tiny at 224 x 224 only; some minutes
    make bench ARGS="--large"                        only the large images
    make bench ARGS="--models pvt_v2_b0 deit_s_16"   only these models

Without any of these, a segmentation network is measured at the end, by segmentation.py.

Every contender has its own process; they run in turn, round after round, while the others sleep.
First all of them must give the numbers of the readable layers in float64. One case is timed again
while another process keeps a core busy. For large images, memory is measured too. Models other than
PVT are only timed, against fewer contenders. A contender whose library is not installed is reported
as not run. Results go to docs/results/: cpu.json (all measurements), cpu_tables.md, and pictures,
made by report.py. Stored results that are not measured again are kept.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from busy import busy_core
from contenders import CONTENDERS, missing
from in_turn import (
    NATIVE,
    RESULTS,
    ContenderError,
    Worker,
    check_equality,
    make_weights,
    say,
    time_in_turn,
)
from machine import cores, describe_machine
from report import CASES, RIVAL, all_cases, models_of, read_runs, write_report
from segmentation import bench as bench_segmentation

from pvt_ref import VARIANTS, PVTConfig

#: The default measurements.
MODELS = ("pvt_tiny", "pvt_small", "pvt_v2_b0", "pvt_v2_b2", "deit_s_16")
LARGE = (512, 1024, 2048)
#: The contenders on models other than PVT, without --all, and the most rounds.
FEW, FEW_ROUNDS = ("pvt_ref", "pvt_ref, readable layers", RIVAL, "torch.compile"), 3


class Bench:
    """The settings that all measurements of a run share."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.threads = args.threads or cores()
        self.weights: dict[str, Path] = {}

    def order(self, model: str, size: int, batch: int, train: bool = False) -> dict:
        """An order for a worker; random weights are made the first time."""
        if model not in self.weights:
            self.weights[model] = make_weights(model, self.folder)
        path = str(self.weights[model])
        return {"weights": path, "model": model, "size": size, "batch": batch, "train": train}

    def times(self, names: list[str], models: list[str], rounds: int) -> dict:
        """One run: models by one set of contenders."""
        result: dict = {"machine": describe_machine(self.threads), "versions": {}}
        args, has_tiny = self.args, "pvt_tiny" in models
        say("Starting", ", ".join(names))
        workers = [Worker(name, self.threads) for name in names]
        say("Checking that all results match")
        checks = [self.order(model, NATIVE, 2, train=True) for model in models]
        if has_tiny and not args.quick:
            checks.append(self.order("pvt_tiny", LARGE[0], 1))
        result["errors"] = check_equality(workers, checks, self.folder)
        say(f"Timing, {rounds} rounds; medians")
        cases = [
            self.order(model, NATIVE, batch, train)
            for model in models
            for train in (False, True)
            for batch in (1, 8)
        ]
        result["times"] = time_in_turn(workers, cases, rounds, args.seconds)
        if has_tiny:
            say("The first of these again, while another process keeps a core busy")
            case = self.order("pvt_tiny", NATIVE, 1)
            with busy_core():
                result["busy"] = time_in_turn(workers, [case], rounds, args.seconds)
        for worker in workers:
            answer = worker.ask(do="versions", **cases[-1] | {"train": False})
            result["versions"][worker.name] = answer["versions"]
            worker.close()
        return result

    def large(self, names: list[str]) -> dict:
        """One run: memory and time of large images."""
        say("Large images, in fresh processes")
        single = [name for name in names if name != "torch.compile"]  # it compiles for each size
        orders = [self.order("pvt_tiny", size, 1) for size in (NATIVE, *LARGE)]
        result: dict = {"machine": describe_machine(self.threads), "versions": {}}
        rounds = min(self.args.rounds, 2)
        result["large"] = measure_memory(single, orders, self.threads, rounds, result["versions"])
        return result


def merge(stored: list[dict], measured: dict) -> list[dict]:
    """The measured run, and the stored cases that were not measured again."""
    again = {(key, case["model"]) for key in CASES for case in measured.get(key, [])}
    kept = []
    for run in stored:
        cases = {
            key: [case for case in run.get(key, []) if (key, case["model"]) not in again]
            for key in CASES
        }
        rest = {key: x for key, x in run.items() if key not in CASES}
        kept.append(rest | {key: x for key, x in cases.items() if x})
    runs = [run for run in (measured, *kept) if all_cases(run)]
    order = list(VARIANTS)
    return sorted(runs, key=lambda run: ("times" not in run, order.index(models_of(run)[0])))


def measure_memory(
    names: list[str], orders: list[dict], threads: int, rounds: int, versions: dict[str, str]
) -> list:
    """Peak memory and time of a forward pass in fresh processes, in turn; versions are entered."""
    results = []
    for order in orders:
        case = {key: order[key] for key in ("model", "size", "batch", "train")}
        peaks: dict[str, list[float]] = {name: [] for name in names}
        before: dict[str, list[float]] = {name: [] for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        failures = {}
        for _ in range(rounds):
            for name in names:
                if name in failures:
                    continue
                worker = Worker(name, threads)
                try:
                    answer = worker.ask(do="memory", least=2, **order)
                    peaks[name].append(answer["peak"])
                    before[name].append(answer["before"])
                    seconds[name].append(min(answer["times"]))
                    versions[name] = answer["versions"]
                except ContenderError as error:  # killed for lack of memory
                    failures[name] = str(error)
                worker.close()
        results.append(
            case
            | {"peak_mib": peaks, "before_mib": before, "seconds": seconds, "failures": failures}
        )
        shown = ", ".join(
            f"{n} {min(peaks[n]):.0f} MiB {statistics.median(seconds[n]):.2f} s"
            if peaks[n]
            else f"{n} failed"
            for n in names
        )
        say(f"  {order['model']} forward at {order['size']}: {shown}")
    return results


def main() -> None:
    rest = [name for name in CONTENDERS if name not in ("pvt_ref", RIVAL)]  # tables need these two
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="pvt_tiny at 224 x 224 only")
    parser.add_argument("--large", action="store_true", help="only the large images")
    parser.add_argument(
        "--models",
        nargs="+",
        default=MODELS,
        choices=VARIANTS,
        metavar="NAME",
        help=f"default: {' '.join(MODELS)}",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing per case and round")
    parser.add_argument("--skip", nargs="*", default=[], choices=rest, metavar="NAME")
    parser.add_argument("--all", action="store_true", help="all contenders for all models")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    asked = [name for name in CONTENDERS if name not in args.skip]
    not_run = {name: reason for name in asked if (reason := missing(name))}
    names = [name for name in asked if name not in not_run]
    for name, reason in not_run.items():
        say(f"{name} is not run; {reason}")
    if RIVAL in not_run:
        parser.error(f"there is nothing to compare with: {RIVAL} is {not_run[RIVAL]}")
    models = ["pvt_tiny"] if args.quick or args.large else list(dict.fromkeys(args.models))
    pvts = [model for model in models if isinstance(VARIANTS[model], PVTConfig)]
    others = [model for model in models if model not in pvts]
    few = asked if args.all else [name for name in asked if name in FEW]
    file = args.out / "cpu.json"
    args.out.mkdir(parents=True, exist_ok=True)
    runs = read_runs(file) if file.exists() else []

    def run(measure: Callable[..., dict], wanted: list[str], *what: Any) -> list[dict]:
        """All runs with the new measurements; each is stored at once, since they take long."""
        measured = measure([name for name in wanted if name in names], *what)
        absent = {name: reason for name, reason in not_run.items() if name in wanted}
        for case in all_cases(measured):
            if reasons := absent | case.get("not_run", {}):
                case["not_run"] = reasons
        merged = merge(runs, measured)
        file.write_text(json.dumps({"runs": merged}, indent=1) + "\n")
        return merged

    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, Path(temporary))
        if pvts and not args.large:
            runs = run(bench.times, asked, pvts, args.rounds)
        if "pvt_tiny" in models and not args.quick:
            runs = run(bench.large, asked)
        if others:
            runs = run(bench.times, few, others, min(args.rounds, FEW_ROUNDS))
    write_report(runs, args.out)
    if args.models is MODELS and not args.quick and not args.large:
        bench_segmentation(rounds=args.rounds, seconds=args.seconds, out=args.out)
    say(f"Written to {args.out}: cpu.json, cpu_tables.md and pictures")


if __name__ == "__main__":
    main()
