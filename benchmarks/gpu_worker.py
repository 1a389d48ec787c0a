"""One contender on a CUDA device, in its own process: one line for each order and answer.

An order names a model, a task, a batch size, a precision, and how the work is started. The answer
holds the errors to float64. If they are small enough, it also holds times by device events and the
memory used; otherwise it says why there are none.
"""

import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from contenders import COMPARED
from gpu_clock import CupyClock, TorchClock, time_calls
from in_turn import allowed_error

import pvt_ref
from pvt_ref import VARIANTS
from pvt_ref.arrays import array_module, from_host
from pvt_ref.kernels.cuda import optimizer
from pvt_ref.kernels.cuda.launch import Cuda
from pvt_ref.kernels.cuda.table import cuda_kernels
from pvt_ref.kernels.cuda.weights import arranged_for
from pvt_ref.models.architecture import architecture_of
from pvt_ref.tree import first_array, map_arrays, named_arrays

#: Sides of the images: of a classifier, and of a segmentation network.
SIZE, DENSE_SIZE = 224, 512
LR = 1e-3
#: AdamW's epsilon, larger than usual. Otherwise the first step would be the sign of each gradient,
#: and the sign of a gradient near 0 is rounding noise.
EPS = 1e-4
DEVICE = "cuda"

#: Largest errors to float64 at which a row is timed, relative L2: logits, gradients and weights.
#: TF32 and halves have 11 and 8 significant bits, and a network is some hundred products deep.
ALLOWED = {"float32": 1e-5, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}


class Case(NamedTuple):
    """The input of every contender; the first image and its targets are the same in every batch."""

    images: np.ndarray  # (B, 3, H, W)
    dlogits: np.ndarray  # (B, K) or (B, K, H/4, W/4), of a forward and its backward
    targets: np.ndarray  # (B, K), distributions, of a classifier's step


class Contender(NamedTuple):
    """A model on a device: its results by name, and the call that is timed."""

    results: Callable[[Case], dict[str, np.ndarray]]
    prepared: Callable[[Case], Callable[[], Any]]  # a call that does it once


def side_of(config: Any) -> int:
    """Pixels of the images along either axis."""
    return DENSE_SIZE if architecture_of(config).dense else SIZE


def make_case(batch: int, config: Any, first_only: bool = False) -> Case:
    """Images and targets; first_only gives all others none, so gradients are the first's alone.

    That holds for batch norms too: they use running statistics, as at inference.
    """
    side, classes = side_of(config), config.num_classes
    places = 2 * (side // 4,) if architecture_of(config).dense else ()
    images = np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)
    rng = np.random.default_rng(1)
    dlogits = rng.standard_normal((batch, classes, *places), dtype=np.float32)
    targets = np.zeros((batch, classes), np.float32)
    targets[np.arange(batch), rng.permutation(classes)[np.arange(batch) % classes]] = 1
    if first_only:
        dlogits[1:] = 0
        targets[:] = 0
        targets[0, 7 % classes] = batch  # a loss is the mean over the batch
    return Case(images, dlogits, targets)


def exact_results(model: str, weights: Path, what: str) -> dict[str, Any]:
    """The results of the readable layers on NumPy in float64, for the first image."""
    config = VARIANTS[model]
    params = pvt_ref.load(weights, config).params
    params = map_arrays(lambda x: x.astype(np.float64) if x.dtype.kind == "f" else x, params)
    case = Case(*(x.astype(np.float64) for x in make_case(1, config, True)))
    return our_results(params, case, config, what, pvt_ref.REFERENCE)


# Ours ---------------------------------------------------------------------------------------------


def our_work(params: Any, config: Any, what: str, ops: Any) -> Callable[..., Any]:
    """A function of arrays that does it: logits; with gradients; or the weights after a step.

    What a Model does once for all its forwards is done before.
    """
    from pvt_ref.train import AdamW, adamw_init, adamw_step

    if what == "forward":
        model = arranged_for(ops, pvt_ref.prepare(params, config, side_of(config)))
        return lambda images: pvt_ref.forward(model, images, ops=ops)

    def forward_and_backward(images: Any, dlogits: Any) -> Any:
        logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
        return logits, *pvt_ref.backward(params, cache, dlogits, config)

    if what == "train":
        return forward_and_backward
    if isinstance(getattr(ops, "settings", None), Cuda):
        update = one_launch(params, ops.settings)
    else:
        start = adamw_init(params)

        def update(grads: Any, /) -> Any:
            return adamw_step(params, grads, start, LR, AdamW(eps=EPS, weight_decay=0.0))[0]

    def step(images: Any, targets: Any) -> Any:
        logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
        _, dlogits = pvt_ref.cross_entropy(logits, targets)
        grads, _ = pvt_ref.backward(params, cache, dlogits, config)
        return logits, update(grads)

    return step


def one_launch(params: Any, cuda: Cuda) -> Callable[[Any], Any]:
    """The first step of AdamW, without weight decay, for all arrays in one launch of a kernel."""
    beta1, beta2 = 0.9, 0.999
    weights = [w for _, w in named_arrays(params)]
    xp = array_module(weights[0])
    zeros = [xp.zeros_like(w) for w in weights]
    rate = np.array([1.0, -LR / (1 - beta1), (1 - beta2) ** -0.5], np.float32)
    rates = from_host(np.tile(rate, (len(weights), 1)), like=weights[0])

    def update(grads: Any) -> Any:
        arrays = optimizer.gather(weights, [g for _, g in named_arrays(grads)], zeros, zeros)
        new = iter(optimizer.adamw(arrays, rates, beta1, beta2, EPS, cuda)[0])
        return map_arrays(lambda _: next(new), params)

    return update


def arguments_of(case: Case, what: str) -> tuple[np.ndarray, ...]:
    """The arguments of such a function."""
    return {
        "forward": (case.images,),
        "train": (case.images, case.dlogits),
        "step": (case.images, case.targets),
    }[what]


def our_results(
    params: Any, case: Case, config: Any, what: str, ops: Any, wrap: Any = None
) -> dict[str, np.ndarray]:
    """By name: the logits of the first image, and gradients or new weights of some layers."""
    arrays = arguments_of(case, what)
    if not isinstance(first_array(params), np.ndarray):
        arrays = pvt_ref.to_device(arrays)
    work = our_work(params, config, what, ops)
    result = (work if wrap is None else wrap(work, *arrays))(*arrays)
    result = pvt_ref.to_numpy(result)
    if what == "forward":
        return {"logits": result[:1]}
    state = pvt_ref.to_state_dict(result[1])
    return {"logits": result[0][:1]} | {key: state[key] for key in COMPARED[type(config)]}


def ours(order: dict) -> Contender:
    """pvt_ref with its kernels for CUDA, launched one by one or captured."""
    config, what = VARIANTS[order["model"]], order["what"]
    ops = cuda_kernels(order["precision"])
    params = pvt_ref.to_device(pvt_ref.load(Path(order["weights"]), config).params)
    wrap = pvt_ref.capture if order["how"] == "captured" else None

    def prepared(case: Case) -> Callable[[], Any]:
        arrays = pvt_ref.to_device(arguments_of(case, what))
        work = our_work(params, config, what, ops)
        run = work if wrap is None else wrap(work, *arrays)
        return lambda: run(*arrays)

    return Contender(lambda case: our_results(params, case, config, what, ops, wrap), prepared)


class NotRunError(Exception):
    """A contender cannot do the task; the message says why."""


# PyTorch ------------------------------------------------------------------------------------------


def pytorch(order: dict) -> Contender:
    """The network in torch.nn with fused attention, eager or by torch.compile."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file
    from torch_networks import network

    precision, what, how = order["precision"], order["what"], order["how"]
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    config = VARIANTS[order["model"]]
    with torch.device("meta"):
        model = network(config, fused=True)
    model.load_state_dict(load_file(order["weights"], device=DEVICE), assign=True)
    model = model.requires_grad_()
    module = model
    if how != "eager":
        module = torch.compile(model, mode=how, dynamic=False)
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0.0, fused=True)

    def logits_of(images: Any) -> Any:
        if half is None:
            return module(images)
        with torch.autocast(DEVICE, half):
            return module(images).float()

    def forward(images: Any) -> Any:
        with torch.inference_mode():
            return logits_of(images)

    def train(images: Any, dlogits: Any) -> Any:
        images = images.detach().requires_grad_()
        model.zero_grad(set_to_none=True)
        logits = logits_of(images)
        logits.backward(dlogits)
        return logits

    def step(images: Any, targets: Any) -> Any:
        model.zero_grad(set_to_none=True)
        logits = logits_of(images)
        F.cross_entropy(logits, targets).backward()
        optimizer.step()
        return logits

    work = {"forward": forward, "train": train, "step": step}[what]
    parameters = dict(model.named_parameters())

    def arrays_of(case: Case) -> list[Any]:
        return [torch.from_numpy(x).to(DEVICE) for x in arguments_of(case, what)]

    def results(case: Case) -> dict[str, np.ndarray]:
        logits = work(*arrays_of(case)).detach().cpu().numpy()[:1]
        if what == "forward":
            return {"logits": logits}
        kept = {key: parameters[key] for key in COMPARED[type(config)]}
        tensors: dict[str, Any] = {
            k: p.grad if what == "train" else p.detach() for k, p in kept.items()
        }
        return {"logits": logits} | {key: x.cpu().numpy() for key, x in tensors.items()}

    def prepared(case: Case) -> Callable[[], Any]:
        arrays = arrays_of(case)
        return lambda: work(*arrays)

    return Contender(results, prepared)


# Answers ------------------------------------------------------------------------------------------


def errors_of(found: dict, exact: dict, model: str, precision: str) -> dict[str, float]:
    """Relative L2 errors by name. Raises: NotRunError if one is too large, or no number."""
    errors = {
        key: float(np.linalg.norm(found[key] - x) / np.linalg.norm(x)) for key, x in exact.items()
    }
    for key, error in errors.items():
        allowed = max(ALLOWED[precision], allowed_error(model, key))
        if not error <= allowed:
            limit = f"{allowed:.0e} is allowed"
            raise NotRunError(f"its {key} is off by {error:.1e}, and {limit}")
    return errors


class Family(NamedTuple):
    """The functions that a process needs from its library."""

    make: Callable[[dict], Contender]
    clock: Any
    versions: str
    release: Callable[[], None]  # frees the memory that the library keeps for reuse
    mib_free: Callable[[], float]  # of the device


def answer(order: dict, family: Family) -> dict:
    """Errors first; then times, and the memory that the work took."""
    model, batch = order["model"], order["batch"]
    gc.collect()
    family.release()
    before = family.mib_free()
    contender = family.make(order)
    with np.load(order["exact"]) as exact:
        check = make_case(batch, VARIANTS[model], first_only=True)
        errors = errors_of(contender.results(check), dict(exact), model, order["precision"])
    run = contender.prepared(make_case(batch, VARIANTS[model]))
    for _ in range(3):
        run()  # compiles, tunes, and records graphs
    times = time_calls(run, family.clock, order["seconds"])
    return {
        "errors": errors,
        "seconds": statistics.median(times),
        "spread": [min(times), max(times)],
        "calls": len(times),
        # memory kept for reuse equals the peak need of the work
        "mib": before - family.mib_free(),
    }


def answer_or_why_not(order: dict, family: Family) -> dict:
    """The answer, or the reason why there is none."""
    try:
        told = answer(order, family)
    except NotRunError as error:
        told = {"not_run": str(error)}
    except Exception as error:  # from any library: out of memory, a failing compiler
        told = {"not_run": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return told | {"versions": family.versions}


def with_cupy() -> Family:
    from pvt_ref.arrays import import_cupy

    cupy = import_cupy()
    ones = cupy.ones((64, 64), "float32")
    _ = ones @ ones  # the matrix library allocates its memory
    return Family(
        ours,
        CupyClock(cupy),
        f"CuPy {cupy.__version__}",
        cupy.get_default_memory_pool().free_all_blocks,
        lambda: cupy.cuda.runtime.memGetInfo()[0] / 2**20,
    )


def with_torch() -> Family:
    import torch

    ones = torch.ones(64, 64, device=DEVICE)
    _ = ones @ ones

    def release() -> None:
        torch.compiler.reset()  # the graphs of the previous row hold memory
        gc.collect()
        torch.cuda.empty_cache()

    return Family(
        pytorch,
        TorchClock(torch),
        f"PyTorch {torch.__version__}",
        release,
        lambda: torch.cuda.mem_get_info()[0] / 2**20,
    )


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # output of a library is not an answer
    family = {"pvt_ref": with_cupy, "PyTorch": with_torch}[sys.argv[1]]()
    for line in sys.stdin:
        print(json.dumps(answer_or_why_not(json.loads(line), family)), file=answers, flush=True)


if __name__ == "__main__":
    main()
