"""Pictures of any number of channels: prepared, trained on, saved, loaded and classified."""

import dataclasses
import io
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from loose import loose
from PIL import Image
from small_training import CONFIG, RECIPE, without_chance
from strategies import rng_of

import pvt_ref
from pvt_ref import Model, ModelInfo, Preprocessing
from pvt_ref.data.image import resize_and_crop, resize_and_crop_bands
from pvt_ref.errors import (
    ArrayTypeError,
    ConfigError,
    ImageError,
    RangeError,
    ShapeError,
    TrainingError,
)
from pvt_ref.train import (
    LabelledImages,
    cutmix,
    cutout,
    evaluate,
    fit,
    mixup,
    one_hot,
    random_crop,
    random_erasing,
    random_flip,
)

FOUR = Preprocessing("bands", (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))


def noise(height, width, channels, seed=0):
    return rng_of(seed).integers(0, 256, (height, width, channels), np.uint8)


# Preparing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 33, 64, (40, 24), 224])
def test_three_bands_have_the_bits_of_colours(size):
    pixels = noise(50, 37, 3)
    colours = resize_and_crop(Image.fromarray(pixels), size)
    assert np.array_equal(resize_and_crop_bands(pixels, size), np.asarray(colours))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    bands = Preprocessing("bands", mean, std)([pixels], size)
    assert np.array_equal(bands, Preprocessing("RGB", mean, std)([pixels], size))


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
def test_every_band_is_prepared_on_its_own(channels):
    pixels = noise(30, 45, channels)
    mean, std = np.linspace(0.1, 0.6, channels), np.linspace(0.2, 0.9, channels)
    x = Preprocessing("bands", tuple(mean), tuple(std))(pixels, (16, 24))
    assert x.shape == (1, channels, 16, 24)
    assert x.dtype == np.float32
    for c in range(channels):
        band = Image.fromarray(np.ascontiguousarray(pixels[..., c])).resize((24, 16), 3)
        expected = (np.asarray(band) / 255 - mean[c]) / std[c]
        np.testing.assert_allclose(x[0, c], expected, rtol=1e-5, atol=1e-6)


def test_one_and_many():
    pictures = [noise(20, 30, 4, 1), noise(40, 16, 4, 2)]
    x = FOUR(pictures, 16)
    assert x.shape == (2, 4, 16, 16)
    assert np.array_equal(FOUR(pictures[1], 16)[0], x[1])
    stacked = np.stack([pictures[0]] * 3)
    assert np.array_equal(FOUR(stacked, 16)[2], x[0])
    assert np.array_equal(
        FOUR.pixels(loose(stacked), 16)[2].transpose(2, 0, 1),
        FOUR.pixels(loose(stacked), 16)[0].transpose(2, 0, 1),
    )
    grey = Preprocessing("bands", (0.5,), (0.25,))
    flat = noise(20, 30, 1)
    assert np.array_equal(grey([flat[..., 0]], 16), grey([flat], 16))


@pytest.mark.parametrize(
    ("picture", "error", "words"),
    [
        ("cat.png", ArrayTypeError, r"is a str; with 4 bands.*array \(H, W, 4\) of uint8"),
        (Image.new("RGBA", (8, 8)), ArrayTypeError, r"is a Image; .*numpy\.asarray\(image\)"),
        (noise(8, 8, 3), ShapeError, r"shape \(8, 8, 3\); with 4 bands it must be \(H, W, 4\)$"),
        (np.zeros((4, 8, 8), np.uint8), ShapeError, "channels-first: picture.transpose"),
        (np.zeros((8, 8), np.uint8), ShapeError, r"shape \(8, 8\)"),
        (np.zeros((0, 8, 4), np.uint8), ShapeError, r"shape \(0, 8, 4\)"),
        (np.zeros((8, 8, 4)), ArrayTypeError, "dtype float64; .*uint8"),
        (np.zeros((1, 40_000, 4), np.uint8), ImageError, "shape .*40000, 4.* would be resized"),
    ],
)
def test_what_is_no_picture_of_bands(picture, error, words):
    with pytest.raises(error, match=words):
        FOUR([picture], 224)


def test_pictures_and_pixels_of_other_types():
    pictures: Any
    for pictures in (5, None, "cat.png", {1}):
        with pytest.raises(ArrayTypeError, match="they must be a list"):
            FOUR.pixels(pictures, 8)
    pixels: Any
    for pixels in (None, [1], np.zeros((4, 4, 2))):
        with pytest.raises(ArrayTypeError, match=r"must be a NumPy array \(H, W, C\) of uint8"):
            resize_and_crop_bands(pixels, 8)
    for shape in ((4, 4), (4, 0, 2), ()):
        with pytest.raises(ShapeError, match=r"must be \(H, W, C\), not empty"):
            resize_and_crop_bands(np.zeros(shape, np.uint8), 8)


def test_colours_say_where_bands_go():
    with pytest.raises(ShapeError, match=r"Preprocessing\('bands', mean, std\)"):
        Preprocessing()([noise(8, 8, 4)], 8)
    config = dataclasses.replace(CONFIG, in_chans=4)
    model = Model(pvt_ref.init_params(config, rng_of(0)), config)
    with pytest.raises(ConfigError, match=r"Preprocessing\('bands', mean, std\)"):
        model.preprocess([noise(8, 8, 4)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None,), "mode is None; it must be 'RGB', 'L' .*'bands'"),
        ((["RGB"],), "mode is"),
        (("x" * 10_000,), "mode is 'xxx"),
        (("bands", (), ()), "mean is .* needs at least one finite"),
        (("bands", (0.5, 0.5), (1,)), "std is .* needs 2 finite numbers above 0, as many as mean"),
        (("bands", (0.5, 0.5), (1, -1)), "std is"),
        (("L", (10**400,), (1,)), "mean is"),
        (("L", (0.5,), (float("inf"),)), "std is"),
        (("L", (0.5,), None), "std is None"),
        (("L", {0.5}, (1,)), "mean is"),
        (("L", (1j,), (1,)), "mean is"),
    ],
)
def test_what_is_no_preprocessing(arguments, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Preprocessing(*arguments)
    assert len(str(caught.value)) < 300


def test_normalize_refuses_another_number_of_channels():
    like = np.empty(0, np.float32)
    for shape in ((2, 3, 8, 8), (4, 8, 8), (2, 8, 8, 4)):
        with pytest.raises(ShapeError, match=r"must be \(B, 4, H, W\)"):
            FOUR.normalize(np.zeros(shape, np.uint8), like)
    with pytest.raises(ShapeError, match="must be"):
        FOUR.normalize([1], like)


# Files --------------------------------------------------------------------------------------------


def test_bands_in_a_file():
    info = ModelInfo(preprocessing=FOUR)
    stored = json.loads(json.dumps(info.to_dict()))
    assert stored["preprocessing"] == {
        "mode": "bands",
        "mean": [0.1, 0.2, 0.3, 0.4],
        "std": [0.5, 0.6, 0.7, 0.8],
    }
    assert ModelInfo.from_dict(stored) == info


def test_files_of_before_read_as_before():
    for name, mode, channels in (("cifar10", "RGB", 3), ("digits", "L", 1)):
        preprocessing = pvt_ref.load(name).info.preprocessing
        assert (preprocessing.mode, preprocessing.channels) == (mode, channels)
        assert ModelInfo.from_dict(pvt_ref.load(name).info.to_dict()) == pvt_ref.load(name).info


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"new": 1}, "an info has the field 'new', which this version does not know; known are ti"),
        ({"two\nlines": 1}, r"'two\\nlines'"),
        ({"preprocessing": None}, "a preprocessing is a NoneType; it must be a mapping"),
        ({"preprocessing": {"gamma": 2}}, "a preprocessing has the field 'gamma'"),
        ({"preprocessing": {"mode": "HSV"}}, "mode is 'HSV'"),
        ({"preprocessing": {"mean": 3}}, "mean is 3"),
        ({"classes": 5}, "classes are 5"),
        ({"classes": [3]}, "classes are"),
        ({"title": []}, "title is a list"),
        ({"training": []}, "training is a list"),
    ],
)
def test_an_info_that_is_none(change, words):
    with pytest.raises(ConfigError, match=words):
        ModelInfo.from_dict({**ModelInfo().to_dict(), **change})


def test_an_info_of_another_kind():
    values: Any
    for values in ([], None, "info", 3):
        with pytest.raises(ConfigError, match="an info is a "):
            ModelInfo.from_dict(values)
    with pytest.raises(ConfigError, match="needs the field preprocessing"):
        ModelInfo.from_dict({"title": "x"})
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConfigError, match="what JSON cannot"):
        ModelInfo(training={"deep": deep})


# Training -----------------------------------------------------------------------------------------


def four_bands(samples, seed):
    """Three kinds of pictures, told by the band that is bright; the last one only disturbs."""
    rng = rng_of(seed)
    labels = rng.integers(0, 3, samples)
    images = rng.integers(0, 60, (samples, 4, 16, 16))
    images[np.arange(samples), labels] += 150
    return LabelledImages(images.astype(np.uint8), labels, FOUR)


def test_a_model_of_four_bands_is_trained_saved_loaded_and_asked(tmp_path):
    config = dataclasses.replace(CONFIG, in_chans=4, drop_path_rate=0.0)
    data, held_out = four_bands(48, 1), four_bands(24, 2)
    recipe = dataclasses.replace(without_chance(RECIPE), epochs=4, lr=1e-2, ema_decay=0.5)
    info = ModelInfo(classes=("a", "b", "c"), preprocessing=FOUR)
    fit(config, recipe, data, held_out, tmp_path, info=info)
    model = pvt_ref.load(tmp_path / "best.safetensors")
    assert model.info.preprocessing == FOUR
    _, accuracy = evaluate(model.params, config, held_out)
    assert accuracy > 0.5  # a third by chance
    pictures = list(held_out.images.transpose(0, 2, 3, 1))  # (H, W, 4) each
    answers = [a[0].index for a in model.predict(pictures, top=1)]
    assert np.mean(answers == held_out.labels) == pytest.approx(accuracy)
    file = tmp_path / "again.safetensors"
    pvt_ref.save(file, model)
    again = pvt_ref.load(file)
    assert again.info == model.info
    assert again.predict(pictures[0]) == model.predict(pictures[0])


def test_images_of_other_channels_are_refused():
    with pytest.raises(TrainingError, match=r"mode 'bands' has 4 channels.*\(N, 4, H, W\)"):
        LabelledImages(np.zeros((2, 3, 8, 8), np.uint8), np.zeros(2, int), FOUR)
    with pytest.raises(TrainingError, match="look channels-last"):
        LabelledImages(np.zeros((2, 8, 8, 4), np.uint8), np.zeros(2, int), FOUR)
    with pytest.raises(TrainingError, match="preprocessing is a str"):
        LabelledImages(np.zeros((2, 8, 8, 4), np.uint8), np.zeros(2, int), loose("RGB"))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_augmentation_moves_all_channels_alike(channels):
    base = rng_of(0).standard_normal((6, 1, 9, 8)).astype(np.float32)
    images = np.repeat(base, channels, axis=1)
    for changed in (
        random_crop(images, 2, rng_of(1)),
        random_flip(images, rng_of(1)),
        cutout(images, 3, rng_of(1)),
        random_erasing(images, 0.9, rng_of(1)),
        mixup(images, np.eye(6), 0.5, rng_of(1))[0],
        cutmix(images, np.eye(6), 1.0, rng_of(1))[0],
    ):
        assert changed.shape == images.shape
        assert np.array_equal(changed, np.repeat(changed[:, :1], channels, axis=1))
        assert not np.array_equal(changed, images)


IMAGES = np.zeros((2, 3, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda r: random_crop(IMAGES, -1, r),
            RangeError,
            "padding is -1; .*whole number at least",
        ),
        (lambda r: random_crop(IMAGES, loose(1.5), r), RangeError, "padding is 1.5"),
        (lambda r: random_crop(IMAGES[0], 0, r), ShapeError, r"\(3, 8, 8\); they must be \(B, C"),
        (lambda r: random_crop([1], 1, r), ArrayTypeError, "got a list"),
        (lambda r: random_crop(IMAGES, 1, loose(5)), ArrayTypeError, "rng is int"),
        (lambda r: random_flip(IMAGES[0], r), ShapeError, "must be"),
        (lambda r: random_flip(IMAGES, loose(None)), ArrayTypeError, "rng is NoneType"),
        (lambda r: cutout(IMAGES, -2, r), RangeError, "side is -2"),
        (lambda r: cutout(IMAGES, loose("3"), r), RangeError, "side is '3'"),
        (lambda r: mixup(IMAGES, np.eye(2), -0.1, r), RangeError, "alpha is -0.1"),
        (lambda r: mixup(IMAGES, np.eye(2), float("nan"), r), RangeError, "alpha is nan"),
        (lambda r: mixup(IMAGES, np.eye(3), 0.2, r), ShapeError, r"targets have shape \(3, 3\)"),
        (lambda r: random_erasing(IMAGES, 1.5, r), RangeError, "probability is 1.5"),
        (lambda r: random_erasing(IMAGES, True, r), RangeError, "probability is True"),
        (lambda r: random_erasing(IMAGES[0], 0, r), ShapeError, "must be"),
        (lambda r: random_erasing(IMAGES, 0.5, loose(None)), ArrayTypeError, "rng is NoneType"),
        (
            lambda r: random_erasing(IMAGES, 0.5, r, area=(0, 0.5)),
            RangeError,
            r"area\[0\] is 0; it must be a number above 0",
        ),
        (
            lambda r: random_erasing(IMAGES, 0.5, r, area=(0.4, 0.3)),
            RangeError,
            r"area\[1\] is 0.3; it must be a number .*at least 0.4",
        ),
        (
            lambda r: random_erasing(IMAGES, 0.5, r, ratio=loose(3)),
            RangeError,
            "ratio is 3; it must be two numbers, the smaller one first",
        ),
        (lambda r: cutmix(IMAGES, np.eye(2), -0.1, r), RangeError, "alpha is -0.1"),
        (lambda r: cutmix(IMAGES, np.eye(3), 1, r), ShapeError, r"targets have shape \(3, 3\)"),
        (lambda r: cutmix(IMAGES, None, 1, r), ShapeError, r"targets have shape \(\)"),
        (lambda r: cutmix(IMAGES, np.eye(2), 1, loose(5)), ArrayTypeError, "rng is int"),
        (lambda r: one_hot(np.zeros(2), 3, IMAGES), ArrayTypeError, "labels are float64"),
        (lambda r: one_hot(loose([1, 2]), 3, IMAGES), ArrayTypeError, "labels are list"),
        (lambda r: one_hot(np.zeros((2, 1), int), 3, IMAGES), ShapeError, r"shape \(2, 1\)"),
        (lambda r: one_hot(np.zeros(2, int), 0, IMAGES), RangeError, "classes is 0"),
    ],
)
def test_augmentation_says_what_is_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call(rng_of(0))


# Evaluation ---------------------------------------------------------------------------------------


def test_evaluation_needs_no_more_memory_for_more_data():
    config = dataclasses.replace(CONFIG, in_chans=4)
    params = pvt_ref.init_params(config, rng_of(0))
    peaks = []
    for samples in (256, 2048):
        data = four_bands(samples, 0)
        evaluate(params, config, data)
        tracemalloc.start()
        evaluate(params, config, data)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_large_images_are_evaluated_few_at_a_time(monkeypatch):
    sizes = []

    def spy(params, images, config, ops=None):
        sizes.append(images.shape[0])
        return np.zeros((images.shape[0], 3), np.float32)

    monkeypatch.setattr("pvt_ref.data.labelled.forward", spy)
    params = pvt_ref.init_params(CONFIG, rng_of(0))
    grey = Preprocessing("L", (0.5,), (0.5,))
    for side, expected in ((32, [256, 44]), (224, [20] * 15), (2048, [1] * 3)):
        samples = 300 if side < 2048 else 3
        images = np.broadcast_to(np.uint8(7), (samples, 1, side, side))
        sizes.clear()
        evaluate(params, CONFIG, LabelledImages(images, np.zeros(samples, int), grey))
        assert sizes == expected
        sizes.clear()
        evaluate(params, CONFIG, LabelledImages(images, np.zeros(samples, int), grey), 2)
        assert set(sizes) <= {1, 2}


def test_a_picture_of_two_channels_in_a_file_is_grey_with_alpha():
    file = io.BytesIO()
    Image.new("LA", (8, 8), (40, 255)).save(file, "PNG")
    assert Preprocessing("L", (0.0,), (1.0,))([file], 8)[0, 0, 0, 0] == np.float32(40) / 255
