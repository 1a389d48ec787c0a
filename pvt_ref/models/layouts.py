"""How files of other projects name and split a network's weights, and what else they state.

Most weights are only renamed; a few are split or joined, so the map is spelled out as pieces: some
rows of our array are some rows of theirs. A network makes its layouts, and a :class:`Files`, in its
own folder; :mod:`pvt_ref.checkpoint`, which knows no network, does the rest.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pvt_ref.errors import CheckpointError, shown

Region = tuple[slice, ...]
Shape = tuple[int, ...]

WHOLE: Region = ()


class Piece(NamedTuple):
    """One region of our array that is one region of a foreign array; ``WHOLE`` is all of it."""

    key: str
    region: Region
    foreign: str
    foreign_region: Region
    foreign_shape: Shape  # of the whole array


def same_key(key: str) -> str:
    """A layout that renames nothing."""
    return key


def renaming(table: Mapping[str, str]) -> Callable[[str], str | None]:
    """The ``rename`` of a layout, from templates: ``"block{i}.{b}.norm1"`` to theirs.

    i is the stage from 1, j from 0; b the block from 0, c from 1; leaf is weight or bias, and is
    appended if their template does not place it.
    """

    def rename(key: str) -> str | None:
        match = re.fullmatch(r"([a-z_]+?)(\d*)(?:\.(\d+))?(\..*?)??(?:\.(weight|bias))?", key)
        if match is None:
            return None
        kind, i, b, rest, leaf = match.groups(default="")
        template = table.get(kind + ("{i}" if i else "") + (".{b}" if b else "") + rest)
        i, b = int(i or 0), int(b or 0)
        if template and leaf and "{leaf}" not in template:
            template += ".{leaf}"
        return template and template.format(leaf=leaf, i=i, j=i - 1, b=b, c=b + 1)

    return rename


def pieces_by(
    rename: Callable[[str], str | None], stacked: tuple[str, ...] = ()
) -> Callable[[str, Shape, Any], list[Piece]]:
    """The ``pieces_of`` of a layout that renames, and may store our stacked matrices separately.

    stacked are the names of these parts in our rows, from the top; rename gives the first.
    """

    def pieces_of(key: str, shape: Shape, config: Any) -> list[Piece]:
        name = rename(key)
        assert name is not None, key
        if not stacked or f".{stacked[0]}." not in name:
            return [Piece(key, WHOLE, name, WHOLE, shape)]
        rows = shape[0] // len(stacked)
        return [
            Piece(
                key,
                (slice(i * rows, (i + 1) * rows),),
                name.replace(f".{stacked[0]}.", f".{part}."),
                WHOLE,
                (rows, *shape[1:]),
            )
            for i, part in enumerate(stacked)
        ]

    return pieces_of


#: Of a layout that renames nothing.
same_pieces = pieces_by(same_key)


def one_side(name: str, sides: Any, why: str) -> Any:
    """The side of a square that a config.json names, alone or twice. Raises: CheckpointError."""
    if not isinstance(sides, list):
        return sides
    if len(sides) != 2 or sides[0] != sides[1]:
        raise CheckpointError(f"{name} is {shown(sides)}; {why}")
    return sides[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one family of files names and splits the weights."""

    name: str  # for messages
    rename: Callable[[str], str | None] = same_key  # our key to theirs; None where they have none
    pieces_of: Callable[[str, Shape, Any], list[Piece]] = same_pieces  # of (key, shape, config)
    eps: tuple[float, ...] = ()  # of the code that reads them, as the configuration's fields
    marks: tuple[str, ...] = ()  # our keys, of which one must be there, if any are named
    has_classifier: bool | None = None  # None if files with and without are found
    unused: tuple[str, ...] = ()  # their keys that are left out, such as those of a head
    config_beside: bool = False  # whether a config.json lies beside such files
    eps_advice: str = ""  # which other eps to pass, and when; for `source`
    resize_assumed: str = ""  # how its tables are resized if nobody says, and that it is a guess


class Seen(NamedTuple):
    """The shapes of a network in a file, looked up by our keys."""

    shapes: Mapping[str, Shape]
    layout: Layout

    def has(self, key: str) -> bool:
        """Whether the file has that array."""
        return self.layout.rename(key) in self.shapes

    def shape(self, key: str) -> Shape:
        """Of an array; a KeyError if the file has none."""
        return self.shapes[self.layout.rename(key) or ""]

    def first(self, *keys: str) -> Shape:
        """Of the first of these that the file has, with an axis or more; () if it has none."""
        found = (self.shapes.get(self.layout.rename(key) or "") for key in keys)
        return next(filter(None, found), ())

    def depth(self, blocks: str) -> int:
        """How many blocks have keys ``{blocks}.{number}``."""
        return next(b for b in itertools.count() if not self.has(f"{blocks}.{b}.norm1.weight"))

    def mlp_ratio(self, block: str) -> float:
        """E, whole if it is."""
        hidden, C = self.shape(f"{block}.mlp.fc1.weight")[:2]
        return hidden / C if hidden % C else hidden // C


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Files:
    """What :mod:`pvt_ref.checkpoint` needs from a network about the files of other projects."""

    readable: str  # which files are read, in words
    layouts: tuple[Layout, ...]  # looked for in this order; of all networks those with marks first
    probes: tuple[str, ...]  # our keys; one of them, as a layout renames it, shows that layout
    # (layout, state, wanted) -> layout and prefix in which a model without classifier is read;
    # a CheckpointError for a state that is of a relative of the network
    bare: Callable[[Layout, Mapping[str, Any], bool], tuple[Layout, str]]
    model_type: str  # in Hugging Face's config.json
    telling: frozenset[str]  # fields of a config.json that describes a model, and not a training
    hugging_face: Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json by our field names
    partial: Callable[[dict[str, Any]], Any]  # a config, with what fits in fields that are not said
    # (config, shapes, layout) -> config with class count, channels and image size of a file
    fit: Callable[[Any, Mapping[str, Shape], Layout], Any]
    shown: Callable[[Mapping[str, Shape], Layout], dict[str, Any]]  # all fields that shapes show
    widths: str  # the field by which `num_heads`, which no shape shows, is known of a variant
    blocks: Callable[[Any], int]  # of a config
    hub: Mapping[str, str] = field(default_factory=dict)  # Hugging Face repositories by variant
    url: str = ""  # where the authors' own files are, with `{name}`
    file_names: Mapping[str, str] = field(default_factory=dict)  # where it is not the variant's
