"""Operations, and the table through which blocks and models reach them.

An operation is a forward and its backward, made beside the two functions:
``gelu = Operation(gelu_forward, gelu_backward)``. Whoever needs one asks the table,
``ops[gelu].forward(...)``, so that a faster twin may stand in any place. What is not in the table
is computed as written: the reference is the empty table.

All operations have the same signatures::

    forward(p, x, ops, ..., keep=True) -> y, cache
    backward(p, cache, dy, ops)        -> dx, grads

p is the record of weights, and grads the same record with dL/dw in the place of w; both are None
where there are no weights. The cache holds all that backward needs. With ``keep=False`` it is None.
Only arrays that an operation made are written to; its backward leaves the cache as it was.
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
    """A forward, and the backward that understands its cache.

    Operations are equal if their functions are, so they survive pickling and copying.

    Attributes:
        forward: as in the head of this file, like backward.
        absorbs: the readable operations that it computes itself instead of asking the table, those
            inside them included. Empty for a readable operation.

    Raises:
        ArrayTypeError: if forward or backward cannot be called, or absorbs is something else.
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
        """Whether it is the operation that its module has under its name: a key of the table."""
        module = sys.modules.get(getattr(self.forward, "__module__", None) or "")
        return getattr(module, self.name, None) == self

    def __repr__(self) -> str:
        return f"Operation({self.name})"


class Call(NamedTuple):
    """What :meth:`Ops.watched` reports of an operation.

    path is the key of its weights, ``"block1.0.attn.q"``; where it has none, the path of the
    operation that asked for it, and its name.
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
        accepts: whether the twins compute on an array, a module's function; None: on any.
        settings: what the twins share, perhaps with a ``scope()`` for public calls, or None.
        replaced: the operations that :meth:`replace` was called for.

    Args:
        twins: the table.
        parts: more of them, which others of the table may absorb: what a larger twin computes
            itself, and what is used where that one has stepped aside.

    Raises:
        ArrayTypeError: if an argument is of another type.
        ConfigError: if a key is no readable operation, or another of twins absorbs it.
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
            raise ArrayTypeError(f"name is a {type(name).__name__}; it must be a text")
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
        """Sets what :meth:`_state` tells."""
        names = ("_twins", "name", "accepts", "settings", "replaced")
        for slot, value in zip(names, state, strict=True):
            object.__setattr__(self, slot, value)
        return self

    def _with_twins(self, twins: Mapping[Operation, Operation], kind: Any = None) -> Any:
        """A table of these twins, otherwise the same, of the same class or of another kind."""
        return object.__new__(kind or type(self))._fill(twins, *self._state()[1:])

    @property
    def twins(self) -> Mapping[Operation, Operation]:
        """The table, read-only. An operation that is not in it is its own twin."""
        return MappingProxyType(self._twins)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a table of operations is frozen; ops.replace makes a changed one")

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
        """A table in which twin computes op, and everybody asks for it.

        The twins that would compute op themselves step aside: in their place the readable
        operations run, with what the table has for their parts.

        Args:
            op: a readable operation, such as :data:`pvt_ref.layers.gelu.gelu`.
            twin: what shall be computed instead.

        Returns:
            A new table.

        Raises:
            ArrayTypeError: if op or twin is no Operation.
            ConfigError: if op is none that is ever asked for, or twin absorbs one replaced before.
        """
        _check_pair(op, twin)
        kept = {k: t for k, t in self._twins.items() if op not in t.absorbs or k == op}
        # what the new twin absorbs, and was replaced before, would be ignored from now on
        ignored = [other.name for other in self.replaced if other in twin.absorbs and other != op]
        if ignored:
            raise ConfigError(
                f"this twin of {op.name} absorbs {', '.join(sorted(ignored))}, which the table "
                f"replaces: that replacement would have no effect. Leave one of the two out"
            )
        state = (self.name, self.accepts, self.settings, self.replaced | {op})
        return object.__new__(Ops)._fill({**kept, op: twin}, *state)

    def scope(self) -> AbstractContextManager[Any]:
        """To be entered once around a public call: what the settings set up for its duration."""
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
        """A table that computes the same and reports every operation that is asked for.

        Args:
            after: called when an operation has returned.
            before: called when it begins.
            only: report these, and let the twins that absorb one of them step aside; None reports
                whatever this table asks for.
            params: the weights of the model, from which paths take their keys.
            unseen: called as without a watch, which holds an operation's arguments while it runs.

        Returns:
            A table for this process and one call at a time.
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
    """The state of one watched table: who reports, and which operations are under way."""

    after: Callable[[Call], Any] | None
    before: Callable[[Call], Any] | None
    wanted: frozenset[Operation] | None
    names: Mapping[int, str]
    unseen: frozenset[Operation]
    inside: list[str] = field(default_factory=list)

    def name_of(self, p: Any) -> str | None:
        """The key of weights, or of the first part of weights that were put together for a call."""
        if p is None:  # shared by all that have no weights: it says nothing of the place
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
            f"{op!r} is no operation that a model asks for, so a twin of it would have no effect. "
            f"Import the readable one: from pvt_ref.layers.gelu import gelu"
        )


#: The operations as the paper writes them.
REFERENCE = Ops()
