"""How files of other projects name and split a network's weights, and what else they contain.

Most weights are only renamed; a few are split or joined. So the map consists of pieces: some rows
of our array are some rows of theirs. Each network defines its layouts, and a :class:`Files`, in its
own folder. :mod:`pvt_ref.checkpoint`, which knows no network, does the rest.
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
    """A region of our array that equals a region of a foreign array; ``WHOLE`` is all of it."""

    key: str
    region: Region
    foreign: str
    foreign_region: Region
    foreign_shape: Shape  # of the whole array


def same_key(key: str) -> str:
    """The ``rename`` of a layout that renames nothing."""
    return key


def renaming(table: Mapping[str, str]) -> Callable[[str], str | None]:
    """The ``rename`` of a layout, from templates: ``"block{i}.{b}.norm1"`` to theirs.

    i is the stage counted from 1, j from 0; b is the block counted from 0, c from 1. leaf is weight
    or bias, and is appended if their template does not contain it.
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

    stacked are the names of the parts, in the order of our rows; rename gives the first.
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


#: The ``pieces_of`` of a layout that renames nothing.
same_pieces = pieces_by(same_key)


def one_side(name: str, sides: Any, why: str) -> Any:
    """The side of a square in a config.json, given once or twice. Raises: CheckpointError."""
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
    eps: tuple[float, ...] = ()  # of the code that reads them, in the order of our fields
    marks: tuple[str, ...] = ()  # our keys; if there are any, the file must have one of them
    has_classifier: bool | None = None  # None if there are files with and without one
    unused: tuple[str, ...] = ()  # their keys that are left out, such as those of a head
    config_beside: bool = False  # whether a config.json comes with such files
    eps_advice: str = ""  # which other eps to pass, and when; for `source`
    resize_assumed: str = ""  # how its tables are resized by default, and that this is a guess


class Seen(NamedTuple):
    """The shapes of a network in a file, looked up by our keys."""

    shapes: Mapping[str, Shape]
    layout: Layout

    def has(self, key: str) -> bool:
        """Whether the file has this array."""
        return self.layout.rename(key) in self.shapes

    def shape(self, key: str) -> Shape:
        """The shape of an array; a KeyError if the file does not have it."""
        return self.shapes[self.layout.rename(key) or ""]

    def first(self, *keys: str) -> Shape:
        """The shape of the first of these arrays that the file has with an axis or more, or ()."""
        found = (self.shapes.get(self.layout.rename(key) or "") for key in keys)
        return next(filter(None, found), ())

    def depth(self, blocks: str) -> int:
        """How many blocks have keys ``{blocks}.{number}``."""
        return next(b for b in itertools.count() if not self.has(f"{blocks}.{b}.norm1.weight"))

    def mlp_ratio(self, block: str) -> float:
        """E, as an int if it is an integer."""
        hidden, C = self.shape(f"{block}.mlp.fc1.weight")[:2]
        return hidden / C if hidden % C else hidden // C


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Files:
    """What :mod:`pvt_ref.checkpoint` needs from a network about the files of other projects."""

    readable: str  # which files are read, in words
    layouts: tuple[Layout, ...]  # tried in this order; of all networks, those with marks first
    probes: tuple[str, ...]  # our keys; one of them, as a layout renames it, shows that layout
    # (layout, state, wanted) -> layout and prefix in which a model without classifier is read;
    # raises CheckpointError for the state of a relative of the network
    bare: Callable[[Layout, Mapping[str, Any], bool], tuple[Layout, str]]
    model_type: str  # in Hugging Face's config.json
    telling: frozenset[str]  # fields of a config.json that describes a model, and not a training
    hugging_face: Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json by our field names
    partial: Callable[[dict[str, Any]], Any]  # a config; missing fields get values that fit
    # (config, shapes, layout) -> config with the class count, channels and image size of a file
    fit: Callable[[Any, Mapping[str, Shape], Layout], Any]
    shown: Callable[[Mapping[str, Shape], Layout], dict[str, Any]]  # all fields that shapes show
    widths: str  # the field that tells the variant, and so `num_heads`, which no shape shows
    blocks: Callable[[Any], int]  # of a config
    hub: Mapping[str, str] = field(default_factory=dict)  # Hugging Face repositories by variant
    url: str = ""  # address of the authors' own files, with `{name}`
    file_names: Mapping[str, str] = field(default_factory=dict)  # by variant, if they differ
