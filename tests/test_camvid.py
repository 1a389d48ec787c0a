"""What is told of the two trainings on CamVid is what their files say, and the frames stay out."""

import json
import mmap
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import segmentors
from PIL import Image
from small_pairs import RECIPE

import pvt_ref
from pvt_ref import Model, ModelInfo, SegmentorConfig, SemanticFPNHead, SETRHead
from pvt_ref.data.iou import class_iou, mean_iou
from pvt_ref.train import LabelledPairs, evaluate_pixels

ROOT = Path(__file__).parents[1]
WHOLE = (32, 64)


@pytest.fixture
def camvid(monkeypatch):
    """benchmarks/camvid.py, for pictures of 32 x 64 pixels."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    module = import_module("camvid")
    monkeypatch.setattr(module, "WHOLE", WHOLE)
    monkeypatch.setattr(module, "CROP", (32, 32))
    yield module
    for name in ("camvid", "score_camvid", "train_camvid"):
        sys.modules.pop(name, None)


@pytest.fixture
def data(camvid, monkeypatch, tmp_path):
    """Five frames in each part, 24 x 48: stripes of all classes, a line, and a strip of void."""
    for part in ("train", "test"):
        for folder in (part, f"{part}annot"):
            (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(5):
            rng = np.random.default_rng([i, len(part)])
            labels = np.repeat(rng.permutation(11), 4)[None].repeat(24, axis=0).astype(np.uint8)
            labels = np.pad(labels, ((0, 0), (0, 4)), constant_values=255)
            labels[int(rng.integers(0, 20)), :44] = 2
            photo = np.repeat(labels[..., None] * 20, 3, axis=2) + rng.integers(0, 9, (24, 48, 3))
            Image.fromarray(photo.astype(np.uint8)).save(tmp_path / "data" / part / f"{i}.png")
            Image.fromarray(labels).save(tmp_path / "data" / f"{part}annot" / f"{i}.png")

    def frames(folder, part, augment=None):
        folders = folder / part, folder / f"{part}annot"
        return LabelledPairs(*folders, list(camvid.CLASSES), WHOLE, whole=WHOLE)

    for name in ("camvid", "score_camvid"):
        monkeypatch.setattr(sys.modules[name], "frames", frames)
    return tmp_path / "data"


def line(epoch: int, miou: float) -> dict:
    shares = {"train_accuracy": 0.5, "held_out_accuracy": 0.6, "held_out_miou": miou}
    best = {"best_miou": miou, "best_epoch": epoch, "images_per_second": 4.0, "lr": 1e-3}
    return {"step": 3 * epoch, "epoch": epoch, "train_loss": 2.0 / epoch, "held_out_loss": 1.0,
            **shares, **best}  # fmt: skip


@pytest.fixture
def runs(camvid, data, tmp_path):
    """Folders as two trainings leave them."""
    heads = {"fpn": SemanticFPNHead(neck_channels=6, channels=5), "setr": SETRHead(channels=7)}
    backbones = {"fpn": segmentors.PVT, "setr": segmentors.VIT}
    folders = {}
    for seed, (name, head) in enumerate(heads.items()):
        config = SegmentorConfig(backbone=backbones[name], head=head, num_classes=11)
        params = segmentors.params_of(config, seed, np.float32)
        told = {"recipe": RECIPE.to_dict(), "command": f"python {name}.py"}
        info = ModelInfo(classes=tuple(camvid.CLASSES), training=told)
        folder = folders[name] = tmp_path / name
        folder.mkdir()
        pvt_ref.save(folder / "model.safetensors", Model(params, config, info=info))
        lines = [json.dumps(line(1, 0.2)), json.dumps(line(2, 0.3))]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        counts = evaluate_pixels(params, config, camvid.frames(data, "test"))[1]
        (folder / "test.json").write_text(json.dumps(counts.tolist()))
    return folders


def test_runs_of_a_class_are_counted_along_rows_and_columns(camvid):
    labels = np.array([[0, 0, 1, 0], [0, 0, 1, 0], [2, 2, 1, 0]])
    assert camvid.run_lengths(labels).tolist() == [[2, 2, 1, 1]] * 3
    assert camvid.run_lengths(labels.T).T.tolist() == [[2, 2, 3, 3], [2, 2, 3, 3], [1, 1, 3, 3]]
    assert camvid.thickness(labels).tolist() == [[2, 2, 1, 1], [2, 2, 1, 1], [1, 1, 1, 1]]


def test_shapes_of_classes_are_counted_in_pixels_of_the_networks_picture(camvid, data):
    found = camvid.shapes_of_classes(camvid.frames(data, "train"))
    assert sum(found["share"]) == pytest.approx(1)
    # stripes are 4 of 48 pixels wide, and 64 are seen: 16 / 3
    assert found["thickness"][0] == pytest.approx(16 / 3)
    assert [share for k, share in enumerate(found["thin"]) if k != 2] == [1.0] * 10
    # where the line crosses the stripe of its own class, 4 pixels are long both ways
    assert found["thin"][2] == pytest.approx(1 - 4 / (44 + 24 * 4 - 4))
    wide = LabelledPairs(data / "train", data / "trainannot", list(camvid.CLASSES), WHOLE,
                         replaced=dict.fromkeys(range(11), 3))  # fmt: skip
    found = camvid.shapes_of_classes(wide)
    assert found["share"][3] == 1
    assert found["thin"][3] == 0
    assert found["thickness"][3] == pytest.approx(24 * 4 / 3)


def test_a_grid_tells_the_largest_share_of_its_cells(camvid):
    labels = np.full((64, 128), 3)
    labels[:, 8:12] = 2  # one column of cells of stride 2, where a pixel of the network is two
    assert np.array_equal(camvid.through_grid(labels, 2), labels)
    assert set(np.unique(camvid.through_grid(labels, 16))) == {3}
    labels[:, 32:] = 7
    seen = camvid.through_grid(labels, 16)
    assert set(np.unique(seen)) == {3, 7}
    assert set(np.unique(seen[:, 33:])) == {7}


def test_logits_are_averaged_over_patches_before_they_are_enlarged(camvid):
    logits = np.zeros((1, 11, 16, 32), np.float32)  # stride 2: a patch is 8 x 8 cells
    logits[0, 0] = 0.5
    logits[0, 4, :8, :8] = 1
    logits[0, 5, 3, 3] = 63  # one cell of 64: less than 1 in the mean
    logits[0, 6, 11, 27] = 65
    answer = camvid.coarse_answer(logits, (64, 128))
    assert answer.shape == (64, 128)
    assert answer[0, 0] == answer[16, 16] == 4
    assert answer[-1, -1] == answer[48, 112] == 6
    assert answer[48, 16] == 0


def test_two_runs_become_figures_a_page_and_pictures(camvid, data, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(camvid, "peak_of", lambda weights: 7.0)
    out = tmp_path / "out"
    out.mkdir()
    camvid.main([*map(str, runs.values()), "--data", str(data), "--out", str(out)])
    written = {path.name for path in out.iterdir()}
    names = ("{}.json", "{}.md", "{}.svg", "{}_answers.png", "{}_fpn.jsonl", "{}_setr.jsonl")
    assert written == {name.format("training_camvid") for name in names}
    found = json.loads((out / "training_camvid.json").read_text())
    commands = [run["command"] for run in found["runs"].values()]
    assert commands == ["python fpn.py", "python setr.py"]
    for head, folder in runs.items():
        run = found["runs"][head]
        assert run["counts"] == json.loads((folder / "test.json").read_text())
        assert SegmentorConfig(**run["config"]) == pvt_ref.load(folder / "model.safetensors").config
        assert run["minutes"] == pytest.approx(2 * 3 * RECIPE.batch_size / 4 / 60)
        assert run["step_cache_bytes"] > run["frame_peak_bytes"] > 0
    shown = [x["fpn"] for x in found["shown"]]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > shown[2]
    for table in (found["coarse"], *found["grids"].values()):
        assert np.sum(table) == np.sum(found["runs"]["fpn"]["counts"])
    text = (out / "training_camvid.md").read_text("utf-8")
    counts = [np.array(run["counts"]) for run in found["runs"].values()]
    cells = " | ".join(f"**{100 * mean_iou(x):.1f}**" for x in counts)
    assert f"| **test mIoU**, % | {cells} |" in text
    row = next(x for x in text.splitlines() if x.startswith("| Tree "))
    assert [f"{100 * class_iou(x)[5]:.1f}" for x in counts] == row.split(" | ")[4:6]
    assert "no result" not in text
    (out / "training_camvid.md").unlink()
    camvid.main(["--out", str(out)])  # again, from what is stored
    assert (out / "training_camvid.md").read_text("utf-8") == text

    (runs["setr"] / "test.json").write_text(json.dumps(np.roll(counts[1], 1, axis=1).tolist()))
    with pytest.raises(SystemExit, match=r"test.json are of another network"):
        camvid.main([*map(str, runs.values()), "--data", str(data), "--out", str(out)])


def test_the_first_run_alone_has_a_page_too(camvid, data, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(camvid, "peak_of", lambda weights: 7.0)
    out = tmp_path / "out"
    out.mkdir()
    camvid.main([str(runs["fpn"]), "--data", str(data), "--out", str(out)])
    assert not (out / "training_camvid_setr.jsonl").exists()
    found = json.loads((out / "training_camvid.json").read_text())
    assert list(found["runs"]) == ["fpn"]
    text = (out / "training_camvid.md").read_text("utf-8")
    assert "was not measured with it" in text
    assert "jsonl) and" not in text
    with pytest.raises(SystemExit):
        camvid.main([*[str(runs["fpn"])] * 3, "--data", str(data), "--out", str(out)])


def test_the_page_is_made_of_what_was_stored(camvid):
    results = ROOT / "docs" / "results"
    found = json.loads((results / "training_camvid.json").read_text("utf-8"))
    assert (results / "training_camvid.md").read_text("utf-8") == camvid.page(found)
    sizes = [run["parameters"] for run in found["runs"].values()]
    assert max(sizes) < 1.05 * min(sizes)


def test_a_network_is_scored_again(camvid, data, runs, capsys):
    score = sys.modules["score_camvid"]
    weights = str(runs["fpn"] / "model.safetensors")
    assert score.main([str(data), "--weights", weights]) == 0
    counts = np.array(json.loads((runs["fpn"] / "test.json").read_text()))
    assert f"mean IoU {mean_iou(counts):.2%}" in capsys.readouterr().out
    assert score.main([str(data), "--weights", weights, "--every", "3"]) == 0
    model = pvt_ref.load(weights)
    two = score.thinned(camvid.frames(data, "test"), 3)
    assert [photo for photo, _ in two.files] == ["0.png", "3.png"]
    few = evaluate_pixels(model.params, model.config, two)[1]
    assert f"mean IoU {mean_iou(few):.2%}" in capsys.readouterr().out
    for wrong, says in (
        (["--weights", "digits"], "does not have CamVid's 11 classes"),
        (["--weights", weights, "--every", "0"], "--every is 0"),
    ):
        assert score.main([str(data), *wrong]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux keeps this account")
def test_the_growth_of_memory_is_that_of_the_run(camvid):
    peak = import_module("peak")

    def touch(mib):
        with mmap.mmap(-1, mib * 2**20) as pages:  # from the kernel: malloc may have some left
            pages[::4096] = bytes(mib * 2**8)

    large = peak.growth_mib(lambda: touch(128))
    small = peak.growth_mib(lambda: touch(32))  # after a higher peak
    assert 120 < large < 150
    assert 28 < small < 50
