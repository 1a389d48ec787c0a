"""Where the time goes: by operation in the readable layers, by kernel in their faster twins.

    python benchmarks/by_operation.py [--model pvt_tiny] [--batch 8] [--threads 2]

A function's time excludes the time of other listed functions that it calls. Threads are added
up, so the sum is threads times the duration; "waiting" is the time of threads without work.
Matrix products are all calls of NumPy's matmul. Results of other models or other batch sizes stay
in docs/results/cpu_operations.json and on its page.
"""

import argparse
import functools
import importlib
import json
import pkgutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from machine import describe_machine
from report import RESULTS, markdown

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, blocked_ops
from pvt_ref.kernels import cpu
from pvt_ref.kernels.cpu import tiling
from pvt_ref.models.architecture import architecture_of
from pvt_ref.ops import Operation

PRODUCTS = "matrix products"
#: Prefix of the name of a pass by the readable layers.
READABLE = "readable layers, "
#: The functions that are timed separately, and their names in the table.
KERNELS = {
    "gelu_rows": "GELU",
    "layer_norm_rows": "layer norm",
    "layer_norm_backward_rows": "layer norm, backward",
    "linear_rows": "adding biases",
    "attend_rows": "softmax of attention",
    "attend_backward_rows": "softmax of attention, backward",
    "embed_rows": "cutting patches",
    "embed_backward_rows": "cutting patches, backward",
    "hidden_backward_rows": "GELU, backward",
    "column_sums": "sums over tokens",
    "padded_lines": "framing maps with zeros",
    "unfold_lines": "unfolding windows of convolutions",
    "shifted_lines": "framing maps with zeros",
    "sum_lines": "depth-wise convolution",
    "kernel_gradient": "depth-wise convolution, gradient of the kernel",
}
REPEATS = 10

HEADING = """# Speed by operation

This page splits [the whole time](cpu.md) by operation; `benchmarks/by_operation.py` wrote it. A
line's time excludes the other lines and is added up over all threads, so the sum is threads times
the duration. "Waiting" is the time of threads without work while another has some. "No work, or
outside" is the rest: the interpreter between operations, and code in no other line. "Rest of" a
kernel is its time outside the other lines: sums, copies, and Python.
"""


class Stopwatch:
    """Adds up the time of functions over all threads, without that of timed functions they call."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.inner = threading.local()

    def time(self, name: str, function: Callable) -> Callable:
        """Wraps function, so that its time counts under name."""

        @functools.wraps(function)
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


def kernel_modules() -> list[ModuleType]:
    """All modules that may contain the functions of KERNELS."""
    names = [module.name for module in pkgutil.iter_modules(cpu.__path__)]
    return [importlib.import_module(f"{cpu.__name__}.{name}") for name in names]


def watch_kernels(watch: Stopwatch) -> None:
    """Replaces the kernels permanently by timed ones."""
    modules = kernel_modules()
    for function, name in KERNELS.items():
        timed = None
        for module in modules:
            if hasattr(module, function):
                timed = timed or watch.time(name, getattr(module, function))
                setattr(module, function, timed)
    run_pieces, by_rows = tiling.run_pieces, tiling.Tiling.by_rows

    def rest_of(work):
        """Times work, a function inside a kernel or a part of a kernel with its weights."""
        function = work.func if isinstance(work, functools.partial) else work
        return watch.time(f"rest of {function.__qualname__.partition('.')[0]}", work)

    def run_watched(work, pieces, threads):
        return run_pieces(rest_of(work), pieces, threads)

    def by_rows_watched(self, work, *arrays, width=None):
        by_rows(self, rest_of(work), *arrays, width=width)

    tiling.Tiling.by_rows = by_rows_watched

    # the caller's own time in there is spent starting threads and waiting for them
    tiling.run_pieces = watch.time("waiting", run_watched)


def watch_table(config: Any, watch: Stopwatch) -> pvt_ref.Ops:
    """The readable layers with timing."""
    table = REFERENCE
    for op in architecture_of(config).operations:
        timed = Operation(
            watch.time(op.name, op.forward), watch.time(f"{op.name}, backward", op.backward)
        )
        table = table.replace(op, timed)
    return table


def measure(model: str, batch: int, train: bool, ops: pvt_ref.Ops, watch: Stopwatch) -> dict:
    """Seconds of one pass, by name and in total."""
    config = VARIANTS[model]
    params = pvt_ref.init_params(config, np.random.default_rng(0))
    shape = (batch, config.in_chans, config.img_size, config.img_size)
    images = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)

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


def machine_words(machine: dict) -> str:
    commit = machine.get("commit", "not known")  # missing in the first stored result
    return (
        f"Measured {machine['date']} on {machine['threads']} threads of: {machine['processor']}. "
        f"pvt_ref {machine['pvt_ref']} (commit {commit}); {'; '.join(machine['blas'])}.\n"
    )


def case_page(case: dict) -> str:
    """The page's section on one model and batch size."""
    model, batch, threads = case["model"], case["batch"], case["machine"]["threads"]
    text = [f"## {model}, B = {batch}\n", machine_words(case["machine"])]
    for what, found in case["seconds"].items():
        title = f"{model}, {what.removeprefix(READABLE)}, B = {batch}"
        whole = f"{1e3 * found['whole']:.0f} ms"
        if what.startswith(READABLE):
            text.append(f"Readable layers, {title}, {whole}\n\n{table(found, 1)}")
            continue
        share = found["parts"][PRODUCTS] / (found["whole"] * threads)
        text.append(
            f"Kernels, {title}, {threads} threads, {whole}; share of matrix products {share:.2f}"
            f"\n\n{table(found, threads)}"
        )
    return "\n".join(text)


def store(case: dict, folder: Path) -> None:
    """Replaces an earlier case of the same model and batch size."""
    file, key = folder / "cpu_operations.json", (case["model"], case["batch"])
    stored = json.loads(file.read_text()) if file.exists() else {"cases": []}
    before = stored.get("cases", [stored])  # the first files held one case
    cases = [case, *(other for other in before if (other["model"], other["batch"]) != key)]
    cases.sort(key=lambda case: (list(VARIANTS).index(case["model"]), case["batch"]))
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"cases": cases}, indent=1) + "\n")
    (folder / "cpu_operations.md").write_text("\n".join([HEADING, *map(case_page, cases)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="pvt_tiny", choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    threads = args.threads or describe_machine(0)["cores"]
    watch = Stopwatch()
    np.matmul = watch.time(PRODUCTS, np.matmul)
    watch_kernels(watch)
    results = {
        "forward + backward" if train else "forward": measure(
            args.model, args.batch, train, blocked_ops(threads), watch
        )
        for train in (False, True)
    }
    watch = Stopwatch()
    readable = watch_table(VARIANTS[args.model], watch)
    results[f"{READABLE}forward"] = measure(args.model, args.batch, False, readable, watch)
    case = {"machine": describe_machine(threads), "model": args.model, "batch": args.batch}
    case["seconds"] = results
    store(case, args.out)
    print(case_page(case))


if __name__ == "__main__":
    main()
