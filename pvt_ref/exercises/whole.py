"""The reader's own functions as the operations of whole networks, compared with PyTorch.

``pytorch.json`` holds PyTorch's results for a small PVT and a small PVT v2: logits, the loss, and
for every map and gradient its L2 norm and its inner product with a drawn array. Weights and images
are drawn by name, so they need not be stored. ``tests/test_exercises_whole.py`` recomputes the
numbers with the networks of the package transformers, and writes the file when run as a program.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pvt_ref import api
from pvt_ref.exercises.catalogue import EXERCISES
from pvt_ref.exercises.marking import twin
from pvt_ref.exercises.network import StageSettings, pyramid, stage
from pvt_ref.layers.softmax import softmax
from pvt_ref.models import VARIANTS
from pvt_ref.models.architecture import architecture_of, param_shapes
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import named_arrays
from pvt_ref.zoo import load

STORED = Path(__file__).with_name("pytorch.json")
PHOTO = Path(__file__).with_name("cat.jpg")

_SMALL: dict[str, Any] = {
    "num_classes": 5,
    "embed_dims": (8, 12, 16, 24),
    "num_heads": (1, 2, 2, 3),
    "mlp_ratios": (2, 2, 2, 2),
    "depths": (1, 1, 2, 1),
    "sr_ratios": (4, 2, 2, 1),
}

#: The networks: a PVT whose tables are for 32 x 32, and a PVT v2, both for images of 32 x 64.
CONFIGS = {
    "pvt": replace(VARIANTS["pvt_tiny"], img_size=32, **_SMALL),
    "pvt_v2": replace(VARIANTS["pvt_v2_b0"], img_size=32, **_SMALL),
}
SIZE, LABELS = (32, 64), np.array([1, 3])


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers by name."""
    return np.random.default_rng([18, zlib.crc32(name.encode())]).standard_normal(shape)


def _weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    x = drawn(key, shape)
    if len(shape) == 1:
        return 1 + 0.2 * x if key.endswith(".weight") else 0.1 * x  # only norms have such weights
    if key.startswith(("pos_embed", "cls_token")):
        return 0.2 * x
    return x / math.sqrt(math.prod(shape[1:]))


def network(name: str) -> tuple[Any, Any, np.ndarray]:
    """Weights, configuration and two images of a network of ``CONFIGS``."""
    config = CONFIGS[name]
    state = {key: _weight(key, shape) for key, shape in param_shapes(config).items()}
    return api.from_state_dict(state, config), config, drawn("images", (2, 3, *SIZE))


def digest(name: str, x: np.ndarray) -> list[float]:
    """An array's norm, and its inner product with an array drawn by name."""
    x = np.ascontiguousarray(x)
    return [float(np.linalg.norm(x.ravel())), float(np.sum(x * drawn(f"probe:{name}", x.shape)))]


class Step(NamedTuple):
    """What was compared, and the result; wrong: the fault, if there is one."""

    what: str
    found: str
    wrong: str = ""


Pairs = Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]]


def table_of(pairs: Pairs, known: frozenset[Operation]) -> Ops:
    """A table in which the reader's functions are the twins of the known operations."""
    table = REFERENCE
    for name, pair in pairs.items():
        exercise = EXERCISES[name]
        if exercise.operation in known:
            table = table.replace(exercise.operation, twin(exercise, *pair))
    return table


def steps(pairs: Pairs, photo: Path = PHOTO) -> Iterator[Step]:
    """The reader's functions in whole networks, step by step.

    Args:
        pairs: forward and backward of every exercise, by name.
        photo: a picture file for the shipped weights.

    Yields:
        What was compared, and the result.
    """
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    params, config, images = network("pvt")
    known = architecture_of(config).operations
    ops = table_of(pairs, known)
    logits, cache = api.forward_with_cache(params, images, config, ops=ops)
    yield _near("logits of a PVT", logits, stored["pvt"]["logits"])

    loss_of, gradient_of = pairs["cross_entropy"]
    loss, dlogits = loss_of(None, logits, REFERENCE, LABELS)
    yield _near("its loss", np.asarray(loss), stored["pvt"]["loss"])
    dlogits, _ = gradient_of(None, dlogits, 1.0, REFERENCE)
    grads, dimages = api.backward(params, cache, dlogits, config)
    gradients = {**dict(named_arrays(grads)), "images": dimages}
    what = "gradients of all its weights, and of the images"
    yield _digests(what, gradients, stored["pvt"]["gradients"])

    table = table_of(pairs, known | {stage, pyramid})
    p = tuple(params.of_stage(i) for i in range(1, 5))
    maps, cache = table[pyramid].forward(p, images.transpose(0, 2, 3, 1), table, _settings(config))
    first = [m.transpose(0, 3, 1, 2) for m in maps]
    named = {f"F_{i}": m for i, m in enumerate(first, start=1)}
    yield _digests("the maps of its pyramid", named, stored["pvt"]["maps"])
    dmaps = [drawn(f"d{name}", m.shape).transpose(0, 2, 3, 1) for name, m in named.items()]
    dimages, _ = table[pyramid].backward(p, cache, dmaps, table)
    dimages = {"images by the maps": dimages.transpose(0, 3, 1, 2)}
    yield _digests("the gradient of the images, from the maps", dimages, stored["pvt"]["maps"])

    params, config, images = network("pvt_v2")
    # the reader's block is PVT's, whose MLP has no convolution
    parts = {name: pair for name, pair in pairs.items() if name != "block"}
    table = table_of(parts, architecture_of(config).operations)
    logits = api.forward(params, images, config, ops=table)
    yield _near("logits of a PVT v2", logits, stored["pvt_v2"]["logits"])
    yield _classified(ops, photo)


def _settings(config: Any) -> tuple[StageSettings, ...]:
    stages = [config.of_stage(i) for i in range(1, 5)]
    return tuple(
        StageSettings(s.patch_size, s.projection_norm_eps, side, s.blocks)
        for s, side in zip(stages, config.table_sides, strict=True)
    )


def _near(what: str, x: np.ndarray, expected: Any, tolerance: float = 1e-12) -> Step:
    theirs = np.asarray(expected)
    if x.shape != theirs.shape:
        return Step(what, "", f"their shape is {x.shape}; PyTorch's is {theirs.shape}")
    error = float(np.max(np.abs(x - theirs)) / np.max(np.abs(theirs)))
    found = f"{error:.1e} from PyTorch's, relative to the largest"
    return Step(what, found, "" if error <= tolerance else f"{found}; at most {tolerance:.0e}")


def _digests(what: str, arrays: Mapping[str, np.ndarray], stored: Mapping[str, Any]) -> Step:
    largest = 0.0
    for name, x in arrays.items():
        size, inner = stored[name]
        scale = max(size, 1e-3)
        error = max(abs(a - b) for a, b in zip(digest(name, x), (size, inner), strict=True)) / scale
        if not error <= 1e-9:
            return Step(what, "", f"{name} is {error:.1e} from PyTorch's, relative to its norm")
        largest = max(largest, error)
    return Step(what, f"{len(arrays)} arrays, at most {largest:.1e} from PyTorch's")


def _classified(table: Ops, photo: Path) -> Step:
    """The answer of the shipped weights for a photo, computed by the reader's functions."""
    model = load("cifar10")
    images = model.preprocess([photo], (96, 96))
    mine = api.forward(model.params, images, model.config, ops=table)[0]
    ours = api.forward(model.params, images, model.config, ops=REFERENCE)[0]
    classes = model.classes
    shares, _ = softmax.forward(None, mine, REFERENCE)
    best = int(np.argmax(shares))
    what = f"the shipped weights classify {photo.name}"
    found = f"{classes[best]}, {shares[best]:.0%}"
    error = float(np.max(np.abs(mine - ours)) / np.max(np.abs(ours)))
    wrong = f"{found}; its logits are {error:.1e} from ours" if not error <= 1e-4 else ""
    return Step(what, found, wrong)
