"""Times this project on a CUDA device, through CuPy, beside PyTorch on the same device.

    python benchmarks/gpu.py --minutes 10            as much of it as that time allows
    python benchmarks/gpu.py --list                  the rows in their order; nothing is run

First the tests that need a device run, and compute-sanitizer looks at every kernel. Then come rows:
a row is a model, what is computed (a forward; with its backward; a whole step with AdamW), how many
images, a precision, and who does it: this project's kernels, launched or captured as a graph, and
PyTorch eager, compiled with mode="reduce-overhead", or with mode="max-autotune" if that is ready in
three minutes. A row is timed only if its numbers are those of the readable layers in float64, and
by the device's own events. Classifiers get images of 224 x 224, segmentation networks of 512 x 512.
The most important rows come first, and each is written to docs/results/gpu_kernels.json as soon as
it is there: run again, the program goes on where it was. Then gpu_report.py makes the page, which
names what was not run. gpu_ladder.py times the steps of single kernels.

docs/results/gpu.json holds times of an earlier commit, measured by an earlier program before there
were kernels.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gpu_report import write_kernels_page
from gpu_worker import exact_results
from in_turn import ROOT, Worker, make_weights, say
from machine import cores, describe_machine

from pvt_ref.arrays import import_cupy

RESULTS = ROOT / "docs" / "results"
FILE = "gpu_kernels.json"

#: The contenders, by process: how the work is started.
HOW = {
    "pvt_ref": ("captured", "launched"),
    "PyTorch": ("eager", "reduce-overhead"),
}

#: Seconds to wait for an answer.
LIMITS = {"reduce-overhead": 150, "max-autotune": 180}
LIMIT = 60

#: All of them, whatever fails, and also where a package is missing that other tests import.
_TESTS = (
    *(sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"),
    *("--go-on", "--continue-on-collection-errors"),
)
_SANITIZER = ("compute-sanitizer", "--error-exitcode", "1", "--tool")
_KERNELS = (sys.executable, "benchmarks/gpu_sanitized.py")

#: What comes before the rows: the share of the minutes that it may take, and the command.
CHECKS: dict[str, tuple[float, tuple[str, ...]]] = {
    "tests": (0.35, _TESTS),
    "memcheck": (0.15, (*_SANITIZER, "memcheck", *_KERNELS)),
    "racecheck": (0.15, (*_SANITIZER, "racecheck", *_KERNELS)),
}

MODELS = ("pvt_small", "pvt_v2_b2", "deit_s_16")
WHATS = ("forward", "train", "step")
BATCHES = (1, 64, 8)

#: The first cases of each model: task, batch size, precision.
FIRST = (
    *(("forward", 1, "float32"), ("forward", 64, "float32"), ("train", 64, "float32")),
    *(("step", 64, "float32"), ("forward", 1, "tf32"), ("forward", 64, "tf32")),
    *(("train", 64, "tf32"), ("train", 1, "float32"), ("forward", 8, "float32")),
    *(("forward", 64, "float16"), ("step", 64, "float16")),
)

#: What is asked of others, after the first rows of MODELS.
OTHERS = (
    *(("pvt_v2_b1", what, batch, "float32") for what in ("forward", "train") for batch in (1, 64)),
    *(
        ("fpn_pvt_tiny", what, batch, "float32")
        for what in ("forward", "train")
        for batch in (1, 8)
    ),
)

#: Environment variables that would change the precision of the processes.
OVERRIDES = ("NVIDIA_TF32_OVERRIDE", "CUPY_TF32")

KEY = ("contender", "how", "model", "what", "batch", "precision")


def rows_of(cases: list[tuple]) -> tuple[list[dict], list[dict]]:
    """The rows of these cases: those that take seconds, and those that compile for a minute."""
    rows: tuple[list[dict], list[dict]] = [], []
    for model, what, batch, precision in cases:
        case = {"model": model, "what": what, "batch": batch, "precision": precision}
        for contender, hows in HOW.items():
            for how in hows:
                rows[how in LIMITS].append({"contender": contender, "how": how} | case)
    return rows


def plan() -> list[dict]:
    """All rows, the most important first."""
    small, *others = MODELS
    first = [(small, *case) for case in FIRST]
    second = [*((model, *case) for case in FIRST[:4] for model in others), *OTHERS]
    rest = []
    for what in WHATS:
        for batch in BATCHES:
            rest += [(model, what, batch, p) for p in ("float32", "tf32") for model in MODELS]
            rest += [(small, what, batch, p) for p in ("float16", "bfloat16")]
    rest += [("fpn_pvt_tiny", "forward", batch, "tf32") for batch in (1, 8)]
    rest = [case for case in dict.fromkeys(rest) if case not in {*first, *second}]
    head = [row for case in first[:3] for rows in rows_of([case]) for row in rows]
    tuned = [row | {"how": "max-autotune"} for row in head if row["how"] == "reduce-overhead"]
    blocks = [rows_of(cases) for cases in (first[3:], second, rest)]
    (quick, slow), (quick_2, slow_2), (quick_3, slow_3) = blocks
    return [*head, *quick, *quick_2, *slow, *tuned, *slow_2, *quick_3, *slow_3]


def key(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def describe_device() -> dict[str, str]:
    """Name, driver and CUDA version of the device that everything runs on."""
    cupy = import_cupy()
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    return {
        "gpu": properties["name"].decode(),
        "driver": driver,
        "cuda": f"{runtime // 1000}.{runtime % 1000 // 10}",
    }


def describe(named_commit: str | None) -> dict:
    """Machine and device; without git, the commit can be passed."""
    told = describe_machine(cores()) | describe_device()
    return told | ({"commit": named_commit} if named_commit else {})


class Impatient(Worker):
    """A process of gpu_worker.py that is killed if it does not answer in time."""

    def __init__(self, name: str) -> None:
        super().__init__(name, cores(), "cuda")

    def start(self) -> None:
        self.arguments = [str(ROOT / "benchmarks" / "gpu_worker.py"), self.arguments[1]]
        super().start()

    def ask_within(self, seconds: float, order: dict) -> dict:
        """The answer, or the reason why there is none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._again("its process had ended")
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return self._again(f"not ready after {seconds:.0f} s")
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else self._again("its process ended")

    def _again(self, why: str) -> dict:
        self.process.kill()
        self.process.communicate()
        status = self.process.returncode
        self.start()
        return {"not_run": why + (f" with status {status}" if "ended" in why else "")}


def check(
    result: dict,
    file: Path,
    minutes: float,
    checks: dict[str, tuple[float, tuple[str, ...]]] = CHECKS,
) -> None:
    """Runs what no earlier run has finished, and writes how each ended and the last that it said.

    No failure keeps rows from being timed, for each is compared before: the page tells of it.
    """
    told = result.setdefault("checks", {})
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    for name, (share, command) in checks.items():
        if "passed" in told.get(name, {}):
            continue
        limit, begun = 60 * minutes * share, time.monotonic()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            said = process.communicate(timeout=limit)[0]
        except FileNotFoundError:
            told[name] = {"not_run": f"{command[0]} is not installed"}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the sanitizer's own process too
            process.communicate()
            told[name] = {"not_run": f"not done after {limit:.0f} s"}
        else:
            lines = [line for line in (line.strip(" =") for line in said.splitlines()) if line]
            last, seconds = "".join(lines[-1:])[:200], round(time.monotonic() - begun, 1)
            told[name] = {"passed": process.returncode == 0, "said": last, "seconds": seconds}
        write(file, result)
        say(f"  {name}: {told[name].get('not_run') or told[name]['said']}")


def measure(
    rows: list[dict],
    result: dict,
    file: Path,
    workers: dict[str, Impatient],
    folder: Path,
    minutes: float,
    seconds: float,
    now=time.monotonic,
) -> None:
    """Measures the rows that result lacks, in order, and writes each at once."""
    begun, done = now(), {key(row) for row in result["rows"]}
    weights: dict[str, str] = {}
    for row in rows:
        if key(row) in done:
            continue
        left = 60 * minutes - (now() - begun)
        if left < 10:
            break
        limit = LIMITS.get(row["how"], LIMIT)
        if row["how"] in LIMITS and left < 90:
            continue  # it would be cut off while compiling; shorter rows follow
        model = row["model"]
        if model not in weights:
            weights[model] = str(make_weights(model, folder))
        exact = folder / f"{model}-{row['what']}.npz"
        if not exact.exists():
            np.savez(exact, **exact_results(model, Path(weights[model]), row["what"]))
        order = row | {"weights": weights[model], "exact": str(exact), "seconds": seconds}
        answer = workers[row["contender"]].ask_within(min(limit, left), order)
        if "not ready" in answer.get("not_run", "") and left < limit:
            break  # this run ends; the contender did not fail
        version = answer.pop("versions", None)
        if version:
            result["versions"][row["contender"]] = version
        result["rows"].append(row | answer)
        write(file, result)
        told = answer.get("not_run") or f"{1e3 * answer['seconds']:.3f} ms"
        say(f"  {', '.join(str(row[name]) for name in KEY)}: {told}")


def write(file: Path, result: dict) -> None:
    """Replaces the file in one step, since a run may be cut off at any moment."""
    new = file.with_suffix(".part")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(file)


def begin(file: Path, machine: dict) -> dict:
    """The result of an earlier run on this machine with this code, or an empty result."""
    if not file.exists():
        return {"machine": machine, "versions": {}, "checks": {}, "rows": []}
    result = json.loads(file.read_text())
    for name in ("gpu", "driver", "commit"):
        if result["machine"][name] != machine[name]:
            raise SystemExit(
                f"{file} has results of {name} {result['machine'][name]}, but this is "
                f"{machine[name]}. One table cannot hold both: move the file away, "
                f"or name another folder with --out"
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the rows, and run nothing")
    parser.add_argument("--minutes", type=float, default=10, help="time limit (default 10)")
    parser.add_argument("--no-checks", action="store_true", help="skip the tests and the sanitizer")
    parser.add_argument("--seconds", type=float, default=0.3, help="timing per row (default 0.3)")
    parser.add_argument("--commit", help="the commit of this code, if git is not available")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    rows = plan()
    if args.list:
        for number, row in enumerate(rows, start=1):
            print(number, *key(row), sep="\t")
        return
    begun = time.monotonic()
    for variable in OVERRIDES:
        os.environ.pop(variable, None)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / FILE
    result = begin(file, describe(args.commit))
    say(f"{result['machine']['gpu']}, commit {result['machine']['commit']}; {len(rows)} rows, "
        f"{len(result['rows'])} of them measured before")  # fmt: skip
    if not args.no_checks:
        check(result, file, args.minutes)
    workers = {name: Impatient(name) for name in HOW}
    try:
        with tempfile.TemporaryDirectory() as folder:
            left = args.minutes - (time.monotonic() - begun) / 60
            measure(rows, result, file, workers, Path(folder), left, args.seconds)
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.communicate()
        write(file, result)
        write_kernels_page(args.out)
    say(f"Written to {args.out}: {FILE} and gpu_kernels.md, {len(result['rows'])} rows")


if __name__ == "__main__":
    sys.exit(main())
