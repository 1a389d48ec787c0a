"""Every block of the how-tos runs, in an empty folder, and prints what the page says.

A page's blocks share one namespace and one folder, in which ``examples`` is that of the checkout. A
block of text right below a block of Python is what that prints, to the letter; below commands, its
lines are among what they print, in this order.

A block that needs a package which is not installed is left out, and so are those that use its
names; a test of its own is then skipped and says which.
"""

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import threadpoolctl

from pvt_ref.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "how_to").glob("*.md"))
BLOCK = re.compile(r"^```(python|sh|text)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

#: What the extra ``test`` need not bring, by the name that a block imports.
OPTIONAL = ("jax", "onnx", "onnxruntime", "torch", "mpi4py")


class Block(NamedTuple):
    """A block of code, where it begins, and the text right below it."""

    kind: str
    code: str
    line: int
    printed: str | None

    def needs(self) -> set[str]:
        """Optional packages without which it cannot run."""
        if self.kind == "sh":
            return {"mpi4py"} if "mpiexec" in self.code else set()
        found = {"onnx"} if "export_onnx" in self.code else set()
        for node in ast.walk(ast.parse(self.code)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
        return found & set(OPTIONAL)


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found, end = [], -1
    for match in BLOCK.finditer(text):
        kind, code = match[1], match[3]
        below = end >= 0 and not text[end : match.start()].strip()
        if kind == "text":
            if below and found[-1].printed is None:
                found[-1] = found[-1]._replace(printed=code)
            end = -1
            continue
        found.append(Block(kind, code, text.count("\n", 0, match.start(3)) + 1, None))
        end = match.end()
    return found


def depends(page: Path) -> list[tuple[Block, set[str]]]:
    """Blocks with what they need: their own packages and those that brought names they use."""
    brought: dict[str, set[str]] = {}
    lacking: set[str] = set()  # of commands and of what uses their files: all that comes after
    result = []
    for block in blocks(page):
        needs = block.needs() | lacking
        if block.kind == "sh":
            lacking |= needs
        else:
            nodes = list(ast.walk(ast.parse(block.code)))
            for node in nodes:
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    needs |= brought.get(node.id, set())
            for node in nodes:
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    brought[node.id] = set(needs)
                elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                    brought[node.name] = set(needs)
                elif isinstance(node, ast.Import | ast.ImportFrom):
                    for alias in node.names:
                        brought[(alias.asname or alias.name).partition(".")[0]] = set(needs)
        result.append((block, needs))
    return result


def run_command(line: str) -> str:
    """What a command prints. Ours run in this process, which saves the time of importing."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        for extra in re.findall(r"\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= set(extras["optional-dependencies"]), line
        return ""
    if words[0] == "export":
        return ""  # of how many threads: the test sets it
    if words[0] == "mpiexec":
        words[0] = str(Path(sys.executable).with_name("mpiexec"))
        words[words.index("python")] = sys.executable
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout
    assert words[0] == "pvt_ref" or words[:3] == ["python", "-m", "pvt_ref"], line
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(words[1:] if words[0] == "pvt_ref" else words[3:])
    assert status == 0, f"{line}: exit status {status}"
    return printed.getvalue()


def run(page: Path, here: set[str]) -> None:
    """Runs the blocks that need no optional package but those that are here."""
    names: dict = {"__name__": page.stem}
    for block, needs in depends(page):
        where = f"{page.name}, line {block.line}"
        if not needs <= here:
            continue
        if block.kind == "sh":
            told = "".join(map(run_command, block.code.splitlines()))
            lines = iter(told.splitlines())
            for line in (block.printed or "").splitlines():
                assert line == "..." or line in lines, f"{where}: {line!r} is not in\n{told}"
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        if block.printed is not None:
            assert printed.getvalue() == block.printed, where


def is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


HERE = {package for package in OPTIONAL if is_here(package)}
#: Pages and what they need and lack: their blocks that need it are reported as not run.
LACKING = [
    (page, package)
    for page in PAGES
    for package in sorted(set().union(*(needs for _, needs in depends(page))) - HERE)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the checkout's examples, and what pages import to draw."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    yield tmp_path
    for name in [path.stem for path in (ROOT / "docs" / "tools").glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_how_to_runs(page, folder):
    with threadpoolctl.threadpool_limits(1):  # as the page on machines says, of each process
        run(page, HERE)


@pytest.mark.parametrize(
    ("page", "package"), LACKING, ids=[f"{page.stem}-{package}" for page, package in LACKING]
)
def test_blocks_that_were_left_out(page, package):
    lines = [block.line for block, needs in depends(page) if package in needs]
    pytest.skip(f"{package} is not installed: {page.name}, lines {lines}, did not run")


def test_a_how_to_has_goal_needs_and_cures():
    assert len(PAGES) == 10
    listed = (ROOT / "docs" / "how_to" / "index.md").read_text("utf-8")
    for page in PAGES:
        text = page.read_text("utf-8")
        if page.stem == "index":
            continue
        assert f"]({page.name})" in listed, page.name
        assert re.search(r"^\*\*Goal:\*\* .*\*\*Needs:\*\* ", text, re.M | re.S), page.name
        assert "\n## What goes wrong\n\n| what you see | why | what to do |\n" in text, page.name
        assert any(block.printed for block in blocks(page)) or 'result="text"' in text, page.name


def test_the_harness_sees_a_wrong_promise_and_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n", "utf-8")
    with pytest.raises(AssertionError, match=r"page\.md, line 2"):
        run(page, set())
    page.write_text(
        "```python\nimport jax\nx = 1\n```\n\n```python\ny = x\n```\n\n```python\nz = 2\n```\n",
        "utf-8",
    )
    assert [needs for _, needs in depends(page)] == [{"jax"}, {"jax"}, set()]
    page.write_text("```sh\npvt_ref summary pvt_tiny\n```\n\n```text\nnothing\n```\n", "utf-8")
    with pytest.raises(AssertionError, match="'nothing' is not in"):
        run(page, set())
