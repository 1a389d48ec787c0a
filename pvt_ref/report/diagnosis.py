"""Where numbers stopped being finite: the forward once more, with an eye on every operation."""

import dataclasses
import functools
from typing import Any

import numpy as np

from pvt_ref.api import forward_with_cache, prepare_images
from pvt_ref.arrays import Array, array_module, is_array, quietly
from pvt_ref.models.architecture import check_params_type
from pvt_ref.models.pvt.config import PVTConfig
from pvt_ref.models.pvt.params import PVTParams
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import named_arrays


class _FoundError(Exception):
    """Stops the forward at the first operation whose output is not finite."""


def first_non_finite(
    tree: PVTParams,
    images: Array | None = None,
    config: PVTConfig | None = None,
    rng: np.random.Generator | None = None,
) -> str:
    """A sentence on the first array that is NaN or infinite.

    Args:
        tree: weights, or (without the rest) gradients.
        images: a batch (B, C, H, W), to look at the outputs of the layers too.
        config: the model.
        rng: as it was at the forward in question, so that the same blocks are dropped.

    Returns:
        What was found, in the order weights, images, outputs from the first layer to the last.

    Raises:
        ArrayTypeError: if tree is not a PVTParams; also as :func:`pvt_ref.forward_with_cache`, if
            there are images and config.
        ShapeError: as :func:`pvt_ref.forward_with_cache`, if there are images and config.
        ConfigError: as :func:`pvt_ref.forward_with_cache`, if there are images and config.
    """
    check_params_type(tree)
    for key, x in named_arrays(tree):
        if not _finite(x):
            return f"The first array that is not finite is {key}"
    if images is None or config is None:
        return "Every array is finite; their squares are too large to be added up"
    images = quietly(prepare_images, tree, images, config)
    if not _finite(images):
        return "The images themselves are not finite"
    try:
        watched = functools.partial(forward_with_cache, ops=_watched(tree))
        quietly(watched, tree, images, config, rng)
    except _FoundError as found:
        return f"The first layer whose output is not finite is {found}"
    return "Every layer's output is finite, so the loss itself overflowed"


def _finite(x: Array) -> bool:
    xp = array_module(x)
    return bool(xp.all(xp.isfinite(x)))


def _watched(params: PVTParams) -> Ops:
    """The readable operations, each of which looks at what it returns."""
    names = _names_by_identity(params)
    inside: list[str] = []  # what has no weights of its own (softmax, GELU) is placed by these

    def watch(name: str, operation: Operation) -> Operation:
        def forward(first: Any, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
            own = names.get(id(first))
            inside.append(own or (inside[-1] if inside else "the network"))
            y, cache = operation.forward(first, *args, **kwargs)
            where = inside.pop()
            if not _finite(y):
                raise _FoundError(f"{own} ({name})" if own else f"the {name} inside {where}")
            return y, cache

        return Operation(forward, operation.backward)

    watched = {
        field.name: watch(field.name, getattr(REFERENCE, field.name))
        for field in dataclasses.fields(REFERENCE)
        if isinstance(getattr(REFERENCE, field.name), Operation)
    }
    return dataclasses.replace(REFERENCE, name="watched", **watched)


def _names_by_identity(tree: Any, prefix: str = "") -> dict[int, str]:
    """The key prefix of every record of parameters, by the record's identity."""
    names: dict[int, str] = {}
    if tree is None:
        return names
    if is_array(tree):
        return {id(tree): prefix}
    names[id(tree)] = prefix
    branches: list[tuple[str, Any]] = []
    if dataclasses.is_dataclass(tree):
        branches = [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    elif isinstance(tree, tuple):
        branches = [(str(index), branch) for index, branch in enumerate(tree)]
    for name, branch in branches:
        names |= _names_by_identity(branch, f"{prefix}.{name}" if prefix else name)
    return names
