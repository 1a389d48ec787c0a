"""Shows whether a change of the code changed any bit of its results.

    python tools/replay.py record before.json            # before the change
    python tools/replay.py compare before.json           # after it, on the same machine
    python tools/replay.py compare before.json --only 'small/*' --allow '*/kernels*: grad *'

``record`` runs hundreds of cases (logits, feature maps, gradients, trainings, files) and stores the
SHA-256 of every array, with its norm, its sum and a sketch. ``compare`` runs them again and
prints, for each group of cases, how many arrays are equal, different or missing. For an array that
differs, it estimates ``norm(new - old) / norm(old)`` from the sketches: 1e-7 is float32 rounding in
another order, 1e-2 is a different result. It exits with 1 if anything differs that ``--allow`` does
not match. A pattern is a shell pattern of ``case: array``, as differences are printed.

Bits depend on the processor, NumPy and its BLAS, so both runs must have the same; ``compare``
reports a difference. Inputs come from fixed seeds. BLAS uses one thread, and kernels have fixed
threads and block sizes. The cases in ``training/own random numbers`` depend on how a training draws
its numbers; they are printed, but do not affect the exit status.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy and SciPy load theirs

import numpy as np
from threadpoolctl import threadpool_info

import pvt_ref
from pvt_ref import VARIANTS, Model, ModelInfo, Preprocessing, PVTConfig

ROOT = Path(__file__).resolve().parents[1]

# ==================================================================================================
# Depends on the package's structure: after a restructuring, port this part by hand, and only this.
# ==================================================================================================

from pvt_ref import REFERENCE, Operation, blocked_ops  # noqa: E402
from pvt_ref.layers.gelu import gelu  # noqa: E402
from pvt_ref.train import (  # noqa: E402
    AdamW,
    LabelledImages,
    Recipe,
    adamw_init,
    adamw_step,
    add_gradients,
    clip_by_global_norm,
    ema_decay_of_step,
    ema_step,
    evaluate,
    start_training,
    train_step,
    warmup_cosine,
)


def reference() -> Any:
    """The table of the readable operations."""
    return REFERENCE


def kernels(threads: int, elements: int) -> Any:
    """The table of the kernels for NumPy, with that many threads and numbers in a block."""
    return blocked_ops(threads, elements=elements)


def with_gelu(table: Any, f: Callable[..., Any], derivative: Callable[..., Any]) -> Any:
    """A table whose GELU is f, an elementwise function with that derivative."""

    def forward(p: None, x: Any, ops: Any, keep: bool = True) -> tuple[Any, Any]:
        return f(x), x if keep else None

    def backward(p: None, cache: Any, dy: Any, ops: Any) -> tuple[Any, None]:
        return dy * derivative(cache), None

    return table.replace(gelu, Operation(forward, backward))


#: The tables for a training. They must have one thread and blocks of 2**18 numbers.
TRAINING_TABLES = ("reference", "kernels")


@contextlib.contextmanager
def as_default(table: str) -> Iterator[None]:
    """Makes one of TRAINING_TABLES the default table.

    If a training step, evaluate and predict take a table, pass it to them instead.
    """
    before = os.environ.get("PVT_REF_OPS")
    os.environ["PVT_REF_OPS"] = {"reference": "reference", "kernels": "blocked"}[table]
    try:
        yield
    finally:
        del os.environ["PVT_REF_OPS"]
        if before is not None:
            os.environ["PVT_REF_OPS"] = before


def package_training(
    params: Any, data: LabelledImages, config: PVTConfig, recipe: Recipe, table: str, steps: int
) -> tuple[list[tuple[float, int, float, float]], Any, Any, tuple[Any, Any]]:
    """The package's own training steps: (loss, hits, lr, norm) of each, params, average, (m, v)."""
    reports = []
    with as_default(table):
        state = start_training(params, len(data), recipe.seed)
        for _ in range(steps):
            state, report = train_step(state, data, config, recipe)
            reports.append((report.loss, report.hits, report.lr, report.grad_norm))
    return reports, state.params, state.average, (state.optimizer.m, state.optimizer.v)


def package_evaluate(params: Any, config: PVTConfig, data: LabelledImages, table: str) -> Any:
    """Loss and accuracy on data."""
    with as_default(table):
        return evaluate(params, config, data)


def package_predict(model: Model, picture: Any, table: str) -> np.ndarray:
    """The probabilities of all classes, by class."""
    with as_default(table):
        answers = model.predict(picture, top=len(model.classes))[0]
    return np.array([answer.probability for answer in sorted(answers, key=lambda a: a.index)])


def moments(optimizer: Any) -> tuple[Any, Any]:
    """The running mean and mean square of AdamW's state."""
    return optimizer.m, optimizer.v


# ==================================================================================================
# Digests
# ==================================================================================================

#: Numbers in a sketch. More give a more exact estimate of a difference, and a larger file.
SKETCH = 4


@cache
def _signs(bits: int) -> np.ndarray:
    """2**bits random signs."""
    return 1 - 2 * np.random.default_rng(0).integers(0, 2, 2**bits, dtype=np.int8)


def sketch(x: np.ndarray) -> list[float]:
    """A few sums over x, (n,), with random signs.

    The root mean square norm of the difference of two sketches is the norm of the difference of the
    arrays (Charikar et al. 2002, the count sketch). Norms alone would hide most differences.
    """
    signed = np.zeros(-(-x.size // SKETCH) * SKETCH)
    signed[: x.size] = x
    signed *= _signs(signed.size.bit_length())[: signed.size]
    return signed.reshape(-1, SKETCH).sum(axis=0).tolist()


def digest(value: Any) -> dict[str, Any]:
    """The stored description of an array, of bytes or of a text."""
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest(), "kind": f"{len(value)} bytes"}
    x = np.ascontiguousarray(value).reshape(np.shape(value))
    kind = f"{x.dtype} {x.shape}"
    wide = x.astype(np.float64).reshape(-1)
    return {
        "sha256": hashlib.sha256(kind.encode() + x.data.tobytes()).hexdigest(),
        "kind": kind,
        "norm": float(np.sqrt(np.sum(wide * wide))),
        "sum": float(np.sum(wide)),
        "sketch": sketch(wide),
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[float, str]:
    """The distance of two arrays, relative to the norm of the old one, and in words."""
    if old["kind"] != new["kind"]:
        return math.inf, f"{old['kind']} became {new['kind']}"
    if "sketch" not in old:
        return math.inf, "other bytes"
    apart = math.dist(old["sketch"], new["sketch"])
    norms, sums = (abs(new[key] - old[key]) for key in ("norm", "sum"))
    scale = old["norm"] or 1.0
    text = f"about {apart / scale:.0e} of the norm; norms differ by {norms / scale:.0e}"
    return apart / scale, f"{text}, sums by {sums / scale:.0e}"


# ==================================================================================================
# Cases
# ==================================================================================================

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A named computation.

    Attributes:
        name: its group and description, separated by slashes.
        run: computes the arrays (or bytes, or texts) by name.
    """

    name: str
    run: Callable[[], Arrays]

    @property
    def group(self) -> str:
        """The first two parts of the name."""
        return "/".join(self.name.split("/")[:2])


#: Cases that depend on how a training draws its random numbers.
OWN_NUMBERS = "training/own random numbers"


def tanh_gelu(x: Any) -> Any:
    """Another GELU, so that a table with a replaced operation is tested too."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def tanh_gelu_derivative(x: Any) -> Any:
    """Its derivative."""
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


#: Tables by name. Small blocks cut even small models into several pieces.
TABLES: dict[str, Callable[[], Any]] = {
    "reference": reference,
    "reference, tanh GELU": lambda: with_gelu(reference(), tanh_gelu, tanh_gelu_derivative),
    "kernels, 1 thread": lambda: kernels(1, 2**18),
    "kernels, 2 threads": lambda: kernels(2, 2**18),
    "kernels, 2 threads, small blocks": lambda: kernels(2, 2**11),
}

_SMALL = PVTConfig(
    img_size=32,
    num_classes=5,
    patch_sizes=(2, 2, 2, 2),
    embed_dims=(8, 12, 16, 24),
    num_heads=(1, 2, 4, 3),
    mlp_ratios=(4, 3, 2, 2),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 2, 1),
)

#: Small models by name.
SMALL: dict[str, PVTConfig] = {
    name: dataclasses.replace(_SMALL, **changes)
    for name, changes in {
        "plain": {},
        "backbone": {"num_classes": 0},
        "backbone, R 2 in stage 4": {"num_classes": 0, "sr_ratios": (4, 2, 2, 2)},
        "no qkv bias": {"qkv_bias": False},
        "R 1": {"sr_ratios": (1, 1, 1, 1)},
        "one head": {"num_heads": (1, 1, 1, 1)},
        "four heads": {"num_heads": (4, 4, 4, 4)},
        "odd widths": {"embed_dims": (7, 9, 15, 21), "num_heads": (1, 3, 5, 3)},
        "one class, one channel": {"num_classes": 1, "in_chans": 1},
        "four channels": {"in_chans": 4},
        "other scale and eps": {"qk_scale": 0.3, "norm_eps": 1e-3, "projection_norm_eps": 1e-2},
        "fractional MLP ratio": {"mlp_ratios": (2.5, 1.5, 1, 3)},
        "other patches": {"patch_sizes": (4, 2, 1, 2), "sr_ratios": (2, 2, 1, 1)},
        "deeper": {"depths": (2, 3, 2, 2)},
    }.items()
}

#: Models with dropout or drop path, each with a generator.
DROPPING: dict[str, PVTConfig] = {
    name: dataclasses.replace(SMALL["deeper"], **rates)
    for name, rates in {
        "drop path": {"drop_path_rate": 0.4},
        "dropout": {"drop_rate": 0.3},
        "attention dropout": {"attn_drop_rate": 0.2},
        "all": {"drop_path_rate": 0.4, "drop_rate": 0.3, "attn_drop_rate": 0.2},
    }.items()
}


def rng_of(*what: Any) -> np.random.Generator:
    """A generator that depends only on the arguments."""
    return np.random.default_rng(zlib.crc32(repr(what).encode()))


def random_params(config: PVTConfig, dtype: Any) -> Any:
    """Weights without zeros and ones, so that every bias matters."""
    rng = rng_of("params")
    state = pvt_ref.to_state_dict(pvt_ref.init_params(config, rng, np.float64))
    moved = {key: x + 0.02 * rng.standard_normal(x.shape) for key, x in state.items()}
    return pvt_ref.from_state_dict({k: x.astype(dtype) for k, x in moved.items()}, config)


def random_images(config: PVTConfig, batch: int, size: tuple[int, int], dtype: Any) -> np.ndarray:
    """Normalised images."""
    rng = rng_of("images", batch, size)
    return rng.standard_normal((batch, config.in_chans, *size)).astype(dtype)


def named(prefix: str, params: Any) -> Arrays:
    """The arrays of parameters or gradients, with a prefix before their names."""
    return {f"{prefix} {key}": x for key, x in pvt_ref.to_state_dict(params).items()}


def classify(
    params: Any, images: np.ndarray, config: PVTConfig, table: Any, seed: int | None = None
) -> Arrays:
    """Logits, with and without a cache, and all gradients for a random cotangent."""
    rng = None if seed is None else np.random.default_rng(seed)
    logits, cache = pvt_ref.forward_with_cache(params, images, config, rng, ops=table)
    cotangent = rng_of("cotangent").standard_normal(logits.shape).astype(logits.dtype)
    grads, dimages = pvt_ref.backward(params, cache, cotangent, config)
    plain = {} if rng else {"logits": pvt_ref.forward(params, images, config, ops=table)}
    return {**plain, "logits, cached": logits, "dimages": dimages, **named("grad", grads)}


def pyramid(
    params: Any,
    images: np.ndarray,
    config: PVTConfig,
    table: Any,
    seed: int | None = None,
    read: Sequence[int] = (0, 1, 2, 3),
) -> Arrays:
    """Feature maps, with and without a cache, and all gradients if only some maps are read."""
    rng = None if seed is None else np.random.default_rng(seed)
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config, rng, ops=table)
    draw = rng_of("cotangents")
    cotangents = [draw.standard_normal(F.shape).astype(F.dtype) for F in maps]
    dmaps = [dF if i in read else None for i, dF in enumerate(cotangents)]
    grads, dimages = pvt_ref.backward_pyramid(params, cache, dmaps, config)
    arrays = {f"map {i + 1}, cached": F for i, F in enumerate(maps)}
    if rng is None:
        again = pvt_ref.forward_pyramid(params, images, config, ops=table)
        arrays |= {f"map {i + 1}": F for i, F in enumerate(again)}
    return {**arrays, "dimages": dimages, **named("grad", grads)}


def _compute(
    compute: Callable[..., Arrays],
    config: PVTConfig,
    batch: int,
    size: tuple[int, int],
    table: str,
    dtype: Any,
    **further: Any,
) -> Arrays:
    params, images = random_params(config, dtype), random_images(config, batch, size, dtype)
    return compute(params, images, config, TABLES[table](), **further)


def _model_case(
    group: str,
    config: PVTConfig,
    batch: int,
    size: tuple[int, int],
    table: str,
    dtype: Any,
    compute: Callable[..., Arrays] = classify,
    **further: Any,
) -> Case:
    name = f"{group}/B {batch}, {size[0]}x{size[1]}/{table}/{np.dtype(dtype).name}"
    return Case(name, partial(_compute, compute, config, batch, size, table, dtype, **further))


def model_cases() -> Iterator[Case]:
    """Small models and the published pvt_tiny and pvt_small, classified and as pyramids."""
    dtypes = (np.float32, np.float64)
    for name, config in SMALL.items():
        compute = classify if config.has_classifier else pyramid
        for table in TABLES:
            for dtype in dtypes:
                # position tables at their own size, and resized for wider and smaller images
                yield _model_case(f"small/{name}", config, 2, (32, 32), table, dtype, compute)
                yield _model_case(f"small/{name}", config, 3, (32, 96), table, dtype, compute)
        yield _model_case(f"small/{name}", config, 1, (64, 32), "reference", np.float64, compute)
    for table in TABLES:
        for dtype in dtypes:
            for name in ("plain", "R 1", "odd widths"):
                group = f"pyramid/{name}"
                yield _model_case(group, SMALL[name], 2, (64, 32), table, dtype, pyramid)
            group, config = "pyramid/maps 2 and 4", SMALL["backbone"]
            yield _model_case(group, config, 2, (32, 32), table, dtype, pyramid, read=(1, 3))
            for name, config in DROPPING.items():
                group = f"dropping/{name}"
                yield _model_case(group, config, 4, (32, 32), table, dtype, seed=7)
            group, config = "dropping/pyramid", DROPPING["all"]
            yield _model_case(group, config, 4, (32, 32), table, dtype, pyramid, seed=7)
    tiny, small = VARIANTS["pvt_tiny"], VARIANTS["pvt_small"]
    for table in ("reference", "kernels, 1 thread", "kernels, 2 threads"):
        for batch, side in ((1, 64), (2, 64), (1, 224), (2, 224)):
            yield _model_case("variants/pvt_tiny", tiny, batch, (side, side), table, np.float32)
        yield _model_case("variants/pvt_tiny", tiny, 1, (64, 96), table, np.float64)
        group = "variants/pvt_tiny pyramid"
        yield _model_case(group, tiny, 1, (224, 160), table, np.float32, pyramid)
    yield _model_case("variants/pvt_small", small, 1, (64, 64), "reference", np.float32)
    yield _model_case("variants/pvt_small", small, 1, (224, 224), "kernels, 2 threads", np.float32)


def attention(params: Any, images: Any, config: PVTConfig, table: Any) -> Arrays:
    """The attention weights of all blocks."""
    maps = pvt_ref.attention_maps(params, images, config, ops=table)
    return {f"stage {i}, block {k}": weights for (i, k), weights in maps.items()}


#: Kinds of images besides plain arrays of the weights' dtype.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "channels last": lambda x: x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
    "every second pixel": lambda x: x.repeat(2, axis=2).repeat(2, axis=3)[:, :, ::2, ::2],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


def _laid_out(layout: str, table: str) -> Arrays:
    config = SMALL["plain"]
    images = LAYOUTS[layout](random_images(config, 2, (32, 32), np.float32))
    return classify(random_params(config, np.float32), images, config, TABLES[table]())


def _shipped(name: str, table: str) -> Arrays:
    model, ops = pvt_ref.load(name), TABLES[table]()
    side = model.config.img_size
    images = random_images(model.config, 4, (side, side), np.float32)
    maps = model.pyramid(images, ops=ops)
    return {
        **classify(model.params, images, model.config, ops),
        **{f"map {i + 1}": F for i, F in enumerate(maps)},
        "logits of the model": model(images, ops=ops),
    }


PHOTO = ROOT / "examples" / "chelsea.jpg"


def _predicted(name: str, table: str) -> Arrays:
    model = pvt_ref.load(name)
    answers = package_predict(model, PHOTO, table)
    return {"photo": model.preprocess(PHOTO), "probabilities": answers}


def _prepared(size: int | tuple[int, int]) -> Arrays:
    images = pvt_ref.load_image(PHOTO, size)
    return {"photo": images, "padded": pvt_ref.pad_to_multiple(images, 37)}


def _first_weights(config: PVTConfig, dtype: Any) -> Arrays:
    rng = np.random.default_rng(0)
    params = pvt_ref.init_params(config, rng, dtype)
    keys = "\n".join(pvt_ref.to_state_dict(params))
    return {**named("weight", params), "keys": keys, "next numbers": rng.random(4)}


def _written(make: Callable[[], Model], dtype: str | None) -> Arrays:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        pvt_ref.save(path, make(), dtype)
        again = pvt_ref.load(str(path))
        keys = "\n".join(pvt_ref.to_state_dict(again.params))
        return {"file": path.read_bytes(), "keys": keys, **named("weight", again.params)}


def _made_up(config: PVTConfig, dtype: Any) -> Model:
    if config.num_classes != 1:
        return Model(random_params(config, dtype), config)
    pixels = Preprocessing("L", (0.5,), (0.25,))
    info = ModelInfo(title="made up", classes=("one",), preprocessing=pixels, training={"seed": 3})
    return Model(random_params(config, dtype), config, info=info)


def other_cases() -> Iterator[Case]:
    """Attention weights, unusual images, shipped models, pictures, initial weights, and files."""
    for table in TABLES:
        for name in ("plain", "backbone, R 2 in stage 4"):
            group, config = f"attention/{name}", SMALL[name]
            yield _model_case(group, config, 2, (32, 64), table, np.float32, attention)
        for name in LAYOUTS:
            yield Case(f"images/{name}/{table}", partial(_laid_out, name, table))
        for name in ("digits", "cifar10"):
            yield Case(f"shipped/{name}/{table}", partial(_shipped, name, table))
    for name in ("digits", "cifar10"):
        for table in TRAINING_TABLES:
            yield Case(f"shipped/{name}/predict, {table}", partial(_predicted, name, table))
        yield Case(f"files/{name}/float32", partial(_written, partial(pvt_ref.load, name), None))
    for size in (224, (96, 160)):
        yield Case(f"pictures/chelsea/{size}", partial(_prepared, size))
    for name, config in {**VARIANTS, **SMALL}.items():
        if isinstance(config, PVTConfig) and name not in ("pvt_large", "pvt_huge_v2"):  # large
            for dtype in (np.float32, np.float64):
                run = partial(_first_weights, config, dtype)
                yield Case(f"init_params/{name}/{np.dtype(dtype).name}", run)
    for name in ("plain", "backbone", "no qkv bias", "one class, one channel"):
        for dtype, stored in ((np.float32, None), (np.float64, None), (np.float32, "float16")):
            run = partial(_written, partial(_made_up, SMALL[name], dtype), stored)
            yield Case(f"files/{name}/{stored or np.dtype(dtype).name}", run)


# Training -----------------------------------------------------------------------------------------

_STEPS = 20

_TRAINED = PVTConfig(
    img_size=16,
    in_chans=1,
    num_classes=3,
    patch_sizes=(4, 2, 1, 2),
    embed_dims=(8, 8, 12, 8),
    num_heads=(1, 2, 3, 2),
    mlp_ratios=(2, 2, 1, 2),
    depths=(1, 2, 1, 1),
    sr_ratios=(2, 1, 1, 1),
)

_DROPPING = dataclasses.replace(
    _TRAINED, drop_path_rate=0.3, drop_rate=0.1, attn_drop_rate=0.1
)  # with a generator


@dataclasses.dataclass(frozen=True)
class Steps:
    """How steps are composed here from the package's parts."""

    config: PVTConfig = _TRAINED
    optimizer: AdamW = dataclasses.field(default_factory=AdamW)
    label_smoothing: float = 0.1
    max_norm: float = 1.0
    ema: float = 0.99
    warmup: int = 5
    parts: int = 1
    mixed: bool = False


#: Options of a training by name.
STEPS: dict[str, Steps] = {
    "plain": Steps(),
    "no clipping, all decayed": Steps(
        optimizer=AdamW(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.2, decay_positions=True),
        label_smoothing=0.0,
        max_norm=math.inf,
        ema=0.5,
        warmup=0,
    ),
    "two parts, mixed targets": Steps(parts=2, mixed=True),
    "dropping": Steps(config=_DROPPING),
}


def train_by_hand(steps: Steps, table: str, dtype: Any) -> Arrays:
    """Some steps on two batches in turn; the given generator draws dropout masks."""
    config, ops = steps.config, TABLES[table]()
    params = average = random_params(config, dtype)
    optimizer = adamw_init(params)
    rng, draw = np.random.default_rng(11), rng_of("batches")
    images = draw.standard_normal((2, 8, 1, 16, 16)).astype(dtype)
    labels = draw.integers(0, 3, (2, 8))
    mixed = draw.dirichlet(np.ones(3), (2, 8)).astype(dtype)
    targets = mixed if steps.mixed else labels
    curve = []
    for step in range(_STEPS):
        grads, loss, part = None, 0.0, 8 // steps.parts
        for start in range(0, 8, part):
            rows = (step % 2, slice(start, start + part))
            logits, cache = pvt_ref.forward_with_cache(params, images[rows], config, rng, ops=ops)
            value, dlogits = pvt_ref.cross_entropy(logits, targets[rows], steps.label_smoothing)
            some, _ = pvt_ref.backward(params, cache, dlogits, config)
            grads = add_gradients(grads, some, part / 8)
            loss += part / 8 * float(value)
        assert grads is not None
        grads, norm = clip_by_global_norm(grads, steps.max_norm)
        lr = warmup_cosine(step, _STEPS, steps.warmup, 3e-3, 1e-5)
        params, optimizer = adamw_step(params, grads, optimizer, lr, steps.optimizer)
        average = ema_step(average, params, ema_decay_of_step(step, steps.ema))
        curve.append((loss, norm, lr))
    m, v = moments(optimizer)
    trees = {"weight": params, "average": average, "m": m, "v": v}
    arrays = {key: x for name, tree in trees.items() for key, x in named(name, tree).items()}
    return {"loss, norm and lr": np.array(curve), **arrays}


def samples(count: int, same: bool) -> LabelledImages:
    """Labelled pictures; with same, all are equal, so their order does not matter."""
    rng = rng_of("samples")
    images = rng.integers(0, 256, (count, 1, 16, 16), dtype=np.uint8)
    labels = rng.integers(0, 3, count)
    if same:
        images[:], labels[:] = images[0], labels[0]
    return LabelledImages(images, labels, Preprocessing("L", (0.5,), (0.25,)))


_STILL: dict[str, Any] = {"crop_padding": 0, "flip": False, "cutout": 0, "mixup_alpha": 0.0}

#: Recipes of trainings without randomness: no rates, and samples that are all the same.
FIXED: dict[str, Recipe] = {
    "plain": Recipe(epochs=5, batch_size=6, **_STILL),
    "two parts, no clipping": Recipe(
        epochs=5,
        batch_size=6,
        accumulate=2,
        clip_norm=None,
        lr=3e-3,
        warmup_epochs=0,
        label_smoothing=0,
        weight_decay=0.2,
        decay_positions=True,
        ema_decay=0.9,
        **_STILL,
    ),
}

#: A recipe in which everything is random that can be.
RANDOM = Recipe(
    epochs=5,
    batch_size=6,
    accumulate=2,
    lr=3e-3,
    mixup_alpha=0.5,
    crop_padding=2,
    cutout=4,
    ema_decay=0.9,
    drop_path_ramp_epochs=2,
    seed=5,
)


def train_by_package(
    config: PVTConfig, recipe: Recipe, same: bool, table: str, dtype: Any
) -> Arrays:
    """Some of the package's own steps, and the accuracy of the weights after them."""
    reports, params, average, (m, v) = package_training(
        random_params(config, dtype), samples(27, same), config, recipe, table, _STEPS
    )
    trees = {"weight": params, "average": average, "m": m, "v": v}
    arrays = {key: x for name, tree in trees.items() for key, x in named(name, tree).items()}
    score = package_evaluate(average, config, samples(20, same=False), table)
    return {"loss, hits, lr and norm": np.array(reports), "score": np.array(score), **arrays}


def training_cases() -> Iterator[Case]:
    """Loss curves, weights, averages and AdamW's moments after 20 steps."""
    for dtype in (np.float32, np.float64):
        kind = np.dtype(dtype).name
        for table in TABLES:
            for name, steps in STEPS.items():
                run = partial(train_by_hand, steps, table, dtype)
                yield Case(f"training/by hand, {name}/{table}/{kind}", run)
        for table in TRAINING_TABLES:
            for name, recipe in FIXED.items():
                run = partial(train_by_package, _TRAINED, recipe, True, table, dtype)
                yield Case(f"training/package, {name}/{table}/{kind}", run)
            run = partial(train_by_package, _DROPPING, RANDOM, False, table, dtype)
            yield Case(f"{OWN_NUMBERS}/{table}/{kind}", run)


def all_cases() -> list[Case]:
    """All cases, in the order in which they run."""
    return [*model_cases(), *other_cases(), *training_cases()]


# ==================================================================================================
# Recording and comparing
# ==================================================================================================


def environment() -> dict[str, Any]:
    """Everything that bits depend on besides the code."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = models[0] if models else processor
    blas = [
        f"{x['internal_api']} {x['version']} {x.get('architecture', '')}, {x['num_threads']} thread"
        for x in threadpool_info()
        if x["user_api"] == "blas"
    ]
    return {
        "processor": processor,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas,
    }


def commit() -> str:
    """The current commit, with a plus if files were changed since."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def digests(case: Case) -> dict[str, Any]:
    """The digests of all results of a case, by name."""
    return {name: digest(value) for name, value in case.run().items()}


def _chosen(cases: Sequence[Case], only: str | None) -> list[Case]:
    return [case for case in cases if only is None or fnmatch.fnmatchcase(case.name, only)]


def record(path: Path, only: str | None = None) -> int:
    """Runs the cases and stores their digests."""
    cases = _chosen(all_cases(), only)
    if not cases:
        print(f"no case matches {only}", file=sys.stderr)
        return 2
    content: dict[str, Any] = {"commit": commit(), "environment": environment()}
    content["cases"] = stored = {case.name: digests(case) for case in cases}
    path.write_text(json.dumps(content), encoding="utf-8")
    print(f"{len(stored)} cases, {sum(map(len, stored.values()))} arrays, commit {commit()}")
    return 0


KINDS = ("equal", "different", "missing", "new", "expected", "allowed")


def compare(
    path: Path, only: str | None = None, allow: Sequence[str] = (), most_lines: int = 10
) -> int:
    """Runs the cases and prints differences; returns 1 if one was not allowed."""
    before, here = json.loads(path.read_text(encoding="utf-8")), environment()
    print(f"recorded at commit {before['commit']}, now {commit()}")
    for key, value in before["environment"].items():
        if value != here[key]:
            print(f"bits may differ for another reason: {key} was {value}, and is {here[key]}")
    cases = {case.name: case for case in _chosen(all_cases(), only)}
    recorded = [Case(name, dict) for name in before["cases"]]
    names = dict.fromkeys([*(case.name for case in _chosen(recorded, only)), *cases])
    if not names:
        print(f"no case matches {only}", file=sys.stderr)
        return 2

    counts: dict[str, Counter[str]] = defaultdict(Counter)  # by group
    lines: dict[str, list[str]] = defaultdict(list)
    apart: dict[str, float] = defaultdict(float)
    for name in names:
        group = Case(name, dict).group
        old, new, failure = before["cases"].get(name, {}), {}, "there is no such case any more"
        if name in cases:
            try:
                new, failure = digests(cases[name]), "is not computed any more"
            except Exception as error:  # continues after any error of a restructured package
                failure = "{}: {}".format(type(error).__name__, str(error).partition("\n")[0])
        for array in dict.fromkeys([*old, *new]):
            far, full = 0.0, f"{name}: {array}"
            if array not in new:
                kind, text = "missing", failure
            elif array not in old:
                kind, text = "new", "was not recorded"
            elif old[array]["sha256"] == new[array]["sha256"]:
                kind, text = "equal", ""
            else:
                kind, (far, text) = "different", difference(old[array], new[array])
            if kind != "equal":
                if any(fnmatch.fnmatchcase(full, pattern) for pattern in allow):
                    kind = "allowed"
                elif name.startswith(OWN_NUMBERS):
                    kind = "expected"
                else:
                    lines[group].append(f"  {kind}: {full}: {text}")
            counts[group][kind] += 1
            apart[group] = max(apart[group], far)
    for group, count in counts.items():
        parts = [f"{count[kind]} {kind}" for kind in KINDS if count[kind] or kind == "equal"]
        far = f" (at most about {apart[group]:.0e} of the norm)" if apart[group] else ""
        print(f"{group:{max(map(len, counts))}}  {', '.join(parts)}{far}")
        print(*lines[group][:most_lines], sep="\n", end="\n" * bool(lines[group]))
        if len(lines[group]) > most_lines:
            print(f"  and {len(lines[group]) - most_lines} more; --lines prints more of them")
    wrong = sum(map(len, lines.values()))
    print(f"{sum(count['equal'] for count in counts.values())} equal, {wrong} not as they were")
    return int(wrong > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="JSON, written or read")
    parser.add_argument("--only", metavar="PATTERN", help="only the cases that match")
    parser.add_argument(
        "--allow",
        metavar="PATTERN",
        action="append",
        default=[],
        help="'case: array' that may differ; may be given several times",
    )
    parser.add_argument(
        "--lines", metavar="N", type=int, default=10, help="differences printed for each group"
    )
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    if given.action == "record":
        status = record(given.file, given.only)
    else:
        status = compare(given.file, given.only, given.allow, given.lines)
    print(f"{time.perf_counter() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
