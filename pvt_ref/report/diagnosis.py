"""Finds where numbers stopped being finite: repeats the forward and checks every operation."""

from typing import Any

from pvt_ref.api import forward_pyramid_with_cache, forward_with_cache
from pvt_ref.arrays import Array, array_module, quietly
from pvt_ref.checks import check_images
from pvt_ref.draws import Source
from pvt_ref.models.architecture import architecture_of, check_params_type
from pvt_ref.ops import REFERENCE, Call
from pvt_ref.tree import first_array, named_arrays, named_records


def first_non_finite(
    tree: Any, images: Array | None = None, config: Any = None, rng: Source = None
) -> str:
    """A sentence on the first array that is NaN or infinite.
    Raises: PVTError as :func:`pvt_ref.forward_with_cache`, if tree, images or config do not fit.

    Args:
        tree: weights, or (without the rest) gradients, of any network.
        images: a batch (B, C, H, W), to look at the outputs of the layers too.
        config: the model.
        rng: as it was at the forward in question, so that the same blocks are dropped.

    Returns:
        What was found, in the order weights, images, outputs from the first layer to the last.
    """
    check_params_type(tree)
    for key, x in named_arrays(tree):
        if not is_finite(x):
            return f"The first array that is not finite is {key}"
    if images is None or config is None:
        return "Every array is finite; their squares are too large to be added up"
    architecture_of(config)
    images = quietly(check_images, images, first_array(tree), config)
    if not is_finite(images):
        return "The images themselves are not finite"
    found: list[Call] = []

    def look(call: Call) -> None:
        if not found and not all(is_finite(y) for _, y in named_arrays(call.result[0])):
            found.append(call)

    watched = REFERENCE.watched(look, params=tree)
    run = forward_with_cache if config.has_classifier else forward_pyramid_with_cache
    quietly(lambda: run(tree, images, config, rng, ops=watched))
    if not found:
        return "Every layer's output is finite, so the loss itself overflowed"
    path, name = found[0].path, found[0].operation.name
    where, _, inside = path.rpartition(".")
    known = path in named_records(tree).values()
    layer = f"{path} ({name})" if known else f"the {inside} inside {where or 'the network'}"
    return f"The first layer whose output is not finite is {layer}"


def is_finite(x: Array) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    xp = array_module(x)
    return bool(xp.all(xp.isfinite(x)))
