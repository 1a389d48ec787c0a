"""The README's code runs as it stands, and what its comments promise is so."""

import importlib
import json
import re
import tempfile
from pathlib import Path

import pytest

import pvt_ref

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_code_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (2, 1000)
    assert [names[f"f{i}"].shape for i in (1, 4)] == [(2, 64, 56, 56), (2, 512, 7, 7)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["(64, 64)", "(2, 1, 3136, 49)"]
    assert any("13,229,288" in line for line in printed)


def test_the_code_on_the_training_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    page = Path(__file__).parents[1] / "docs" / "training.md"
    monkeypatch.chdir(page.parents[1])  # a photo is in examples/
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
        exec(code, names)
    assert names["losses"][-1] < 0.7 * names["losses"][0]
    assert names["run"].finished
    printed = capsys.readouterr().out.splitlines()
    assert "True" in [line.split()[0] for line in printed]
    promised = re.findall(r"^# (.+ (?:True|False))$", page.read_text("utf-8"), re.MULTILINE)
    assert [line for line in printed if line in promised] == promised


def test_the_agreement_in_the_readme_is_that_of_the_full_table():
    table = Path(__file__).parents[1] / "docs" / "results" / "agreement.md"
    measured = table.read_text(encoding="utf-8").splitlines()
    rows = [line for line in README.splitlines() if line.startswith("| pvt_") and "×" in line]
    assert len(rows) > 5
    assert all(row in measured for row in rows)


def test_the_times_in_the_readme_are_those_of_the_full_table():
    results = Path(__file__).parents[1] / "docs" / "results"
    gpu = (results / "gpu.md").read_text("utf-8")
    for text, count, device in ((README, 8, "[cg]pu"), (gpu, 8, "gpu")):
        measured = "".join(p.read_text("utf-8") for p in results.glob(f"{device}_tables.md"))
        rows = [line for line in text.splitlines() if line.endswith("|") and " ms |" in line]
        assert len(rows) == count
        assert all(row in measured.splitlines() for row in rows)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_tables_of_results_are_made_of_what_was_measured(device, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    results = Path(__file__).parents[1] / "docs" / "results"
    file = results / f"{device}.json"
    if device == "cpu":
        report = importlib.import_module("report")
        report.write_report(report.read_runs(file), tmp_path)
    else:
        measured = json.loads(file.read_text("utf-8"))
        importlib.import_module("gpu_report").write_gpu_report(measured, tmp_path)
    written = (tmp_path / f"{device}_tables.md").read_text("utf-8")
    assert written == (results / f"{device}_tables.md").read_text("utf-8")


def test_the_accuracies_in_the_readme_are_those_of_the_weights():
    for name, words, key in (
        ("digits", "handwritten digits", "held_out"),
        ("cifar10", "CIFAR-10, 10,000", "test"),
        ("cifar10_v2", "CIFAR-10, a PVT v2", "test"),
    ):
        model = pvt_ref.load(name)
        accuracy = model.info.training[f"{key}_accuracy"]
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {words}")]
        assert f"| {100 * accuracy:.1f} % |" in row
        assert f"| {pvt_ref.count_cost(model.config).parameters:,} |" in row
        page = Path(__file__).parents[1] / "docs" / "results" / "training.md"
        assert f"| {key.replace('_', ' ')} accuracy | {accuracy:.4f} |" in page.read_text("utf-8")
        assert model.info.training["command"] in page.read_text("utf-8")


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)h#][^)]*)\)", README)
    assert links
    for link in links:
        assert (Path(__file__).parents[1] / link).exists(), link


def test_the_score_of_camvid_in_the_readme_is_that_of_the_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import ship_camvid

    model = pvt_ref.load("camvid")
    said, row = model.info.training, ship_camvid.row(model)
    assert f"| {pvt_ref.count_cost(model.config).parameters:,} |" in row
    assert f"| mIoU {100 * said['test_miou']:.1f} %; " in row
    finished = said["steps"] == said["epochs"] * (
        said["frames"]["train"] // said["recipe"]["batch_size"]
    )
    found = [line for line in README.splitlines() if line.startswith("| [CamVid]")]
    assert found == ([row] if finished else [])  # of weights in the making there is no score
    once = ship_camvid.with_row(README, row)
    assert ship_camvid.with_row(once, row) == once
    lines = once.splitlines()
    assert lines[lines.index(row) - 1].startswith("| [Imagenette]")
    assert [line for line in lines if line != row] == [x for x in README.splitlines() if x != row]
