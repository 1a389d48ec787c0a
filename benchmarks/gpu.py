"""Times this project on a CUDA device, through CuPy, against PyTorch on the same device.

    python benchmarks/gpu.py                         a few minutes; needs CuPy and a CUDA PyTorch
    python benchmarks/gpu.py --kernels               only where the device's time goes, by kernel

As on the CPU (cpu.py): each contender in a process of its own, asked in turn, and only if its
numbers are those of the readable layers in float64. All compute in float32; TensorFloat-32 is off
for all, in cuBLAS and cuDNN, since it would give other numbers. A time is that of one call on a
device with nothing to do, until the device is done. Results go to docs/results/: gpu.json,
gpu_tables.md and a picture.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from gpu_report import kind, write_gpu_report
from in_turn import (
    NATIVE,
    RESULTS,
    Worker,
    check_equality,
    make_weights,
    measure_device_memory,
    say,
    time_in_turn,
)
from machine import cores, describe_machine
from report import RIVAL

from pvt_ref.arrays import import_cupy

NAMES = ("pvt_ref", "PyTorch eager", "PyTorch eager, fused attention", "torch.compile")
BATCHES = (1, 8, 64)


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


def measure_kernels(workers: list[Worker], orders: list[dict]) -> list[dict]:
    """Kernels of one call, by what they do: how many and for how many seconds."""
    results = []
    for order in orders:
        case = {key: order[key] for key in ("model", "size", "batch", "train")}
        kinds: dict[str, dict] = {}
        for worker in workers:
            found = kinds.setdefault(worker.name, {})
            for name, (count, seconds) in worker.ask(do="kernels", **order)["kernels"].items():
                before = found.get(kind(name), (0, 0.0))
                found[kind(name)] = before[0] + count, before[1] + seconds
        results.append(case | {"kernels": kinds})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", action="store_true", help="only where the time goes")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is asked")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing a case and round")
    parser.add_argument("--skip", nargs="*", default=[], choices=NAMES, metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # for the processes started below
    names = [name for name in NAMES if name not in args.skip]
    threads = cores()
    result: dict = {"machine": describe_machine(threads) | describe_device(), "versions": {}}
    if args.kernels:
        result = json.loads((args.out / "gpu.json").read_text())
    models = ["pvt_tiny", "pvt_small"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = {name: str(make_weights(name, folder)) for name in models}
        cases = [
            {"weights": weights[model], "model": model, "size": NATIVE, "batch": batch}
            | {"train": train}
            for model in models
            for train in (False, True)
            for batch in BATCHES
        ]
        if not args.kernels:
            say("Starting", ", ".join(names))
            workers = [Worker(name, threads, "cuda") for name in names]
            say("Checking that all compute the same")
            checks = [case for case in cases if case["batch"] == 1]
            result["errors"] = check_equality(workers, checks, folder)
            say(f"Timing, {args.rounds} rounds; medians")
            result["times"] = time_in_turn(workers, cases, args.rounds, args.seconds)
            result["memory"] = measure_device_memory(workers, cases)
            for worker in workers:
                answer = worker.ask(do="versions", **cases[0])
                result["versions"][worker.name] = answer["versions"]
                worker.close()
        say("Counting kernels")
        workers = [Worker(name, threads, "cuda") for name in ("pvt_ref", RIVAL)]
        chosen = [c for c in cases if c["model"] == "pvt_small" and c["batch"] in (1, 64)]
        result["kernels"] = measure_kernels(workers, chosen)
        for worker in workers:
            worker.close()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    write_gpu_report(result, args.out)
    say(f"Written to {args.out}: gpu.json, gpu_tables.md and gpu_ratios.svg")


if __name__ == "__main__":
    main()
