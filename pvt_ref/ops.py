"""The record of operations through which model, block and layers reach other layers.

They call ``ops.layer_norm.forward`` rather than a function by name, so that a faster twin may stand
in any place, from a single GELU to a whole block: ``dataclasses.replace(REFERENCE, gelu=...)``. The
records that there are stand in records.py.

The rules of an operation, whoever writes it: it takes the arguments of the reference's function, by
position or by those names; it computes what the reference computes; it writes only into arrays it
made; its cache belongs to its own backward and is opaque to everyone else; a backward leaves its
cache as it was.

Who asks for what: an operation made of others takes ``ops``, forward and backward. ``keep=False``
asks for no cache. Dropout and drop path alone have no ``keep``: their cache is None unless
something was dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pvt_ref.arrays import Array


@dataclass(frozen=True, slots=True)
class Operation:
    """A forward and the backward that understands its cache."""

    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One operation of each kind. Frozen: dataclasses.replace makes a changed one."""

    name: str
    numpy_only: bool = False  # whether arrays of other libraries are refused
    linear: Operation
    layer_norm: Operation
    gelu: Operation
    softmax: Operation
    dropout: Operation
    drop_path: Operation
    patch_embed: Operation
    position: Operation
    attention: Operation
    sra: Operation
    mlp: Operation
    block: Operation
