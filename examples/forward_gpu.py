"""Runs a network on a CUDA device through CuPy, compares it with NumPy, and times it.

    python examples/forward_gpu.py                     random pvt_tiny weights, a scikit-learn photo
    python examples/forward_gpu.py cat.jpg --weights pvt_small.pth --batch 32
    python examples/forward_gpu.py --variant pvt_v2_b2 --size 448 448 --precision tf32 --compare

The model has no second implementation: only the arrays move, and the operations come from the table
of kernels for CUDA. Logits, maps and gradients must agree with NumPy before anything is measured:
whole calls, stages, single kernels, and memory. --compare also times PyTorch, eager and by
torch.compile, if it is installed.

The exit status is 0 if all results agree, 1 if one does not, and 2 without CuPy, a driver or a
device, or if a file or an argument is unsuitable.
"""

import argparse
import dataclasses
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from forward import get_images, get_model, one_line
from numpy.typing import NDArray

import pvt_ref
from pvt_ref import VARIANTS, Model, Ops, PVTError, to_device, to_numpy
from pvt_ref.api import choose_ops
from pvt_ref.arrays import import_cupy, synchronize
from pvt_ref.errors import CheckpointError, printable
from pvt_ref.kernels.cuda.launch import PRECISIONS, Cuda
from pvt_ref.kernels.cuda.table import cuda_kernels, table_with
from pvt_ref.kernels.cuda.weights import arranged_for
from pvt_ref.models.architecture import architecture_of
from pvt_ref.report.tables import text_table
from pvt_ref.tree import map_arrays, named_arrays

#: Largest relative L2 difference between the two libraries: outputs, gradients. TF32 and halves
#: have 11 and 8 significant bits.
TOLERANCES = {
    "float32": (1e-4, 1e-3),
    "tf32": (1e-2, 3e-2),
    "float16": (2e-2, 1e-1),
    "bfloat16": (1e-1, 3e-1),
    "float64": (1e-11, 1e-9),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A network on CUDA, checked against NumPy.")
    parser.add_argument("image", nargs="?", help="JPEG or PNG (default: a temple)")
    parser.add_argument("--weights", metavar="NAME|FILE", help="trained weights (default: random)")
    parser.add_argument(
        "--variant",
        choices=[name for name, config in VARIANTS.items() if not architecture_of(config).dense],
        metavar="NAME",
        help="such as pvt_small, pvt_v2_b2, deit_s_16; default pvt_tiny, or the weights' variant",
    )
    parser.add_argument("--batch", type=int, default=8, help="images at once (default 8)")
    size = {"nargs": 2, "type": int, "metavar": ("H", "W")}
    parser.add_argument("--size", **size, help="default: the network's own size")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of products (default float32)"
    )
    parser.add_argument("--compare", action="store_true", help="also time PyTorch, if installed")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch is {args.batch}; it must be at least 1")
    return args


def model_of(weights: str | None, variant: str | None) -> Model:
    """Weights by name or file, of the named variant if there is one; or random weights."""
    if not weights:
        return get_model(None, variant or "pvt_tiny")
    model = get_model(weights, None)
    if not model.config.has_classifier:
        raise CheckpointError(f"{weights} holds no classifier, but this program times one")
    if variant and _kind(model.config) != _kind(VARIANTS[variant]):
        raise CheckpointError(f"{weights} holds another model than {variant}: {model.source}")
    return model


def _kind(config: Any) -> tuple[Any, ...]:
    """Settings that two configurations of one variant share, for any image size and classes."""
    return type(config), getattr(config, "depths", None) or config.depth, config.channels


def make_batch(photo: NDArray, size: int) -> NDArray:
    """The photo (1, 3, H, W), shifted sideways from one sample to the next: (size, 3, H, W)."""
    return np.concatenate([np.roll(photo, 16 * b, axis=3) for b in range(size)])


# Numbers ------------------------------------------------------------------------------------------


def run_all(params: Any, images: Any, config: Any, ops: Ops | None = None) -> dict[str, list[Any]]:
    """Outputs and gradients by name. The host draws the cotangents, so that all are the same."""
    rng = np.random.default_rng(1)
    on_device = not isinstance(images, np.ndarray)

    def cotangent(y: Any) -> Any:
        host = rng.standard_normal(y.shape).astype(str(y.dtype))
        return to_device(host) if on_device else host

    results: dict[str, list[Any]] = {}
    if config.has_classifier:
        logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
        grads, dimages = pvt_ref.backward(params, cache, cotangent(logits), config)
        results["logits"] = [logits]
        results["gradients of the classifier"] = [dimages, *(g for _, g in named_arrays(grads))]
    if architecture_of(config).forward_pyramid is not None:
        maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config, ops=ops)
        cotangents = [cotangent(m) for m in maps]
        grads, dimages = pvt_ref.backward_pyramid(params, cache, cotangents, config)
        results["maps"] = list(maps)
        results["gradients of the maps"] = [dimages, *(g for _, g in named_arrays(grads))]
    return results


def difference(ours: list[Any], reference: list[NDArray]) -> float:
    """Relative L2 distance over all arrays together."""
    pairs = [(to_numpy(a), b) for a, b in zip(ours, reference, strict=True)]
    distance = sum(float(np.sum((a - b) ** 2, dtype=np.float64)) for a, b in pairs)
    norm = sum(float(np.sum(b**2, dtype=np.float64)) for _, b in pairs)
    return (distance / norm) ** 0.5


def check(model: Model, images: NDArray, ops: Ops | None, precision: str) -> tuple[str, bool]:
    """A table of differences between CUDA and NumPy, and whether all are small enough.

    Kernels compute in float32; float64 compares the readable layers.
    """
    rows, all_good = [], True
    for dtype, limits in (("float32", TOLERANCES[precision]), ("float64", TOLERANCES["float64"])):
        params = map_arrays(lambda x, d=dtype: x.astype(d), model.params)
        batch = images.astype(dtype)
        host = run_all(params, batch, model.config)
        device = run_all(to_device(params), to_device(batch), model.config, ops)
        for name, reference in host.items():
            error = difference(device[name], reference)
            limit = limits[name.startswith("gradients")]
            good = bool(error <= limit)  # a NaN is not
            all_good &= good
            told = precision if dtype == "float32" else dtype
            rows.append([name, told, f"{error:.1e}", f"{limit:.0e}", "yes" if good else "NO"])
    heading = ["compared with NumPy", "computed in", "relative difference", "allowed", "agrees"]
    return text_table(heading, rows), all_good


# Times --------------------------------------------------------------------------------------------


class Clock(NamedTuple):
    """Records moments of a computation, and gives the seconds between two of them."""

    note: Callable[[], Any]  # this moment, or this place in a device's queue
    seconds: Callable[[Any, Any], float]  # between two past moments
    wait: Callable[[], Any]  # until all started work is done
    hold: Callable[[], Any]  # keeps a device busy, so that the host gets ahead


def host_clock() -> Clock:
    """The processor's clock; there is no queue."""
    return Clock(time.perf_counter, lambda begin, end: end - begin, lambda: None, lambda: None)


#: Idles for the given nanoseconds.
_SPIN = r"""extern "C" __global__ void spin(unsigned long long nanoseconds)
{
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - begin < nanoseconds);
}"""


def device_clock(cupy: Any, like: Any) -> Clock:
    """Events in the current stream of a CUDA device, which has the array like."""
    tenth, spin = np.uint64(10**8), cupy.RawKernel(_SPIN, "spin")

    def note() -> Any:
        event = cupy.cuda.Event()
        event.record()
        return event

    def seconds(begin: Any, end: Any) -> float:
        return cupy.cuda.get_elapsed_time(begin, end) / 1e3

    return Clock(note, seconds, lambda: synchronize(like), lambda: spin((1,), (1,), (tenth,)))


class Contender(NamedTuple):
    """A library with its clock, and the timed calls: a forward, and one with its backward."""

    name: str
    clock: Clock
    forward: Callable[[], Any]
    train: Callable[[], Any]


def seconds(run: Callable[[], Any], clock: Clock, repeats: int = 5) -> float:
    """Median time of a call, including its launches, on an otherwise idle device."""
    times = []
    for _ in range(repeats + 2):
        clock.wait()
        begin = clock.note()
        run()
        end = clock.note()
        clock.wait()
        times.append(clock.seconds(begin, end))
    return statistics.median(times[2:])  # the first ones warm up


def laid_out(params: Any, config: Any, size: tuple[int, int], ops: Ops | None) -> Any:
    """The weights as a Model gives them to all its forwards."""
    return arranged_for(ops, pvt_ref.prepare(params, config, size))


def ours(
    name: str, model: Model, images: Any, dlogits: Any, ops: Ops | None, clock: Clock, wrap: Any
) -> Contender:
    """pvt_ref on arrays of either device; wrap turns a function of arrays into the timed call."""
    params, config = model.params, model.config
    if not isinstance(images, np.ndarray):
        params = to_device(params)
    prepared = laid_out(params, config, images.shape[2:], ops)

    def forward(images: Any) -> Any:
        return pvt_ref.forward(prepared, images, ops=ops)

    def train(images: Any, dlogits: Any) -> Any:
        logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
        return logits, *pvt_ref.backward(params, cache, dlogits, config)

    forward_of, train_of = (
        (wrap(forward, images), wrap(train, images, dlogits)) if wrap else (forward, train)
    )
    return Contender(name, clock, lambda: forward_of(images), lambda: train_of(images, dlogits))


def pytorch(
    model: Model, images: NDArray, dlogits: NDArray, precision: str, clock: Clock, device: str
) -> Iterator[Contender]:
    """The network in torch.nn with fused attention, eager and by torch.compile."""
    import torch

    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    network = importlib.import_module("torch_networks").network(model.config, True)
    state = pvt_ref.to_state_dict(model.params)
    network.load_state_dict({key: torch.from_numpy(x.copy()) for key, x in state.items()})
    network = network.to(device)
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(precision)
    there, cotangent = (torch.from_numpy(x).to(device) for x in (images, dlogits))

    def of(name: str, module: Any) -> Contender:
        def logits_of(x: Any) -> Any:
            with torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
                return module(x).float()

        def forward() -> Any:
            with torch.inference_mode():
                return logits_of(there)

        def train() -> Any:
            network.zero_grad(set_to_none=True)
            logits = logits_of(there.detach().requires_grad_())
            logits.backward(cotangent)
            return logits

        return Contender(name, clock, forward, train)

    yield of("PyTorch eager", network)
    compiled = torch.compile(network, mode="reduce-overhead", dynamic=False)
    yield of("torch.compile, reduce-overhead", compiled)


def call_table(contenders: list[Contender]) -> str:
    """Milliseconds of whole calls, and the first contender's time relative to each."""
    rows, first = [], None
    for contender in contenders:
        times = [seconds(run, contender.clock) for run in (contender.forward, contender.train)]
        first = first or times
        cells = [(f"{1e3 * t:,.3f}", f"{a / t:,.1f}") for a, t in zip(first, times, strict=True)]
        rows.append([contender.name, *(text for cell in cells for text in cell)])
    name = contenders[0].name
    against = f"{name} / this"
    heading = ["whole calls", "forward ms", against, "forward and backward ms", against]
    return text_table(heading, rows)


def stage_times(
    params: Any, images: Any, config: Any, ops: Ops | None, clock: Clock, repeats: int = 5
) -> list[float]:
    """Median seconds of every stage of a forward, and of the work after the last."""
    row = architecture_of(config)
    ends: dict[int, Any] = {}

    def after(call: Any) -> None:
        place = row.place(call.path)
        if place is not None and place.stage:
            ends[place.stage] = clock.note()

    watched = choose_ops(ops, images, row).watched(after, params=params)
    passes = []
    for _ in range(repeats + 1):
        ends.clear()
        clock.wait()
        begin = clock.note()
        pvt_ref.forward(params, images, config, ops=watched)
        moments = [begin, *(ends[stage] for stage in sorted(ends)), clock.note()]
        clock.wait()
        passes.append([clock.seconds(*pair) for pair in itertools.pairwise(moments)])
    return [statistics.median(times) for times in zip(*passes[1:], strict=True)]


def stage_table(host: list[float], device: list[float]) -> str:
    """Milliseconds by stage on both."""
    names = [f"stage {i}" for i in range(1, len(host))] + ["after the last block", "forward"]
    rows = [
        [name, f"{1e3 * a:,.2f}", f"{1e3 * b:,.3f}", f"{a / b:,.1f}"]
        for name, a, b in zip(names, [*host, sum(host)], [*device, sum(device)], strict=True)
    ]
    return text_table(["by stage", "NumPy ms", "CUDA ms", "NumPy / CUDA"], rows)


def kernel_times(
    run: Callable[[Ops], Any], ops: Ops, clock: Clock
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each launch by kernel, and of the whole, without waiting for the host.

    The device is kept busy while the host queues everything. Otherwise the time between the events
    before and after a kernel would include Python's launch.
    """
    settings, spans = ops.settings, []
    assert isinstance(settings, Cuda)

    def launch(function: Any, *args: Any, **kwargs: Any) -> None:
        begin = clock.note()
        settings.launch(function, *args, **kwargs)
        spans.append((function.name, begin, clock.note()))

    noted = table_with(dataclasses.replace(settings, launch=launch), ops.accepts)
    run(noted)  # compiles
    spans.clear()
    clock.wait()
    clock.hold()
    begin = clock.note()
    run(noted)
    end = clock.note()
    clock.wait()
    found: dict[str, list[float]] = {}
    for name, *span in spans:
        found.setdefault(name, []).append(clock.seconds(*span))
    return found, clock.seconds(begin, end)


def kernel_table(found: dict[str, list[float]], whole: float) -> str:
    """Launches and milliseconds by kernel, the longest first, and the remaining time."""
    rest = whole - sum(map(sum, found.values()))
    lines = sorted(found.items(), key=lambda item: -sum(item[1]))
    rows = [[name, f"{len(t):,}", f"{1e3 * sum(t):,.3f}", f"{sum(t) / whole:.0%}"]
            for name, t in lines]  # fmt: skip
    rows.append(
        ["products and copies by libraries", "", f"{1e3 * rest:,.3f}", f"{rest / whole:.0%}"]
    )
    total = ["the device's work in a forward", "", f"{1e3 * whole:,.3f}", ""]
    return text_table(["by kernel", "launches", "ms", "share"], rows, total)


def memory_line(pool: Any, contender: Contender) -> str:
    """The size of CuPy's pool after a forward and after a forward and backward."""
    held = []
    for run in (contender.forward, contender.train):
        pool.free_all_blocks()
        run()
        contender.clock.wait()
        held.append(f"{pool.total_bytes() / 2**20:,.0f}")
    return (
        f"device memory, including weights and images: {held[0]} MiB for a forward, "
        f"{held[1]} MiB with its backward"
    )


# All of it ----------------------------------------------------------------------------------------


def report(
    cupy: Any, model: Model, images: NDArray, ops: Ops | None, precision: str, compare: bool
) -> Iterator[str]:
    """The tables of times, one after the other."""
    dlogits = np.random.default_rng(2).standard_normal((len(images), model.config.num_classes))
    dlogits = dlogits.astype(np.float32)
    params, there, cotangent = to_device((model.params, images, dlogits))
    host, clock = host_clock(), device_clock(cupy, there)
    launched = ours("CUDA, launched", model, there, cotangent, ops, clock, None)
    captured = ours("CUDA, captured", model, there, cotangent, ops, clock, pvt_ref.capture)
    contenders = [ours("NumPy", model, images, dlogits, None, host, None), launched, captured]
    left_out = []
    if compare:
        try:
            logits = pvt_ref.forward(model.params, images, model.config)
            for contender in pytorch(model, images, dlogits, precision, clock, "cuda"):
                error = difference([contender.forward().cpu().numpy()], [logits])
                if error <= TOLERANCES[precision][0]:
                    contenders.append(contender)
                else:
                    left_out.append(f"{contender.name} is not timed: it is off by {error:.1e}")
        except ImportError as error:
            left_out.append(f"PyTorch is not compared: {error}. Install it: pip install torch")
        except Exception as error:  # from any compiler that torch.compile uses
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            left_out.append(f"PyTorch is not timed further: {why}")
    yield call_table(contenders)
    yield from left_out
    config = model.config
    yield stage_table(
        stage_times(model.params, images, config, None, host),
        stage_times(params, there, config, ops, clock),
    )
    if ops is not None and isinstance(ops.settings, Cuda):
        prepared = laid_out(params, config, there.shape[2:], ops)

        def forward(table: Ops) -> Any:
            return pvt_ref.forward(prepared, there, ops=table)

        yield kernel_table(*kernel_times(forward, ops, clock))
    yield memory_line(cupy.get_default_memory_pool(), launched)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        cupy = import_cupy()
        ops = cuda_kernels(args.precision)
        model = model_of(args.weights, args.variant)
        side = model.config.img_size
        name, photo = get_images(args.image, model, tuple(args.size or (side, side)))
        images = make_batch(photo, args.batch)
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        height, width = images.shape[2:]
        print(f"device:  {properties['name'].decode()}, CuPy {cupy.__version__}")
        print(f"photo:   {name}, {images.shape[0]} images of {height}x{width} pixels")
        print(f"weights: {one_line(model.source)}\n")
        table, good = check(model, images, ops, args.precision)
        print(table, "\n")
        if not good:
            print("Some results differ by more than rounding, so nothing is timed.")
            return 1
        print("All results match.\n")
        for text in report(cupy, model, images, ops, args.precision, args.compare):
            print(text, "\n")
    except (PVTError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
