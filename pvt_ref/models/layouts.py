"""How files of other projects name and cut a network's weights, and what else they say of it.

A layout is a table from our key templates to theirs. Most weights are only renamed; a few are cut
or glued, so the map is spelled out as pieces: some rows of our array are some rows of theirs. The
pieces give both the list of keys and shapes that a file must hold and the way to read them.

A network makes its layouts, and a :class:`Files`, in its own folder; :mod:`pvt_ref.checkpoint`,
which knows no network, does the rest.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


def same_pieces(key: str, shape: Shape, config: Any) -> list[Piece]:
    """A layout that cuts nothing and renames nothing."""
    return [Piece(key, WHOLE, key, WHOLE, shape)]


def renaming(table: Mapping[str, str]) -> Callable[[str], str | None]:
    """The ``rename`` of a layout, from a table of templates.

    Templates: i is the stage from 1, j from 0; b the block from 0, c from 1; leaf is weight or
    bias, and stands at the end where theirs does not say. ``"block{i}.{b}.norm1"`` to
    ``"layers.{j}.1.{c}.norm1"``, say.
    """

    def rename(key: str) -> str | None:
        stem, _, leaf = key.rpartition(".")
        if leaf not in ("weight", "bias"):
            stem, leaf = key, ""
        match = re.fullmatch(r"([a-z_]+?)(\d*)(?:\.(\d+))?(\..*)?", stem)
        if match is None:
            return None
        kind, i, b, rest = match.groups()
        name = kind + ("{i}" if i else "") + (".{b}" if b else "") + (rest or "")
        i, b = int(i or 0), int(b or 0)
        template = table.get(name)
        if template and leaf and "{leaf}" not in template:
            template += ".{leaf}"
        return template and template.format(leaf=leaf, i=i, j=i - 1, b=b, c=b + 1)

    return rename


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one family of files names and cuts the weights.

    Attributes:
        name: for messages.
        rename: our key to theirs; None where they have none.
        pieces_of: ``(key, shape, config) -> pieces`` of one of our arrays.
        eps: of the code that reads such files, in the order of the configuration's fields.
        marks: our keys, of which one must be there, if any are named.
        has_classifier: whether their models have one; None if files with and without are found.
        unused: their keys that are left out where they are, such as those of a head.
        config_beside: whether a config.json lies beside such files.
        eps_advice: which other eps to pass, and when; for ``source``.
    """

    name: str
    rename: Callable[[str], str | None] = same_key
    pieces_of: Callable[[str, Shape, Any], list[Piece]] = same_pieces
    eps: tuple[float, ...] = ()
    marks: tuple[str, ...] = ()
    has_classifier: bool | None = None
    unused: tuple[str, ...] = ()
    config_beside: bool = False
    eps_advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Files:
    """What :mod:`pvt_ref.checkpoint` asks a network about the files of other projects.

    Attributes:
        readable: which files are read, in words.
        layouts: that are looked for, in this order; of all networks those with marks come first.
        probes: our keys; one of them, as a layout renames it, shows that layout.
        bare: ``(layout, state, wanted) -> layout, prefix`` in which a model without classifier is
            read, because that is wanted, or all there is.
        model_type: in Hugging Face's config.json.
        telling: fields of a config.json that describes a model, rather than a training.
        hugging_face: ``(fields of config.json) -> values`` by our field names.
        partial: ``(values) -> config``, with what fits in the fields that are not said.
        fit: ``(config, shapes, layout) -> config`` with class count, channels and image size of a
            file, where these can be read off the shapes, which are by the file's keys.
        shown: ``(shapes, layout) -> values``: all that shapes show; {} if a key is not there.
        widths: the field by which ``num_heads``, which no shape shows, is known of a variant.
        blocks: ``(config) -> int``: how many blocks it has.
        advice: ``(keys) -> sentence`` on keys that do not fit, or "".
        hub: repositories on the Hugging Face Hub by variant.
        url: where the authors' own files are, with ``{name}``.
    """

    readable: str
    layouts: tuple[Layout, ...]
    probes: tuple[str, ...]
    bare: Callable[[Layout, Mapping[str, Any], bool], tuple[Layout, str]]
    model_type: str
    telling: frozenset[str]
    hugging_face: Callable[[Mapping[str, Any]], dict[str, Any]]
    partial: Callable[[dict[str, Any]], Any]
    fit: Callable[[Any, Mapping[str, Shape], Layout], Any]
    shown: Callable[[Mapping[str, Shape], Layout], dict[str, Any]]
    widths: str
    blocks: Callable[[Any], int]
    advice: Callable[[Iterable[str]], str] = lambda keys: ""
    hub: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
