"""Random changes of photos: against Pillow and plain formulas, and by what must hold for all."""

import colorsys
import dataclasses
import importlib
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loose import loose
from PIL import Image, ImageEnhance
from scipy.stats import kstest
from strategies import rng_of, seeds

from pvt_ref.data.photo_augment import TRANSFORMATIONS, draw_crop, turn_hue
from pvt_ref.draws import What, generator
from pvt_ref.errors import ArrayTypeError, ImageError, RangeError, ShapeError
from pvt_ref.train import PhotoAugment

BICUBIC = Image.Resampling.BICUBIC
FILL = (1, 2, 3)

#: With everything on.
ALL = PhotoAugment(jitter=(0.4, 0.3, 0.5, 0.1), rand_augment=(2, 9))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(rng_of(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)  # (H, W, 3)


# The crop ---------------------------------------------------------------------------------------


@st.composite
def intervals(draw, least: float, most: float) -> tuple[float, float]:
    low, high = sorted((draw(st.floats(least, most)), draw(st.floats(least, most))))
    return low, high


sides = st.one_of(st.integers(1, 8), st.integers(9, 400))


@given(seed=seeds, width=sides, height=sides, area=intervals(0.01, 1), ratio=intervals(0.1, 10))
def test_a_crop_lies_inside_and_has_the_ratio_that_was_asked_for(seed, width, height, area, ratio):
    left, top, right, bottom = draw_crop((width, height), area, ratio, rng_of(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    if min(w, h) > 1:  # to half a pixel
        assert (w + 0.5) / (h - 0.5) >= ratio[0]
        assert (w - 0.5) / (h + 0.5) <= ratio[1]


@given(seed=seeds, width=st.integers(20, 400), height=st.integers(20, 400), data=st.data())
def test_a_crop_that_fits_has_the_area_that_was_asked_for(seed, width, height, data):
    most = 0.7 * min(width, height) / max(width, height)  # the ratios below always fit
    low, high = data.draw(intervals(0.01, most))
    left, top, right, bottom = draw_crop((width, height), (low, high), (0.75, 4 / 3), rng_of(seed))
    w, h = right - left, bottom - top
    assert (w - 0.5) * (h - 0.5) <= high * width * height
    assert (w + 0.5) * (h + 0.5) >= low * width * height


def test_areas_ratios_and_places_are_drawn_evenly():
    rng = rng_of(1)
    boxes = np.array(
        [draw_crop((900, 1100), (0.08, 0.6), (3 / 4, 4 / 3), rng) for _ in range(3000)]
    )
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = (w * h / (900 * 1100) - 0.08) / 0.52
    assert kstest(area, "uniform").statistic < 0.03
    shape = (np.log(w / h) / np.log(4 / 3) + 1) / 2
    assert kstest(shape, "uniform").statistic < 0.03
    assert kstest((boxes[:, 0] + 0.5) / (900 - w + 1), "uniform").statistic < 0.03
    assert kstest((boxes[:, 1] + 0.5) / (1100 - h + 1), "uniform").statistic < 0.03
    assert abs(np.corrcoef(w * h, w / h)[0, 1]) < 0.06


def test_a_crop_reaches_both_ends():
    rng = rng_of(2)
    boxes = np.array([draw_crop((7, 5), (0.05, 0.5), (3 / 4, 4 / 3), rng) for _ in range(500)])
    assert boxes[:, 0].min() == boxes[:, 1].min() == 0
    assert (boxes[:, 2].max(), boxes[:, 3].max()) == (7, 5)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 400), (0, 133, 100, 266)),  # 100 / 133 is 3 : 4
        ((400, 100), (133, 0, 266, 100)),
        ((1, 1000), (0, 499, 1, 500)),
        ((1000, 1), (499, 0, 500, 1)),
    ],
)
def test_after_ten_tries_it_is_the_middle(size, box):
    rng, same = rng_of(3), rng_of(3)
    assert draw_crop(size, (1.0, 1.0), (3 / 4, 4 / 3), rng) == box
    same.random(20)
    assert rng.bit_generator.state == same.bit_generator.state
    assert draw_crop((100, 400), (1.0, 1.0), (0.25, 0.25), rng) == (0, 0, 100, 400)
    assert draw_crop((1, 9), (1.0, 1.0), (4, 4), rng) == (0, 4, 1, 5)  # a pixel at least
    assert draw_crop((9, 1), (1.0, 1.0), (0.2, 0.2), rng) == (4, 0, 5, 1)


def test_a_crop_is_resized_as_pillow_does():
    image = noise(60, 50)
    augment = PhotoAugment(crop_area=(0.3, 0.6))
    box = draw_crop((60, 50), (0.3, 0.6), augment.crop_ratio, rng_of(4))
    cropped = augment(image, (24, 32), rng_of(4))
    assert cropped.tobytes() == image.resize((32, 24), BICUBIC, box=box).tobytes()
    # which near the border looks beyond the box, and elsewhere not
    plain = image.crop(box).resize((32, 24), BICUBIC)
    assert np.array_equal(pixels(cropped)[4:-4, 4:-4], pixels(plain)[4:-4, 4:-4])


def test_a_large_crop_is_shrunk_in_two_steps_with_nearly_the_same_result():
    with Image.open(Path(__file__).parents[1] / "examples" / "chelsea.jpg") as photo:
        image = photo.convert("RGB").resize((1800, 1400))
    augment = PhotoAugment(crop_area=(0.5, 0.6))
    box = draw_crop(image.size, (0.5, 0.6), augment.crop_ratio, rng_of(4))
    expected = pixels(image.resize((50, 40), BICUBIC, box=box))
    difference = np.abs(pixels(augment(image, (40, 50), rng_of(4))) - expected)
    assert difference.max() <= 3
    assert difference.mean() < 0.5


@pytest.mark.parametrize(
    ("size", "box"),
    [((20, 20), (30, 0, 70, 40)), ((20, 50), (0, 0, 100, 40)), ((20, 10), (40, 0, 60, 40))],
)
def test_without_a_crop_it_is_the_middle_of_the_right_shape(size, box):
    image = noise(100, 40)
    H, W = size
    expected = image.resize((W, H), BICUBIC, box=box)
    assert PhotoAugment(crop_area=None)(image, size, rng_of(0)).tobytes() == expected.tobytes()


# Colours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "kind"),
    [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
)
@given(seed=seeds, strength=st.floats(0.01, 2))
def test_a_jitter_is_pillows_with_the_factor_that_was_drawn(which, kind, seed, strength):
    jitter: Any = [0.0] * 4
    jitter[which] = strength
    image = noise(9, 6, seed)
    changed = PhotoAugment(crop_area=None, jitter=jitter)(image, (6, 9), rng_of(seed))
    factor = rng_of(seed).uniform(max(0, 1 - strength), 1 + strength)
    assert changed.tobytes() == kind(image).enhance(factor).tobytes()


def test_hues_are_turned_as_far_as_was_drawn():
    image = noise(9, 6, 5)
    seen = []
    for seed in range(300):
        augment = PhotoAugment(crop_area=None, jitter=(0, 0, 0, 0.2))
        changed = augment(image, (6, 9), rng_of(seed))
        turns = rng_of(seed).uniform(-0.2, 0.2)
        assert changed.tobytes() == turn_hue(image, turns).tobytes()
        seen.append(turns)
    assert -0.2 <= min(seen) < -0.19 < 0.19 < max(seen) <= 0.2


def test_jitters_come_in_every_order():
    augment = PhotoAugment(crop_area=None, jitter=(0.5, 0, 0.5, 0.3))
    image, orders = noise(6, 6, 7), set()
    for seed in range(60):
        rng = rng_of(seed)
        order = [int(i) for i in rng.permutation([0, 2, 3])]
        expected = image
        for i in order:
            if i == 3:
                expected = turn_hue(expected, rng.uniform(-0.3, 0.3))
            else:
                kind = ImageEnhance.Color if i else ImageEnhance.Brightness
                expected = kind(expected).enhance(rng.uniform(0.5, 1.5))
        assert augment(image, 6, rng_of(seed)).tobytes() == expected.tobytes()
        orders.add(tuple(order))
    assert len(orders) == 6


def test_a_hue_goes_round_the_circle():
    colours = Image.fromarray(np.array([[[255, 0, 0], [90, 90, 90], [0, 0, 200]]], np.uint8))
    third = pixels(turn_hue(colours, 1 / 3))[0].tolist()
    assert third == [[0, 255, 0], [90, 90, 90], [200, 0, 0]]
    back = pixels(turn_hue(colours, -1 / 3))[0].tolist()
    assert back == [[0, 0, 255], [90, 90, 90], [0, 200, 0]]
    for turns in (0, 1e-4, 1, -1):
        assert turn_hue(colours, turns).tobytes() == colours.tobytes()


@given(seed=seeds, turns=st.floats(-0.5, 0.5))
def test_a_turned_hue_is_that_of_the_standard_library(seed, turns):
    image = noise(4, 4, seed)
    for before, after in zip(
        pixels(image).reshape(-1, 3), pixels(turn_hue(image, turns)).reshape(-1, 3), strict=True
    ):
        h, s, v = colorsys.rgb_to_hsv(*before / 255)
        expected = 255 * np.array(colorsys.hsv_to_rgb((h + turns) % 1, s, v))
        assert np.abs(after - expected).max() < 8  # eight bits a hue, in Pillow


# RandAugment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [-1.0, -0.3, 0.0, 0.6, 1.0])
def test_colours_are_changed_as_the_formulas_say(s):
    image = noise(12, 9, 1)
    x = pixels(image)
    changed = {name: pixels(change(image, s, FILL)) for name, change in TRANSFORMATIONS.items()}
    factor = 1 + 0.9 * s
    grey = pixels(image.convert("L"))[..., None]
    assert np.array_equal(changed["identity"], x)
    for name, still in (("brightness", 0), ("colour", grey), ("contrast", round(grey.mean()))):
        expected = (still + factor * (x - still)).clip(0, 255)
        assert np.abs(changed[name] - expected).max() <= 1, name
    from_here = 256 * (1 - abs(s))
    expected = np.where(x >= from_here, 255 - x, x)
    assert np.mean(changed["solarize"] != expected) < 0.02  # round(from_here)
    bits = 8 - round(4 * abs(s))
    assert np.array_equal(changed["posterize"], x >> (8 - bits) << (8 - bits))
    narrow = Image.fromarray((40 + x * 150 / 255).astype(np.uint8))
    low, high = pixels(narrow).min((0, 1)), pixels(narrow).max((0, 1))
    expected = 255 * (pixels(narrow) - low) / (high - low)
    stretched = TRANSFORMATIONS["autocontrast"](narrow, s, FILL)
    assert np.abs(pixels(stretched) - expected).max() <= 1
    if s in (-1.0, 1.0):
        smooth = ImageEnhance.Sharpness(image).enhance(0)
        expected = pixels(smooth) + factor * (x - pixels(smooth))
        assert np.abs(changed["sharpness"] - expected.clip(0, 255)).max() <= 1


def test_equalized_levels_are_spread_evenly():
    dark = Image.fromarray((255 * rng_of(3).random((80, 90, 3)) ** 3).astype(np.uint8))
    spread = pixels(TRANSFORMATIONS["equalize"](dark, 0.5, FILL))
    assert (
        kstest(spread.ravel() / 255, "uniform").statistic
        < 0.2
        < kstest(pixels(dark).ravel() / 255, "uniform").statistic
    )
    for channel in range(3):  # and keep their order
        before, after = pixels(dark)[..., channel].ravel(), spread[..., channel].ravel()
        order = np.argsort(before, kind="stable")
        assert np.all(np.diff(after[order]) >= 0)


@pytest.mark.parametrize("s", [-1.0, -0.37, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["rotate", "shear x", "shear y", "translate x", "translate y"])
def test_pixels_are_moved_as_the_formulas_say(name, s):
    """Red and green are the coordinates, so that a pixel says where it came from."""
    W, H = 150, 100
    x, y = np.meshgrid(np.arange(W), np.arange(H))
    image = Image.fromarray(np.stack((60 + x, 60 + y, 0 * x + 200), -1).astype(np.uint8))
    moved = pixels(TRANSFORMATIONS[name](image, s, FILL))
    right, down = x + 0.5 - W / 2, y + 0.5 - H / 2  # from the middle
    if name == "rotate":  # counter-clockwise, and y points down
        angle = math.radians(30 * s)
        right, down = (
            math.cos(angle) * right - math.sin(angle) * down,
            math.sin(angle) * right + math.cos(angle) * down,
        )
    elif name == "shear x":
        right = right + 0.3 * s * down
    elif name == "shear y":
        down = down + 0.3 * s * right
    elif name == "translate x":
        right = right - round(s * W * 150 / 331)
    else:
        down = down - round(s * H * 150 / 331)
    from_x, from_y = right + W / 2 - 0.5, down + H / 2 - 0.5
    inside = (from_x > 0) & (from_x < W - 1) & (from_y > 0) & (from_y < H - 1)
    assert np.mean(inside) > 0.5
    assert np.abs(moved[..., 0] - 60 - from_x)[inside].max() <= 1.01
    assert np.abs(moved[..., 1] - 60 - from_y)[inside].max() <= 1.01
    outside = (from_x < -1) | (from_x > W) | (from_y < -1) | (from_y > H)
    assert np.all(moved[outside] == FILL)
    assert s == 0 or np.mean(outside) > 0.01


def test_every_transformation_is_drawn_with_both_signs(monkeypatch):
    seen = []
    for name in TRANSFORMATIONS:
        monkeypatch.setitem(
            TRANSFORMATIONS,
            name,
            lambda image, s, fill, name=name: seen.append((name, s, fill)) or image,
        )
    augment = PhotoAugment(crop_area=None, rand_augment=(3, 7), fill=FILL)
    rng, image = rng_of(6), noise(2, 2)
    for _ in range(1000):
        augment(image, 2, rng)
    assert len(seen) == 3000
    assert {(abs(s), fill) for _, s, fill in seen} == {(0.7, FILL)}
    for name in TRANSFORMATIONS:
        strengths = [s for other, s, _ in seen if other == name]
        assert 160 < len(strengths) < 270  # 214 expected
        assert 0.35 < np.mean(np.array(strengths) > 0) < 0.65


def test_what_comes_in_is_the_mean_colour():
    assert PhotoAugment().fill == (124, 116, 104)
    white = Image.new("RGB", (40, 40), "white")
    seen = set()
    augment = PhotoAugment(crop_area=None, rand_augment=(1, 10))
    for seed in range(60):
        colours = augment(white, 40, rng_of(seed)).getcolors()
        seen |= {colour for _, colour in colours}
    assert (124, 116, 104) in seen


# All together -----------------------------------------------------------------------------------


@given(
    seed=seeds,
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    H=st.integers(1, 20),
    W=st.integers(1, 20),
)
def test_a_picture_of_any_size_becomes_one_of_the_size_asked_for(seed, width, height, H, W):
    image = noise(width, height, seed)
    before = image.tobytes()
    changed = ALL(image, (H, W), rng_of(seed))
    assert (changed.mode, changed.size) == ("RGB", (W, H))
    assert image.tobytes() == before
    again = ALL(image, (H, W), rng_of(seed))
    assert again.tobytes() == changed.tobytes()


def test_the_draws_come_in_the_order_that_is_described():
    image = noise(70, 50)
    for seed in range(30):
        rng = rng_of(seed)
        box = draw_crop((70, 50), loose(ALL.crop_area), ALL.crop_ratio, rng)
        expected = image.resize((24, 24), BICUBIC, box=box)
        for i in rng.permutation(4):
            if i == 3:
                expected = turn_hue(expected, rng.uniform(-0.1, 0.1))
                continue
            low, high = ((0.6, 1.4), (0.7, 1.3), (0.5, 1.5))[i]
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
            expected = kind(expected).enhance(rng.uniform(low, high))
        for _ in range(2):
            change = list(TRANSFORMATIONS.values())[rng.integers(14)]
            sign = 1 if rng.random() < 0.5 else -1
            expected = change(expected, 0.9 * sign, ALL.fill)
        drawn = rng_of(seed)
        assert ALL(image, 24, drawn).tobytes() == expected.tobytes()
        assert drawn.bit_generator.state == rng.bit_generator.state


def test_what_is_off_draws_nothing():
    image = noise(30, 20)
    rng, crop = rng_of(1), rng_of(1)
    before = rng.bit_generator.state
    PhotoAugment(crop_area=None, jitter=(0, 0, 0, 0), rand_augment=(0, 10))(image, 8, rng)
    assert rng.bit_generator.state == before
    PhotoAugment()(image, 8, rng)
    draw_crop(image.size, (0.08, 1.0), (3 / 4, 4 / 3), crop)
    assert rng.bit_generator.state == crop.bit_generator.state != before


def test_a_photo_has_a_generator_of_its_own_place():
    assert What.PHOTO == 7
    image = noise(30, 20)
    places = [(seed, epoch, sample) for seed in (0, 1) for epoch in (0, 1) for sample in (0, 1)]
    changed = {
        ALL(image, 16, generator(seed, What.PHOTO, *where)).tobytes() for seed, *where in places
    }
    assert len(changed) == len(places)


def test_fields_go_to_json_and_back():
    for augment in (PhotoAugment(), ALL, PhotoAugment(crop_area=None, fill=FILL)):
        there = json.loads(json.dumps(augment.to_dict()))
        assert there == augment.to_dict()  # nothing in it is of another kind
        again = PhotoAugment(**there)
        assert again == augment
        assert hash(again) == hash(augment)
        assert again.to_dict() == there
    numbers = loose(PhotoAugment)(
        rand_augment=(np.int64(2), np.float32(7)), crop_area=(0, 1)[1:] * 2
    )
    assert list(map(type, numbers.rand_augment)) == [int, float]
    assert numbers.crop_area == (1.0, 1.0)


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_area": (0, 1)}, "crop_area[0] is 0; it must be a number above 0 and at most 1"),
        (
            {"crop_area": (0.5, 1.1)},
            "crop_area[1] is 1.1; it must be a number at least 0.5 and at most 1",
        ),
        ({"crop_area": (0.5, 0.4)}, "crop_area[1] is 0.4; it must be a number"),
        ({"crop_area": 0.5}, "crop_area is 0.5; it must be two numbers, the smaller one first"),
        ({"crop_area": "ab"}, "crop_area is 'ab'"),
        ({"crop_area": (0.1, 0.2, 0.3)}, "crop_area is (0.1, 0.2, 0.3); it must be two numbers"),
        ({"crop_ratio": (0.5, math.inf)}, "crop_ratio[1] is inf"),
        ({"crop_ratio": (1e-9, 1)}, "crop_ratio[0] is 1e-09; it must be a number at least 0.01"),
        ({"crop_ratio": None}, "crop_ratio is None"),
        ({"jitter": (0.1, 0.1, 0.1)}, "jitter is (0.1, 0.1, 0.1); it must be 4 numbers, (bright"),
        ({"jitter": (0.1, -0.1, 0, 0)}, "jitter[1] is -0.1; it must be a number at least 0"),
        (
            {"jitter": (0, 0, 0, 0.6)},
            "jitter[3] is 0.6; it must be a number at least 0 and at most",
        ),
        ({"jitter": 0.4}, "jitter is 0.4; it must be 4 numbers"),
        ({"rand_augment": (1.5, 9)}, "rand_augment[0] is 1.5; it must be a whole number"),
        ({"rand_augment": (-1, 9)}, "rand_augment[0] is -1"),
        ({"rand_augment": (2, 11)}, "rand_augment[1] is 11; it must be a number at least 0 and at"),
        ({"rand_augment": 2}, "rand_augment is 2; it must be 2 numbers, (count, magnitude)"),
        ({"fill": (0, 0, 256)}, "fill[2] is 256; it must be a whole number at least 0 and at most"),
        ({"fill": (0, 0)}, "fill is (0, 0); it must be 3 numbers, (red, green, blue)"),
    ],
)
def test_fields_say_what_is_wrong_with_them(change, message):
    with pytest.raises(RangeError, match=re.escape(message)):
        dataclasses.replace(ALL, **change)


@pytest.mark.parametrize(
    ("image", "size", "rng", "error", "message"),
    [
        (noise(4, 4).convert("L"), 4, rng_of(0), ImageError, "must be in mode RGB; .*read_rgb"),
        (Image.new("RGB", (0, 4)), 4, rng_of(0), ImageError, "has no pixels"),
        (np.zeros((4, 4, 3), np.uint8), 4, rng_of(0), ArrayTypeError, "image is a ndarray"),
        (noise(4, 4), 0, rng_of(0), ShapeError, "size is 0; it must be a side"),
        (noise(4, 4), (4, 2.5), rng_of(0), ShapeError, r"size is \(4, 2.5\)"),
        (noise(4, 4), 2**30, rng_of(0), ImageError, "suspiciously large; .*smaller size"),
        (noise(4, 4), 4, 0, ArrayTypeError, "rng is int"),
        (noise(4, 4), 4, np.random.RandomState(0), ArrayTypeError, "rng is RandomState"),
    ],
)
def test_a_call_says_what_is_wrong_with_it(image, size, rng, error, message):
    with pytest.raises(error, match=message):
        ALL(image, size, rng)


def test_a_photo_that_breaks_off_is_refused():
    file = io.BytesIO()
    noise(64, 64).save(file, "JPEG")
    broken = Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))
    with pytest.raises(ImageError, match="mode RGB, 64x64"):
        ALL(broken, 16, rng_of(0))


def test_the_picture_in_the_docs_is_what_the_package_draws(monkeypatch):
    tools = Path(__file__).parents[1] / "docs" / "tools"
    monkeypatch.syspath_prepend(str(tools))
    augmentations = importlib.import_module("augmentations")
    monkeypatch.delitem(sys.modules, "augmentations")
    assert augmentations.PICTURE.stat().st_size < 250_000
    with Image.open(augmentations.PICTURE) as picture:
        shown = pixels(picture)
    drawn = pixels(augmentations.draw())
    assert shown.shape == drawn.shape
    assert np.mean(np.abs(shown - drawn)) < 4  # JPEG rounds, and letters differ elsewhere
    names = " ".join(augmentations.changed())
    assert all(name in names for name in TRANSFORMATIONS if name != "identity")
