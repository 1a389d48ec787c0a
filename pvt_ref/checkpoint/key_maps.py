"""Where each weight lies in the files of other projects.

A layout is a table from this project's key templates to theirs. Most weights are only renamed; a
few are cut or glued, so the map is spelled out as pieces: some rows of our array are some rows of
theirs. Read one way, the pieces turn a foreign state into ours; read the other way, back. So both
directions, and the list of keys and shapes that a file must hold, come from one table.

Templates: i is the stage from 1, j from 0; b the block from 0, c from 1; leaf is weight or bias.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pvt_ref.models.architecture import param_shapes
from pvt_ref.models.pvt.config import NUM_STAGES, PVTConfig

Region = tuple[slice, ...]
Shape = tuple[int, ...]

WHOLE: Region = ()

_HF_PATCH = "pvt.encoder.patch_embeddings.{j}."
_HF_BLOCK = "pvt.encoder.block.{j}.{b}."

HUGGING_FACE_KEYS = {
    "patch_embed{i}.proj": _HF_PATCH + "projection.{leaf}",
    "patch_embed{i}.norm": _HF_PATCH + "layer_norm.{leaf}",
    "pos_embed{i}": _HF_PATCH + "position_embeddings",
    "cls_token": "pvt.encoder.patch_embeddings.3.cls_token",
    "block{i}.{b}.norm1": _HF_BLOCK + "layer_norm_1.{leaf}",
    "block{i}.{b}.attn.q": _HF_BLOCK + "attention.self.query.{leaf}",
    "block{i}.{b}.attn.kv": _HF_BLOCK + "attention.self.key.{leaf}",  # and value: see below
    "block{i}.{b}.attn.proj": _HF_BLOCK + "attention.output.dense.{leaf}",
    "block{i}.{b}.attn.sr": _HF_BLOCK + "attention.self.sequence_reduction.{leaf}",
    "block{i}.{b}.attn.norm": _HF_BLOCK + "attention.self.layer_norm.{leaf}",
    "block{i}.{b}.norm2": _HF_BLOCK + "layer_norm_2.{leaf}",
    "block{i}.{b}.mlp.fc1": _HF_BLOCK + "mlp.dense1.{leaf}",
    "block{i}.{b}.mlp.fc2": _HF_BLOCK + "mlp.dense2.{leaf}",
    "norm": "pvt.encoder.layer_norm.{leaf}",
    "head": "classifier.{leaf}",
}

_MM_BLOCK = "layers.{j}.1.{c}."  # element 0 of this list is the position table

MMDETECTION_KEYS = {
    "patch_embed{i}.proj": "layers.{j}.0.projection.{leaf}",
    "patch_embed{i}.norm": "layers.{j}.0.norm.{leaf}",
    "pos_embed{i}": "layers.{j}.1.0.pos_embed",
    "block{i}.{b}.norm1": _MM_BLOCK + "norm1.{leaf}",
    "block{i}.{b}.attn.q": _MM_BLOCK + "attn.attn.in_proj_{leaf}",
    "block{i}.{b}.attn.kv": _MM_BLOCK + "attn.attn.in_proj_{leaf}",
    "block{i}.{b}.attn.proj": _MM_BLOCK + "attn.attn.out_proj.{leaf}",
    "block{i}.{b}.attn.sr": _MM_BLOCK + "attn.sr.{leaf}",
    "block{i}.{b}.attn.norm": _MM_BLOCK + "attn.norm.{leaf}",
    "block{i}.{b}.norm2": _MM_BLOCK + "norm2.{leaf}",
    "block{i}.{b}.mlp.fc1": _MM_BLOCK + "ffn.layers.0.{leaf}",
    "block{i}.{b}.mlp.fc2": _MM_BLOCK + "ffn.layers.3.{leaf}",
}


class Piece(NamedTuple):
    """One region of our array that is one region of a foreign array.

    Attributes:
        key: name of our array.
        region: slices of it; ``WHOLE`` is all of it.
        foreign: name of the foreign array.
        foreign_region: slices of that.
        foreign_shape: shape of the whole foreign array.
    """

    key: str
    region: Region
    foreign: str
    foreign_region: Region
    foreign_shape: Shape  # of the whole foreign array


@dataclass(frozen=True, slots=True)
class Layout:
    """How one family of files names and cuts the weights.

    Attributes:
        name: for messages.
        rename: our key to theirs; None where they have none.
        pieces_of: the pieces of one of our arrays, by its key and shape and the model.
        eps: norm_eps and projection_norm_eps of the code that reads such files.
        has_classifier: whether their models have one; None if files with and without are found.
        unused: keys that a bare backbone does not need, and that files without a head often keep.
    """

    name: str
    rename: Callable[[str], str | None]  # our key to theirs, None where they have none
    pieces_of: Callable[[str, Shape, PVTConfig], list[Piece]]  # of one of our arrays
    eps: tuple[float, float]  # norm_eps and projection_norm_eps of the code that reads such files
    has_classifier: bool | None  # None: files with and without are found
    unused: tuple[str, ...] = ()  # keys that are left out where they are


def pieces(layout: Layout, config: PVTConfig) -> list[Piece]:
    """All pieces of a model, in the authors' order.

    Args:
        layout: how the file names and cuts the weights.
        config: the model.

    Returns:
        The pieces of the first array, then those of the second, and so on.
    """
    return [
        piece
        for key, shape in param_shapes(config).items()
        for piece in layout.pieces_of(key, shape, config)
    ]


def foreign_shapes(layout: Layout, config: PVTConfig) -> dict[str, Shape]:
    """Key and shape of every array that a file of this layout must hold.

    Args:
        layout: how the file names and cuts the weights.
        config: the model.

    Returns:
        Shape by foreign key.
    """
    return {piece.foreign: piece.foreign_shape for piece in pieces(layout, config)}


def to_native(
    state: Mapping[str, np.ndarray], layout: Layout, config: PVTConfig
) -> dict[str, np.ndarray]:
    """A foreign state by this project's keys.

    Args:
        state: foreign key to array, complete and of the shapes of :func:`foreign_shapes`.
        layout: how the file names and cuts the weights.
        config: the model.

    Returns:
        Our key to array, of the shapes of :func:`pvt_ref.api.param_shapes`. What is one piece
        keeps its dtype and may share its memory; what is put together has the widest dtype of the
        state.

    Raises:
        KeyError: if the state lacks an array.
        ValueError: if an array has more or fewer numbers than its shape says.
    """
    shapes = param_shapes(config)
    dtype = np.result_type(*(x.dtype for x in state.values()))
    native: dict[str, np.ndarray] = {}
    for piece in pieces(layout, config):
        part = state[piece.foreign][piece.foreign_region]
        if piece.region == WHOLE:
            native[piece.key] = part.reshape(shapes[piece.key])
        else:
            if piece.key not in native:
                native[piece.key] = np.empty(shapes[piece.key], dtype)
            native[piece.key][piece.region] = part
    # without qkv_bias, MMDetection's attention has no output bias either: ours is then zero
    return {k: native[k] if k in native else np.zeros(shapes[k], dtype) for k in shapes}


def to_foreign(
    state: Mapping[str, np.ndarray], layout: Layout, config: PVTConfig
) -> dict[str, np.ndarray]:
    """A native state by the keys of a layout. What that layout lacks is left out.

    Args:
        state: our key to array, of the shapes of :func:`pvt_ref.api.param_shapes`.
        layout: how the file names and cuts the weights.
        config: the model.

    Returns:
        Foreign key to array, of the shapes of :func:`foreign_shapes` and the dtypes of the state,
        in new memory. What we lack is zero there.

    Raises:
        KeyError: if the state lacks an array.
        ValueError: if an array has more or fewer numbers than its shape says.
    """
    foreign: dict[str, np.ndarray] = {}
    for piece in pieces(layout, config):
        x = state[piece.key]
        if piece.foreign not in foreign:
            foreign[piece.foreign] = np.zeros(piece.foreign_shape, x.dtype)
        target = foreign[piece.foreign][piece.foreign_region]
        target[...] = x[piece.region].reshape(target.shape)
    return foreign


def _table_rename(table: Mapping[str, str]) -> Callable[[str], str | None]:
    def rename(key: str) -> str | None:
        stem, _, leaf = key.rpartition(".")
        if leaf not in ("weight", "bias"):
            stem, leaf = key, ""
        numbers = {}
        match = re.fullmatch(r"(pos_embed|patch_embed|block)(\d+)(?:\.(\d+))?(.*)", stem)
        if match:
            kind, i, b, rest = match.groups()
            numbers = {"j": int(i) - 1}
            stem = f"{kind}{{i}}{rest}"
            if b is not None:
                numbers |= {"b": int(b), "c": int(b) + 1}
                stem = f"{kind}{{i}}.{{b}}{rest}"
        template = table.get(stem)
        return None if template is None else template.format(leaf=leaf, **numbers)

    return rename


def _same(key: str, shape: Shape, config: PVTConfig) -> list[Piece]:
    return [Piece(key, WHOLE, key, WHOLE, shape)]


def _authors_dense(key: str, shape: Shape, config: PVTConfig) -> list[Piece]:
    if key == f"pos_embed{NUM_STAGES}":  # the released backbones keep the cls row and skip it
        _, n, C = shape
        return [Piece(key, WHOLE, key, (slice(None), slice(1, None)), (1, n + 1, C))]
    return _same(key, shape, config)


_hugging_face_name = _table_rename(HUGGING_FACE_KEYS)


def _hugging_face(key: str, shape: Shape, config: PVTConfig) -> list[Piece]:
    name = _hugging_face_name(key)
    assert name is not None, key
    if ".attn.kv." in key:  # (2C, ...): keys above values
        C = shape[0] // 2
        half = (C, *shape[1:])
        return [
            Piece(key, (slice(0, C),), name, WHOLE, half),
            Piece(key, (slice(C, 2 * C),), name.replace(".key.", ".value."), WHOLE, half),
        ]
    return [Piece(key, WHOLE, name, WHOLE, shape)]


_BASE = "pvt."  # of every key but the classifier's: what transformers calls a base model
_bare_name = _table_rename({k: v.removeprefix(_BASE) for k, v in HUGGING_FACE_KEYS.items()})


def _hugging_face_bare(key: str, shape: Shape, config: PVTConfig) -> list[Piece]:
    if key == f"pos_embed{NUM_STAGES}":  # a PvtModel keeps the cls token
        ((_, _, _, region, theirs),) = _authors_dense(key, shape, config)
        return [Piece(key, WHOLE, _bare_name(key) or "", region, theirs)]
    return [
        piece._replace(foreign=piece.foreign.removeprefix(_BASE))
        for piece in _hugging_face(key, shape, config)
    ]


_mmdetection_name = _table_rename(MMDETECTION_KEYS)


def _mmdetection(key: str, shape: Shape, config: PVTConfig) -> list[Piece]:
    name = _mmdetection_name(key)
    if name is None or (key.endswith("attn.proj.bias") and not config.qkv_bias):
        return []
    if ".attn.q." in key or ".attn.kv." in key:  # glued: (3C, ...), q above k above v
        C = config.embed_dims[int(key[len("block")]) - 1]
        rows = slice(0, C) if ".attn.q." in key else slice(C, 3 * C)
        return [Piece(key, WHOLE, name, (rows,), (3 * C, *shape[1:]))]
    if ".mlp." in key and key.endswith(".weight"):  # a linear layer written as 1x1 convolution
        return [Piece(key, WHOLE, name, WHOLE, (*shape, 1, 1))]
    return [Piece(key, WHOLE, name, WHOLE, shape)]


AUTHORS_EPS = (1e-6, 1e-5)
PORTS_EPS = (1e-6, 1e-6)

_CLASSIFIER = ("cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias")

AUTHORS = Layout("authors' layout", lambda key: key, _same, AUTHORS_EPS, None)
AUTHORS_DENSE = Layout(
    "authors' dense-prediction layout",
    lambda key: key,
    _authors_dense,
    AUTHORS_EPS,
    False,
    _CLASSIFIER,
)
HUGGING_FACE = Layout("Hugging Face layout", _hugging_face_name, _hugging_face, PORTS_EPS, True)
HUGGING_FACE_BARE = Layout(
    "Hugging Face layout without classifier",
    _bare_name,
    _hugging_face_bare,
    PORTS_EPS,
    False,
    tuple(_bare_name(key) or "" for key in _CLASSIFIER[:3]),
)
OWN = Layout("pvt_ref file", lambda key: key, _same, AUTHORS_EPS, None)
MMDETECTION = Layout("MMDetection layout", _mmdetection_name, _mmdetection, PORTS_EPS, False)
