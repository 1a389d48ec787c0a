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
    """A forward and the backward that understands its cache.

    Attributes:
        forward: returns y and the cache, which is None if nothing was kept.
        backward: takes the cache and dL/dy, and returns dL/dx and the gradients of the weights, if
            there are any.
    """

    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One operation of each kind. Frozen: dataclasses.replace makes a changed one.

    Attributes:
        name: for messages.
        numpy_only: whether arrays of other libraries are refused.
        linear: as in layers/linear.py.
        layer_norm: as in layers/layer_norm.py.
        gelu: as in layers/gelu.py.
        softmax: as in layers/softmax.py.
        dropout: as in layers/drop.py.
        drop_path: as in layers/drop.py.
        patch_embed: as in layers/patch_embed.py.
        position: as in layers/position.py.
        attention: as in layers/attention.py.
        sra: as in layers/sra.py.
        mlp: as in layers/mlp.py.
        block: as in block.py.
    """

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
