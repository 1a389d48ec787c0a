"""The laws of every operation, whatever it computes: its forward, and its backward as the adjoint.

A law is a function of a :class:`Trial`, and raises :class:`LawError` if it does not hold. Only
:func:`shape`, :func:`values` and :func:`gradient_values` need another implementation.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pvt_ref.arrays import is_array
from pvt_ref.errors import shown
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.testing.closeness import LawError, close, first_wrong, spelt_entry, spelt_pair
from pvt_ref.tree import branches, map_arrays

#: Relative tolerances in float64: for values against another implementation, and for gradients.
FORWARD, GRADIENT = 1e-12, 1e-10

#: Relative tolerance for derivatives by central differences, and the step of the differences.
DIFFERENCES, STEP = 1e-5, 1e-5


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and array of every array of a tree of records, tuples, lists and dicts, in order."""
    if is_array(tree):
        yield path, tree
    else:
        for name, branch in branches(tree):
            yield from leaves(branch, f"{path}.{name}" if path else str(name))


@dataclass(frozen=True, slots=True)
class Trial:
    """A forward and its backward on one input. They get copies, which they may change.

    Attributes:
        forward: ``(p, x, *settings) -> y, cache``.
        backward: ``(p, cache, dy) -> dx, grads``.
        p: the weights, a record, an array or None.
        x: the input, an array, or several in a tuple or a list.
        settings: further arguments of the forward.
        names: of arrays, for messages, by path: those of x are "x", "x.0" and so on, those of p
            the fields of its record, and "p" if it is an array.
        seed: of the cotangents and directions.
        order: first parts of the inputs' names, in the order in which a backward computes their
            gradients. If several are wrong, the first is reported. By default the last weight
            comes first, and x last.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    p: Any
    x: Any
    settings: tuple[Any, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    order: tuple[str, ...] = ()

    def run(self) -> tuple[Any, Any]:
        """y and the cache."""
        p, x, settings = map_arrays(np.copy, (self.p, self.x, self.settings))
        return _pair("forward", "y, cache", self.forward(p, x, *settings))

    def back(self, cache: Any, dy: Any) -> dict[str, Any]:
        """The gradients by the names of the arrays."""
        p, dy = map_arrays(np.copy, (self.p, dy))
        dx, grads = _pair("backward", "dx, grads", self.backward(p, cache, dy))
        # copies: the next backward may write into what this one returned
        pairs = self._gradients("", (self.x, self.p), (dx, grads))
        return {name: np.array(g, dtype=g.dtype) for name, g in pairs}

    def drawn(self, key: int, like: Any) -> Any:
        """A tree of normal numbers of the shapes and dtypes of another."""
        rng = np.random.default_rng([self.seed, key])
        return map_arrays(lambda a: rng.standard_normal(np.shape(a)).astype(a.dtype), like)

    def inputs(self) -> dict[str, Any]:
        """The arrays that gradients are taken with respect to, by name."""
        trees = {"x": self.x, "p": self.p}
        return {self._name(path): a for path, a in leaves(trees)}

    def given(self, changed: Mapping[str, Any]) -> "Trial":
        """A trial with some of the arrays replaced, by name."""
        paths = iter([path for path, _ in leaves({"x": self.x, "p": self.p})])
        x, p = map_arrays(lambda a: changed.get(self._name(next(paths)), a), (self.x, self.p))
        return replace(self, x=x, p=p)

    def cast(self, dtype: Any) -> "Trial":
        """A trial in another precision."""

        def convert(a: Any) -> Any:
            return a.astype(dtype) if a.dtype.kind == "f" else a

        p, x, settings = map_arrays(convert, (self.p, self.x, self.settings))
        return replace(self, p=p, x=x, settings=settings)

    def _name(self, path: str) -> str:
        plain = path.removeprefix("p.")
        return self.names.get(path, plain)

    def _gradients(self, path: str, values: Any, gradients: Any) -> Iterator[tuple[str, Any]]:
        """Names and gradients; the two trees must have the same structure."""
        if not path:  # (x, p), (dx, grads)
            yield from self._gradients("x", values[0], gradients[0])
            yield from self._gradients("p", values[1], gradients[1])
            return
        name = self._name(path)
        if is_array(values):
            if not is_array(gradients):
                what = f"the gradient of {name} is a {type(gradients).__name__}"
                raise LawError("gradient", f"{what}; it must be an array of its shape", name)
            yield name, gradients
        elif values is None:
            if gradients is not None:
                what = f"there is no {'weight' if path == 'p' else name}"
                raise LawError("gradient", f"{what}, so its gradient must be None", name)
        else:
            mine, theirs = dict(branches(values)), dict(branches(gradients))
            if list(mine) != list(theirs):
                kind = type(values).__name__
                what = f"the gradients of {'the weights' if path == 'p' else name} are a "
                what += f"{type(gradients).__name__}; they must be a {kind} with {', '.join(mine)}"
                raise LawError("gradient", what, name)
            for branch, value in mine.items():
                yield from self._gradients(f"{path}.{branch}", value, theirs[branch])


def _pair(way: str, what: str, result: Any) -> tuple[Any, Any]:
    """Refuses a result that is not y and a second value. Raises: LawError."""
    if not isinstance(result, tuple) or len(result) != 2:
        kind = f"{len(result)} values" if isinstance(result, tuple) else shown(result, 40)
        raise LawError("returns", f"the {way} returned {kind}; it must return two: {what}")
    if way == "forward" and not any(True for _ in leaves(result[0])):
        raise LawError("returns", f"y is {shown(result[0], 40)}; it must be an array")
    return result


def arrays_of(y: Any) -> list[Any]:
    """The arrays of an output: one, or those of a list."""
    return [a for _, a in leaves(y)]


def dot(a: Any, b: Any) -> float:
    """The inner product of two trees."""
    return float(sum(np.sum(u * v) for u, v in zip(arrays_of(a), arrays_of(b), strict=True)))


# The forward --------------------------------------------------------------------------------------


def shape(trial: Trial, reference: Trial) -> None:
    """y has the shape that the docstring gives."""
    y, expected = arrays_of(trial.run()[0]), arrays_of(reference.run()[0])
    shapes, wanted = ([tuple(a.shape) for a in arrays] for arrays in (y, expected))
    if shapes != wanted:
        is_, must = (s[0] if len(wanted) == 1 and len(s) == 1 else s for s in (shapes, wanted))
        raise LawError("shape", f"y has shape {is_}; it must be {must}")


def values(trial: Trial, reference: Trial) -> None:
    """y agrees with another implementation."""
    _compare("values", "y", trial.run()[0], reference.run()[0], FORWARD)


def _compare(law: str, what: str, y: Any, expected: Any, tolerance: float) -> None:
    pairs = list(zip(arrays_of(y), arrays_of(expected), strict=True))
    for k, (mine, theirs) in enumerate(pairs):
        name = what if len(pairs) == 1 else f"{what}[{k}]"
        close(mine, theirs, tolerance, name, floor=1e-3 * math.sqrt(theirs.size), law=law)


def dtype(trial: Trial) -> None:
    """y has the dtype of the inputs."""
    for kind in (np.float32, np.float64):
        y, _ = trial.cast(kind).run()
        _refuse_dtypes("dtype", {"y": y}, kind)


def _refuse_dtypes(law: str, arrays: Mapping[str, Any], kind: Any) -> None:
    for name, tree in arrays.items():
        for a in arrays_of(tree):
            if a.dtype != kind:
                what = f"with {np.dtype(kind)} inputs, {name} is {a.dtype}"
                raise LawError(law, f"{what}; the dtype must stay the same", name)


def pure(trial: Trial) -> None:
    """The forward does not change its arguments."""
    p, x, settings = map_arrays(np.copy, (trial.p, trial.x, trial.settings))
    trial.forward(p, x, *settings)
    _refuse_changes("pure", trial, replace(trial, p=p, x=x))


def _refuse_changes(law: str, before: Trial, after: Trial) -> None:
    for (name, old), new in zip(before.inputs().items(), after.inputs().values(), strict=True):
        index = first_wrong(new, old, 0.0)
        if index is not None:
            is_, was = spelt_pair(new[index].item(), old[index].item())
            what = f"{spelt_entry(name, index)} was {was} and is {is_} afterwards"
            raise LawError(law, f"{what}: the caller's array was written to", name, index)


def layouts(a: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The same numbers in other memory layouts."""
    yield "Fortran order", np.asfortranarray(a)
    if a.ndim:
        wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::2] = a
        yield "every other number of a larger array", wide[..., ::2]
        yield "an array read backwards", np.ascontiguousarray(a[..., ::-1])[..., ::-1]


def layout(trial: Trial) -> None:
    """The memory layout of arrays does not matter, forward and backward."""
    y, cache = trial.run()
    dy = trial.drawn(1, y)
    grads = trial.back(cache, dy)
    inputs = (trial.p, trial.x, dy)
    for k, (label, _) in enumerate(layouts(np.zeros(1))):

        def relaid(a: Any, k: int = k) -> Any:
            return list(layouts(a))[k][1] if a.ndim else a

        p, x, other_dy = map_arrays(relaid, inputs)
        other, cache = _pair("forward", "y, cache", trial.forward(p, x, *trial.settings))
        _compare(f"layout ({label})", "y", other, y, GRADIENT)
        result = _pair("backward", "dx, grads", trial.backward(p, cache, other_dy))
        for name, g in trial._gradients("", (trial.x, trial.p), result):
            _compare(f"layout ({label})", f"the gradient of {name}", g, grads[name], GRADIENT)


def repeatable(trial: Trial) -> None:
    """The same call gives the same bits again."""
    y, again = (arrays_of(trial.run()[0]) for _ in range(2))
    for a, b in zip(y, again, strict=True):
        index = first_wrong(b, a, 0.0)
        if index is not None:
            was, is_ = spelt_pair(a[index].item(), b[index].item())
            what = f"{spelt_entry('y', index)} was {was} in a first call and {is_} in a second one"
            what += " with the same arguments"
            raise LawError("repeatable", what, index=index)


def _sample(tree: Any, b: int) -> Any:
    return map_arrays(lambda a: a[b : b + 1], tree)


def samples(trial: Trial) -> None:
    """The result for a sample does not depend on the other samples of its batch, the first axis."""
    y, _ = trial.run()
    for b in range(len(arrays_of(y)[0])):
        alone, _ = replace(trial, x=_sample(trial.x, b)).run()
        what = f"y of sample {b}, computed alone,"
        _compare("samples", what, alone, _sample(y, b), FORWARD)


# The backward -------------------------------------------------------------------------------------


def gradient_shapes(trial: Trial) -> None:
    """The gradient of an array has the shape of the array."""
    y, cache = trial.run()
    inputs = trial.inputs()
    for name, g in trial.back(cache, trial.drawn(1, y)).items():
        if g.shape != inputs[name].shape:
            what = f"the gradient of {name} has shape {g.shape}"
            raise LawError(
                "gradient shape", f"{what}; {name} has {inputs[name].shape}, and so must it", name
            )


def gradient_dtypes(trial: Trial) -> None:
    """The gradients have dy's dtype."""
    for kind in (np.float32, np.float64):
        cast = trial.cast(kind)
        y, cache = cast.run()
        grads = cast.back(cache, trial.drawn(1, map_arrays(lambda a: a.astype(kind), y)))  # noqa: B023
        _refuse_dtypes("gradient dtype", grads, kind)


def linear_in_dy(trial: Trial) -> None:
    """The backward is linear in dy: it multiplies by the transpose of the Jacobian."""
    y, cache = trial.run()
    u, v = trial.drawn(1, y), trial.drawn(2, y)
    both = trial.back(cache, map_arrays(lambda a, b: 2 * a - b, u, v))
    du, dv = trial.back(cache, u), trial.back(cache, v)
    for name, g in both.items():
        expected = 2 * du[name] - dv[name]
        floor = 1e-6 + float(np.linalg.norm(du[name]) + np.linalg.norm(dv[name]))
        what = f"the gradient of {name} for 2u - v"
        try:
            close(g, expected, 1e-9, what, floor=floor, law="linear in dy")
        except LawError as error:
            raise LawError("linear in dy", error.message, name, error.index) from None


def batch_sum(trial: Trial) -> None:
    """The gradient of the weights is the sum over the samples, which all share the weights."""
    shared = [name for path, _ in leaves(trial.p, "p") for name in [trial._name(path)]]
    y, cache = trial.run()
    dy = trial.drawn(1, y)
    whole = trial.back(cache, dy)
    parts = []
    for b in range(len(arrays_of(y)[0])):
        one = replace(trial, x=_sample(trial.x, b))
        parts.append(one.back(one.run()[1], _sample(dy, b)))
    for name in shared:
        total = sum(part[name] for part in parts)
        floor = 1e-6 + sum(float(np.linalg.norm(part[name])) for part in parts)
        what = f"the gradient of {name} for the whole batch"
        try:
            close(whole[name], total, 1e-9, what, floor=floor, law="batch")
        except LawError as error:
            what = f"{error.message}, the sum of those of its samples"
            raise LawError("batch", what, name, error.index) from None


def adjoint(trial: Trial) -> None:
    """<J v, u> = <v, J^T u>: J v by differences of the forward, J^T u by the backward.

    If it fails for an array, its entries are changed one by one until one disagrees.
    """
    y, cache = trial.run()
    u = trial.drawn(1, y)
    inputs, grads = trial.inputs(), trial.back(cache, u)
    largest = max((float(np.abs(g).max()) for g in grads.values() if g.size), default=0.0)
    noise = 1e-6 * largest
    wrong: dict[str, str] = {}
    for k, (name, a) in enumerate(inputs.items()):
        v, g = trial.drawn(2 + k, a), grads[name]
        left, right = _slope(trial, name, a, v, u), float(np.sum(v * g))
        size = float(np.linalg.norm(g))
        if not abs(left - right) <= DIFFERENCES * (size + abs(left)) + noise:
            wrong[name] = f"for {name}, <J v, u> is {left:.9g} and <v, J^T u> is {right:.9g}"
    if not wrong:
        return
    name = _first_of(trial, list(wrong))
    a, g = inputs[name], grads[name]
    size = float(np.linalg.norm(g))
    for index in np.ndindex(a.shape):
        one = np.zeros_like(a)
        one[index] = 1.0
        slope, said = _slope(trial, name, a, one, u), float(g[index])
        if not abs(slope - said) <= DIFFERENCES * (abs(slope) + size) + noise:
            what = f"the gradient of {spelt_entry(name, index)} is {said:.6g}; by finite "
            what += f"differences of the forward it is {slope:.6g}"
            raise LawError("finite differences", what, name, index)
    raise LawError("adjoint", wrong[name], name)


def _first_of(trial: Trial, names: list[str]) -> str:
    """The first input, in the order of the backward, whose gradient is wrong."""
    for start in trial.order:
        for name in names:
            if name == start or name.startswith(f"{start}."):
                return name
    weights = [name for path, _ in leaves(trial.p, "p") for name in [trial._name(path)]]
    last = [name for name in weights if name in names]
    return last[-1] if last else names[0]


def _slope(trial: Trial, name: str, a: Any, direction: Any, u: Any) -> float:
    """d <u, y> when one array moves along a direction, by central differences."""
    up, down = (trial.given({name: a + s * STEP * direction}).run()[0] for s in (1, -1))
    return (dot(up, u) - dot(down, u)) / (2 * STEP)


def gradient_values(trial: Trial, reference: Trial) -> None:
    """The gradients agree with another implementation."""
    y, cache = trial.run()
    dy = trial.drawn(1, y)
    grads, expected = trial.back(cache, dy), reference.back(reference.run()[1], dy)
    largest = max((float(np.abs(g).max()) for g in expected.values() if g.size), default=0.0)
    for name, g in expected.items():
        floor = 1e-3 * largest * math.sqrt(g.size) + 1e-12
        try:
            close(grads[name], g, GRADIENT, f"the gradient of {name}", floor=floor)
        except LawError as error:
            raise LawError("gradient values", error.message, name, error.index) from None


def pure_backward(trial: Trial) -> None:
    """The backward does not change the weights, dy or its cache."""
    y, cache = trial.run()
    dy = trial.drawn(1, y)
    first = trial.back(cache, dy)
    p, own = map_arrays(np.copy, (trial.p, dy))
    trial.backward(p, cache, own)
    _refuse_changes("pure", trial, replace(trial, p=p))
    for a, b in zip(arrays_of(dy), arrays_of(own), strict=True):
        index = first_wrong(b, a, 0.0)
        if index is not None:
            raise LawError("pure", f"{spelt_entry('dy', index)} was written to", "dy", index)
    second = trial.back(cache, dy)
    for name, g in first.items():
        index = first_wrong(second[name], g, 0.0)
        if index is not None:
            what = f"the gradient of {spelt_entry(name, index)} differs in a second backward"
            raise LawError(
                "cache", f"{what} with the same cache, which was written to", name, index
            )


def no_state(trial: Trial) -> None:
    """The backward depends only on its cache, even if another forward has run in between."""
    y, cache = trial.run()
    dy = trial.drawn(1, y)
    expected = trial.back(cache, dy)
    y, cache = trial.run()
    x = trial.drawn(99, trial.x)
    replace(trial, x=x).run()
    for name, g in trial.back(cache, dy).items():
        index = first_wrong(g, expected[name], 0.0)
        if index is not None:
            what = f"the gradient of {spelt_entry(name, index)} differs if a forward on another"
            raise LawError("state", f"{what} input runs in between", name, index)


# All of them, for any operation -------------------------------------------------------------------


def laws_of(batched: bool, compared: bool) -> list[Callable[..., None]]:
    """All laws, in the order in which they are tried."""
    found: list[Callable[..., None]] = [shape, values] if compared else []
    found += [dtype, pure, repeatable, *([samples] if batched else [])]
    found += [gradient_shapes, pure_backward, gradient_dtypes, linear_in_dy]
    found += [*([batch_sum] if batched else []), adjoint]
    return [*found, *([gradient_values] if compared else []), no_state, layout]


def _try_all(trial: Trial, batched: bool, reference: Trial | None) -> None:
    for law in laws_of(batched, reference is not None):
        told = (trial, reference) if law in (shape, values, gradient_values) else (trial,)
        law(*told)


def check_operation(
    op: Operation,
    p: Any,
    x: Any,
    *settings: Any,
    ops: Ops = REFERENCE,
    expected: Operation | None = None,
    batched: bool = True,
    names: Mapping[str, str] | None = None,
    seed: int = 0,
) -> None:
    """Tries an operation with this package's signatures against all laws, in float64.

    The laws: dtype and purity, memory layouts, independent samples, the shapes of gradients,
    linearity in dy, sums over the batch, the adjoint by finite differences, caches that can be used
    again, and ``keep=False``.

    Args:
        op: forward ``(p, x, ops, *settings, keep=True)`` and backward ``(p, cache, dy, ops)``.
        p: weights in float64: a record, an array or None.
        x: a small array in float64, or several arrays in a tuple or list.
        settings: further arguments of the forward.
        ops: the table from which it takes its parts.
        expected: another operation, whose values and gradients it should have.
        batched: whether the first axis of x and y counts independent samples.
        names: of arrays, for messages, by path: ``{"x.0": "q"}``.
        seed: of the random directions.

    Raises:
        LawError: for the first law that does not hold.
    """

    def trial_of(op: Operation) -> Trial:
        def forward(p: Any, x: Any, *settings: Any) -> Any:
            return op.forward(p, x, ops, *settings)

        def backward(p: Any, cache: Any, dy: Any) -> Any:
            return op.backward(p, cache, dy, ops)

        return Trial(forward, backward, p, x, settings, names or {}, seed)

    trial = trial_of(op)
    _try_all(trial, batched, None if expected is None else trial_of(expected))
    y, _ = trial.run()
    inputs = map_arrays(np.copy, (p, x, settings))
    alone, cache = op.forward(inputs[0], inputs[1], ops, *inputs[2], keep=False)
    _compare("keep=False", "y", alone, y, FORWARD)
    if cache is not None:
        what = f"the cache is a {type(cache).__name__}; without a backward it must be None"
        raise LawError("keep=False", what)


def check_vjp(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *inputs: Any,
    batched: bool = False,
    seed: int = 0,
) -> None:
    """Tries any function and its vector-Jacobian product against the laws, in float64.

    ::

        def forward(x, w):
            return x * w, (x, w)

        def backward(cache, dy):
            x, w = cache
            return dy * w, dy * x

        check_vjp(forward, backward, x, w)

    Args:
        forward: ``(*inputs) -> y, cache``.
        backward: ``(cache, dy) -> gradients``, a tuple with one for each input.
        inputs: small arrays in float64, or records of them.
        batched: whether the first axis of all inputs and of y counts independent samples.
        seed: of the random directions.

    Raises:
        LawError: for the first law that does not hold.
    """

    def run(_: None, x: tuple[Any, ...]) -> Any:
        return forward(*x)

    def back(_: None, cache: Any, dy: Any) -> Any:
        grads = backward(cache, dy)
        if not isinstance(grads, tuple) or len(grads) != len(inputs):
            what = f"the backward returned {shown(grads, 40)}; it must return a tuple of"
            raise LawError("returns", f"{what} {len(inputs)} gradients, one for each input")
        return grads, None

    names = {f"x.{k}": f"input {k}" for k in range(len(inputs))}
    _try_all(Trial(run, back, None, tuple(inputs), (), names, seed), batched, None)
