"""Executes shape comments: ``# (B, n, C)`` at the end of a line is checked when the line has run.

A comment describes the first array that its line assigns or returns, or each of them if it says
"each". If the value is a tuple of integers, it gives their values. It may list alternatives:
``# (H*W, C), or (1 + H*W, C)``. The sizes of its letters come from

- the function's docstring: the shapes in ``Args:`` after an argument (``grid: (H, W)``) or after
  one of its attributes (``p: weight (C_out, C_in)``, ``settings: num_heads (N)``), or, in a
  docstring without ``Args:``, after an argument's name (``tokens x (B, n, C) to a map``). They are
  read when the function is entered, so they are checked as well;
- integers that the function assigned to a variable with the letter's name: ``B, n, C = x.shape``;
- for a letter with an index, ``C_i``, ``H_{i-1}`` or ``C_4``: the sizes of that stage, with the
  value that i has when the line runs;
- the formulas of :data:`DERIVED`, applied to these.

A letter with two sizes is a fault, and so is one without a size: nothing is skipped.
"""

import ast
import contextlib
import io
import operator
import re
import sys
import textwrap
import tokenize
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

from pvt_ref.testing.closeness import LawError
from pvt_ref.tree import branches

#: Formulas for letters that need no shape of their own. The first whose letters are known is used.
DERIVED: dict[str, tuple[str, ...]] = {
    # all axes but the last merged: of tokens, of a map of logits, of a batch of logits
    "rows": ("...", "B*H*W", "B"),
    "n": ("(H/P)(W/P)",),  # tokens of a map cut into patches
    "n_i": ("H_i*W_i",),  # tokens of a stage, without the cls token
    "m": ("n/(R*R)", "n"),  # keys: one for every R x R tokens, or one per token without reduction
    "d": ("C/N",),  # channels of one head
}

#: A letter with at most one index; the two words are the only longer names.
_LETTER = r"(?:rows|num_classes|[A-Za-z](?:_(?:in|out|\w|\{\w[+-]\d\}))?)(?!\w)"
_TOKEN = re.compile(rf"\s*(\.\.\.|\d+|{_LETTER}|[-+*/()])")
_INDEX = re.compile(r"_\{?(?:(\d)|([a-z])([+-]\d)?)\}?$")

#: A number, a letter, ``...``, or an operation on two of them.
Dim = int | str | tuple[str, Any, Any]
Shape = tuple[Dim, ...]


# Reading shapes -----------------------------------------------------------------------------------


def _factor(tokens: list[str]) -> Dim:
    token = tokens.pop(0) if tokens else ")"
    if token == "(":
        inner = _sum(tokens)
        if not tokens or tokens.pop(0) != ")":
            raise ValueError("a parenthesis is open")
        return inner
    if token in ("+", "-", "*", "/", ")"):
        raise ValueError(f"an operand is missing before {token}")
    return int(token) if token.isdigit() else token


def _product(tokens: list[str]) -> Dim:
    left = _factor(tokens)
    while tokens and tokens[0] not in ("+", "-", ")"):
        sign = tokens.pop(0) if tokens[0] in ("*", "/") else "*"  # 2C, (H/P)(W/P)
        left = (sign, left, _factor(tokens))
    return left


def _sum(tokens: list[str]) -> Dim:
    left = _product(tokens)
    while tokens and tokens[0] in ("+", "-"):
        left = (tokens.pop(0), left, _product(tokens))
    return left


@cache
def parse_dim(text: str) -> Dim:
    """Parses a dimension such as ``1 + n_i``, ``2C``, ``(H/P)(W/P)`` or ``...``.

    Raises:
        ValueError: if the text is not a dimension.
    """
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"{text!r} is no dimension")
        tokens.append(match[1])
        at = match.end()
    dim = _sum(tokens)
    if tokens:
        raise ValueError(f"{text!r} is no dimension")
    return dim


def _group(text: str, start: int) -> str | None:
    """The text between the parenthesis at start and its closing one; None if it is not closed."""
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "(") - (text[end] == ")")
        if depth == 0:
            return text[start + 1 : end]
    return None


@dataclass(frozen=True)
class Found:
    """A shape in a text: where it starts and ends, and whether it is a single number, ``(N)``."""

    shape: Shape
    start: int
    end: int
    lone: bool


def find_shapes(text: str) -> list[Found]:
    """The shapes in a text. A parenthesis with other words in it is not one, nor is ``f(x)``."""
    found, at = [], 0
    while (start := text.find("(", at)) >= 0:
        at = start + 1
        inside = _group(text, start)
        if inside is None or text[start - 1 : start].isalnum():
            continue
        parts = inside.split(",")
        lone = len(parts) == 1 and inside.strip() not in ("", "...")
        if parts[-1].strip() == "":
            parts.pop()  # (C,) and ()
        try:
            shape = tuple(parse_dim(part.strip()) for part in parts)
        except ValueError:
            continue
        at = start + len(inside) + 2
        found.append(Found(shape, start, at, lone))
    return found


def offers(text: str, found: Sequence[Found]) -> list[Found]:
    """The first shape, and the alternatives that "or" joins to it."""
    joined = list(found[:1])
    for one in found[1:]:
        if not re.fullmatch(r",? or ", text[joined[-1].end : one.start]):
            break
        joined.append(one)
    return joined


def _spelt(dim: Dim) -> str:
    if not isinstance(dim, tuple):
        return str(dim)
    return f"({_spelt(dim[1])} {dim[0]} {_spelt(dim[2])})"


def spelt(shape: Shape) -> str:
    """A shape as text."""
    return f"({', '.join(map(_spelt, shape))}{',' if len(shape) == 1 else ''})"


# Sizes --------------------------------------------------------------------------------------------


class UnknownSizeError(Exception):
    """A letter has no size."""


class ContradictionError(UnknownSizeError):
    """A letter has two sizes."""


#: The sizes of letters; for ``...`` a tuple of sizes.
Scope = Mapping[str, Any]
Stages = Mapping[str, Sequence[int]]

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


def _number(dim: Dim, scope: Scope, stages: Stages, derive: bool = True) -> Fraction:
    if isinstance(dim, int):
        return Fraction(dim)
    if isinstance(dim, str):
        return _size(dim, scope, stages, derive)
    left, right = (_number(side, scope, stages, derive) for side in dim[1:])
    return _OPERATORS[dim[0]](left, right)


def _size(letter: str, scope: Scope, stages: Stages, derive: bool) -> Fraction:
    values: set[Fraction] = set()
    if letter in scope:
        value = scope[letter]
        if isinstance(value, tuple):  # of ..., where one number is needed: the product
            number = Fraction(1)
            for size in value:
                number *= size
            return number
        values.add(Fraction(value))
    index = _INDEX.search(letter)
    sizes = stages.get(letter.partition("_")[0])
    if index and sizes:
        place = int(index[1]) if index[1] else scope.get(index[2])
        if place is not None:
            values.add(Fraction(sizes[place + int(index[3] or 0)]))
    if len(values) > 1:
        raise ContradictionError(f"{letter} is {' and '.join(sorted(map(str, values)))} at once")
    if values:
        return values.pop()
    pattern = f"{letter[: index.start()]}_i" if index else letter
    for formula in DERIVED.get(pattern, ()) if derive else ():
        if index:
            formula = formula.replace("_i", letter[index.start() :])
        try:
            return _number(parse_dim(formula), scope, stages, derive=False)
        except UnknownSizeError:
            continue
    raise UnknownSizeError(f"{letter} has no size")


def fits(shapes: Sequence[Shape], actual: tuple[int, ...], scope: Scope, stages: Stages) -> bool:
    """Whether one of the shapes is the actual one. Shapes of another rank are not evaluated.

    Raises:
        UnknownSizeError: if a letter has no size, or two.
    """
    offered: list[tuple[Fraction, ...]] = []
    for shape in shapes:
        if "..." in shape:
            if "..." not in scope:
                raise UnknownSizeError("... has no size")
            at = shape.index("...")
            shape = (*shape[:at], *scope["..."], *shape[at + 1 :])
        if len(shape) == len(actual):
            offered.append(tuple(_number(dim, scope, stages) for dim in shape))
    return actual in offered


def _solved(dim: Dim, value: Fraction, scope: Scope, stages: Stages, derive: bool) -> Scope:
    """The unknown letter of dim, solved for, given that dim has this value."""
    if not isinstance(dim, tuple):
        return {str(dim): value}
    sign, left, right = dim
    try:
        known = _number(right, scope, stages, derive)
    except UnknownSizeError:
        known, left = _number(left, scope, stages, derive), right
        if sign in ("-", "/"):  # known - letter
            return _solved(left, _OPERATORS[sign](known, value), scope, stages, derive)
    return _solved(left, _OPERATORS[_INVERSE[sign]](value, known), scope, stages, derive)


def bound(
    shape: Shape, actual: tuple[int, ...], scope: Scope, stages: Stages, derive: bool
) -> dict[str, Any]:
    """The letters, old and new, with which shape equals the actual one.

    Raises:
        ValueError: if there are none.
        UnknownSizeError: if a dimension has two unknown letters.
    """
    letters = dict(scope)
    if "..." in shape:
        at = shape.index("...")
        count = len(actual) - len(shape) + 1
        leading = actual[at : at + max(count, 0)]
        if letters.setdefault("...", leading) != leading:
            raise ValueError
        shape = (*shape[:at], *leading, *shape[at + 1 :])
    if len(shape) != len(actual):
        raise ValueError
    for dim, size in zip(shape, actual, strict=True):
        try:
            number = _number(dim, letters, stages, derive)
        except ContradictionError:
            raise
        except UnknownSizeError:
            letters.update(_solved(dim, Fraction(size), letters, stages, derive))
        else:
            if number != size:
                raise ValueError
    return letters


# Reading source -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Comment:
    """A shape comment, and what was observed when its line ran.

    Attributes:
        where: file and line.
        text: the text of the comment.
        shapes: its alternatives.
        each: whether it describes all arrays of the line, not only the first.
        statement: the assignment or return on its line.
        facts: for each time the line ran, the scope and the shapes of the arrays.
    """

    where: str
    text: str
    shapes: tuple[Shape, ...]
    each: bool
    statement: ast.stmt
    facts: set[tuple[frozenset[tuple[str, Any]], tuple[tuple[int, ...], ...]]] = field(
        default_factory=set
    )


@dataclass(eq=False)
class Function:
    """A function, its commented lines, and what its docstring says about the arguments."""

    where: str
    entries: list[tuple[str, str]]
    comments: dict[int, Comment]


def _documented(docstring: str) -> list[tuple[str, str]]:
    """Each argument and its description, from ``Args:``; without that, ("", the whole text)."""
    text = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, flags=re.MULTILINE | re.DOTALL)
    if text is None:
        return [("", " ".join(docstring.split()))]
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", textwrap.dedent(text[1]), flags=re.MULTILINE)
    return [(name, " ".join(said.split())) for name, said in entries]


def _comment(where: str, text: str, statement: ast.stmt | None) -> Comment:
    found = find_shapes(text)
    shapes = offers(text, found)
    if not found or len(shapes) != len(found) or found[0].start != 0 or shapes[0].lone:
        raise ValueError(f"{where}: '# {text}' is no shape, or one with another beside it")
    if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign) and statement.value:
        for target in ast.walk(ast.Module(_targets(statement), [])):
            if isinstance(target, ast.Attribute) or (
                isinstance(target, ast.Subscript)
                and not (isinstance(target.slice, ast.Constant) and target.slice.value is ...)
            ):
                raise ValueError(f"{where}: '# {text}' stands beside a part of an array")
    elif not isinstance(statement, ast.Return) or statement.value is None:
        raise ValueError(f"{where}: '# {text}' stands where nothing is assigned or returned")
    each = text[shapes[-1].end :].startswith(" each")
    return Comment(where, text, tuple(one.shape for one in shapes), each, statement)


def _targets(statement: ast.stmt) -> list[Any]:
    return statement.targets if isinstance(statement, ast.Assign) else [statement.target]  # type: ignore


def read_functions(path: Path) -> dict[tuple[int, str], Function]:
    """The functions of a file, by first line and name, with their shape comments.

    Raises:
        ValueError: if a shape stands beside a line that neither assigns nor returns, or if a
            comment contains a shape but does not begin with it.
    """
    source = path.read_text(encoding="utf-8")
    texts = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
        and token.line[: token.start[1]].strip()
        and (token.string.startswith("# (") or not all(s.lone for s in find_shapes(token.string)))
    }
    functions: dict[tuple[int, str], Function] = {}

    def visit(node: ast.AST, function: Function | None) -> None:
        for child in ast.iter_child_nodes(node):
            inner = function
            if isinstance(child, ast.FunctionDef):
                first = min([child.lineno, *(one.lineno for one in child.decorator_list)])
                entries = _documented(ast.get_docstring(child) or "")
                inner = Function(f"{path.name}:{child.lineno} {child.name}", entries, {})
                functions[first, child.name] = inner
            elif isinstance(child, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Return):
                lines = range(child.lineno, (child.end_lineno or 0) + 1)
                text = texts.pop(lines[-1], None)
                if text is not None:
                    where = f"{path.name}:{lines[-1]}"
                    comment = _comment(where, text, function and child)
                    if function is not None:
                        function.comments |= dict.fromkeys(lines, comment)
            visit(child, inner)

    visit(ast.parse(source), None)
    for line, text in texts.items():  # inside a statement, or beside the head of one
        _comment(f"{path.name}:{line}", text, None)
    return functions


# Running ------------------------------------------------------------------------------------------


def _shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of an array; a tuple of integers itself; None for anything else."""
    if isinstance(value, tuple) and value and all(type(size) is int for size in value):
        return value
    shape = getattr(value, "shape", None)
    return shape if isinstance(shape, tuple) else None


def _shapes_in(value: Any) -> list[tuple[int, ...]]:
    """The shapes of the arrays in a value; if there are none, its tuples of integers."""
    found: tuple[list[Any], list[Any]] = ([], [])

    def visit(value: Any) -> None:
        shape = _shape_of(value)
        if shape is not None:
            found[shape is value].append(shape)
        else:
            for _, branch in branches(value):
                visit(branch)

    visit(value)
    return found[0] or found[1]


def _assigned(target: ast.AST, names: Mapping[str, Any]) -> Any:
    if isinstance(target, ast.Tuple | ast.List):
        return [_assigned(one, names) for one in target.elts]
    if isinstance(target, ast.Starred | ast.Subscript):
        return _assigned(target.value, names)
    return names[target.id]  # type: ignore[attr-defined]


class ShapeComments:
    """The shape comments of modules, executed in a with block: ``with comments: run()``.

    Args:
        modules: the modules whose comments are read. Functions are recognised by file and line, so
            they run unchanged.
        stages: for letters with an index, their sizes by index, from 0.

    Attributes:
        comments: all comments.

    Raises:
        ValueError: as :func:`read_functions`.
    """

    def __init__(self, modules: Sequence[ModuleType], stages: Stages | None = None) -> None:
        self.stages = stages or {}
        self._faults: dict[str, str] = {}
        self._functions = {str(m.__file__): read_functions(Path(str(m.__file__))) for m in modules}
        self._by_code: dict[CodeType, Function | None] = {}
        self.comments = [
            comment
            for functions in self._functions.values()
            for function in functions.values()
            for comment in dict.fromkeys(function.comments.values())
        ]

    def __enter__(self) -> "ShapeComments":
        self._before = sys.gettrace()
        sys.settrace(self._entered)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _entered(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code not in self._by_code:
            functions = self._functions.get(code.co_filename, {})
            self._by_code[code] = functions.get((code.co_firstlineno, code.co_name))
        function = self._by_code[code]
        return None if function is None else _Call(self, function, frame).went_on

    @property
    def faults(self) -> list[str]:
        """What did not hold or could not be evaluated, once for each comment or argument."""
        return [f"{where}: {what}" for where, what in self._faults.items()]

    def fault(self, where: str, what: str) -> None:
        """Notes a fault, unless there was one in the same place."""
        self._faults.setdefault(where, what)

    def unreached(self) -> list[str]:
        """The shapes of comments that never matched an array, each with its comment."""
        return [
            f"{comment.where}: {spelt(shape)}"
            for comment in self.comments
            for shape in comment.shapes
            if not any(
                fits([shape], one, dict(scope), self.stages)
                for scope, seen in comment.facts
                for one in seen
            )
        ]

    def holds(self, comment: Comment, shapes: Sequence[Shape]) -> bool:
        """Whether these shapes, in place of the comment's own, would have held every time."""
        return all(
            fits(shapes, one, dict(scope), self.stages)
            for scope, seen in comment.facts
            for one in seen
        )

    def survivors(self) -> list[str]:
        """Comments that would still hold if the last dimension of a shape were larger by 1."""
        return [
            f"{comment.where}: {spelt(mutant)}"
            for comment in self.comments
            for k, shape in enumerate(comment.shapes)
            for mutant in [_one_more(shape)]
            if self.holds(comment, (*comment.shapes[:k], mutant, *comment.shapes[k + 1 :]))
        ]

    def confusable(self) -> list[str]:
        """Comments that would still hold with one letter replaced by another.

        The letters of the function and of all comments in the file are tried. If a replacement
        survives, the two letters had the same size whenever the line ran, so the run cannot tell
        them apart.
        """
        return [
            f"{comment.where}: {spelt(mutant)}"
            for comment in self.comments
            for k, shape in enumerate(comment.shapes)
            for mutant in self._other_letters(comment, shape)
            if self.holds(comment, (*comment.shapes[:k], mutant, *comment.shapes[k + 1 :]))
        ]

    def _other_letters(self, comment: Comment, shape: Shape) -> Iterator[Shape]:
        file = comment.where.partition(":")[0]
        written = {
            letter
            for other in self.comments
            if other.where.partition(":")[0] == file
            for letter in re.findall(_TOKEN, other.text)
        }
        for at, dim in enumerate(shape):
            if isinstance(dim, str) and dim != "...":
                for letter in sorted(self._known(comment, written) - {dim}):
                    # a line may run in stage 4 only, where C_i is C_4
                    if letter[:2] != dim[:2] or not re.search(r"_\d", letter + dim):
                        yield (*shape[:at], letter, *shape[at + 1 :])

    def _known(self, comment: Comment, others: set[str]) -> set[str]:
        """The letters that had a size, without DERIVED, every time the comment's line ran."""
        known: set[str] = set()
        for number, (scope, _) in enumerate(comment.facts):
            letters = dict(scope)
            here: set[str] = set()
            for letter in {*letters, *others} - {"..."}:
                with contextlib.suppress(UnknownSizeError):
                    _size(letter, letters, self.stages, derive=False)
                    here.add(letter)
            known = known & here if number else here
        return known


def _one_more(shape: Shape) -> Shape:
    if not shape or shape[-1] == "...":
        return (*shape, 1)
    return (*shape[:-1], ("+", shape[-1], 1))


@dataclass
class _Said:
    """What a docstring says about one array: its name and shape, and the shapes it may have.

    Attributes:
        i: the position of the array in a list, from 1; None if it is in no list.
    """

    name: str
    actual: tuple[int, ...]
    shapes: list[Shape]
    i: int | None


def _said_of(name: str, value: Any, found: Sequence[Found], i: int | None = None) -> list[_Said]:
    """At most one; none for None. A single number, (N), describes an integer and nothing else."""
    number = type(value) is int
    actual = (value,) if number else _shape_of(value)
    shapes = [one.shape for one in found if one.lone == number]
    return [_Said(name, actual, shapes, i)] if actual is not None and shapes else []


def _said(name: str, text: str, arguments: Mapping[str, Any]) -> list[_Said]:
    """What the text says about an argument, or about all arguments if the name is empty.

    Raises:
        ValueError: if a shape stands beside no attribute of a record.
    """
    found = find_shapes(text)
    value = arguments.get(name)
    if name == "":
        return _said_by_names(text, found, arguments)
    if value is None or not found or _shape_of(value) is not None or type(value) is int:
        return _said_of(name, value, found)
    if not isinstance(value, tuple | list) or hasattr(value, "_fields"):
        return _said_by_names(text, found, value)
    one_each = found * len(value) if len(found) == 1 else found
    said = []
    for k, (one, shape) in enumerate(zip(value, one_each, strict=True)):
        said += _said_of(f"{name}[{k}]", one, [shape], k + 1)
    return said


def _said_by_names(text: str, found: Sequence[Found], of: Any) -> list[_Said]:
    """The shapes that stand after names: of arguments if ``of`` is a mapping, else of attributes.

    A shape belongs to the word before it, or, if "each" follows, to all names since the last shape.
    """
    by_name: dict[str, list[Found]] = {}
    values: dict[str, Any] = {}
    before = 0
    while found:
        joined = offers(text, found)
        found = found[len(joined) :]
        words = re.findall(r"[A-Za-z_](?:[\w.]*\w)?", text[before : joined[0].start])
        before = joined[-1].end
        named: list[str] = []
        for word in words if text.startswith(" each", before) else words[-1:]:
            first, *rest = word.split(".")
            if isinstance(of, Mapping) and first in of:
                value = of[first]
            elif not isinstance(of, Mapping) and hasattr(of, first):
                value = getattr(of, first)
            else:
                continue
            for step in rest:
                value = getattr(value, step, None)
            values[word] = value
            by_name.setdefault(word, []).extend(joined)
            named.append(word)
        if not named and not isinstance(of, Mapping) and not joined[0].lone:
            raise ValueError(f"{spelt(joined[0].shape)} stands beside no attribute")
    return [one for name, shapes in by_name.items() for one in _said_of(name, values[name], shapes)]


def _numbers(names: Mapping[str, Any]) -> dict[str, int]:
    """The integers among the variables whose names are letters."""
    return {k: v for k, v in names.items() if type(v) is int and _TOKEN.fullmatch(k)}


class _Call:
    """One call of a function: its letters, and the comment whose line is running."""

    def __init__(self, owner: ShapeComments, function: Function, frame: FrameType) -> None:
        self.owner, self.function = owner, function
        self.pending: Comment | None = None
        self.letters: dict[str, Any] = {}
        self._bind(frame.f_locals)

    def _bind(self, arguments: Mapping[str, Any]) -> None:
        """Binds the docstring's letters. What is undecided at first is tried again at the end."""
        said: list[_Said] = []
        for name, text in self.function.entries:
            try:
                said += _said(name, text, arguments)
            except ValueError as error:
                self.owner.fault(f"{self.function.where}: {name}", str(error))
        said.sort(key=lambda one: len(one.shapes))  # known letters choose among several shapes
        undecided = [one for one in said if not self._bind_one(one, arguments, last=False)]
        for one in undecided:
            self._bind_one(one, arguments, last=True)

    def _bind_one(self, said: _Said, arguments: Mapping[str, Any], last: bool) -> bool:
        scope = {**_numbers(arguments), **self.letters}
        if said.i is not None:
            scope["i"] = said.i
        ways: list[dict[str, Any]] = []
        why = f"it is {said.actual}"
        several = len(said.shapes) > 1
        for shape in said.shapes:
            try:
                ways.append(bound(shape, said.actual, scope, self.owner.stages, derive=several))
            except UnknownSizeError as unknown:
                why = str(unknown)
                if not last:
                    return False
            except ValueError:
                continue
        if len(ways) == 1:
            self.letters.update(ways[0].items() - scope.items())
            return True
        if last or not ways:
            why = "more than one of them fits" if ways else why
            shapes = " or ".join(map(spelt, said.shapes))
            self.owner.fault(f"{self.function.where}: {said.name} {shapes}", why)
        return not ways

    def went_on(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Checks the line that has just run. Called before the next line, and at the return."""
        if event == "exception":
            self.pending = None
        elif event in ("line", "return"):
            here = self.function.comments.get(frame.f_lineno) if event == "line" else None
            if self.pending is not None and self.pending is not here:
                self._check(self.pending, frame.f_locals, arg)
            self.pending = here
        return self.went_on

    def _check(self, comment: Comment, names: Mapping[str, Any], returned: Any) -> None:
        where, statement = f"{comment.where}: # {comment.text}", comment.statement
        if isinstance(statement, ast.Return):
            value = returned
        else:
            value = [_assigned(target, names) for target in _targets(statement)]
        seen = tuple(_shapes_in(value))
        if not comment.each:
            seen = seen[:1]
        if not seen:
            self.owner.fault(where, "there is no array")
            return
        numbers = _numbers(names)
        for letter in numbers.keys() & self.letters.keys():
            if numbers[letter] != self.letters[letter]:
                two = f"{self.letters[letter]} in the docstring, {numbers[letter]} as assigned"
                self.owner.fault(where, f"{letter} is {two}")
        scope = {**self.letters, **numbers}
        try:
            wrong = [one for one in seen if not fits(comment.shapes, one, scope, self.owner.stages)]
        except UnknownSizeError as unknown:
            self.owner.fault(where, str(unknown))
            return
        comment.facts.add((frozenset(scope.items()), seen))
        for shape in wrong:
            self.owner.fault(where, f"it is {shape}")


@contextlib.contextmanager
def shape_comments(*modules: ModuleType, stages: Stages | None = None) -> Generator[ShapeComments]:
    """Executes the shape comments of modules in a with block.

    With ``with shape_comments(my_layer): run()``, a line that ends in ``# (B, n, C)`` is checked
    every time it has run. The letters are those of the docstring's ``Args:``. The docstring of this
    module describes the notation.

    Args:
        modules: the modules whose comments are read.
        stages: for letters with an index, such as C_i, their sizes by index, from 0.

    Yields:
        The comments and what was observed, to ask for example which comments were never reached.

    Raises:
        LawError: at the end, if a comment did not hold or could not be evaluated, or if no line
            with a comment has run.
        ValueError: if a comment is not a shape, or stands where nothing is assigned or returned.
    """
    comments = ShapeComments(modules, stages)
    with comments:
        yield comments
    if comments.faults:
        raise LawError("shape comments", "; ".join(comments.faults))
    if not any(comment.facts for comment in comments.comments):
        names = ", ".join(module.__name__ for module in modules)
        what = f"no line with a shape comment of {names} has run, so nothing was checked"
        raise LawError("shape comments", what)
