"""Marks a reader's file: the first law that fails, on the smallest case, and where to look.

A file is executed as it is. Errors are shown with the reader's own lines; an unwritten function is
not a mistake. This module does not stop endless code; ``running.py`` does.
"""

import ast
import functools
import inspect
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pvt_ref.errors import ConfigError, printable, shown
from pvt_ref.exercises.catalogue import Exercise, Property
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.testing import laws
from pvt_ref.testing.closeness import LawError
from pvt_ref.testing.laws import Trial

PASSED, FAILED, NOT_STARTED, WAITS = "passed", "failed", "not started", "waits"
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, slots=True)
class Mark:
    """The result of one way of an exercise.

    Attributes:
        exercise, way: "linear", and "forward" or "backward".
        state: PASSED, FAILED, NOT_STARTED, or WAITS if the forward has to be right first.
        law: the law that failed, "finite differences".
        says: the law in words.
        case: the smallest case on which it fails.
        found: the value found and the value expected, with the first wrong index.
        page: the address of the line of the derivation that the code contradicts.
        line: page, equation and words.
        where, index: the array and the entry.
        trace: the reader's own lines, if the code raised an error.
    """

    exercise: str
    way: str
    state: str
    law: str = ""
    says: str = ""
    case: str = ""
    found: str = ""
    page: str = ""
    line: str = ""
    where: str = ""
    index: tuple[int, ...] | None = None
    trace: str = ""


class ReadersError(Exception):
    """An error of the reader's code, with the reader's own lines that led to it."""

    def __init__(self, error: BaseException, path: Path) -> None:
        last = traceback.format_exception_only(error)[-1].strip()
        super().__init__(printable(last[:600]))
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            own = [traceback.FrameSummary(str(path), error.lineno or 0, "the file")]
        if len(own) > 4:  # a recursion
            own = [*own[:2], *own[-2:]]
        lines = [
            f"{path.name}, line {f.lineno}, in {f.name}: {(f.line or '').strip()}" for f in own
        ]
        self.trace = printable("\n".join(lines))


def load_file(path: Path) -> dict[str, Any]:
    """The names that a file defines. Raises: ReadersError, or an OSError."""
    try:
        source = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReadersError(error, path) from error
    module = types.ModuleType(f"exercise_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look for their module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ReadersError(error, path) from error
    return vars(module)


def is_unwritten(path: Path, function: str) -> bool:
    """Whether a function's body is its docstring, ``...``, pass or the raise of a new file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return all(map(_says_nothing, node.body))
    return False


def _says_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return "NotImplementedError" in ast.unparse(node)  # as new files have it
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, ast.Pass)


def _guarded(function: Callable[..., Any], path: Path) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except (NotImplementedError, LawError, ReadersError):  # unwritten, or reported already
            raise
        except (Exception, SystemExit) as error:
            raise ReadersError(error, path) from error

    return call


def readers_pair(exercise: Exercise, path: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of a file, in the signatures of the exercises.

    Raises:
        ReadersError: if the file cannot be executed, or lacks a function.
    """
    names = load_file(path)
    missing = [name for name in exercise.functions if not callable(names.get(name))]
    if missing:
        raise ReadersError(NameError(f"{path.name} defines no {' and no '.join(missing)}"), path)
    functions = [_guarded(names[name], path) for name in exercise.functions]
    if not exercise.alone:
        return functions[0], functions[1]

    def forward(p: Any, x: Any, ops: Ops, *settings: Any) -> Any:
        return functions[0](x, *settings)

    def backward(p: Any, cache: Any, dy: Any, ops: Ops) -> Any:
        return dy * cache, None

    return forward, backward


def twin(
    exercise: Exercise, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Operation:
    """The reader's pair as a twin for a table of operations.

    Raises, when called:
        ConfigError: if the network needs something that exercises leave out, such as dropout.
    """
    signature = inspect.signature(exercise.operation.forward)
    passed = ("p", "x", "ops", *exercise.settings)

    def twin_forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given.get("rng") is not None or given.get("mode", "bilinear") != "bilinear":
            what = f"{exercise.name} is called with dropout or bicubic resizing"
            raise ConfigError(f"{what}, which the exercises leave out: use a PVT, without rng")
        y, cache = forward(*(given[name] for name in passed))
        return y, cache if given["keep"] else None

    twin_forward.__name__ = f"{exercise.name}_forward"
    return Operation(twin_forward, backward)


def _trial(exercise: Exercise, pair: tuple[Any, Any], case: Any, ops: Ops) -> Trial:
    forward, backward = pair

    def run(p: Any, x: Any, *settings: Any) -> Any:
        return forward(p, x, ops, *settings)

    def back(p: Any, cache: Any, dy: Any) -> Any:
        return backward(p, cache, dy, ops)

    return Trial(run, back, case.p, case.x, case.settings, exercise.names, order=exercise.order)


_REFERRING = (laws.shape, laws.values, laws.gradient_values)


def _laws(exercise: Exercise, way: str) -> Iterator[tuple[Any, Property | None]]:
    """The laws of one way in the order of trial, the most informative first."""
    if way == FORWARD:
        plain = [laws.shape]
        plain_after = [laws.samples, laws.values]
        plain_after += [laws.dtype, laws.pure, laws.repeatable]
    else:
        plain = [laws.gradient_shapes, laws.pure_backward]
        plain_after = [laws.batch_sum, laws.linear_in_dy, laws.adjoint]
        plain_after += [laws.gradient_values, laws.gradient_dtypes]
        plain_after += [laws.no_state, laws.layout]
    own = exercise.forward if way == FORWARD else exercise.backward
    yield from ((law, None) for law in plain)
    yield from ((law.check, law) for law in own)
    yield from ((law, None) for law in plain_after)


def _described(exercise: Exercise, trial: Trial) -> str:
    arrays = [f"{name} {tuple(a.shape)}" for name, a in trial.inputs().items()]
    if len(arrays) > 8:
        arrays = [*arrays[:3], f"and {len(arrays) - 3} weights"]
    told = [
        f"{name} = {shown(value, 60)}"
        for name, value in zip(exercise.settings, trial.settings, strict=True)
    ]
    return ", ".join([*arrays, *told])


def _way(exercise: Exercise, way: str, pair: tuple[Any, Any], ops: Ops) -> Mark:
    trials = [
        (case.batched, *(_trial(exercise, p, case, ops) for p in (pair, _own_pair(exercise))))
        for case in exercise.cases()
    ]
    for law, own in _laws(exercise, way):
        for batched, trial, reference in trials:
            if law in (laws.samples, laws.batch_sum) and not batched:
                continue
            try:
                law(*((trial, reference) if law in _REFERRING else (trial,)))
            except LawError as error:
                if way == BACKWARD and _aliased(trial, reference):
                    what = f"{error.message}. The cache shares memory with y, so it changed when"
                    what += " the forward wrote into y afterwards"
                    error, own = LawError("aliased cache", what, error.where, error.index), None
                return _failed(exercise, way, error, law, own, _described(exercise, trial))
            except ReadersError as error:
                return _stopped(exercise, way, error, _described(exercise, trial))
    return Mark(exercise.name, way, PASSED)


def _stopped(exercise: Exercise, way: str, error: ReadersError, case: str) -> Mark:
    """The mark for code that raised an error; it can only point to the section."""
    line = exercise.line("values" if way == FORWARD else "adjoint", "")
    says = "The function ends without an error." if case else "The file can be executed."
    return Mark(
        exercise.name, way, FAILED, "runs", says, case, str(error), line.address, line.address,
        trace=error.trace,
    )  # fmt: skip


def _aliased(trial: Trial, reference: Trial) -> bool:
    """Whether writing into y changes the gradients, which it must not."""

    def is_changed(trial: Trial) -> bool:
        y, cache = trial.run()
        before = trial.back(cache, dy := trial.drawn(1, y))
        y, cache = trial.run()
        for a in laws.arrays_of(y):
            if a.flags.writeable:
                a.fill(np.nan)
        after = trial.back(cache, dy)
        return any(laws.first_wrong(after[name], g, 0.0) is not None for name, g in before.items())

    try:
        return is_changed(trial) and not is_changed(reference)
    except (LawError, ReadersError):  # gradients that cannot be compared
        return False


def _own_pair(exercise: Exercise) -> tuple[Any, Any]:
    return exercise.operation.forward, exercise.operation.backward


def _failed(
    exercise: Exercise, way: str, error: LawError, law: Any, own: Property | None, case: str
) -> Mark:
    broken = error.law.partition(" (")[0]
    if own is not None and broken == "values":
        name, says, line = own.name, own.says, own.line
    else:
        name, line = broken, exercise.line(broken, error.where)
        says = _SAYS.get(broken) or (law.__doc__ or "").partition("\n")[0]
    return Mark(
        exercise.name, way, FAILED, name, says, case, error.message,
        line.address, str(line), error.where, error.index,
    )  # fmt: skip


_SAYS: Mapping[str, str] = {
    "returns": "A forward returns y and a cache, a backward dx and the gradients of the weights.",
    "gradient": "Gradients have the structure of the weights.",
    "finite differences": "The backward is the derivative of your forward.",
    "aliased cache": "Writing to y does not change the cache.",
    "cache": "The backward does not change its cache.",
}


def mark_file(exercise: Exercise, path: Path, ops: Ops = REFERENCE) -> Iterator[Mark]:
    """The mark of the forward that a file defines, then that of its backward.

    Args:
        exercise: the file's.
        path: of the file.
        ops: the table from which a composite takes its parts.

    Yields:
        Two marks. The backward waits until the forward is right, since it is its derivative.

    Raises:
        OSError: if the file cannot be read.
    """
    unwritten = [is_unwritten(path, name) for name in exercise.functions]
    if all(unwritten):
        yield from (Mark(exercise.name, way, NOT_STARTED) for way in (FORWARD, BACKWARD))
        return
    try:
        pair = without_warnings(readers_pair, exercise, path)
    except ReadersError as error:
        yield _stopped(exercise, FORWARD, error, "")
        yield Mark(exercise.name, BACKWARD, WAITS)
        return
    forward = _mark(exercise, FORWARD, pair, unwritten[0], ops)
    yield forward
    if forward.state == PASSED:
        yield _mark(exercise, BACKWARD, pair, unwritten[-1], ops)
    else:
        yield Mark(exercise.name, BACKWARD, NOT_STARTED if unwritten[-1] else WAITS)


def _mark(exercise: Exercise, way: str, pair: tuple[Any, Any], empty: bool, ops: Ops) -> Mark:
    if empty:
        return Mark(exercise.name, way, NOT_STARTED)
    try:
        return without_warnings(_way, exercise, way, pair, ops)
    except NotImplementedError:  # half of it is written
        return Mark(exercise.name, way, NOT_STARTED)


def without_warnings(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) without warnings: an overflow shows in the law that it breaks."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return function(*args)
