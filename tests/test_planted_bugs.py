"""Every mistake of the catalogues can still be planted; tests/planted_bugs/run.py plants them."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CATALOGUES = (
    *sorted((HERE / "planted_bugs").glob("*.toml")),
    HERE / "cuda_on_cpu" / "planted.toml",
)


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("run_planted", HERE / "planted_bugs" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program  # where its dataclasses look for their annotations
    spec.loader.exec_module(program)
    yield program
    del sys.modules[spec.name]


@pytest.mark.parametrize("catalogue", CATALOGUES, ids=lambda path: path.stem)
def test_every_mistake_still_stands_for_a_line_of_the_code(program, catalogue):
    bugs = program.read_catalogue(catalogue)
    assert len(bugs) >= 60
    stale = []
    for bug in bugs:
        try:
            program.edited((HERE.parent / bug.file).read_text("utf-8"), bug)
        except (program.DoesNotApplyError, SyntaxError, OSError) as error:
            stale.append(f"{bug.id}: {error}")
    assert stale == []


def test_a_mistake_whose_line_is_gone_is_told(program):
    bug = program.read_catalogue()[0]
    with pytest.raises(program.DoesNotApplyError, match="stands 0 times"):
        program.edited("x = 1\n", bug)
