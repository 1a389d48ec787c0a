"""The course's code runs, solutions included, and its equations and tables hold.

The site runs the shown blocks when it is built; here every fenced block of a page runs, in order.
"""

import contextlib
import functools
import importlib
import io
import re
import sys
import textwrap
import traceback
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

import pvt_ref
from pvt_ref.arrays import erf
from pvt_ref.layers.linear import LinearCache, linear_forward
from pvt_ref.train.lock import RunLock

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^( *)```python([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)

#: The order of a page about an operation; other pages keep to what of it makes sense for them.
SECTIONS = (
    "The equation", "Shapes", "The source", "A run", "The backward", "Checked", "Cost", "Drawn",
    "Exercises",
)  # fmt: skip
OPERATIONS = (
    "linear", "layer_norm", "gelu", "softmax", "patch_embed", "position", "attention", "sra",
    "block", "vit", "convolution", "pvt_v2", "semantic_fpn",
)  # fmt: skip
COURSE = sorted(set((DOCS / "course").glob("*.md")) - {DOCS / "course" / "index.md"})
PHOTO = DOCS.parent / "examples" / "chelsea.jpg"
OTHERS = [
    DOCS / f"{name}.md"
    for name in (
        *("index", "use", "cheat_sheet", "glossary", "api/index"),
        *("course/index", "teachers", "field"),
    )
]


#: What only the extra ``docs`` brings. Pages run without it, also where it happens to be there.
ONLY_TO_BUILD = ("griffe", "markdown_exec", "material", "mkdocs", "mkdocstrings", "quickjs")


@pytest.fixture
def tools(monkeypatch):
    """The folder of the pages' own tools, from which pages import, as when the site is built."""
    monkeypatch.syspath_prepend(str(DOCS / "tools"))
    for name in ONLY_TO_BUILD:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    yield DOCS / "tools"
    for name in [path.stem for path in (DOCS / "tools").glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture
def lesson(tools):
    return importlib.import_module("lesson")


def execute(code: str, names: dict, page: Path, line: int) -> None:
    """Runs code that stands on a page from a line on.

    Raises:
        AssertionError: if the code raises anything: where on the page, the line itself, and what.
    """
    try:
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
    except Exception as error:
        here = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(page)]
        where = here[-1].lineno if here else getattr(error, "lineno", line)
        shown = page.read_text("utf-8").splitlines()[where - 1].strip()
        what = "".join(traceback.format_exception_only(error)).strip()
        raise AssertionError(f"{page}:{where}: {shown}\n{what}") from error


def run(page: Path) -> tuple[str, list[str]]:
    """What the blocks of a page print, run in order; and its solutions, run by themselves."""
    names: dict = {"__name__": page.stem}
    solutions, style = [], mpl.rcParams.copy()
    text = page.read_text("utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in BLOCK.finditer(text):
            indent, code = block[1], textwrap.dedent(block[3])
            if indent:
                solutions.append(code)
            line = text.count("\n", 0, block.start(3)) + 1
            execute(code, {} if indent else names, page, line)
    assert mpl.rcParams.copy() == style, f"{page} changes matplotlib's settings"
    return printed.getvalue(), solutions


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """What pages show but no test has: weights that are fetched, a reader's photo, a GPU.

    Files that pages write go elsewhere, too.
    """
    load, to_device, predict = pvt_ref.load, pvt_ref.to_device, pvt_ref.Model.predict

    @functools.wraps(load)
    def load_offline(name, *args, **kwargs):
        if str(name).startswith(("pvt_", "deit_", "retinanet_")):
            config = pvt_ref.PVTConfig(embed_dims=(8, 16, 20, 16), img_size=32)
            return pvt_ref.Model(pvt_ref.init_params(config, np.random.default_rng(0)), config)
        return load(name, *args, **kwargs)

    def predict_offline(self, images, top=5):
        return predict(self, PHOTO if isinstance(images, str) else images, top)

    @functools.wraps(to_device)
    def stay(tree, device="cuda"):
        return tree if device == "cuda" else to_device(tree, device)

    export = pvt_ref.export_onnx

    @functools.wraps(export)
    def export_there(model, path, **told):
        return export(model, tmp_path / path, **told)

    @functools.wraps(pvt_ref.capture)
    def as_it_is(function, *examples):
        return function

    monkeypatch.setattr(pvt_ref, "load", load_offline)
    monkeypatch.setattr(pvt_ref.Model, "predict", predict_offline)
    monkeypatch.setattr(pvt_ref, "to_device", stay)
    monkeypatch.setattr(pvt_ref, "capture", as_it_is)
    monkeypatch.setattr(pvt_ref, "export_onnx", export_there)
    monkeypatch.setattr("pvt_ref.kernels.cuda.table.cuda_kernels", pvt_ref.blocked_ops)
    monkeypatch.chdir(DOCS.parent)


def test_no_block_of_python_goes_by_another_name():
    for page in DOCS.rglob("*.md"):
        if "node_modules" not in page.parts:
            shown = set(re.findall(r"^ *```(\w+)", page.read_text("utf-8"), re.MULTILINE))
            assert shown <= {"python", "sh", "text"}, page


@pytest.mark.parametrize("page", COURSE, ids=lambda page: page.stem)
def test_every_block_of_a_lesson_runs(page, tools, elsewhere):
    text, solutions = run(page)
    assert len(solutions) >= 2
    assert all("assert " in code for code in solutions)
    assert 'class="drawn"' in text
    assert not re.search(r"^(True |False )*False\b", text, re.MULTILINE)
    compared = re.findall(r"^(.+?) +relative error +(\d\S*), bound (\d\S*)$", text, re.MULTILINE)
    for name, error, bound in compared:
        assert float(error) <= float(bound) <= (1e-6 if "difference" in name else 1e-11), name
    numbers = re.findall(r"\\tag\{(\d+)\}", page.read_text("utf-8"))
    assert numbers == [str(k) for k in range(1, len(numbers) + 1)]
    if page.stem in OPERATIONS:
        assert "| symbol | shape |" in text
        assert compared
        assert "finite differences" in text
        assert text.count("PyTorch") >= 2


@pytest.mark.parametrize("page", COURSE, ids=lambda page: page.stem)
def test_a_lesson_keeps_to_the_order(page):
    headings = re.findall(r"^## (.+)$", page.read_text("utf-8"), re.MULTILINE)
    known = [heading for heading in headings if heading in SECTIONS]
    assert known == sorted(known, key=SECTIONS.index)
    assert headings[-1] == "Exercises"
    assert "Drawn" in headings
    if page.stem in OPERATIONS:
        assert known == list(SECTIONS)


def test_the_course_is_whole():
    pages = {page.stem for page in COURSE}
    more = ("pyramid", "notation", "stages", "whole_backward", "checkpoints", "training")
    more += ("gpu", "gpu_ladder", "gpu_capture", "segmentation_training", "one_scale")
    assert pages == {*OPERATIONS, *more}


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_every_block_of_the_other_pages_runs(page, tools, elsewhere):
    text, _ = run(page)
    assert len(text) > 100


def test_a_lesson_shows_only_what_holds(lesson):
    x = np.ones((2, 3))
    table = re.sub(r"<[^>]+>", "", lesson.shapes({"B": 2, "C": 3}, x=(x, "B C", "tokens")))
    assert "| `x` | (B, C) | (2, 3) | tokens |" in table
    with pytest.raises(AssertionError, match=r"x is \(2, 3\), the page says C B"):
        lesson.shapes({"B": 2, "C": 3}, x=(x, "C B", "tokens"))
    with pytest.raises(AssertionError, match="B and n are both 2: change one"):
        lesson.shapes({"B": 2, "n": 2, "C": 3}, x=(x, "B C", "tokens"), y=(x, "n C", "tokens"))
    assert lesson.compare("x", x, x + 1e-5, 1e-3).split("x ")[1].strip() == (
        "relative error 1e-05, bound 1e-03"
    )
    assert lesson.compare("x", x, x.copy(), 1e-3).endswith("relative error     0, bound 1e-03")
    with pytest.raises(AssertionError, match=r"1\.0e-02 apart"):
        lesson.compare("x", 1.01 * x, x, 1e-3)
    with pytest.raises(AssertionError, match="compared with zero"):
        lesson.compare("x", x, 0 * x, 1e-3)
    gradient = lesson.finite_difference(lambda v: float(np.sum(v**3)), 2 * x)
    np.testing.assert_allclose(gradient, 12, rtol=1e-8)
    told = lesson.source(erf, LinearCache, linear_forward, RunLock)
    named = [line for line in told.splitlines() if line.endswith("{ .listing }")]
    assert named == [
        "[`pvt_ref/arrays.py`][pvt_ref.arrays]{ .listing }",
        "[`pvt_ref/layers/linear.py`][pvt_ref.layers.linear]{ .listing }",
        "`pvt_ref/train/lock.py`{ .listing }",  # in no page of the reference
    ]
    shown = lesson.source(lesson.finite_difference)
    assert "central differences" not in shown
    assert "gradient = np.empty_like(x)" in shown


def test_a_failing_page_is_told_by_its_line(tmp_path):
    page = tmp_path / "lesson.md"
    page.write_text("# Ours\n\n```python\nx = 3\n```\n\n- as here:\n\n    ```python\n    x = 2\n\n"
                    "    assert x > 4, f\"{x} is small\"\n    ```\n", "utf-8")  # fmt: skip
    with pytest.raises(AssertionError) as found:
        run(page)
    told = str(found.value).splitlines()
    assert told == [f'{page}:12: assert x > 4, f"{{x}} is small"', "AssertionError: 2 is small"]
    page.write_text("```python\ndef f():\n    return 1 / 0\n\nf()\n```\n", "utf-8")
    with pytest.raises(AssertionError, match=r"lesson.md:3: return 1 / 0\nZeroDivisionError"):
        run(page)
    page.write_text("text\n\n```python\n1 +\n```\n", "utf-8")
    with pytest.raises(AssertionError, match=r"lesson.md:4: 1 \+\n"):
        run(page)


def test_a_figure_leaves_matplotlib_s_settings_alone_even_half_drawn(tools):
    draw = importlib.import_module("draw")
    style = mpl.rcParams.copy()
    with draw.panels(1, 2) as (figure, (left, right)):
        assert mpl.rcParams["text.color"] == draw.INK
        left.plot([1, 2])
        right.set_title("as the page")
    assert "fill: var(--figure-ink)" in draw.show(figure, "name", "what is seen")
    with pytest.raises(ZeroDivisionError), draw.panels():
        raise ZeroDivisionError
    assert mpl.rcParams.copy() == style
