"""One contender in its own process. Reads commands and writes answers, one JSON line each."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS
from peak import growth_mib, peak_mib

from pvt_ref import VARIANTS


def inputs(batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and dL/dlogits, the same for every contender."""
    rng = np.random.default_rng(batch)
    images = rng.standard_normal((batch, 3, size, size), dtype=np.float32)
    return images, rng.standard_normal((batch, 1000), dtype=np.float32)


def measure(run, synchronize, seconds: float, least: int) -> list[float]:
    """Times of repeated runs, for a minimum of seconds and of runs, until the device is done."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def kernels(run, synchronize) -> dict[str, tuple[int, float]]:
    """Kernels that ran on the CUDA device during one run: by name, their count and seconds.

    CUPTI reports every kernel of the process, from any library.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")  # the profiler needs a context of PyTorch's
    run()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA":
            count, seconds = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, seconds + event.time_range.elapsed_us() / 1e6
    return found


def main() -> None:
    name, device, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = sys.stdout
    sys.stdout = sys.stderr  # output of a library is not an answer
    model, loaded = None, None
    for line in sys.stdin:
        order = json.loads(line)
        key = order["weights"], order["model"], order["size"]
        if model is None or key != loaded:
            model = None  # not two at once
            config = VARIANTS[order["model"]]
            weights = Path(order["weights"])
            model = CONTENDERS[name](weights, config, order["size"], threads, device)
            loaded = key
        if order["train"] and model.train is None:
            print(json.dumps({"not_run": "it computes no gradients"}), file=answers, flush=True)
            continue
        images, dlogits = map(model.prepare, inputs(order["batch"], order["size"]))

        def run(model: Any = model, images=images, dlogits=dlogits, order=order):
            return model.train(images, dlogits) if order["train"] else model.forward(images)

        answer: dict[str, Any] = {"versions": model.versions}
        if order["do"] == "outputs":
            np.savez(order["file"], **model.to_numpy(run()))
        elif order["do"] == "time":
            run()  # warms up
            model.synchronize()
            answer["times"] = measure(run, model.synchronize, order["seconds"], order["least"])
        elif order["do"] == "memory":
            answer["before"] = peak_mib()
            answer["times"] = measure(run, model.synchronize, 0, order["least"])
            answer["peak"] = peak_mib()
        elif order["do"] == "growth":
            model.forward(model.prepare(inputs(1, 64)[0]))  # loads weights and libraries
            answer["growth"] = growth_mib(run)
        elif order["do"] == "kernels":
            answer["kernels"] = kernels(run, model.synchronize)
        elif order["do"] == "device memory":
            assert model.device_mib is not None, "only those on a device are asked"
            answer["peak"] = model.device_mib(run)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
