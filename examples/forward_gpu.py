"""The same functions on a CUDA device through CuPy, held against NumPy, and timed beside it.

    python examples/forward_gpu.py                     random pvt_tiny weights, a scikit-learn photo
    python examples/forward_gpu.py cat.jpg --weights pvt_small.pth --batch 32

Nothing of the model is written twice: the arrays are moved, and the code that computes is the same.
Exit status 0 if every number agrees, 1 if one does not, 2 without CuPy, a driver or a device, or
when a file or an argument is unsuitable.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from forward import get_images, get_model, one_line
from numpy.typing import NDArray

import pvt_ref
from pvt_ref import VARIANTS, Model, PVTConfig, PVTError, to_device, to_numpy
from pvt_ref.arrays import import_cupy, synchronize
from pvt_ref.errors import printable
from pvt_ref.report.tables import text_table
from pvt_ref.report.times import time_stages
from pvt_ref.tree import map_arrays, named_arrays

#: Largest relative L2 difference between the two libraries, by dtype: outputs, gradients.
TOLERANCES = {"float32": (1e-4, 1e-3), "float64": (1e-11, 1e-9)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A PVT on CUDA, checked against NumPy.")
    parser.add_argument("image", nargs="?", help="JPEG or PNG (default: a temple)")
    parser.add_argument("--weights", metavar="NAME|FILE", help="trained ones (default: random)")
    parser.add_argument(
        "--variant",
        choices=[name for name, config in VARIANTS.items() if isinstance(config, PVTConfig)],
        help="default pvt_tiny; with weights: what they are",
    )
    parser.add_argument("--batch", type=int, default=8, help="images at once (default 8)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch is {args.batch}; it must be at least 1")
    return args


def make_batch(photo: NDArray, size: int) -> NDArray:
    """The photo (1, 3, H, W), shifted sideways from one sample to the next: (size, 3, H, W)."""
    return np.concatenate([np.roll(photo, 16 * b, axis=3) for b in range(size)])


def run_all(params: Any, images: Any, config: pvt_ref.PVTConfig) -> dict[str, list[Any]]:
    """Outputs and gradients by name. The cotangents are drawn on the host, the same everywhere."""
    rng = np.random.default_rng(1)
    on_device = not isinstance(images, np.ndarray)

    def cotangent(y: Any) -> Any:
        host = rng.standard_normal(y.shape).astype(str(y.dtype))
        return to_device(host) if on_device else host

    results: dict[str, list[Any]] = {}
    if config.has_classifier:
        logits, cache = pvt_ref.forward_with_cache(params, images, config)
        grads, dimages = pvt_ref.backward(params, cache, cotangent(logits), config)
        results["logits"] = [logits]
        results["gradients of the classifier"] = [dimages, *(g for _, g in named_arrays(grads))]
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config)
    grads, dimages = pvt_ref.backward_pyramid(params, cache, [cotangent(m) for m in maps], config)
    results["pyramid F1 to F4"] = list(maps)
    results["gradients of the pyramid"] = [dimages, *(g for _, g in named_arrays(grads))]
    return results


def difference(ours: list[Any], reference: list[NDArray]) -> float:
    """Relative L2 distance over all arrays together."""
    pairs = [(to_numpy(a), b) for a, b in zip(ours, reference, strict=True)]
    distance = sum(float(np.sum((a - b) ** 2, dtype=np.float64)) for a, b in pairs)
    norm = sum(float(np.sum(b**2, dtype=np.float64)) for _, b in pairs)
    return (distance / norm) ** 0.5


def check(model: Model, images: NDArray) -> tuple[str, bool]:
    """A table of differences between CUDA and NumPy, and whether all are small enough."""
    rows, all_good = [], True
    for dtype, (output_limit, gradient_limit) in TOLERANCES.items():
        params = map_arrays(lambda x, d=dtype: x.astype(d), model.params)
        batch = images.astype(dtype)
        host = run_all(params, batch, model.config)
        device = run_all(to_device(params), to_device(batch), model.config)
        for name, reference in host.items():
            error = difference(device[name], reference)
            limit = gradient_limit if name.startswith("gradients") else output_limit
            good = bool(error <= limit)  # a NaN is not
            all_good &= good
            rows.append([name, dtype, f"{error:.1e}", f"{limit:.0e}", "yes" if good else "NO"])
    heading = ["compared with NumPy", "dtype", "relative difference", "allowed", "agrees"]
    return text_table(heading, rows), all_good


def seconds(run: Callable[[], Any], images: Any, repeats: int = 5) -> float:
    """Median time of a call, the device's work included."""
    times = []
    for _ in range(repeats + 1):
        synchronize(images)
        start = time.perf_counter()
        run()
        synchronize(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one warms up


def time_table(model: Model, images: NDArray) -> str:
    """Milliseconds by stage, of the whole forward, and of forward and backward."""
    config = model.config
    columns = []
    for params, batch in (
        (model.params, images),
        (to_device(model.params), to_device(images)),
    ):
        stages = time_stages(params, batch, config)

        def step(params: Any = params, batch: Any = batch) -> None:
            maps, cache = pvt_ref.forward_pyramid_with_cache(params, batch, config)
            pvt_ref.backward_pyramid(params, cache, maps, config)

        columns.append([*stages, sum(stages), seconds(step, batch, repeats=3)])
    names = [f"stage {i}" for i in range(1, 5)]
    names += ["after the last block", "forward", "forward and backward (pyramid)"]
    rows = [
        [name, f"{1000 * host:,.2f}", f"{1000 * device:,.2f}", f"{host / device:,.1f}"]
        for name, host, device in zip(names, *columns, strict=True)
    ]
    return text_table(["", "NumPy ms", "CUDA ms", "NumPy / CUDA"], rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        cupy = import_cupy()
        model = get_model(args.weights, args.variant or (None if args.weights else "pvt_tiny"))
        side = model.config.img_size
        name, photo = get_images(args.image, model, (side, side))
        images = make_batch(photo, args.batch)
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        print(f"device:  {properties['name'].decode()}, CuPy {cupy.__version__}")
        print(f"photo:   {name}, {images.shape[0]} images of {side}x{side} pixels")
        print(f"weights: {one_line(model.source)}\n")
        table, good = check(model, images)
        print(table, "\n")
        if not good:
            print("Some numbers differ by more than rounding. Nothing is timed.")
            return 1
        print("All results match.\n")
        print(time_table(model, images))
    except (PVTError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
