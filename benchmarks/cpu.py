"""Times this project against PyTorch, transformers, ONNX Runtime and OpenVINO on the CPU.

    make bench                         everything; about 45 minutes
    make bench ARGS="--quick"          pvt_tiny at 224 x 224 only; some minutes
    make bench ARGS="--large"          the large images again, beside the times already stored

Every contender lives in a process of its own; they are asked in turn, round after round, while the
others sleep. First all of them must give the numbers of the readable layers in float64. One case is
timed again while another process keeps a core busy. For large images, memory is measured too.
A contender whose library is not installed is reported as not run. Results go to docs/results/:
cpu.json (everything measured), cpu_tables.md, and pictures, made by report.py.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

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
from report import RIVAL, write_report

LARGE = (512, 1024, 2048)


def measure_memory(names: list[str], orders: list[dict], threads: int, rounds: int) -> list:
    """Peak memory and time of a forward pass in fresh processes, in turn."""
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
                except ContenderError as error:  # killed: more memory than there is
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="pvt_tiny at 224 x 224 only")
    parser.add_argument("--large", action="store_true", help="only the large images")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is asked")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a case and round")
    parser.add_argument("--skip", nargs="*", default=[], choices=rest, metavar="NAME")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    threads = args.threads or cores()
    asked = [name for name in CONTENDERS if name not in args.skip]
    not_run = {name: reason for name in asked if (reason := missing(name))}
    names = [name for name in asked if name not in not_run]
    for name, reason in not_run.items():
        say(f"{name} is not run; {reason}")
    if RIVAL in not_run:
        parser.error(f"there is nothing to compare with: {RIVAL} is {not_run[RIVAL]}")
    models = ["pvt_tiny"] if args.quick else ["pvt_tiny", "pvt_small"]
    result: dict = {"machine": describe_machine(threads), "versions": {}}
    if args.large:
        result = json.loads((args.out / "cpu.json").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = {name: make_weights(name, folder) for name in models}

        def order(model: str, size: int, batch: int, train: bool = False) -> dict:
            path = str(weights[model])
            return {"weights": path, "model": model, "size": size, "batch": batch, "train": train}

        if not args.large:
            say("Starting", ", ".join(names))
            workers = [Worker(name, threads) for name in names]
            say("Checking that all compute the same")
            checks = [order(model, NATIVE, 2, train=True) for model in models]
            if not args.quick:
                checks.append(order("pvt_tiny", LARGE[0], 1))
            result["errors"] = check_equality(workers, checks, folder)
            say(f"Timing, {args.rounds} rounds; medians")
            cases = [
                order(model, NATIVE, batch, train)
                for model in models
                for train in (False, True)
                for batch in (1, 8)
            ]
            result["times"] = time_in_turn(workers, cases, args.rounds, args.seconds)
            say("The first of these again, while another process keeps a core busy")
            with busy_core():
                result["busy"] = time_in_turn(workers, cases[:1], args.rounds, args.seconds)
            for worker in workers:
                answer = worker.ask(do="versions", **order(models[-1], NATIVE, 1))
                result["versions"][worker.name] = answer["versions"]
                worker.close()
        if not args.quick:
            say("Large images, in fresh processes")
            sizes = [order("pvt_tiny", size, 1) for size in (NATIVE, *LARGE)]
            single = [name for name in names if name != "torch.compile"]  # would compile each
            result["large"] = measure_memory(single, sizes, threads, min(args.rounds, 2))
    measured = ("large",) if args.large else ("times", "busy", "large")
    for case in (case for key in measured for case in result.get(key, [])):
        if reasons := not_run | case.get("not_run", {}):
            case["not_run"] = reasons
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    write_report(result, args.out)
    say(f"Written to {args.out}: cpu.json, cpu_tables.md and pictures")


if __name__ == "__main__":
    main()
