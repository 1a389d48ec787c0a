"""The weights of a file under our keys, for any layout of any network."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pvt_ref.models.architecture import param_shapes
from pvt_ref.models.layouts import WHOLE, Layout, Piece, Shape


def pieces(layout: Layout, config: Any) -> list[Piece]:
    """All pieces of a model, in the order of our arrays."""
    shapes = param_shapes(config).items()
    return [piece for key, shape in shapes for piece in layout.pieces_of(key, shape, config)]


def foreign_shapes(layout: Layout, config: Any) -> dict[str, Shape]:
    """Key and shape of every array that a file of this layout must hold."""
    return {piece.foreign: piece.foreign_shape for piece in pieces(layout, config)}


def to_native(state: Mapping[str, Any], layout: Layout, config: Any) -> dict[str, np.ndarray]:
    """A complete state under our keys. Arrays of one piece may share memory with it."""
    shapes = param_shapes(config)
    dtype = np.result_type(*(x.dtype for x in state.values() if x.dtype.kind != "i"))
    native: dict[str, np.ndarray] = {}
    for piece in pieces(layout, config):
        part = state[piece.foreign][piece.foreign_region]
        if piece.region == WHOLE:
            native[piece.key] = part.reshape(shapes[piece.key])
        else:
            glued = native.setdefault(piece.key, np.empty(shapes[piece.key], dtype))
            glued[piece.region] = part
    # without qkv_bias, MMDetection's attention has no output bias either: ours is zero then
    return {k: native[k] if k in native else np.zeros(shapes[k], dtype) for k in shapes}
