"""tools/coverage_floors.py counts lines and branches, and names what no test reaches."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "coverage_floors.py"


@pytest.fixture
def floors():
    spec: Any = importlib.util.spec_from_file_location("coverage_floors", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(lines=(), branches=(), statements=20, ways=4):
    return {
        "missing_lines": list(lines),
        "missing_branches": [list(way) for way in branches],
        "summary": {
            "num_statements": statements,
            "covered_lines": statements - len(lines),
            "num_branches": ways,
            "covered_branches": ways - len(branches),
        },
    }


def report(**files):
    paths = {f"pvt_ref/{name.replace('__', '/')}.py": file for name, file in files.items()}
    return {"meta": {"branch_coverage": True}, "files": paths}


def test_what_is_wholly_run_is_enough(floors):
    made = report(layers__gelu=measured(), api=measured(lines=[3]))
    told, held = floors.judge(made, {"pvt_ref/layers/": 100, "pvt_ref/": 95})
    assert held
    assert told[0].split() == ["pvt_ref/layers/", "100.00", "%,", "needs", "100", "%"]
    assert told[1].split()[1] == "97.92"  # 47 of 48


def test_one_branch_is_too_little_of_a_hundred(floors):
    made = report(layers__gelu=measured(branches=[(7, 9), (8, -1)]), layers__relu=measured())
    told, held = floors.judge(made, {"pvt_ref/layers/": 100})
    assert not held
    assert told[1:] == ["    pvt_ref/layers/gelu.py: 7->9, 8->exit"]


def test_lines_are_listed_in_runs_without_the_branches_into_them(floors):
    made = measured(lines=[3, 4, 5, 9], branches=[(2, 3), (9, 12), (6, 8)])
    assert floors.missing(made) == "3-5, 9, 6->8"


def test_a_floor_needs_branches_and_files(floors):
    with pytest.raises(ValueError, match="no file of pvt_ref/blocks/ was measured"):
        floors.judge(report(layers__gelu=measured()), {"pvt_ref/blocks/": 100})
    without = report(layers__gelu=measured()) | {"meta": {"branch_coverage": False}}
    with pytest.raises(ValueError, match="branches were not measured"):
        floors.judge(without, {"pvt_ref/layers/": 100})


def test_every_part_of_the_network_has_its_floor_and_the_status_says_it(
    floors, tmp_path, monkeypatch, capsys
):
    parts = ("layers", "blocks", "heads", "models")
    whole = {f"pvt_ref/{part}/": 100 for part in parts}
    assert whole | {"pvt_ref/": 95} == floors.FLOORS
    path = tmp_path / "coverage.json"
    monkeypatch.setattr(sys, "argv", ["coverage_floors.py", str(path)])
    good = {f"{part}__x": measured() for part in parts}
    path.write_text(json.dumps(report(**good)), encoding="utf-8")
    assert floors.main() == 0
    path.write_text(json.dumps(report(**good | {"blocks__x": measured([1])})), encoding="utf-8")
    assert floors.main() == 1
    assert "pvt_ref/blocks/x.py: 1" in capsys.readouterr().out
