"""The record of operations through which model, block and layers reach other layers.

They call ``ops.layer_norm.forward`` rather than a function by name, so that a faster twin may stand
in any place, from a single GELU to a whole block: ``dataclasses.replace(REFERENCE, gelu=...)``. The
records that there are stand in records.py.

A twin of a large operation may compute smaller ones itself, and says which. A record in which one
of those was replaced is refused, since nobody would ask for it.

The rules of an operation, whoever writes it: it takes the arguments of the reference's function, by
position or by those names; it computes what the reference computes; it writes only into arrays it
made; its cache belongs to its own backward and is opaque to everyone else; a backward leaves its
cache as it was.

Who asks for what: an operation made of others takes ``ops``, forward and backward. ``keep=False``
asks for no cache. Dropout and drop path alone have no ``keep``: their cache is None unless
something was dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from pvt_ref.arrays import Array
from pvt_ref.errors import ArrayTypeError, ConfigError, shown


@dataclass(frozen=True, slots=True)
class Operation:
    """A forward and the backward that understands its cache.

    Attributes:
        forward: returns y and the cache, which is None if nothing was kept.
        backward: takes the cache and dL/dy, and returns dL/dx and the gradients of the weights, if
            there are any.
        absorbed: names and operations that it computes itself, without asking the record. Kernels
            have an attribute of that name, which is added. A function of your own around a kernel
            cannot be seen through: say here what it absorbs.

    Raises:
        ArrayTypeError: if forward or backward cannot be called, or absorbed is something else.
    """

    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., Any]
    absorbed: tuple[tuple[str, "Operation"], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for way in ("forward", "backward"):
            if not callable(getattr(self, way)):
                given = type(getattr(self, way)).__name__
                raise ArrayTypeError(
                    f"{way} is a {given}; an operation is made of two functions: "
                    f"Operation(forward, backward)"
                )
        absorbed: tuple[tuple[str, Operation], ...] = ()
        for source in (self, self.forward, self.backward):
            pairs = getattr(source, "absorbed", ())
            if pairs is absorbed:
                continue
            if not isinstance(pairs, tuple) or not all(map(_is_pair, pairs)):
                raise ArrayTypeError(
                    f"absorbed is {shown(pairs)}; it must be a tuple of pairs, each a name and the "
                    f"Operation that is computed: (('gelu', REFERENCE.gelu),)"
                )
            absorbed = (
                absorbed + tuple(p for p in pairs if p not in absorbed) if absorbed else pairs
            )
        object.__setattr__(self, "absorbed", absorbed)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], Operation)
    )


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

    Raises:
        ArrayTypeError: if the name is no text, numpy_only no truth value, or an operation no
            Operation.
        ConfigError: if one was replaced that another of this record computes itself, or one is said
            to compute what there is not.
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

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArrayTypeError(f"name is a {type(self.name).__name__}; it must be a text")
        if not isinstance(self.numpy_only, bool):
            given = type(self.numpy_only).__name__
            raise ArrayTypeError(f"numpy_only is a {given}; it must be True or False")
        operations = {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        for name, operation in operations.items():
            if not isinstance(operation, Operation):
                raise ArrayTypeError(
                    f"{name} is a {type(operation).__name__}; it must be an Operation, a forward "
                    f"and its backward: Operation(f, {name}_backward)"
                )
        deaf = {}
        for name, operation in operations.items():
            for absorbed, own in operation.absorbed:
                if absorbed not in operations:
                    raise ConfigError(
                        f"{name} is said to absorb {shown(absorbed)}; known are "
                        f"{', '.join(operations)}"
                    )
                if operations[absorbed] is not own and operations[absorbed] != own:
                    deaf[name] = absorbed
        if deaf:
            replaced, names = next(iter(deaf.values())), ", ".join(deaf)
            back = ", ".join(f"{name}=REFERENCE.{name}" for name in deaf)
            raise ConfigError(
                f"another {replaced} would have no effect: in the record {shown(self.name)} it is "
                f"part of {names}, which would go on computing their own. Replace it in REFERENCE, "
                f"where every operation is asked for: dataclasses.replace(REFERENCE, "
                f"{replaced}=...); or replace these by the readable ones too: {back}"
            )

    def __repr__(self) -> str:
        """Its name and the settings of its kernels; the functions would fill a screen."""
        operations = [getattr(self, f.name) for f in fields(self)[2:]]
        settings = [getattr(operation.forward, "blocking", None) for operation in operations]
        kinds = dict.fromkeys(repr(setting) for setting in settings if setting is not None)
        return f"Ops({', '.join([shown(self.name), *kinds])})"
