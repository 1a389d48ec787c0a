"""Shared by the benchmarks of CPU and GPU: contenders in their own processes, run in turn.

First all of them must give the numbers of the readable layers in float64; then each is timed while
the others sleep, round after round.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from contenders import READABLE, our_arrays, our_pass
from safetensors.numpy import save_file
from worker import inputs

import pvt_ref
from pvt_ref import VARIANTS
from pvt_ref.models.architecture import architecture_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
NATIVE = 224  # the variants' own size
#: Largest relative error (L2) to float64 at which a contender is timed.
ALLOWED = 1e-5
#: The same for gradients through a ReLU. In any library, rounding moves one of ten million hidden
#: units across 0, which changes the gradients of all earlier layers, by 3e-4 in pvt_v2_b2_li, and
#: in fpn_pvt_tiny at 512 x 512.
ALLOWED_PAST_RELU = 1e-3


class ContenderError(Exception):
    """A contender's process ended: its error is on the terminal, or it was killed for memory."""


class Worker:
    """A process that answers orders, one at a time.

    It runs the code under root, this checkout or a copy of another commit. shown is the
    contender's name in tables, if different from its own.
    """

    def __init__(
        self, name: str, threads: int, device: str = "cpu", root: Path = ROOT, shown: str = ""
    ) -> None:
        environment = dict(os.environ) | {"PYTHONPATH": str(root)}
        environment.pop("PVT_REF_OPS", None)  # it would change the operations that users get
        for library in ("OMP", "OPENBLAS", "MKL"):
            environment[f"{library}_NUM_THREADS"] = str(threads)
        self.name, self.environment = shown or name, environment
        self.arguments = [str(root / "benchmarks" / "worker.py"), name, device, str(threads)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *self.arguments],
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
            self.close()
            status = self.process.returncode
            self.start()
            raise ContenderError(f"{self.name} ended with status {status}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()  # no more orders: it ends


def say(*words: object) -> None:
    print(*words, flush=True)


def make_weights(name: str, folder: Path) -> Path:
    """Random weights of a variant; no bias is 0 and no norm 1, so that comparisons test them."""
    rng = np.random.default_rng(7)
    state = pvt_ref.to_state_dict(pvt_ref.init_params(VARIANTS[name], rng))
    path = folder / f"{name}.safetensors"
    save_file(
        {
            key: (x + 0.02 * rng.standard_normal(x.shape)).astype(np.float32) if is_real(x) else x
            for key, x in state.items()
        },
        path,
    )
    return path


def is_real(x: np.ndarray) -> bool:
    """False for a norm's count of batches."""
    return x.dtype.kind == "f"


def exact_outputs(name: str, weights: Path, size: int, batch: int, train: bool) -> dict:
    """The results of the readable layers in float64."""
    config = VARIANTS[name]
    images, dlogits = (x.astype(np.float64) for x in inputs(batch, size))
    state = pvt_ref.to_state_dict(pvt_ref.load(weights, config).params)
    state = {key: x.astype(np.float64) if is_real(x) else x for key, x in state.items()}
    params = pvt_ref.from_state_dict(state, config)
    if not train:
        return our_arrays(pvt_ref.forward(params, images, config, ops=READABLE))
    return our_arrays(our_pass(params, images, dlogits, config, READABLE))


def allowed_error(name: str, quantity: str) -> float:
    """The largest error at which a contender is timed, for a variant's logits or a gradient."""
    config = VARIANTS[name]
    has_relu = architecture_of(config).dense or getattr(config, "linear", False)  # head, or MLPs
    return ALLOWED_PAST_RELU if has_relu and quantity != "logits" else ALLOWED


def check_equality(workers: list[Worker], orders: list[dict], folder: Path) -> list[dict]:
    """Raises unless every contender is right; returns the errors."""
    errors = []
    for order in orders:
        exact = exact_outputs(
            order["model"], Path(order["weights"]), order["size"], order["batch"], order["train"]
        )
        for worker in workers:
            file = folder / "outputs.npz"
            wanted = exact
            if "not_run" in worker.ask(do="outputs", file=str(file), **order):
                wanted = {"logits": exact["logits"]}
                worker.ask(do="outputs", file=str(file), **order | {"train": False})
            with np.load(file) as found:
                for key, x in wanted.items():
                    allowed = allowed_error(order["model"], key)
                    error = float(np.linalg.norm(found[key] - x) / np.linalg.norm(x))
                    errors.append(
                        {"contender": worker.name, "model": order["model"], "size": order["size"]}
                        | {"quantity": key, "error": error}
                    )
                    if not error < allowed:
                        raise SystemExit(
                            f"{worker.name} is not timed: its {key} of {order['model']} at "
                            f"{order['size']} x {order['size']} is off by {error:.1e}, and "
                            f"{allowed:.0e} is allowed"
                        )
    worst = max(errors, key=lambda e: e["error"])
    whose = f"{worst['quantity']} of {worst['model']} in {worst['contender']}"
    say(f"All results match float64 within {worst['error']:.1e} ({whose}).")
    return errors


def time_in_turn(workers: list[Worker], orders: list[dict], rounds: int, seconds: float) -> list:
    """Median of each contender in each round, for every order; None where it failed."""
    results = []
    for order in orders:
        not_run = {}
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
                if "not_run" in answer:
                    not_run[worker.name] = answer["not_run"]
                    able.remove(worker)
                    continue
                medians[worker.name].append(statistics.median(answer["times"]))
        case = {key: order[key] for key in ("model", "size", "batch", "train")}
        results.append(case | {"seconds": medians} | ({"not_run": not_run} if not_run else {}))
        shown = ", ".join(f"{n} {statistics.median(t) * 1e3:.1f}" for n, t in medians.items() if t)
        what = "forward + backward" if order["train"] else "forward"
        say(f"  {order['model']} {what}, B = {order['batch']}, in ms: {shown}")
    return results


def measure_device_memory(workers: list[Worker], orders: list[dict]) -> list[dict]:
    """MiB of the device's memory that each contender holds for every order."""
    results = []
    for order in orders:
        case = {key: order[key] for key in ("model", "size", "batch", "train")}
        mib = {w.name: w.ask(do="device memory", **order)["peak"] for w in workers}
        results.append(case | {"mib": mib})
    return results
