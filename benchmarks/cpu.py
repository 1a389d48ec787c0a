"""Times this project against PyTorch and transformers on the CPU, and measures memory.

    make bench                         everything; about half an hour
    make bench ARGS="--quick"          pvt_tiny at 224 x 224 only; some minutes
    make bench ARGS="--large"          the large images again, beside the times already stored

Every contender lives in a process of its own; they are asked in turn, round after round, while the
others sleep. First all of them must give the numbers of the readable layers in float64. Results go
to docs/results/: cpu.json (everything measured), cpu_tables.md, and pictures, made by report.py.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from contenders import COMPARED, CONTENDERS
from report import write_report
from worker import inputs

import pvt_ref
from pvt_ref import VARIANTS, Model
from pvt_ref.arrays import map_arrays

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
NATIVE = 224  # the size the variants were made for
LARGE = (512, 1024, 2048)
#: Largest relative error (L2) against float64 with which a contender may be timed.
ALLOWED = 1e-5


class ContenderError(Exception):
    """A contender's process died: its error is on the terminal, or it was killed for memory."""


class Worker:
    """A process that answers orders, one at a time."""

    def __init__(self, name: str, threads: int) -> None:
        environment = dict(os.environ)
        for library in ("OMP", "OPENBLAS", "MKL"):
            environment[f"{library}_NUM_THREADS"] = str(threads)
        self.name, self.threads, self.environment = name, threads, environment
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), self.name, str(self.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def ask(self, **order) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            self.start()
            raise ContenderError(f"{self.name} ended with status {status}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def say(*words: object) -> None:
    print(*words, flush=True)


def make_weights(name: str, folder: Path) -> Path:
    """Random weights of a variant; no bias is 0 and no norm 1, so that equality means something."""
    rng = np.random.default_rng(7)
    params = pvt_ref.init_params(VARIANTS[name], rng)
    params = map_arrays(
        lambda x: (x + 0.02 * rng.standard_normal(x.shape)).astype(np.float32), params
    )
    path = folder / f"{name}.safetensors"
    pvt_ref.save(path, Model(params, VARIANTS[name]))
    return path


def exact_outputs(name: str, weights: Path, size: int, batch: int, train: bool) -> dict:
    """What the readable layers give in float64."""
    config = VARIANTS[name]
    images, dlogits = inputs(batch, size)
    params = map_arrays(lambda x: x.astype(np.float64), pvt_ref.load(weights, config).params)
    logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=pvt_ref.REFERENCE)
    exact = {"logits": logits}
    if train:
        grads, dimages = pvt_ref.backward(params, cache, dlogits.astype(np.float64), config)
        state = pvt_ref.to_state_dict(grads)
        exact |= {"dimages": dimages} | {key: state[key] for key in COMPARED}
    return exact


def check_equality(workers: list[Worker], orders: list[dict], folder: Path) -> list[dict]:
    """Raises unless every contender is right; returns the errors found."""
    errors = []
    for order in orders:
        exact = exact_outputs(
            order["model"], Path(order["weights"]), order["size"], order["batch"], order["train"]
        )
        for worker in workers:
            file = folder / "outputs.npz"
            worker.ask(do="outputs", file=str(file), **order)
            with np.load(file) as found:
                for key, x in exact.items():
                    error = float(np.linalg.norm(found[key] - x) / np.linalg.norm(x))
                    errors.append(
                        {"contender": worker.name, "model": order["model"], "size": order["size"]}
                        | {"quantity": key, "error": error}
                    )
                    if not error < ALLOWED:
                        raise SystemExit(
                            f"{worker.name} is not timed: its {key} of {order['model']} at "
                            f"{order['size']} x {order['size']} is off by {error:.1e}, and "
                            f"{ALLOWED:.0e} is allowed"
                        )
    worst = max(errors, key=lambda e: e["error"])
    say(f"All results match float64 within {worst['error']:.1e} ({worst['contender']}).")
    return errors


def time_in_turn(workers: list[Worker], orders: list[dict], rounds: int, seconds: float) -> list:
    """Median of each contender in each round, for every order; none where it failed."""
    results = []
    for order in orders:
        medians: dict[str, list[float]] = {worker.name: [] for worker in workers}
        able = list(workers)
        for _ in range(rounds):
            for worker in list(able):
                try:
                    answer = worker.ask(do="time", seconds=seconds, least=3, **order)
                except ContenderError as error:
                    say(f"  {error}; it is left out here")
                    medians[worker.name] = []
                    able.remove(worker)
                    continue
                medians[worker.name].append(statistics.median(answer["times"]))
        case = {key: order[key] for key in ("model", "size", "batch", "train")}
        results.append(case | {"seconds": medians})
        shown = ", ".join(f"{n} {statistics.median(t) * 1e3:.1f}" for n, t in medians.items() if t)
        what = "forward + backward" if order["train"] else "forward"
        say(f"  {order['model']} {what}, B = {order['batch']}, in ms: {shown}")
    return results


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


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def describe_machine(threads: int) -> dict:
    from threadpoolctl import threadpool_info

    blas = sorted({f"{i['internal_api']} {i['version']}, {i.get('architecture', '')} kernels"
                   for i in threadpool_info() if i["user_api"] == "blas"})  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "machine": platform.machine(),
        "system": platform.system(),
        "memory_gib": round(memory, 1),
        "threads": threads,
        "cores": cores(),
        "python": platform.python_version(),
        "pvt_ref": pvt_ref.__version__,
        "blas": blas,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="pvt_tiny at 224 x 224 only")
    parser.add_argument("--large", action="store_true", help="only the large images")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is asked")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a case and round")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    threads = args.threads or cores()
    names = [name for name in CONTENDERS if name not in args.skip]
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
            for worker in workers:
                answer = worker.ask(do="versions", **order(models[-1], NATIVE, 1))
                result["versions"][worker.name] = answer["versions"]
                worker.close()
        if not args.quick:
            say("Large images, in fresh processes")
            sizes = [order("pvt_tiny", size, 1) for size in (NATIVE, *LARGE)]
            single = [name for name in names if name != "torch.compile"]  # would compile each
            result["large"] = measure_memory(single, sizes, threads, min(args.rounds, 2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    write_report(result, args.out)
    say(f"Written to {args.out}: cpu.json, cpu_tables.md and pictures")


if __name__ == "__main__":
    main()
