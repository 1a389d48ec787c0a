"""The example scripts do what the README says, from a photo to a picture."""

import dataclasses
import importlib
import re
import sys
import types
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from segmentors import SEGMENTORS, params_of
from strategies import normal, rng_of

import pvt_ref
from pvt_ref import VARIANTS, Model
from pvt_ref.report.times import time_stages

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """Import of a script by name, run in an empty folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def get(name: str) -> types.ModuleType:
        return importlib.import_module(name)

    yield get
    for name in ("forward", "pictures", "segment", "train_digits", "training", "cifar10_data"):
        sys.modules.pop(name, None)


def test_forward_classifies_shows_the_stages_and_draws_the_pyramid(examples, capsys, tmp_path):
    forward = examples("forward")
    assert forward.main([]) == 0
    out = capsys.readouterr().out
    assert "china.jpg by danielbuechele (CC BY 2.0, comes with scikit-learn)" in out
    assert "random" not in out.lower()
    assert "trained from nothing on Imagenette" in out
    model = pvt_ref.load("imagenette")
    assert f"\nclasses: {', '.join(model.classes)} (no others)\n" in out
    assert "a temple, which is none of the ten classes" in out
    assert "predictions:         0 1 2 3 4 5 6 7 8 9\n" in out
    table = [line.split() for line in out.splitlines()]
    stages = {row[0]: row[1:6] for row in table if row and row[0] in ("1", "2", "3", "4")}
    cost = pvt_ref.count_cost(model.config)
    assert "resized and cropped to 128x128 pixels" in out
    assert "position tables are resized" not in out
    for s in cost.stages:
        macs = f"{cost.of_stage(s.stage).macs / 1e6:,.1f}"
        assert stages[f"{s.stage}"] == [
            f"{s.grid[0]}x{s.grid[1]}",
            f"{s.channels}",
            f"{s.tokens}",
            f"{s.keys}",
            macs,
        ]
    (answers,) = model.predict(examples("pictures").default_photo().path)
    assert answers[0].label == "church"
    heading = next(i for i, row in enumerate(table) if row == ["class", "probability"])
    shown = table[heading + 2 : heading + 7]
    assert shown == [[*a.label.split(), f"{a.probability:.4f}"] for a in answers]
    with Image.open(tmp_path / "pyramid.png") as picture:
        assert picture.width > 1000
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 1000  # a photo is in it
        drawn = np.asarray(picture.convert("RGB").resize((160, 123)), dtype=float)
    readme = EXAMPLES.parent / "docs" / "images" / "pyramid.png"
    assert readme.stat().st_size < 400_000
    with Image.open(readme) as picture:
        shown = np.asarray(picture.convert("RGB").resize((160, 123)), dtype=float)
    # it has 256 colours, and other fonts elsewhere
    assert np.percentile(np.abs(drawn - shown), 95) < 16


@pytest.mark.parametrize("found", [None, types.SimpleNamespace(origin=None), "an empty folder"])
def test_without_scikit_learns_photo_the_demo_shows_the_cat_and_says_what_it_is_not(
    found, examples, capsys, tmp_path, monkeypatch
):
    forward, pictures = examples("forward"), examples("pictures")
    if found == "an empty folder":
        found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    for module in (forward, pictures):
        monkeypatch.setattr(module, "find_spec", lambda name: found)
    assert pictures.default_photo() is pictures.CAT
    if found is None:
        assert forward.main([]) == 0
        out = capsys.readouterr().out
        assert "chelsea.jpg by Stefan van der Walt (CC0, comes with the examples)" in out
        assert "a cat, which is none of the ten classes; every answer is wrong" in out
        assert "digits" not in out
        assert "a cat and no part of a street; every answer is wrong" in out
        assert "labelled" not in out
        assert (tmp_path / "pyramid.png").exists()
        assert (tmp_path / "segmentation.png").exists()


def test_the_truth_about_the_photo_is_told_only_beside_the_weights_that_it_is_about(
    examples, capsys, monkeypatch
):
    forward, pictures = examples("forward"), examples("pictures")
    monkeypatch.setattr(examples("segment"), "show", lambda *args: None)
    monkeypatch.setattr(forward, "draw", lambda *args, **kwargs: None)  # what is printed will do
    truth = pictures.default_photo().truth
    for arguments in ([], ["--size", "64", "96"], ["--weights", "imagenette"]):
        assert forward.main(arguments) == 0
        assert truth in capsys.readouterr().out
    for arguments in (
        [str(pictures.CAT.path)],
        ["--weights", "digits"],
        ["--variant", "pvt_tiny", "--size", "32", "32"],
    ):
        assert forward.main(arguments) == 0
        assert "The photo shows" not in capsys.readouterr().out


def test_what_the_readme_and_the_pages_say_of_the_photos_is_so(examples):
    """Sizes that are told with their answers, the unflattering ones among them."""
    pictures = examples("pictures")
    temple, model = pictures.default_photo().path, pvt_ref.load("imagenette")
    answers = {s: model.predict(temple, top=1, size=s)[0][0] for s in (80, 128, 176, 192, 224)}
    likeliest = {size: answer.label for size, answer in answers.items()}
    assert likeliest == {
        80: "church",
        128: "church",
        176: "gas pump",
        192: "church",
        224: "parachute",
    }
    shown = {
        size: f"{answer.probability:.0%}".replace("%", " %") for size, answer in answers.items()
    }
    root = EXAMPLES.parent
    readme, use, decisions = (
        (root / name).read_text("utf-8")
        for name in ("README.md", "docs/use.md", "docs/decisions.md")
    )
    assert f"church ({shown[128]})" in readme
    assert f"church ({shown[128]})" in use
    assert f"parachute ({shown[224]})" in use
    assert f"({shown[192][:2]} to\n{shown[80]})" in decisions
    (cat,) = model.predict(pictures.CAT.path, top=1)
    assert (cat[0].label, cat[0].probability > 0.8) == ("French horn", True)
    cifar = pvt_ref.load("cifar10")
    assert [cifar.predict(pictures.CAT.path, size=s)[0][0].label for s in (32, 192)] == [
        "frog",
        "cat",
    ]
    listed = ", ".join(model.classes)
    assert listed in " ".join(readme.split())


def test_classes_are_named_if_they_are_few(examples, capsys):
    forward = examples("forward")
    config = pvt_ref.PVTConfig(img_size=32, num_classes=21, depths=(1, 1, 1, 1))

    def named(names):
        config_of = dataclasses.replace(config, num_classes=len(names) or 3)
        params = pvt_ref.init_params(config_of, rng_of(0))
        return Model(params, config_of, info=pvt_ref.ModelInfo(classes=tuple(names)))

    few = named([f"c{k}" for k in range(20)])
    assert forward.few_classes(few) == ", ".join(few.classes)
    assert forward.few_classes(named([f"c{k}" for k in range(21)])) == ""
    assert forward.few_classes(named([])) == ""  # none has a name
    assert forward.few_classes(named(["two\nlines", "\x1b"])) == r"two lines, \x1b"
    photo = normal(0, 1, 3, 32, 32, dtype=np.float32)
    above = pyramid_of(forward, few, photo).get_suptitle()
    assert "It only knows 20 classes: c0, c1," in above
    assert "c19" in above
    assert "only knows" not in pyramid_of(forward, named([]), photo).get_suptitle()
    assert forward.main(["--weights", "digits"]) == 0
    assert "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 (no others)" in capsys.readouterr().out


def test_the_digits_shown_are_held_out_and_mostly_read(examples):
    pixels, labels = examples("forward").read_ten_digits()
    assert labels == list("0123456789")
    data, _ = examples("train_digits").read_digits()
    assert not any((data.images[:, 0] == picture).all(axis=(1, 2)).any() for picture in pixels)
    answers = pvt_ref.load("digits").predict(pixels, top=1)
    assert sum(answer.label == label for (answer,), label in zip(answers, labels, strict=True)) >= 9


def test_random_weights_are_called_so_and_matplotlibs_settings_are_left_alone(
    examples, capsys, tmp_path
):
    before = dict(matplotlib.rcParams)
    assert examples("forward").main(["--variant", "pvt_tiny", "--size", "64", "64"]) == 0
    assert dict(matplotlib.rcParams) == before
    out = capsys.readouterr().out
    assert "RANDOM weights" in out
    assert "The weights are random" in out
    assert [line for line in out.splitlines() if line.startswith("3  ")]
    assert (tmp_path / "pyramid.png").exists()


def test_imagenet_weights_answer_by_name(examples, capsys, tmp_path):
    from pvt_ref.data.imagenet import imagenet_classes

    config = VARIANTS["pvt_tiny"]
    state = pvt_ref.to_state_dict(pvt_ref.init_params(config, rng_of(3)))
    from safetensors.numpy import save_file

    save_file(state, tmp_path / "released.safetensors")  # in the authors' layout, without info
    assert examples("forward").main(["--weights", "released.safetensors"]) == 0
    out = capsys.readouterr().out
    rows = out.split("\nclass ")[1].splitlines()[2:7]
    assert len(rows) == 5
    assert all(row.rsplit(maxsplit=1)[0] in imagenet_classes() for row in rows)


def test_forward_takes_a_picture_weights_and_a_size(examples, capsys, tmp_path):
    config = VARIANTS["pvt_tiny"]
    model = Model(pvt_ref.init_params(config, rng_of(3)), config)
    pvt_ref.save(tmp_path / "mine.safetensors", model)
    Image.fromarray(rng_of(0).integers(0, 255, (50, 90, 3), np.uint8)).save(tmp_path / "x.png")
    arguments = ["x.png", "--weights", "mine.safetensors", "--size", "64", "96"]
    assert examples("forward").main([*arguments, "--output", "out.png"]) == 0
    out = capsys.readouterr().out
    assert "x.png, resized and cropped to 64x96 pixels" in out
    assert "random" not in out.lower()
    assert (tmp_path / "out.png").exists()


def test_forward_draws_a_backbone_without_a_classifier(examples, capsys, tmp_path, monkeypatch):
    config = dataclasses.replace(VARIANTS["pvt_tiny"], num_classes=0)
    backbone = Model(pvt_ref.init_params(config, rng_of(3)), config)
    forward = examples("forward")
    monkeypatch.setattr(forward, "get_model", lambda *_: backbone)
    assert forward.main(["--variant", "pvt_tiny", "--size", "64", "64"]) == 0
    assert "without a classifier" in capsys.readouterr().out
    assert (tmp_path / "pyramid.png").exists()


def test_forward_explains_what_is_wrong(examples, capsys, tmp_path):
    forward = examples("forward")
    assert forward.main(["nothing.jpg"]) == 2
    assert "nothing.jpg" in capsys.readouterr().err
    assert forward.main(["--variant", "pvt_tiny", "--size", "100", "224"]) == 2
    assert "multiples of 32" in capsys.readouterr().err
    assert not (tmp_path / "pyramid.png").exists()


def test_forward_sends_a_segmentation_network_to_the_other_program(examples, capsys, tmp_path):
    assert examples("forward").main(["--weights", "camvid"]) == 2
    assert "Use examples/segment.py for such a network" in capsys.readouterr().err
    assert examples("forward").main(["--output", "segmentation.jpg"]) == 2  # without --weights
    assert "the name of the second picture. Choose another" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["noext", "", "out.xyz", "nodir/out.png"])
def test_forward_refuses_a_useless_output_before_it_works(examples, capsys, output):
    assert examples("forward").main(["--output", output]) == 2
    captured = capsys.readouterr()
    assert "--output is" in captured.err
    assert not captured.out


def test_forward_takes_file_names_with_dollar_signs(examples, tmp_path):
    Image.fromarray(rng_of(0).integers(0, 255, (50, 90, 3), np.uint8)).save(tmp_path / "a$^$b.png")
    assert examples("forward").main(["a$^$b.png"]) == 0
    assert (tmp_path / "pyramid.png").exists()


def test_forward_holds_the_weights_to_the_variant_that_was_named(examples, capsys, tmp_path):
    config = VARIANTS["pvt_tiny"]
    pvt_ref.save(
        tmp_path / "mine.safetensors", Model(pvt_ref.init_params(config, rng_of(3)), config)
    )
    arguments = ["--weights", "mine.safetensors", "--size", "32", "32", "--variant"]
    assert examples("forward").main([*arguments, "pvt_small"]) == 2
    assert "holds another model than pvt_small" in capsys.readouterr().err
    assert examples("forward").main([*arguments, "pvt_tiny"]) == 0


def test_query_attention_picks_the_token_at_the_point(examples):
    forward = examples("forward")
    config = VARIANTS["pvt_tiny"]
    model = Model(pvt_ref.init_params(config, rng_of(1)), config)
    images = normal(0, 1, 3, 64, 96, dtype=np.float32)
    maps = pvt_ref.attention_maps(model.params, images, config)
    found = forward.query_attention(model, images, (0.55, 0.5))
    for i, (row, col) in enumerate([(8, 12), (4, 6), (2, 3), (1, 1)]):
        H, W = config.grids(64, 96)[i]
        weights = maps[i + 1, 1][0].mean(axis=0)
        cls = int(i == 3)
        np.testing.assert_array_equal(found[i].ravel(), weights[cls + row * W + col][cls:])
        assert found[i].shape == (2, 3)
        assert weights.shape[0] == H * W + cls


def test_time_stages_gives_a_time_for_each_stage_and_the_rest():
    config = VARIANTS["pvt_tiny"]
    params = pvt_ref.init_params(config, rng_of(0))
    times = time_stages(params, normal(0, 1, 3, 32, 32, dtype=np.float32), config, repeats=2)
    assert len(times) == 5
    assert all(t > 0 for t in times)
    with pytest.raises(ValueError, match="at least 1"):
        time_stages(params, normal(0, 1, 3, 32, 32, dtype=np.float32), config, repeats=0)


# What the picture says ----------------------------------------------------------------------------


def pyramid_of(forward, model, images, name="a photo"):
    """The figure as an object, as draw_pyramid makes it."""
    figure = forward.Figure(layout="constrained")
    forward.draw_pyramid(figure, model, name, images)
    return figure


def attention_colours(figure):
    """The pixels of the four attention panels, without the photo below them."""
    panels = [ax.images[-1] for ax in figure.axes if len(ax.images) == 2]
    assert len(panels) == 4
    return [panel.cmap(panel.norm(panel.get_array())) for panel in panels]


def test_attention_that_is_nearly_alike_looks_alike(examples):
    forward, pictures = examples("forward"), examples("pictures")
    config = VARIANTS["pvt_tiny"]
    model = Model(pvt_ref.init_params(config, rng_of(0)), config)
    images = normal(0, 1, 3, 64, 64, dtype=np.float32)
    for colours in attention_colours(pyramid_of(forward, model, images)):  # random weights
        spread = np.ptp(colours[..., :3].reshape(-1, 3), axis=0)
        assert spread.max() < 0.1
    trained = pvt_ref.load("cifar10")
    photo = trained.preprocess([pictures.CAT.path], 192)
    for colours in attention_colours(pyramid_of(forward, trained, photo))[1:]:
        spread = np.ptp(colours[..., :3].reshape(-1, 3), axis=0)
        assert spread.max() > 0.5


def test_the_same_colour_is_the_same_multiple_of_all_alike_at_every_stage(examples, monkeypatch):
    forward = examples("forward")
    config = VARIANTS["pvt_tiny"]
    model = Model(pvt_ref.init_params(config, rng_of(0)), config)
    images = normal(0, 1, 3, 64, 64, dtype=np.float32)
    alike = [np.full((2, 2), 1 / 4)] * 3 + [np.full((2, 2), 1 / 5)]  # of 4 keys; of 4 and cls
    monkeypatch.setattr(forward, "query_attention", lambda *_: alike)
    figure = pyramid_of(forward, model, images)
    first, *others = attention_colours(figure)
    for colours in (first, *others):
        np.testing.assert_allclose(colours, np.broadcast_to(first[0, 0], colours.shape), atol=0.01)
    (bar,) = [child for ax in figure.axes for child in ax.child_axes]
    assert bar.get_xlabel() == "a key's weight × number of keys (1: uniform)"
    assert [t.get_text() for t in bar.get_xticklabels()] == ["0", "1", "2", "3", "≥4"]


def test_names_and_labels_are_drawn_and_printed_as_they_are(examples, capsys, tmp_path):
    forward = examples("forward")
    names = ("a $\\frac{1}{$ b", "two\nlines", "\x1b[31mred", *(f"c{k}$^$" for k in range(7)))
    model = pvt_ref.load("cifar10")
    info = dataclasses.replace(model.info, title="$x^$ \x07", classes=names)
    pvt_ref.save(tmp_path / "m.safetensors", Model(model.params, model.config, info=info))
    photo = tmp_path / "$a$ {b}\x1b.png"
    Image.fromarray(rng_of(0).integers(0, 255, (50, 90, 3), np.uint8)).save(photo)
    assert forward.main([str(photo), "--weights", "m.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\\x1b" in out
    assert "two\n" not in out
    figure = pyramid_of(
        forward, Model(model.params, model.config, info=info), model.preprocess(photo)
    )
    likeliest = model.predict(photo, top=3)[0]
    label = next(ax.xaxis.label for ax in figure.axes if "%" in ax.get_xlabel())
    assert label.get_text().splitlines()[0].startswith(forward.one_line(names[likeliest[0].index]))
    assert not label.get_parse_math()


# The class of every pixel -------------------------------------------------------------------------


def ideal(photo, shape, classes) -> np.ndarray:
    """A class map that is right at every point that was labelled."""
    pictures = importlib.import_module("pictures")
    H, W = shape
    answers = np.zeros(shape, np.uint8)
    for i, row in enumerate(photo.points):
        for j, letter in enumerate(row):
            kind = pictures.KINDS.get(letter)
            if kind in classes:
                rows = slice(i * H // len(photo.points), (i + 1) * H // len(photo.points))
                columns = slice(j * W // len(row), (j + 1) * W // len(row))
                answers[rows, columns] = classes.index(kind)
    return answers


def test_segment_tells_how_much_each_class_gets_and_where_that_is_wrong(examples, capsys, tmp_path):
    segment, pictures = examples("segment"), examples("pictures")
    assert segment.main(["--panel", "200"]) == 0
    out = capsys.readouterr().out
    model, photo = pvt_ref.load("camvid"), pictures.default_photo()
    assert f"photo:   {photo.credit}, 427x640 pixels, input of 192x288\n" in out
    assert f"classes: {', '.join(model.classes)} (no others)\n" in out
    assert "A lake is none of the classes, so every answer there is wrong." in out
    (class_map,) = model.segment(photo.path)
    table = [line.split() for line in out.splitlines()]
    for k, name in enumerate(model.classes):
        share = (class_map == k).mean()
        assert ([name, f"{share:.1%}"] in table) == (share > 0)
        listed = f"{name} {share:.1%}" in out.partition("not in the photo")[2]
        assert listed == (share > 0 and name in photo.absent)
    truths = [letter for row in photo.points for letter in row if letter != "."]
    assert len(truths) == 48
    places = [(i, j) for i in range(6) for j in range(9) if photo.points[i][j] != "."]
    answers = [
        model.classes[class_map[int((i + 0.5) / 6 * 427), int((j + 0.5) / 9 * 640)]]
        for i, j in places
    ]
    right = [pictures.KINDS[t] == answer for t, answer in zip(truths, answers, strict=True)]
    assert f"48 points of a grid were labelled by hand; the answer is right at {sum(right)}:" in out
    for letter, name in pictures.KINDS.items():
        of_kind = [r for t, r in zip(truths, right, strict=True) if t == letter]
        words = [*name.split(), f"{len(of_kind)}", f"{sum(of_kind)}"]
        assert words in [row[: len(words)] for row in table]
    lake = [a for t, a in zip(truths, answers, strict=True) if t == "-"]
    assert not any(r for t, r in zip(truths, right, strict=True) if t == "-")
    assert re.search(rf"a lake +3 +0 +.*{lake[0]}", out)
    with Image.open(tmp_path / "segmentation.png") as picture:
        assert 800 < picture.width < 900
        drawn = np.asarray(picture.convert("RGB").resize((160, 120)), dtype=float)
    readme = EXAMPLES.parent / "docs" / "images" / "segmentation.jpg"
    assert readme.stat().st_size < 400_000
    with Image.open(readme) as picture:
        shown = np.asarray(picture.convert("RGB").resize((160, 120)), dtype=float)
    assert np.percentile(np.abs(drawn - shown), 95) < 24  # smaller, and other fonts elsewhere


def test_a_perfect_answer_is_called_right_and_a_wrong_one_by_its_name(examples):
    segment, pictures = examples("segment"), examples("pictures")
    photo, model = pictures.default_photo(), pvt_ref.load("camvid")
    answers = ideal(photo, (60, 90), model.classes)
    points = segment.judge(photo, answers, model.classes)
    assert [p.truth for p in points if not p.is_right] == ["a lake"] * 3
    answers[35, 25] = model.classes.index("Car")  # the point of row 3 and column 2
    points = segment.judge(photo, answers, model.classes)
    wrong = [p for p in points if not p.is_right and p.truth != "a lake"]
    assert [(p.truth, p.answer) for p in wrong] == [("Building", "Car")]
    assert wrong[0].place == (3.5 / 6, 2.5 / 9)


def small_segmentor(path, name, **info):
    """A file of a small segmentation network."""
    config = SEGMENTORS[name]
    pvt_ref.save(
        path, Model(params_of(config, 1, np.float32), config, info=pvt_ref.ModelInfo(**info))
    )


@pytest.mark.parametrize(
    ("name", "width", "panels"), [("pvt", 128, 12), ("pvt_v2", 112, 8), ("naive", 112, 5)]
)
def test_segment_draws_a_photo_of_ones_own_with_every_backbone(
    name, width, panels, examples, capsys, tmp_path
):
    segment = examples("segment")
    classes = ("a $\\frac{1}{$ b", "two\nlines", "\x1b[31mred", "$x^$")
    small_segmentor(tmp_path / "m.safetensors", name, classes=classes, title="$x^$ \x07")
    photo = tmp_path / "$a$ {b}\x1b.png"
    Image.fromarray(rng_of(0).integers(0, 255, (40, 70, 3), np.uint8)).save(photo)
    given = [str(photo), "--weights", "m.safetensors", "--size", "64", "--output", "x.jpg"]
    assert segment.main(given) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "two lines" in out
    assert "labelled" not in out
    assert f"input of 64x{width}" in out
    with Image.open(tmp_path / "x.jpg") as picture:
        assert picture.format == "JPEG"
    model = pvt_ref.load("m.safetensors")
    seen = segment.see(model, str(photo), "a photo", 64, None)
    figure = segment.figure_of(seen)
    assert len(figure.axes) == panels
    assert figure.axes[2].get_title() == "the same without the photo"
    for ax in figure.axes:  # of one size, in the photo's proportions
        if ax.images:
            box = ax.get_position().bounds
            inches = box[2:] * figure.get_size_inches()
            assert tuple(inches) == pytest.approx((3.2, 3.2 * 40 / 70))


def test_every_panel_has_as_many_pixels_as_the_photo(examples, tmp_path):
    segment = examples("segment")
    small_segmentor(tmp_path / "m.safetensors", "pvt")
    model = pvt_ref.load("m.safetensors")
    for width, panel, expected in ((300, None, 300), (90, None, 200), (300, 250, 250)):
        photo = Image.new("RGB", (width, width // 2))
        seen = segment.see(model, photo, "a photo", 32, None)
        segment.draw(seen, tmp_path / "x.png", panel)
        with Image.open(tmp_path / "x.png") as picture:
            assert picture.width / segment.figure_of(seen).get_size_inches()[0] == pytest.approx(
                expected / 3.2, abs=0.1
            )
    large = np.zeros((10, 3000, 3), np.uint8)
    assert segment.thinned(large).shape == (4, 1000, 3)
    assert segment.thinned(large[:, :1280]).shape == (10, 1280, 3)


def test_segment_explains_what_is_wrong(examples, capsys, tmp_path):
    segment = examples("segment")
    for given, says in (
        (["nothing.jpg"], "nothing.jpg"),
        (["--output", "x.gif"], "--output is 'x.gif'"),
        (["--panel", "50"], "--panel is 50"),
        (["--size", "0"], "size is 0"),
        (["--weights", "digits"], "tells what a picture shows, not where"),
    ):
        assert segment.main(given) == 2
        captured = capsys.readouterr()
        assert says in captured.err
        assert captured.err.count("error:") == 1
    assert list(tmp_path.iterdir()) == []
