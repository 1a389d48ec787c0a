"""Where the time goes: by operation in the readable layers, by kernel in their faster twins.

    python benchmarks/by_operation.py [--model pvt_tiny] [--batch 8] [--threads 2]

A function's time is its own: what it spends in others that are listed is theirs. Threads are added
up, so the sum is threads times the duration; "waiting" is what a thread spends without work.
Matrix products are NumPy's matmul, whoever calls it.
"""

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import describe_machine
from report import RESULTS, markdown

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, blocked_ops
from pvt_ref.kernels.cpu import (
    attention,
    block,
    gelu,
    layer_norm,
    linear,
    mlp,
    patch_embed,
    tiling,
)
from pvt_ref.models.pvt import PVT
from pvt_ref.ops import Operation

PRODUCTS = "matrix products"
#: The functions that are told apart, and what they are called in the table.
KERNELS = {
    "gelu_rows": "GELU",
    "layer_norm_rows": "layer norm",
    "layer_norm_backward_rows": "layer norm, backward",
    "linear_rows": "adding biases",
    "attend_rows": "softmax of attention",
    "attend_backward_rows": "softmax of attention, backward",
    "embed_rows": "cutting patches",
    "embed_backward_rows": "cutting patches, backward",
    "mlp_backward_rows": "GELU, backward",
    "column_sums": "gradients of biases",
}
REPEATS = 10

HEADING = """# Speed by operation

Where the time of [the whole](cpu.md) goes, written by `benchmarks/by_operation.py`. A line's time
is its own, without what it spends in other lines, added up over all threads; so the sum is
threads times the duration. "Waiting" is a thread without work while another has some; "no work,
or outside" is the rest: the interpreter between operations, and what is in no line.
"""


class Stopwatch:
    """Adds up the own time of functions, over all threads."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.inner = threading.local()

    def time(self, name: str, function: Callable) -> Callable:
        """function, timed under name."""

        def timed(*args, **kwargs):
            stack = self.inner.__dict__.setdefault("stack", [])
            stack.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                with self.lock:
                    self.seconds[name] += taken - stack.pop()
                if stack:
                    stack[-1] += taken

        return timed


def watch_kernels(watch: Stopwatch) -> None:
    """Replaces the kernels, for good, by timed ones."""
    modules = (attention, block, gelu, layer_norm, linear, mlp, patch_embed)
    for function, name in KERNELS.items():
        timed = None
        for module in modules:
            if hasattr(module, function):
                timed = timed or watch.time(name, getattr(module, function))
                setattr(module, function, timed)
    run_pieces = tiling.run_pieces

    def run_watched(work, pieces, threads):
        return run_pieces(watch.time("sums, copies, Python", work), pieces, threads)

    # the caller's own time in there is spent starting threads and waiting for them
    tiling.run_pieces = watch.time("waiting", run_watched)


def watch_table(watch: Stopwatch) -> pvt_ref.Ops:
    """The readable layers, timed."""
    table = REFERENCE
    for op in PVT.operations:
        timed = Operation(
            watch.time(op.name, op.forward), watch.time(f"{op.name}, backward", op.backward)
        )
        table = table.replace(op, timed)
    return table


def measure(model: str, batch: int, train: bool, ops: pvt_ref.Ops, watch: Stopwatch) -> dict:
    """Seconds by name and in all, of one pass."""
    config = VARIANTS[model]
    params = pvt_ref.init_params(config, np.random.default_rng(0))
    images = np.random.default_rng(1).standard_normal((batch, 3, 224, 224), dtype=np.float32)

    def run():
        if not train:
            return pvt_ref.forward(params, images, config, ops=ops)
        logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
        return pvt_ref.backward(params, cache, logits, config)

    for _ in range(3):
        run()
    watch.seconds.clear()
    start = time.perf_counter()
    for _ in range(REPEATS):
        run()
    whole = (time.perf_counter() - start) / REPEATS
    return {"whole": whole, "parts": {k: v / REPEATS for k, v in watch.seconds.items()}}


def table(found: dict, threads: int) -> str:
    budget = found["whole"] * threads
    rows = [
        [name, f"{1e3 * t:.1f}", f"{t / budget:.0%}"]
        for name, t in sorted(found["parts"].items(), key=lambda item: -item[1])
        if t > 0.002 * budget
    ]
    idle = budget - sum(found["parts"].values())
    rows.append(["no work, or outside", f"{1e3 * idle:.1f}", f"{idle / budget:.0%}"])
    rows.append(["sum", f"{1e3 * budget:.1f}", "100%"])
    return markdown(["", "ms, all threads", "share"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pvt_tiny", choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    threads = args.threads or describe_machine(0)["cores"]
    watch = Stopwatch()
    np.matmul = watch.time(PRODUCTS, np.matmul)
    watch_kernels(watch)
    results, text = {}, [HEADING]
    for train in (False, True):
        what = "forward + backward" if train else "forward"
        found = measure(args.model, args.batch, train, blocked_ops(threads), watch)
        results[what] = found
        share = found["parts"][PRODUCTS] / (found["whole"] * threads)
        text.append(
            f"Kernels, {args.model}, {what}, B = {args.batch}, {threads} threads, "
            f"{1e3 * found['whole']:.0f} ms; share of matrix products {share:.2f}\n\n"
            + table(found, threads)
        )
    watch = Stopwatch()
    found = measure(args.model, args.batch, False, watch_table(watch), watch)
    results["readable layers, forward"] = found
    title = f"Readable layers, {args.model}, forward, B = {args.batch}"
    text.append(f"{title}, {1e3 * found['whole']:.0f} ms\n\n{table(found, 1)}")
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(threads)
    stored = {"machine": machine, "model": args.model, "batch": args.batch, "seconds": results}
    (args.out / "cpu_operations.json").write_text(json.dumps(stored, indent=1) + "\n")
    (args.out / "cpu_operations.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
