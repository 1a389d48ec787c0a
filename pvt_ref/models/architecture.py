"""What the rest of the package knows of a network: one row of functions and names.

A network lives in a folder of its own and is entered in ``models/__init__.py``. Everybody else
(checks, files, training, reports, the command line) looks up the row of a configuration.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pvt_ref.arrays import Array
from pvt_ref.errors import ArrayTypeError, shown
from pvt_ref.models.layouts import Files
from pvt_ref.ops import Operation, Ops


class Leaf(NamedTuple):
    """What one array of the parameters has to be: its key in the state dict, and its shape.

    init says how it is drawn (:func:`pvt_ref.init_params`); ``"uniform"`` needs fan_in, C_in P P.
    """

    key: str
    shape: tuple[int, ...]
    init: Literal["zeros", "ones", "normal", "uniform"]
    fan_in: int = 0


class Place(NamedTuple):
    """Where an operation stands, read off its path.

    Stages count from 1, and 0 is the classifier; blocks of a stage from 0, and None is outside of
    them; part is what is left of the path: ``"attn.q"``, ``"patch_embed"``.
    """

    stage: int
    block: int | None
    part: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Architecture:
    """A network. All passes are unchecked: shapes and dtypes are trusted.

    A configuration is a frozen dataclass. It offers img_size, in_chans, num_classes (0 without a
    classifier), drop_path_rate, has_classifier, size_multiple, channels and strides of each stage,
    and ``grids(height, width)``, which raises a ShapeError for a size that it cannot take.

    Attributes:
        name: by which files know it, ``"pvt"``.
        title: for people, ``"PVT"``.
        config_type: of its configurations.
        params_type: the record of its parameters.
        build_params: ``(config, make) -> params``: every array made by ``make(leaf)``, in the order
            of the state dict. The one place that says which arrays there are.
        prepare: ``(params, config, (H, W)) -> constants``: what does not depend on the images, such
            as resized position tables.
        forward: ``(params, images, config, ops, rng, keep, constants) -> logits, cache``. Without
            constants it makes its own. rng is a Generator, a Draws or None.
        backward: ``(params, cache, dlogits, ops) -> grads, dimages``.
        forward_pyramid: as forward, with a list of maps (B, C_i, H_i, W_i); None if there are none.
            With map_blocks it takes also the numbers of blocks, or None.
        backward_pyramid: ``(params, cache, dmaps, ops) -> grads, dimages``, a dmap for every map.
        map_blocks: of a configuration, how many blocks there are of which forward_pyramid can be
            asked for maps; None if its maps are those of its stages only.
        operations: all that its passes can ask for, those inside others included.
        place: where the operation with a path stands; None for one inside another.
        describe: a configuration in a few words, ``"pvt_tiny, 1000 classes, 224 px"``.
        stem: key of the weight that reads the image, (C_out, in_chans, ...); None if there is none
            that could be adapted to other channels.
        head: key prefix of the last layer of the classifier.
        variants: published configurations by name.
        aliases: other names of them.
        files: how files of other projects are read; None if only this project's own are.
    """

    name: str
    title: str
    config_type: type
    params_type: type
    build_params: Callable[[Any, Callable[[Leaf], Array]], Any]
    prepare: Callable[[Any, Any, tuple[int, int]], Any]
    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[[Any, Any, Array, Ops], tuple[Any, Array]]
    forward_pyramid: Callable[..., tuple[list[Array], Any]] | None = None
    backward_pyramid: Callable[[Any, Any, Sequence[Array], Ops], tuple[Any, Array]] | None = None
    map_blocks: Callable[[Any], int] | None = None
    operations: frozenset[Operation]
    place: Callable[[str], Place | None]
    describe: Callable[[Any], str]
    stem: str | None = None
    head: str = "head"
    variants: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: Files | None = None


_rows: dict[type, Architecture] = {}


def register(row: Architecture) -> None:
    """Enters a network. A later row of the same configuration type takes the place of the first."""
    _rows[row.config_type] = row


def architectures() -> Iterator[Architecture]:
    """All rows, in the order in which they were entered."""
    yield from list(_rows.values())


def architecture_of(config: object) -> Architecture:
    """The row of a configuration. Raises ArrayTypeError if config is none of any network."""
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
    """Plain values by field name, fit for JSON; ``type(config)(**values)`` is config again."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


@functools.lru_cache(maxsize=64)  # every forward asks
def param_shapes(config: Any) -> Mapping[str, tuple[int, ...]]:
    """Shape of every array by key, in the order of the state dict; read-only."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(leaf: Leaf) -> None:
        shapes[leaf.key] = leaf.shape

    architecture_of(config).build_params(config, note)
    return MappingProxyType(shapes)


def check_params_type(params: object) -> None:
    """Refuses what is not a record of parameters of any network. Raises: ArrayTypeError."""
    known = [row.params_type for row in _rows.values()]
    if type(params) not in known:
        raise ArrayTypeError(
            f"params is a {type(params).__name__}; it must be a "
            f"{' or '.join(kind.__name__ for kind in known)}, from init_params, from_state_dict or "
            f"load(path).params. It was given {shown(params)}"
        )
