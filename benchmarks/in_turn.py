"""What the benchmarks of CPU and GPU share: contenders in processes of their own, asked in turn.

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
from contenders import COMPARED
from worker import inputs

import pvt_ref
from pvt_ref import VARIANTS, Model
from pvt_ref.tree import map_arrays

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
NATIVE = 224  # the size the variants were made for
#: Largest relative error (L2) against float64 with which a contender may be timed.
ALLOWED = 1e-5


class ContenderError(Exception):
    """A contender's process died: its error is on the terminal, or it was killed for memory."""


class Worker:
    """A process that answers orders, one at a time."""

    def __init__(self, name: str, threads: int, device: str = "cpu") -> None:
        environment = dict(os.environ)
        for library in ("OMP", "OPENBLAS", "MKL"):
            environment[f"{library}_NUM_THREADS"] = str(threads)
        self.name, self.environment = name, environment
        self.arguments = [name, device, str(threads)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), *self.arguments],
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


def measure_device_memory(workers: list[Worker], orders: list[dict]) -> list[dict]:
    """MiB of the device's memory that each contender holds for every order."""
    results = []
    for order in orders:
        case = {key: order[key] for key in ("model", "size", "batch", "train")}
        mib = {w.name: w.ask(do="device memory", **order)["peak"] for w in workers}
        results.append(case | {"mib": mib})
    return results
