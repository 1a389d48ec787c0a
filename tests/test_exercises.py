"""The exercises: right answers pass, wrong ones are told what is wrong, and nothing costs more."""

import ast
import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pvt_ref.__main__ import main
from pvt_ref.errors import PVTError
from pvt_ref.exercises import running
from pvt_ref.exercises.catalogue import EXERCISES, IDIOM, Line
from pvt_ref.exercises.command import _hint, _table
from pvt_ref.exercises.marking import (
    BACKWARD,
    FAILED,
    FORWARD,
    NOT_STARTED,
    PASSED,
    WAITS,
    Mark,
    mark_file,
    readers_pair,
)
from pvt_ref.exercises.reading import (
    Progress,
    Remembered,
    file_of,
    name_of,
    read_progress,
    template,
    write_new,
)
from pvt_ref.exercises.whole import STORED, steps


class Mistake(NamedTuple):
    exercise: str
    what: str
    old: str
    new: str
    way: str
    law: str
    where: str
    line: str


CATALOGUE = Path(__file__).with_name("exercise_mistakes.toml").read_text("utf-8")
MISTAKES = [Mistake(**mistake) for mistake in tomllib.loads(CATALOGUE)["mistake"]]
COURSE = Path(__file__).parents[1] / "docs" / "course"
SOLUTIONS = Path(__file__).parent / "exercise_solutions"


def solution(name: str) -> Path:
    return SOLUTIONS / f"{name}.py"


# Marking ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXERCISES)
def test_a_right_answer_passes(name):
    marks = list(mark_file(EXERCISES[name], solution(name)))
    assert [(m.way, m.state, m.found) for m in marks] == [
        (FORWARD, PASSED, ""),
        (BACKWARD, PASSED, ""),
    ]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.exercise}: {m.what}")
def test_a_wrong_answer_is_told_what_is_wrong(mistake, tmp_path):
    source = solution(mistake.exercise).read_text("utf-8")
    assert mistake.old in source
    wrong = source.replace(mistake.old, mistake.new)
    if "kept = x" in mistake.new:
        wrong = wrong.replace("x = cache", "x = kept")
    path = tmp_path / "answer.py"
    path.write_text(wrong, "utf-8")
    marks = list(mark_file(EXERCISES[mistake.exercise], path))
    failed = next(mark for mark in marks if mark.state == FAILED)
    assert (failed.way, failed.law, failed.where, failed.line.removeprefix("docs/course/")) == (
        *(mistake.way, mistake.law, mistake.where, mistake.line),
    )
    assert failed.says
    assert failed.found
    assert failed.case
    if failed.way == FORWARD:
        assert marks[1].state == WAITS
    if failed.law in ("values", "finite differences", "batch"):
        assert failed.index is not None


def test_mistakes_are_many_and_of_every_exercise():
    assert len({(m.exercise, m.old, m.new) for m in MISTAKES}) == len(MISTAKES) >= 60
    assert {m.exercise for m in MISTAKES} == set(EXERCISES)


def test_the_first_wrong_index_is_on_the_smallest_case(tmp_path):
    path = tmp_path / "linear.py"
    text = solution("linear").read_text("utf-8")
    path.write_text(
        text.replace("y = y + p.bias", "y = y + p.bias\n        y[..., 1] += 1"), "utf-8"
    )
    mark = next(mark_file(EXERCISES["linear"], path))
    assert mark.law == "bias at zero"
    assert mark.index == (0, 0, 1)
    assert mark.case == "x (1, 1, 2), weight (3, 2), bias (3,)"
    assert re.match(r"y\[0, 0, 1\] is \S+; it must be \S+", mark.found)


def marked(tmp_path, name, source):
    path = tmp_path / "answer.py"
    path.write_text(source, "utf-8")
    return list(mark_file(EXERCISES[name], path))


def test_an_alias_that_harms_nothing_is_not_blamed(tmp_path):
    source = solution("linear").read_text("utf-8")
    for old, new in (
        ("return y, x", "return y, (x, y)"),
        ("x = cache", "x, _ = cache"),
        ("LinearParams(dweight", "LinearParams(2 * dweight"),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    forward, backward = marked(tmp_path, "linear", source)
    assert forward.state == PASSED
    assert backward.law == "finite differences"


def test_what_is_not_written_yet_is_no_mistake(tmp_path):
    states = [m.state for m in marked(tmp_path, "gelu", template("gelu"))]
    assert states == [NOT_STARTED, NOT_STARTED]
    half = solution("gelu").read_text("utf-8").split("def gelu_backward")[0]
    for body in ('"""Later."""\n    ...', "pass", "x = cache\n    raise NotImplementedError"):
        source = f"{half}def gelu_backward(p, cache, dy, ops):\n    {body}\n"
        assert [m.state for m in marked(tmp_path, "gelu", source)] == [PASSED, NOT_STARTED]
    source = f"def gelu_forward(p, x, ops):\n    y = x\n    raise NotImplementedError\n\n{half}"
    source = source.replace(half, "def gelu_backward(p, cache, dy, ops):\n    ...\n")
    assert [m.state for m in marked(tmp_path, "gelu", source)] == [NOT_STARTED, NOT_STARTED]


def test_an_exception_is_shown_by_the_readers_own_lines(tmp_path):
    source = solution("gelu").read_text("utf-8").replace("return x * cdf, x", "return x @ cdf, x")
    forward, backward = marked(tmp_path, "gelu", source)
    assert (forward.state, backward.state, forward.law) == (FAILED, WAITS, "runs")
    assert forward.trace == "answer.py, line 9, in gelu_forward: return x @ cdf, x"
    assert forward.found.startswith("ValueError: matmul")
    forward, _ = marked(tmp_path, "gelu", "def gelu_forward(:\n")
    assert forward.found.startswith("SyntaxError")
    assert "answer.py, line 1" in forward.trace
    forward, _ = marked(tmp_path, "gelu", "import sys\nsys.exit(3)\n")
    assert forward.found == "SystemExit: 3"
    (tmp_path / "answer.py").write_bytes(b"# \xff\n")
    assert next(mark_file(EXERCISES["gelu"], tmp_path / "answer.py")).found.startswith("Unicode")
    forward, _ = marked(tmp_path, "gelu", "x = 1\n")
    assert forward.found == "NameError: answer.py defines no gelu_forward and no gelu_backward"


# Lines of the derivations -------------------------------------------------------------------------


def lines():
    yield from IDIOM.values()
    for exercise in EXERCISES.values():
        yield from exercise.lines.values()
        yield from (law.line for law in (*exercise.forward, *exercise.backward))


def section(line: Line) -> str:
    text = (COURSE / f"{line.page}.md").read_text("utf-8")
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for part in re.split(r"^#{2,3} ", text, flags=re.MULTILINE)[1:]:
        heading = part.partition("\n")[0]
        if re.sub(r"[^\w -]", "", heading).lower().strip().replace(" ", "-") == line.section:
            return part
    raise AssertionError(f"there is no section {line.address}")


def plain(text: str) -> str:
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)  # links
    return " ".join(re.sub(r"[*`]", "", text).split())


@pytest.mark.parametrize("line", sorted(set(lines()), key=str), ids=str)
def test_a_line_stands_on_its_page(line):
    text = section(line)
    if line.equation is not None:
        assert rf"\tag{{{line.equation}}}" in text
    assert plain(line.words) in plain(text)


def test_hints_and_laws_say_something():
    for exercise in EXERCISES.values():
        for way in (FORWARD, BACKWARD):
            assert exercise.hints[way]
        for law in (*exercise.forward, *exercise.backward):
            assert law.says.endswith(".")
            assert "\n" not in law.says
        solved = solution(exercise.name).read_text("utf-8")
        code = {line.strip() for line in solved.splitlines() if "=" in line}
        for hint in (*exercise.hints[FORWARD], *exercise.hints[BACKWARD]):
            assert not any(line in hint for line in code), hint  # never the solution


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXERCISES)
def test_a_template_has_signatures_and_docstrings_and_nothing_else(name):
    text, exercise = template(name), EXERCISES[name]
    compile(text, name, "exec")
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions] == list(exercise.functions)
    assert f"docs/course/{exercise.page}.md" in text
    assert len(text.splitlines()) < 50
    assert max(map(len, text.splitlines())) <= 100
    for function in functions:
        assert ast.get_docstring(function)
        assert ast.unparse(ast.Module(function.body[1:], [])) == "raise NotImplementedError"
    if not exercise.alone:
        forward, backward = ([a.arg for a in f.args.args] for f in functions)
        assert forward == ["p", "x", "ops", *exercise.settings]
        assert backward == ["p", "cache", "dy", "ops"]
        ours = list(inspect.signature(exercise.operation.forward).parameters)
        assert [a for a in ours if a in forward] == forward
    solved = {n.name: n for n in ast.parse(solution(name).read_text("utf-8")).body
              if isinstance(n, ast.FunctionDef)}  # fmt: skip
    for function in functions:
        assert ast.unparse(solved[function.name].args) == ast.unparse(function.args)


def test_new_overwrites_nothing(tmp_path, capsys):
    folder = tmp_path / "mine"
    assert main(["exercises", "new", str(folder)]) == 0
    assert [p.name for p in sorted(folder.iterdir())] == [
        file_of(folder, n).name for n in EXERCISES
    ]
    file_of(folder, "linear").write_text("mine", "utf-8")
    file_of(folder, "gelu").unlink()
    capsys.readouterr()
    assert main(["exercises", "new", str(folder)]) == 0
    said = capsys.readouterr().out
    assert file_of(folder, "linear").read_text("utf-8") == "mine"
    assert re.search(r"^written to .*: 03_gelu\.py$", said, re.MULTILINE)
    assert "left as they are: 01_linear.py, 02" in said


def test_names_are_those_of_exercises_or_files():
    assert name_of("linear") == name_of("01_linear.py") == name_of("x/01_linear") == "linear"
    with pytest.raises(PVTError, match=r"there is no exercise 'linaer'; they are linear, layer"):
        name_of("linaer")


# The command line, with processes -----------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_new(tmp_path)
    return tmp_path


def answer(folder, name, old="", new=""):
    text = solution(name).read_text("utf-8")
    assert old in text
    file_of(folder, name).write_text(text.replace(old, new) if old else text, "utf-8")


def test_check_marks_one_and_keeps_what_it_knows(folder, capsys):
    answer(folder, "linear", "rows_dy.T @ rows_x", "rows_x.T @ rows_dy")
    check = ["exercises", "check", str(folder), "linear"]
    assert main([*check, "--hint"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"^linear, backward\n  law +gradient shape: The gradient of an array", said)
    assert "docs/course/linear.md#the-backward, equation 3" in said
    assert re.search(r"01_linear.py +passed +failed", said)
    assert "0 of 16 exercises done" in said
    assert re.search(r"Hints for the backward of linear \(2 more\):\n  1\. Write the shapes", said)
    assert "  2. " not in said
    progress, damaged = read_progress(folder)
    assert not damaged
    assert progress.exercises["linear"].hints == {"backward": 1}

    answer(folder, "linear")
    assert main(check) == 0
    said = capsys.readouterr().out
    assert re.search(r"01_linear.py +passed +passed", said)
    assert "1 of 16 exercises done" in said
    file_of(folder, "linear").write_text("# another\n", "utf-8")
    table = _table(folder, read_progress(folder)[0])
    assert re.search(r"01_linear.py +passed, changed since +passed, changed since", table)
    assert "0 of 16 exercises done" in table


def test_hints_come_one_by_one_and_end():
    progress = Progress({name: Remembered() for name in EXERCISES})
    failed = [Mark("gelu", FORWARD, PASSED), Mark("gelu", BACKWARD, FAILED)]
    hints = EXERCISES["gelu"].hints[BACKWARD]
    for count in (1, 2, 2):
        said = _hint(failed, progress)
        assert [hint in said for hint in hints] == [True, count == 2]
        assert ("1 more" if count == 1 else "no more") in said
    assert _hint(failed[:1], progress) == "There is nothing to give a hint for"


def facts(folder, names, seconds=running.SECONDS):
    found = running.marks(folder, names, seconds)
    return [(m.exercise, m.way, m.state, m.found, printed) for m, printed in found]


def test_a_crash_costs_only_its_own_exercise(folder):
    answer(folder, "gelu", "    x = cache\n", "    x = cache\n    import os; os._exit(7)\n")
    crash = "import os\n\n\ndef softmax_forward(p, x, ops):\n    os._exit(8)\n\n\n"
    file_of(folder, "softmax").write_text(f"{crash}def softmax_backward(p, c, dy, ops): ...\n")
    answer(folder, "mlp", "    y, fc2_cache", "    print('here', x.shape)\n    y, fc2_cache")
    found = facts(folder, ["gelu", "softmax", "mlp"])
    died = "the process that ran it ended with status"
    assert [fact[:4] for fact in found] == [
        ("gelu", FORWARD, PASSED, ""),
        ("gelu", BACKWARD, FAILED, f"{died} 7"),
        ("softmax", FORWARD, FAILED, f"{died} 8"),
        ("softmax", BACKWARD, WAITS, ""),
        ("mlp", FORWARD, PASSED, ""),
        ("mlp", BACKWARD, PASSED, ""),
    ]
    assert found[-1][4].startswith("here (1, 1, 2)\n")
    assert len(found[-1][4]) <= 1000


def test_an_endless_loop_is_ended(folder):
    file_of(folder, "gelu").write_text("while True:\n    pass\n")
    loop = "it did not end within 1 seconds. Is there an endless loop?"
    assert [fact[:4] for fact in facts(folder, ["gelu"], 1.0)] == [
        ("gelu", FORWARD, FAILED, loop),
        ("gelu", BACKWARD, WAITS, ""),
    ]


@pytest.mark.parametrize(
    "damage", ["", "[1]", "{}", '{"format": "pvt_ref exercises 1"}', "[" * 100_000, "\xff",
               '{"format": "pvt_ref exercises 1", "exercises": {"linear": 3}, "whole": ""}',
               '{"format": "pvt_ref exercises 1", "exercises": 3, "whole": ""}'],
)  # fmt: skip
def test_damaged_progress_counts_as_none(tmp_path, damage):
    (tmp_path / "progress.json").write_bytes(damage.encode("latin-1"))
    progress, damaged = read_progress(tmp_path)
    assert damaged
    assert list(progress.exercises) == list(EXERCISES)
    assert not any(known.forward for known in progress.exercises.values())


def test_a_folder_or_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["exercises", "check", str(tmp_path / "none")]) == 2
    assert "exercises new DIR" in capsys.readouterr().err
    assert main(["exercises", "check", str(tmp_path), "linear"]) == 2
    assert "there is no 01_linear.py" in capsys.readouterr().err
    assert main(["exercises", "check", str(tmp_path), "--seconds", "0"]) == 2
    assert "it must be a number above 0" in capsys.readouterr().err


# Whole networks -----------------------------------------------------------------------------------


def pairs():
    return {name: readers_pair(e, solution(name)) for name, e in EXERCISES.items()}


def test_right_answers_are_a_pvt_with_pytorchs_numbers():
    done = list(steps(pairs()))
    assert [step.what for step in done] == [
        "logits of a PVT",
        "its loss",
        "gradients of all its weights, and of the images",
        "the maps of its pyramid",
        "the gradient of the images, from the maps",
        "logits of a PVT v2",
        "the shipped weights classify cat.jpg",
    ]
    assert [step.wrong for step in done] == [""] * 7
    assert done[-1].found.startswith("cat, ")


def test_a_wrong_part_shows_in_the_whole(tmp_path):
    answers = pairs()
    forward, backward = answers["gelu"]
    wrong = {**answers, "gelu": (lambda *args: (1.001 * forward(*args)[0], args[1]), backward)}
    assert next(steps(wrong)).wrong
    doubled = {**answers, "gelu": (forward, lambda *args: (2 * backward(*args)[0], None))}
    found = [step.wrong for step in steps(doubled)]
    assert [bool(wrong) for wrong in found] == [False, False, True, False, True, False, False]


def test_stored_numbers_are_small_and_not_zero():
    assert STORED.stat().st_size < 20_000
    stored = json.loads(STORED.read_text("utf-8"))
    norms = [size for size, _ in stored["pvt"]["gradients"].values()]
    assert np.count_nonzero(np.array(norms) > 1e-6) > 90
