"""The interface of a network to the rest of the package: one row of functions and names.

A network has a folder of its own and is registered in ``models/__init__.py``. All other code
(checks, files, training, reports, the command line) looks up the row of a configuration.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from pvt_ref.arrays import Array
from pvt_ref.errors import ArrayTypeError, shown
from pvt_ref.models.layouts import Files
from pvt_ref.ops import Operation, Ops
from pvt_ref.tree import BUFFERS, named_arrays


class Leaf(NamedTuple):
    """The specification of one array of the parameters."""

    key: str  # in the state dict
    shape: tuple[int, ...]
    # how init_params draws it; a "count" is the one kind of array that is int64
    init: Literal["zeros", "ones", "normal", "uniform", "fan_out", "count"]
    fan_in: int = 0  # C_in P P, for "uniform"
    fan_out: int = 0  # C_out k k, for "fan_out"
    std: float = 0.02  # for "normal"


class Place(NamedTuple):
    """The place of an operation or a weight, from its path or its key."""

    stage: int  # from 1; 0 is the classifier
    block: int | None  # of the stage, from 0; None is outside of them
    part: str  # the rest of the path: "attn.q", "patch_embed"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Architecture:
    """A network. All passes are unchecked: shapes and dtypes are trusted.

    A configuration is a frozen dataclass. It offers img_size, in_chans, num_classes (0 without a
    classifier), drop_path_rate, has_classifier, size_multiple, channels and strides of each stage,
    and ``grids(height, width)``, which raises a ShapeError for a size that it cannot take. One that
    contains another network's has ``with_drop_path_rate(rate)``, which returns a changed copy.
    """

    name: str  # by which files know it, "pvt"
    title: str  # for people, "PVT"
    config_type: type
    params_type: type
    # (config, make) -> params, every array made by make(leaf), in the order of the state dict: the
    # one place that says which arrays there are
    build_params: Callable[[Any, Callable[[Leaf], Array]], Any]
    # (params, config, (H, W)) -> constants: what images do not change, as resized position tables
    prepare: Callable[[Any, Any, tuple[int, int]], Any]
    # (params, images, config, ops, rng, keep, constants) -> logits, cache; rng is a Generator, a
    # Draws or None. Without constants it makes its own
    forward: Callable[..., tuple[Array, Any]]
    # (params, cache, dlogits, ops) -> grads, dimages
    backward: Callable[[Any, Any, Array, Ops], tuple[Any, Array]]
    # the same with a list of maps (B, C_i, H_i, W_i), and a dmap for every map; None without maps
    forward_pyramid: Callable[..., tuple[list[Array], Any]] | None = None
    backward_pyramid: Callable[[Any, Any, Sequence[Array], Ops], tuple[Any, Array]] | None = None
    # of a configuration, how many blocks there are of which forward_pyramid, which then also takes
    # their numbers or None, can give maps; None if its maps are those of its stages only
    map_blocks: Callable[[Any], int] | None = None
    operations: frozenset[Operation]  # all that its passes can ask for, also inside others
    # of an operation, by its path, or of a weight, by its key; None inside another operation
    place: Callable[[str], Place | None]
    describe: Callable[[Any], str]  # a configuration: "pvt_tiny, 1000 classes, 224 px"
    # whether logits are maps (B, num_classes, h, w): a class for every place
    dense: bool = False
    # of a network with batch norms, whose forward then also takes batch_statistics: cache -> what
    # these saw of the batch, a record as params.buffers, or None. Gradients have None there
    batch_buffers: Callable[[Any], Any] | None = None
    # key of the weight that reads the image, (C_out, in_chans, ...), if other channels can be had
    stem: str | None = None
    head: str = "head"  # key prefix of the last layer of the classifier
    variants: Mapping[str, Any] = field(default_factory=dict)  # published, by name
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of them
    files: Files | None = None  # of other projects, how they are read; None: only our own are


_rows: dict[type, Architecture] = {}


def register(row: Architecture) -> None:
    """Registers a network. A later row of the same configuration type replaces the first."""
    _rows[row.config_type] = row


def architectures() -> Iterator[Architecture]:
    """All rows, in the order of registration."""
    yield from list(_rows.values())


def architecture_of(config: object) -> Architecture:
    """The row of a configuration. Raises ArrayTypeError if config is not one of a network."""
    row = _rows.get(type(config))
    if row is None:
        variant = isinstance(config, str) and config in known_variants()
        raise ArrayTypeError(
            f"config is a {type(config).__name__}; it must be a "
            f"{' or '.join(row.config_type.__name__ for row in _rows.values())}, such as "
            f"pvt_ref.VARIANTS[{config if variant else 'pvt_tiny'!r}]. The arguments come in the "
            f"order (params, images, config), or (config, rng) for init_params"
        )
    return row


def known_variants() -> dict[str, Any]:
    """Published configurations of all networks by name, aliases included."""
    known: dict[str, Any] = {}
    for row in _rows.values():
        known |= row.variants
        known |= {alias: row.variants[name] for alias, name in row.aliases.items()}
    return known


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain values by field name, fit for JSON; ``type(config)(**values)`` is config again.

    A part that is a record itself becomes such a dict, with its ``name`` among its values: that of
    a network's row, or of a kind of head.
    """
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {name: _part_to_dict(x) if is_dataclass(x) else x for name, x in values.items()}


def _part_to_dict(part: Any) -> dict[str, Any]:
    row = _rows.get(type(part))
    return {"name": row.name if row else part.name, **config_to_dict(part)}


@functools.lru_cache(maxsize=64)  # every forward asks
def param_shapes(config: Any) -> Mapping[str, tuple[int, ...]]:
    """Shape of every array by key, in the order of the state dict; read-only."""
    shapes: dict[str, tuple[int, ...]] = {}
    build = architecture_of(config).build_params
    build(config, lambda leaf: shapes.setdefault(leaf.key, leaf.shape))
    return MappingProxyType(shapes)


@functools.lru_cache(maxsize=64)
def count_keys(config: Any) -> frozenset[str]:
    """Keys of the int64 arrays of counts: batches that a norm has seen."""
    keys = set[str]()

    def note(leaf: Leaf) -> None:
        if leaf.init == "count":
            keys.add(leaf.key)

    architecture_of(config).build_params(config, note)
    return frozenset(keys)


@functools.lru_cache(maxsize=64)
def buffer_keys(config: Any) -> frozenset[str]:
    """Keys of the arrays that are not trained: the state of batch norms."""
    tree = architecture_of(config).build_params(config, lambda leaf: np.empty(0))
    return frozenset(key for key, _ in named_arrays(getattr(tree, BUFFERS, None)))


@functools.lru_cache(maxsize=64)
def layer_numbers(config: Any) -> Mapping[str, int]:
    """The layer number of each array by key, from the image to the head; read-only.

    The blocks of all stages count from 1 to L. A stage's other arrays belong to its first block if
    they come before it (embedding, positions, cls token), and to its last block if they come
    after (PVT v2's norms). Those before the blocks of stage 1 are layer 0; the classifier's norm
    and head, which belong to no stage, are layer L + 1.
    """
    place = architecture_of(config).place
    places = {key: place(key) or Place(0, None, key) for key in param_shapes(config)}
    blocks = sorted({(stage, k) for stage, k, _ in places.values() if k is not None})
    numbers = {block: number for number, block in enumerate(blocks, start=1)}
    layers: dict[str, int] = {}
    begun = set()  # stages of which a block has come; keys come in the order of the state dict
    for key, (stage, k, _) in places.items():
        if k is not None:
            begun.add(stage)
            layers[key] = numbers[stage, k]
        elif stage == 0:
            layers[key] = len(blocks) + 1
        elif stage in begun:
            layers[key] = sum(of <= stage for of, _ in blocks)
        else:
            layers[key] = sum(of < stage for of, _ in blocks) + 1 if stage > 1 else 0
    return MappingProxyType(layers)


def check_params_type(params: object) -> None:
    """Refuses anything but a record of parameters of a network. Raises: ArrayTypeError."""
    known = [row.params_type for row in _rows.values()]
    if type(params) not in known:
        raise ArrayTypeError(
            f"params is a {type(params).__name__}; it must be a "
            f"{' or '.join(kind.__name__ for kind in known)}, from init_params, from_state_dict or "
            f"load(path).params. It was given {shown(params)}"
        )
