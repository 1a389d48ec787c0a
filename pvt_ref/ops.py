"""Operations, and the table through which blocks and models reach them.

An operation is a forward and its backward, made beside the two functions:
``gelu = Operation(gelu_forward, gelu_backward)``. Code that needs one looks it up in the table,
``ops[gelu].forward(...)``, so a faster twin can replace it everywhere. An operation that is not in
the table is computed as written: the reference is the empty table.

All operations have the same signatures::

    forward(p, x, ops, ..., keep=True) -> y, cache
    backward(p, cache, dy, ops)        -> dx, grads

p is the record of weights, and grads the same record with dL/dw in place of w; both are None if
there are no weights. The cache holds all that backward needs; with ``keep=False`` it is None.
An operation writes only to arrays that it made; its backward leaves the cache unchanged.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from pvt_ref.arrays import Array
from pvt_ref.errors import ArrayTypeError, ConfigError, shown
from pvt_ref.tree import branches, named_records


@dataclass(frozen=True, slots=True)
class Operation:
    """A forward, and the backward that reads its cache.

    Operations are equal if their functions are, so pickling and copying keep them equal.

    Attributes:
        forward: with the signature above, like backward.
        absorbs: the readable operations that it computes itself instead of using the table,
        including those inside them. Empty for a readable operation.

    Raises:
        ArrayTypeError: if forward or backward is not callable, or absorbs has the wrong type.
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., tuple[Any, Any]]
    absorbs: tuple["Operation", ...] = ()

    def __post_init__(self) -> None:
        for way, function in (("forward", self.forward), ("backward", self.backward)):
            if not callable(function):
                raise ArrayTypeError(
                    f"{way} is a {type(function).__name__}; an operation is made of two functions: "
                    f"Operation(forward, backward)"
                )
        absorbed = self.absorbs if isinstance(self.absorbs, tuple) else (None,)
        if not all(isinstance(op, Operation) for op in absorbed):
            raise ArrayTypeError(
                f"absorbs is {shown(self.absorbs)}; it must be a tuple of the readable operations "
                f"that are computed inside: absorbs=(gelu, linear)"
            )

    @property
    def name(self) -> str:
        """``"gelu"`` for ``gelu_forward``."""
        return getattr(self.forward, "__name__", "operation").removesuffix("_forward")

    def is_readable(self) -> bool:
        """Whether its module has it under its name, so that it can be a key of the table."""
        module = sys.modules.get(getattr(self.forward, "__module__", None) or "")
        return getattr(module, self.name, None) == self

    def __repr__(self) -> str:
        return f"Operation({self.name})"


class Call(NamedTuple):
    """What :meth:`Ops.watched` reports about an operation.

    path is the key of its weights, ``"block1.0.attn.q"``; without weights, it is the path of the
    calling operation and its own name.
    """

    path: str
    operation: Operation  # the readable one
    way: str  # "forward" or "backward"
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any = None  # None in ``before``


class Ops:
    """A frozen table from readable operations to their twins.

    Attributes:
        name: for messages.
        accepts: a function that says whether the twins compute on an array; None means any array.
        settings: shared by the twins, optionally with a ``scope()`` for public calls, or None.
        replaced: the operations that :meth:`replace` was called for.

    Args:
        twins: the table.
        parts: further twins, which others may absorb. They are used where a larger twin that
        computes them itself has stepped aside.

    Raises:
        ArrayTypeError: if an argument has the wrong type.
        ConfigError: if a key is not a readable operation, or another twin absorbs it.
    """

    __slots__ = ("_twins", "_watch", "accepts", "name", "replaced", "settings")
    _twins: dict[Operation, Operation]
    name: str
    accepts: Callable[[Array], bool] | None
    settings: Any
    replaced: frozenset[Operation]

    def __init__(
        self,
        twins: Mapping[Operation, Operation] | None = None,
        *,
        parts: Mapping[Operation, Operation] | None = None,
        name: str = "reference",
        accepts: Callable[[Array], bool] | None = None,
        settings: Any = None,
    ) -> None:
        if not isinstance(name, str):
            raise ArrayTypeError(f"name is a {type(name).__name__}; it must be a str")
        for what, table in (("twins", twins), ("parts", parts)):
            if table is not None and not isinstance(table, Mapping):
                raise ArrayTypeError(
                    f"{what} is a {type(table).__name__}; it must map readable operations to their "
                    f"twins: Ops({{gelu: Operation(f, f_backward)}})"
                )
        every = {**(parts or {}), **(twins or {})}
        for op, twin in every.items():
            _check_pair(op, twin)
        for op in twins or {}:
            absorbing = [k.name for k, t in every.items() if k != op and op in t.absorbs]
            if absorbing:
                raise ConfigError(
                    f"this twin of {op.name} would have no effect: {', '.join(absorbing)} would "
                    f"compute it. table.replace({op.name}, twin) lets them step aside"
                )
        self._fill(every, name, accepts, settings, frozenset())

    def _fill(self, *state: Any) -> "Ops":
        """Sets the fields that :meth:`_state` returns."""
        names = ("_twins", "name", "accepts", "settings", "replaced")
        for slot, value in zip(names, state, strict=True):
            object.__setattr__(self, slot, value)
        return self

    def _with_twins(self, twins: Mapping[Operation, Operation], kind: Any = None) -> Any:
        """The same table with these twins, of the same class or another."""
        return object.__new__(kind or type(self))._fill(twins, *self._state()[1:])

    @property
    def twins(self) -> Mapping[Operation, Operation]:
        """The table, read-only. An operation that is not in it is its own twin."""
        return MappingProxyType(self._twins)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a table of operations is frozen; ops.replace makes a changed copy")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def __getitem__(self, op: Operation) -> Operation:
        """The twin that computes op: op itself if the table has none."""
        return self._twins.get(op, op)

    __iter__ = None  # or Python would ask for items 0, 1, 2 and so on without end

    def _state(self) -> tuple[Any, ...]:
        return (self._twins, self.name, self.accepts, self.settings, self.replaced)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ops) and self._state() == other._state()

    def __hash__(self) -> int:
        return hash((self.name, self.replaced))

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, self._state()

    def __repr__(self) -> str:
        parts = [shown(self.name)]
        if self.settings is not None:
            parts.append(repr(self.settings))
        parts += [f"another {op.name}" for op in sorted(self.replaced, key=lambda op: op.name)]
        return f"Ops({', '.join(parts)})"

    def replace(self, op: Operation, twin: Operation) -> "Ops":
        """A table in which twin computes op wherever op is needed.

        Twins that would compute op themselves step aside: the readable operations run in their
        place, with the table's twins for their parts.

        Args:
            op: a readable operation, such as :data:`pvt_ref.layers.gelu.gelu`.
            twin: the operation to compute instead.

        Returns:
            A new table.

        Raises:
            ArrayTypeError: if op or twin is not an Operation.
            ConfigError: if op is not readable, or twin absorbs an operation replaced before.
        """
        _check_pair(op, twin)
        kept = {k: t for k, t in self._twins.items() if op not in t.absorbs or k == op}
        # an earlier replacement that the new twin absorbs would be ignored from now on
        ignored = [other.name for other in self.replaced if other in twin.absorbs and other != op]
        if ignored:
            raise ConfigError(
                f"this twin of {op.name} absorbs {', '.join(sorted(ignored))}, which the table "
                f"replaces: that replacement would have no effect. Leave out one of the two"
            )
        state = (self.name, self.accepts, self.settings, self.replaced | {op})
        return object.__new__(Ops)._fill({**kept, op: twin}, *state)

    def scope(self) -> AbstractContextManager[Any]:
        """A context for one public call: what the settings set up for its duration."""
        return getattr(self.settings, "scope", nullcontext)()

    def watched(
        self,
        after: Callable[[Call], Any] | None = None,
        *,
        before: Callable[[Call], Any] | None = None,
        only: Iterable[Operation] | None = None,
        params: Any = None,
        unseen: Iterable[Operation] = (),
    ) -> "Ops":
        """A table that computes the same and reports every operation that is called.

        Args:
            after: called after an operation returns.
            before: called before it begins.
            only: report these, and let the twins that absorb one of them step aside; None reports
            every operation that goes through this table.
            params: the weights of the model, whose keys become the paths.
            unseen: not watched. (A watch holds an operation's arguments while it runs.)

        Returns:
            A table for use in this process, one call at a time.
        """
        wanted = None if only is None else frozenset(only)
        table = self._with_twins(self._twins, _Watched)
        watch = _Watch(after, before, wanted, named_records(params), frozenset(unseen))
        base = self if wanted is None else self._asking_for(wanted)
        object.__setattr__(table, "_watch", (base, watch))
        return table

    def _asking_for(self, wanted: frozenset[Operation]) -> "Ops":
        """A table without the twins that would compute one of these themselves."""
        kept = {k: t for k, t in self._twins.items() if k in wanted or wanted.isdisjoint(t.absorbs)}
        return self._with_twins(kept)


@dataclass(slots=True)
class _Watch:
    """The state of a watched table: its callbacks, and the operations in progress."""

    after: Callable[[Call], Any] | None
    before: Callable[[Call], Any] | None
    wanted: frozenset[Operation] | None
    names: Mapping[int, str]
    unseen: frozenset[Operation]
    inside: list[str] = field(default_factory=list)

    def name_of(self, p: Any) -> str | None:
        """The key of weights, or that of the first part if they were combined for a call."""
        if p is None:  # all operations without weights share it, so it identifies nothing
            return None
        first = next(iter(branches(p)), None)
        return self.names.get(id(p)) or (first and self.names.get(id(first[1])))


class _Watched(Ops):
    __slots__ = ()

    def _asking_for(self, wanted: frozenset[Operation]) -> Ops:
        base, watch = self._watch
        table = super()._asking_for(wanted)
        object.__setattr__(table, "_watch", (base._asking_for(wanted), watch))
        return table

    def __getitem__(self, op: Operation) -> Operation:
        base, watch = self._watch
        twin = base[op]
        if op in watch.unseen:
            return twin

        def run(way: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            own = watch.name_of(args[0]) if args else None
            outer = watch.inside[-1] if watch.inside else ""
            path = own or (f"{outer}.{op.name}" if outer else op.name)
            reported = watch.wanted is None or op in watch.wanted
            if reported and watch.before is not None:
                watch.before(Call(path, op, way, args, kwargs))
            watch.inside.append(path)
            try:
                result = function(*args, **kwargs)
            finally:
                watch.inside.pop()
            if reported and watch.after is not None:
                watch.after(Call(path, op, way, args, kwargs, result))
            return result

        forward, backward = (partial(run, w, getattr(twin, w)) for w in ("forward", "backward"))
        return Operation(forward, backward)


def _made_again(*state: Any) -> Ops:
    return object.__new__(Ops)._fill(*state)


def _check_pair(op: object, twin: object) -> None:
    for what, value in (("op", op), ("twin", twin)):
        if not isinstance(value, Operation):
            raise ArrayTypeError(
                f"{what} is a {type(value).__name__}; it must be an Operation, a forward and its "
                f"backward: Operation(f, f_backward)"
            )
    assert isinstance(op, Operation)
    if not op.is_readable():
        raise ConfigError(
            f"{op!r} is not an operation that a model uses, so a twin of it would have no effect. "
            f"Import the readable one: from pvt_ref.layers.gelu import gelu"
        )


#: The operations as the paper writes them.
REFERENCE = Ops()
