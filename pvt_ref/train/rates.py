"""Fine-tuning: each layer has its own learning rate, and some are not trained at all.

Layers near the image are general and need small steps; layers near the head have most to learn
(Howard and Ruder 2018, arXiv 1801.06146, section 3.2). With l the number of a layer, from 0 for the
first one to L + 1 for the head (:func:`pvt_ref.models.architecture.layer_numbers`)::

    lr_l = lr layer_decay^(L + 1 - l)

This is the rule of BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377). A frozen weight has 0.
"""

import difflib
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pvt_ref.checks import check_number
from pvt_ref.errors import RangeError, TrainingError, shown
from pvt_ref.models.architecture import architecture_of, buffer_keys, layer_numbers
from pvt_ref.tree import map_named, zeros_like


def learning_rate_factors(
    config: Any, layer_decay: float = 1.0, frozen: Sequence[str] = ()
) -> Mapping[str, float]:
    """Factors for the learning rate of each weight, for :func:`adamw_step`.

    Args:
        config: the model.
        layer_decay: of a layer to the one behind it, in (0, 1]; 1 trains all alike.
        frozen: what is not trained: beginnings of keys, as :func:`pvt_ref.to_state_dict` has them,
            that end where a dot or the key does. "block1" freezes all blocks of stage 1, and
            nothing of "block10".

    Returns:
        A factor for each key, read-only: 1 for the head, and 0 for what is frozen.

    Raises:
        TrainingError: if an entry of frozen is of no weight of the model, or all are frozen.
        RangeError: if layer_decay is outside its range, or frozen no tuple or list of texts.
        ArrayTypeError: if config is no configuration.
    """
    architecture_of(config)
    layer_decay = check_number("layer_decay", layer_decay, above=0, most=1)
    return _factors(config, layer_decay, as_prefixes(frozen))


@functools.lru_cache(maxsize=8)  # every step asks
def _factors(config: Any, layer_decay: float, frozen: tuple[str, ...]) -> Mapping[str, float]:
    buffers = buffer_keys(config)
    layers = {key: layer for key, layer in layer_numbers(config).items() if key not in buffers}
    still = {key for prefix in frozen for key in _keys_below(prefix, layers)}
    if still == layers.keys():
        what = f"frozen is {shown(frozen)}, which is all of the model: nothing would be trained"
        raise TrainingError(f"{what}. Leave something out, such as the head")
    last = max(layers.values())
    factors = {key: layer_decay ** (last - layer) for key, layer in layers.items()}
    return MappingProxyType(factors | dict.fromkeys(still, 0.0))


def as_prefixes(frozen: Any) -> tuple[str, ...]:
    """What is frozen, as a tuple. Raises: RangeError."""
    if not isinstance(frozen, tuple | list) or not all(isinstance(x, str) and x for x in frozen):
        needed = "a tuple of beginnings of keys, such as ('patch_embed1', 'block1.0')"
        raise RangeError(f"frozen is {shown(frozen)}; it must be {needed}")
    return tuple(frozen)


def _keys_below(prefix: str, keys: Mapping[str, Any]) -> list[str]:
    """The keys that begin so. Raises: TrainingError if there is none."""
    if found := [key for key in keys if f"{key}.".startswith(f"{prefix}.")]:
        return found
    parts = {key: key.split(".") for key in keys}
    known = {".".join(some[:n]): None for some in parts.values() for n in range(1, len(some) + 1)}
    near = difflib.get_close_matches(prefix[:100], known, 3)
    what = f"frozen has {shown(prefix)}; no key of the model is that, or begins so up to a dot"
    if near:
        raise TrainingError(f"{what}. Did you mean {' or '.join(map(repr, near))}?")
    first = ", ".join(dict.fromkeys(some[0] for some in parts.values()))
    raise TrainingError(f"{what}. Keys begin with {first}")


def without_frozen(grads: Any, factors: Mapping[str, float]) -> Any:
    """grads with zeros for what is not trained, whose gradients then count in no norm."""
    return map_named(lambda key, g: g if factors[key] else zeros_like(g), grads)
