"""Photos with label maps: read, changed together at random, compared with answers, and shown."""

import colorsys
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loose import loose
from PIL import Image, ImageDraw
from segmentors import PVT, SEGMENTORS
from small_pairs import (
    CLASSES,
    COLOURS,
    HEIGHT,
    VOID,
    VOID_COLOUR,
    WIDTH,
    pairs,
    scene,
    write_pairs,
)
from strategies import rng_of, seeds

from pvt_ref import Preprocessing
from pvt_ref.data.iou import IGNORED, class_iou, count_pixels, mean_iou, pixel_accuracy
from pvt_ref.data.overlay import class_colours, indexed, overlay
from pvt_ref.data.pair_augment import PairAugment, distort_colours
from pvt_ref.data.pairs import LabelledPairs
from pvt_ref.errors import (
    ArrayTypeError,
    ConfigError,
    ImageError,
    MissingFileError,
    RangeError,
    ShapeError,
    TrainingError,
)

# Pairs in folders ---------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    return write_pairs(tmp_path / "scenes", 5)


def save_labels(root, name: str, values, mode: str | None = None) -> None:
    image = Image.fromarray(np.asarray(values, np.uint8))
    (image.convert(mode) if mode else image).save(root / "labels" / name)


def test_pairs_are_those_of_one_name_in_the_order_of_code_points(root):
    for name in ("b", "B", "a2", "a10"):
        photo, labels = scene(len(name))
        Image.fromarray(photo).save(root / "images" / f"{name}.jpg")
        save_labels(root, f"{name}.png", labels)
    (root / "images" / "notes.txt").write_text("no photo")
    (root / "images" / ".hidden.png").write_bytes(b"")
    save_labels(root, "unasked.png", np.zeros((3, 3)))
    data = pairs(root)
    assert [photo for photo, _ in data.files] == [
        *(f"00{i}.png" for i in range(5)), "B.jpg", "a10.jpg", "a2.jpg", "b.jpg",
    ]  # fmt: skip
    assert all(labels == photo[:-4] + ".png" for photo, labels in data.files)
    assert len(data) == 9
    chosen = pairs(root, names=["b", "003"])  # in the order of the list
    assert chosen.files == (("b.jpg", "b.png"), ("003.png", "003.png"))


def test_names_may_have_dots_and_endings_capitals(root):
    photo, labels = scene(7)
    Image.fromarray(photo).save(root / "images" / "2011.05.jpg")
    Image.fromarray(photo).save(root / "images" / "DSC_01.JPG")
    for name in ("2011.05.png", "DSC_01.png"):
        save_labels(root, name, labels)
    assert pairs(root).files[-2:] == (("2011.05.jpg", "2011.05.png"), ("DSC_01.JPG", "DSC_01.png"))


def test_what_is_read_is_what_was_written(root):
    data = pairs(root)
    for i in range(5):
        photo, labels = data.read(i)
        expected, of_file = scene(i)
        np.testing.assert_array_equal(np.asarray(photo), expected)
        np.testing.assert_array_equal(np.asarray(labels) == 255, of_file == VOID)
        np.testing.assert_array_equal(np.asarray(labels)[:-2], of_file[:-2])
        assert set(np.unique(np.asarray(labels))) <= {0, 1, 2, 3, 255}


def test_whole_pairs_are_stretched_and_labels_keep_their_size(root):
    save_labels(root, "000.png", np.repeat(np.repeat(scene(0)[1], 3, 0), 3, 1))
    data = pairs(root, (16, 24), whole=(40, 20))
    pixels, labels = data.pair(0)
    assert (pixels.shape, pixels.dtype) == ((3, 40, 20), np.uint8)
    assert (labels.shape, labels.dtype) == ((72, 96), np.uint8)
    resized = Image.fromarray(scene(0)[0]).resize((20, 40), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(resized))
    assert pairs(root, (16, 24)).pair(1)[0].shape == (3, 16, 24)
    assert data.size == (16, 24)


def test_labels_are_the_last_channel_of_pixels(root):
    data = pairs(root, (12, 16))
    pixels = data.pixels(np.array([3, 0]))
    assert (pixels.shape, pixels.dtype) == ((2, 4, 12, 16), np.uint8)
    photo, labels = scene(3)
    resized = Image.fromarray(photo).resize((16, 12), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels[0, :3].transpose(1, 2, 0), np.asarray(resized))
    assert set(np.unique(pixels[:, 3])) <= {0, 1, 2, 3, 255}
    np.testing.assert_array_equal(pixels[0, 3, 0], labels[1, 1::2])  # nearest, not a mean
    np.testing.assert_array_equal(pixels, data.drawn_pixels(np.array([3, 0]), 1, 2))
    np.testing.assert_array_equal(data.pixels(slice(0, 2)), data.pixels(np.array([0, 1])))
    batch = data.batch(np.array([3]), np.zeros(1, np.float32))
    assert (batch.shape, batch.dtype) == ((1, 3, 12, 16), np.float32)
    expected = data.preprocessing.normalize(pixels[:1, :3], np.zeros(1, np.float32))
    np.testing.assert_array_equal(batch, expected)


def mode_of(path) -> str:
    with Image.open(path) as image:
        return image.mode


def test_a_palette_counts_by_its_numbers(root):
    labels = scene(1)[1]
    image = Image.fromarray(labels, "P")
    image.putpalette([*range(255, -1, -1)] * 3)
    image.save(root / "labels" / "001.png")
    assert mode_of(root / "labels" / "001.png") == "P"
    np.testing.assert_array_equal(pairs(root).read(1)[1], np.where(labels == VOID, 255, labels))


def test_two_classes_may_be_black_and_white(root):
    mask = scene(1)[1] == 2
    Image.fromarray(mask).save(root / "labels" / "001.png")
    assert mode_of(root / "labels" / "001.png") == "1"
    np.testing.assert_array_equal(pairs(root).read(1)[1], mask.astype(np.uint8))


def test_values_are_replaced_all_at_once(root):
    values = np.array([[0, 1, 2], [3, 4, 255]])
    save_labels(root, "000.png", values)
    ade = {0: 255, **{k: k - 1 for k in range(1, 5)}}
    found = np.asarray(pairs(root, replaced=ade).read(0)[1])
    np.testing.assert_array_equal(found, [[255, 0, 1], [2, 3, 255]])
    found = np.asarray(pairs(root, replaced={3: 0, 0: 3, 4: 255}).read(0)[1])
    np.testing.assert_array_equal(found, [[3, 1, 2], [0, 255, 255]])


@pytest.mark.parametrize(
    ("values", "mode", "says"),
    [
        ([[0, 4], [7, 255]], None, "holds 4, 7; classes are 0 to 3, and 255 where a pixel does no"),
        (
            [[0, 1], [2, 3]],
            "RGB",
            "is of mode RGB; it must be a picture of one channel, mode L, or",
        ),
        ([[0, 1], [2, 3]], "LA", "is of mode LA"),
        ([[0, 1], [2, 3]], "I;16", "is of mode I;16"),
    ],
)
def test_a_label_map_that_is_none_is_refused_by_name(root, values, mode, says):
    save_labels(root, "002.png", values, mode)
    data = pairs(root)
    with pytest.raises(ImageError, match=says) as caught:
        data.read(2)
    assert str(root / "labels" / "002.png") in str(caught.value)
    for ask in (data.pair, lambda i: data.pixels(slice(i, i + 1))):
        with pytest.raises(ImageError, match=says):
            ask(2)


def test_check_names_what_is_damaged_and_goes_on(root):
    path = root / "labels" / "001.png"
    path.write_bytes(path.read_bytes()[:-30])
    (root / "images" / "003.png").write_bytes(b"no picture")
    save_labels(root, "004.png", np.full((2, 2), 200))
    data = pairs(root)
    for workers in (1, 3):
        found = list(data.check(workers))
        assert [x is None for x in found] == [True, False, True, False, False]
        assert [x[0] for x in found if x] == ["001.png", "003.png", "004.png"]
        assert str(path) in str(found[1])
        assert "holds 200" in str(found[4])
    path.unlink()
    assert "001.png" in str(list(data.check())[1])


def test_missing_files_are_named(root, tmp_path):
    with pytest.raises(MissingFileError, match=r"there is no folder '.*none'; check the spelling"):
        LabelledPairs(tmp_path / "none", root / "labels", CLASSES, 16)
    with pytest.raises(MissingFileError, match="there is no folder"):
        LabelledPairs(root / "images", root / "labels" / "000.png", CLASSES, 16)
    with pytest.raises(MissingFileError, match="has no photo 'seven', which the list names"):
        pairs(root, names=["000", "seven"])
    (root / "labels" / "004.png").unlink()
    with pytest.raises(MissingFileError, match=r"has no label map '004.png' for the photo 004.png"):
        pairs(root)
    assert len(pairs(root, names=["000"])) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match=r"there is no photo in '.*empty'"):
        LabelledPairs(tmp_path / "empty", root / "labels", CLASSES, 16)


def test_two_photos_of_one_name_are_refused(root):
    Image.fromarray(scene(1)[0]).save(root / "images" / "001.jpg")
    with pytest.raises(TrainingError, match=r"the photos 001.jpg and 001.png, which would share"):
        pairs(root)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"size": 0}, ShapeError, "size is 0"),
        ({"size": (16, 16, 3)}, ShapeError, "the side of a square or"),
        ({"whole": 1.5}, ShapeError, "size is 1.5"),
        ({"preprocessing": "RGB"}, ArrayTypeError, "preprocessing is a str"),
        (
            {"preprocessing": Preprocessing("L", (0.5,), (0.5,))},
            ConfigError,
            "preprocessing has mode 'L'; needed is 'RGB'",
        ),
        ({"augment": 3}, ArrayTypeError, "augment is a int; it must be a PairAugment, or None"),
        ({"replaced": {9: 256}}, ConfigError, "replaced maps 9 to 256; both must be whole numbe"),
        ({"replaced": {-1: 0}}, ConfigError, "replaced maps -1 to 0"),
        ({"replaced": {1.0: 0}}, ConfigError, "replaced maps 1.0 to 0"),
    ],
    ids=str,
)
def test_wrong_arguments_of_pairs_are_refused(root, changes, error, says):
    with pytest.raises(error, match=says):
        pairs(root, **changes)


@pytest.mark.parametrize("classes", [(), "abc", ("a", 1), [str(k) for k in range(256)], None])
def test_classes_are_one_to_255_names(root, classes):
    with pytest.raises(ArrayTypeError, match="they must be a list of 1 to 255 names"):
        LabelledPairs(root / "images", root / "labels", classes, 16)


def test_samples_that_do_not_suit_a_network_are_refused(root):
    data = pairs(root)
    data.check_fits(SEGMENTORS["pvt"], "data")
    few = LabelledPairs(root / "images", root / "labels", CLASSES[:3], 16)
    with pytest.raises(TrainingError, match="data have 3 classes, but the model has 4"):
        few.check_fits(SEGMENTORS["pvt"], "data")
    backbone = dataclasses.replace(PVT, in_chans=1)
    grey = dataclasses.replace(SEGMENTORS["pvt"], backbone=backbone)
    with pytest.raises(TrainingError, match="data have 3 channels, but the model has 1"):
        data.check_fits(grey, "data")


def test_a_description_tells_what_is_learnt_from(root):
    first = pairs(root).describe()
    assert first == pairs(root).describe()
    assert first["samples"] == 5
    others = [
        pairs(root, (16, 16)),
        pairs(root, whole=(50, 60)),
        pairs(root, augment=PairAugment()),
        pairs(root, augment=PairAugment(flip=False)),
        pairs(root, replaced={VOID: 255, 3: 0}),
        pairs(root, names=["000", "001", "002", "003"]),
        LabelledPairs(
            root / "images", root / "labels", ("a", "b", "c", "d"), (32, 64), replaced={VOID: 255}
        ),
    ]
    digests = {x.describe()["sha256"] for x in others}
    assert len(digests | {first["sha256"]}) == len(others) + 1
    save_labels(root, "000.png", np.zeros((50, 50)))
    assert pairs(root).describe() != first
    assert "5 photos with labels of 4 classes" in repr(pairs(root))


# Changed at random --------------------------------------------------------------------------------


def whole_scene(seed: int) -> tuple[Image.Image, Image.Image]:
    """A scene without noise, and its labels as they are read."""
    photo, labels = scene(seed, noise=0)
    return Image.fromarray(photo), Image.fromarray(np.where(labels == VOID, 255, labels))


def inside(labels: np.ndarray, far: int) -> np.ndarray:
    """Where all labels within so many pixels are one: there no colours mix."""
    H, W = labels.shape
    padded = np.pad(labels.astype(int), far, constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * far + 1, 2 * far + 1))
    assert windows.shape[:2] == (H, W)
    return (windows == labels[..., None, None]).all(axis=(2, 3))


@settings(max_examples=40)
@given(seeds, st.booleans(), st.sampled_from([1, 3]))
def test_photo_and_labels_stay_aligned(seed, flip, times):
    """A photo is enlarged here 2 to 4.5 times, so that 5 pixels off a border it shows one class."""
    photo, labels = whole_scene(seed % 50)
    labels = labels.resize((WIDTH * times, HEIGHT * times), Image.Resampling.NEAREST)
    augment = PairAugment(scale=(0.7, 1.5), flip=flip, distort=False, fill=(1, 2, 3))
    pixels, target = augment(photo, labels, (72, 96), (64, 80), rng_of(seed))
    assert (pixels.shape, target.shape) == ((64, 80, 3), (64, 80))
    assert pixels.dtype == target.dtype == np.uint8
    assert set(np.unique(target)) <= {0, 1, 2, 3, 255}
    sure = inside(target, 5)
    seen = sure & (target < 4)
    assert seen.sum() > 50
    np.testing.assert_array_equal(pixels[seen], COLOURS[target[seen]])
    void = sure & (target == 255)  # the border of the scene, or what lies beyond it
    for colour in np.unique(pixels[void], axis=0):
        assert tuple(colour) in {VOID_COLOUR, (1, 2, 3)}


@settings(max_examples=40)
@given(seeds, st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_what_lies_beyond_the_picture_is_fill_and_ignored(seed, whole):
    photo, labels = Image.new("RGB", (8, 6), (200, 0, 0)), Image.new("L", (8, 6), 2)
    augment = PairAugment(distort=False, fill=(0, 9, 0))
    pixels, target = augment(photo, labels, whole, (70, 64), rng_of(seed))
    inner = target == 2
    rows, columns = inner.any(axis=1), inner.any(axis=0)
    h, w = int(rows.sum()), int(columns.sum())
    assert inner[:h, :w].all()
    assert inner.sum() == h * w  # at the top left
    assert (pixels[:h, :w] == (200, 0, 0)).all()
    beyond = pixels[~inner]
    assert (beyond == (0, 9, 0)).all()
    assert (target[~inner] == 255).all()
    for side, given_side in ((h, whole[0]), (w, whole[1])):
        assert max(1, round(0.5 * given_side)) <= side <= round(2 * given_side)


def test_crops_reach_every_border():
    labels = np.tile(np.arange(5, dtype=np.uint8), (7, 1))  # a pixel of room across, two down
    labels[:, 0] += 10 * np.arange(7, dtype=np.uint8)
    augment = PairAugment(scale=(1, 1), flip=False, distort=False)
    places = set()
    for seed in range(40):
        given_labels = Image.fromarray(labels)
        _, target = augment(Image.new("RGB", (5, 7)), given_labels, (7, 5), (5, 4), rng_of(seed))
        places.add((int(target[0, 1]), int(target[-1, 0]) // 10))
    assert {left for left, _ in places} == {1, 2}
    assert {bottom for left, bottom in places if left == 1} == {4, 5, 6}


def test_no_class_fills_what_is_labelled_of_a_crop():
    """On the left half is ignored and 9 of 10 other pixels are of one class; on the right none."""
    labels = np.zeros((10, 20), np.uint8)
    labels[:5, :10] = 255
    labels[9, :5] = 1
    labels[5:, 10:] = 1
    augment = PairAugment(scale=(1, 1), flip=False, distort=False)
    size = Image.new("RGB", (20, 10))
    for seed in range(40):
        _, target = augment(size, Image.fromarray(labels), (10, 20), (10, 10), rng_of(seed))
        counts = np.bincount(target[target < 255])
        assert counts.max() < augment.most_of_a_class * counts.sum()


def test_scales_fill_their_range_evenly():
    photo, _ = whole_scene(0)
    augment = PairAugment(scale=(0.5, 2.0), distort=False)
    heights = []
    for seed in range(200):
        _, target = augment(photo, Image.new("L", (8, 8), 1), (100, 100), (200, 200), rng_of(seed))
        heights.append(int((target[:, 0] == 1).sum()))
        assert heights[-1] == (target[0] == 1).sum()  # the ratio is kept
    assert 50 <= min(heights) < 55
    assert 195 < max(heights) <= 200
    assert 115 < np.mean(heights) < 135


def test_a_crop_that_one_class_fills_is_drawn_anew():
    values = np.zeros((40, 400), np.uint8)
    values[:, 200:] = 1  # a crop of 40 columns shows both with probability 39/361
    photo, labels = Image.new("RGB", (400, 40)), Image.fromarray(values)
    shares = {}
    for most in (0.75, 1.0):
        augment = PairAugment(scale=(1.0, 1.0), most_of_a_class=most, distort=False)
        found = []
        for seed in range(150):
            _, target = augment(photo, labels, (40, 400), (40, 40), rng_of(seed))
            counts = np.bincount(target.ravel(), minlength=2)
            found.append(counts.max() / counts.sum())
        shares[most] = np.array(found)
    below = shares[0.75] < 0.75  # 19 of 361 places: 0.42 in ten tries
    assert 0.3 < below.mean() < 0.55
    both = shares[1.0] < 1  # 0.68 in ten tries
    assert 0.55 < both.mean() < 0.8
    assert ((shares[1.0] >= 0.75) & both).any()


def test_ignored_pixels_are_of_no_class_when_a_crop_is_chosen():
    values = np.full((20, 230), 255, np.uint8)
    values[:, 100:200], values[:, 200:] = 0, 1
    augment = PairAugment(scale=(1.0, 1.0), distort=False)
    photo, labels = Image.new("RGB", (230, 20)), Image.fromarray(values)
    good = 0
    for seed in range(100):  # where both classes are: at 15 of 171 places, so 60 in ten tries
        _, target = augment(photo, labels, (20, 230), (20, 60), rng_of(seed))
        counts = np.bincount(target.ravel(), minlength=256)[:2]
        good += bool(counts.all() and counts.max() < 0.75 * counts.sum())
    assert good > 45  # half void and half of class 0 would do at 29 more


def test_a_picture_of_one_class_is_taken_all_the_same():
    augment = PairAugment()
    photo, labels = Image.new("RGB", (40, 40)), Image.new("L", (40, 40), 3)
    _, target = augment(photo, labels, (40, 40), (20, 20), rng_of(1))
    assert set(np.unique(target)) <= {3, 255}
    _, target = augment(photo, Image.new("L", (40, 40), 255), (40, 40), (20, 20), rng_of(1))
    assert (target == 255).all()


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_all_crops_are_mirrored(flip):
    values = np.zeros((10, 10), np.uint8)
    values[:, 5:] = 1
    colours = np.where(values[..., None] == 1, (250, 0, 0), (0, 0, 250)).astype(np.uint8)
    photo, labels = Image.fromarray(colours), Image.fromarray(values)
    augment = PairAugment(scale=(1.0, 1.0), flip=flip, distort=False)
    mirrored = 0
    for seed in range(200):
        pixels, target = augment(photo, labels, (10, 10), (10, 10), rng_of(seed))
        assert (pixels[..., 0] > 125).tolist() == (target == 1).tolist()
        mirrored += int(target[0, 0] == 1)
    assert (75 < mirrored < 125) if flip else mirrored == 0


def test_draws_depend_on_seed_epoch_and_number_alone(root):
    data = pairs(root, (24, 24), whole=(36, 48), augment=PairAugment())
    drawn = data.drawn_pixels(np.arange(5), 3, 1)
    assert (drawn.shape, drawn.dtype) == ((5, 4, 24, 24), np.uint8)
    for i in (4, 0, 2):
        np.testing.assert_array_equal(data.drawn_pixels(np.array([i]), 3, 1)[0], drawn[i])
    np.testing.assert_array_equal(data.drawn_pixels(np.array([2, 2]), 3, 1)[1], drawn[2])
    for seed, epoch in ((4, 1), (3, 2)):
        other = data.drawn_pixels(np.arange(5), seed, epoch)
        assert all((a != b).any() for a, b in zip(other, drawn, strict=True))
    for folder in ("images", "labels"):
        first = (root / folder / "000.png").read_bytes()
        (root / folder / "001.png").write_bytes(first)
    alike = data.drawn_pixels(np.array([0, 1]), 3, 1)
    np.testing.assert_array_equal(alike[0], drawn[0])
    assert (alike[1] != alike[0]).any()
    write_pairs(root, 5)
    again = pairs(root, (24, 24), whole=(36, 48), augment=PairAugment())
    np.testing.assert_array_equal(again.drawn_pixels(np.arange(5), 3, 1), drawn)
    assert (data.pixels(np.arange(5)) != drawn).any()


def test_an_augmentation_is_made_again_of_its_dictionary():
    for augment in (
        PairAugment(),
        loose(PairAugment)(
            scale=[1, 3], most_of_a_class=0.5, flip=False, distort=False, fill=[0, 1, 2]
        ),
    ):
        assert PairAugment(**augment.to_dict()) == augment
    assert PairAugment().fill == (124, 116, 104)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": (0, 1)},
        {"scale": (2, 1)},
        {"scale": 1.0},
        {"scale": (1, 17)},
        {"most_of_a_class": 0},
        {"most_of_a_class": 1.1},
        {"flip": 1},
        {"distort": None},
        {"fill": (0, 0, 256)},
        {"fill": (0, 0.5, 0)},
        {"fill": (0, 0)},
        {"fill": 3},
    ],
    ids=str,
)
def test_wrong_augmentations_are_refused(changes):
    (name,) = changes
    with pytest.raises(RangeError, match=name):
        PairAugment(**changes)


# Colours ------------------------------------------------------------------------------------------


class Script(np.random.Generator):
    """A generator that says what it is told: whether each change is made, and how much."""

    def __init__(self, brightness=None, early=False, contrast=None, saturation=None, hue=None):
        super().__init__(np.random.PCG64())  # which is not asked
        made = [x is not None for x in (brightness, contrast, saturation, hue)]
        self.coins = [0.0 if x else 0.9 for x in (made[0], early, *made[1:])]
        self.amounts = [x for x in (brightness, contrast, saturation) if x is not None]
        self.hue, self.asked = hue, []

    def random(self):
        return self.coins.pop(0)

    def uniform(self, low, high):
        self.asked.append((low, high))
        return self.amounts.pop(0)

    def integers(self, low, high):
        self.asked.append((low, high))
        return self.hue


PIXELS = rng_of(5).integers(0, 256, (9, 11, 3), np.uint8)


def test_without_any_change_the_pixels_are_the_same():
    found = distort_colours(PIXELS, Script())
    np.testing.assert_array_equal(found, PIXELS)
    assert found is not PIXELS
    assert found.dtype == np.uint8


def test_brightness_and_contrast_are_cut_off_and_made_whole():
    script = Script(brightness=-20.5)
    x = PIXELS.astype(float)
    np.testing.assert_array_equal(distort_colours(PIXELS, script), (x - 20.5).clip(0, 255) // 1)
    assert script.asked == [(-32, 32)]
    script = Script(contrast=1.25)
    np.testing.assert_array_equal(distort_colours(PIXELS, script), (x * 1.25).clip(0, 255) // 1)
    assert script.asked == [(0.5, 1.5)]
    both = Script(brightness=30.0, early=True, contrast=0.75)
    expected = ((x + 30).clip(0, 255) // 1 * 0.75) // 1
    np.testing.assert_array_equal(distort_colours(PIXELS, both), expected)


def hsv(pixels: np.ndarray) -> np.ndarray:
    flat = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels.reshape(-1, 3).astype(float)]
    return np.array(flat).reshape(pixels.shape)


def test_saturation_keeps_hue_and_value():
    before = hsv(PIXELS)
    for factor in (0.5, 1.5):
        script = Script(saturation=factor)
        after = hsv(distort_colours(PIXELS, script))
        assert script.asked == [(0.5, 1.5)]
        np.testing.assert_allclose(after[..., 2], before[..., 2], atol=0.005)
        clear = before[..., 2] > 0.3  # dark pixels have few levels
        expected = (before[..., 1] * factor).clip(0, 1)
        np.testing.assert_allclose(after[..., 1][clear], expected[clear], atol=0.03)


@pytest.mark.parametrize("turn", [-18, -5, 7, 17])
def test_hue_turns_by_twice_so_many_degrees(turn):
    script = Script(hue=turn)
    before, after = hsv(PIXELS), hsv(distort_colours(PIXELS, script))
    assert script.asked == [(-18, 18)]  # the last is not drawn
    np.testing.assert_allclose(after[..., 2], before[..., 2], atol=0.005)
    clear = (before[..., 1] * before[..., 2]) > 0.3
    assert clear.sum() > 20
    apart = (after[..., 0] - before[..., 0] - turn / 180 + 0.5) % 1 - 0.5
    assert np.abs(apart[clear]).max() < 0.02
    grey = np.repeat(PIXELS[..., :1], 3, axis=2)
    np.testing.assert_array_equal(distort_colours(grey, Script(hue=turn)), grey)


def test_contrast_comes_before_or_behind_saturation():
    x = np.array([[[200, 100, 60]]], np.uint8)
    early = distort_colours(x, Script(early=True, contrast=1.5, saturation=0.5))
    late = distort_colours(x, Script(contrast=1.5, saturation=0.5))
    assert early.max() == late.max() == 255
    # 255, 150, 90 with half its saturation, and 200, 150, 130 half as much again
    np.testing.assert_allclose(early[0, 0], (255, 202, 172), atol=2)
    np.testing.assert_allclose(late[0, 0], (255, 225, 195), atol=2)


@given(seeds)
def test_distorting_is_pure_and_drawn_from_the_generator_alone(seed):
    kept = PIXELS.copy()
    first, again = (distort_colours(PIXELS, rng_of(seed)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(PIXELS, kept)


# How well they agree ------------------------------------------------------------------------------


def slow_count(answers, labels, classes: int) -> list[list[int]]:
    counts = [[0] * classes for _ in range(classes)]
    for answer, label in zip(answers.ravel().tolist(), labels.ravel().tolist(), strict=True):
        if label != 255:
            counts[label][answer] += 1
    return counts


@st.composite
def answers_and_labels(draw):
    classes = draw(st.integers(1, 6))
    rng = rng_of(draw(seeds))
    shape = draw(st.sampled_from([(0,), (7,), (3, 5), (2, 4, 3)]))
    there = draw(st.integers(1, classes))  # the others are nowhere
    labels = rng.integers(0, there, shape).astype(draw(st.sampled_from([np.uint8, np.int64])))
    labels[rng.random(shape) < draw(st.sampled_from([0, 0.3, 1]))] = 255
    return rng.integers(0, there, shape), labels, classes


@given(answers_and_labels())
def test_scores_are_those_of_a_slow_count(case):
    answers, labels, K = case
    counts = count_pixels(answers, labels, K)
    slow = slow_count(answers, labels, K)
    assert counts.tolist() == slow
    assert counts.dtype == np.int64
    ious = []
    for k in range(K):
        there = labels != 255
        both = int(((answers == k) & (labels == k) & there).sum())
        either = int((((answers == k) | (labels == k)) & there).sum())
        ious.append(both / either if either else math.nan)
    np.testing.assert_allclose(class_iou(counts), ious, rtol=1e-15)
    found = [x for x in ious if not math.isnan(x)]
    np.testing.assert_allclose(mean_iou(counts), np.mean(found) if found else math.nan)
    total = sum(map(sum, slow))
    right = sum(slow[k][k] for k in range(K))
    np.testing.assert_allclose(pixel_accuracy(counts), right / total if total else math.nan)


def test_a_class_that_is_only_answered_counts_as_0():
    counts = count_pixels(np.array([0, 0, 1]), np.array([0, 0, 0]), 3)
    np.testing.assert_allclose(mean_iou(counts), (2 / 3 + 0) / 2)


def test_scores_of_a_few_pixels():
    labels = np.array([[0, 0, 1, 1, 255, 2]])
    answers = np.array([[0, 1, 1, 1, 3, 0]])
    counts = count_pixels(answers, labels, 5)
    # of class 3 there is nothing: where it was answered, nothing is known
    np.testing.assert_allclose(class_iou(counts), [1 / 3, 2 / 3, 0, math.nan, math.nan])
    assert mean_iou(counts) == pytest.approx(1 / 3)
    assert pixel_accuracy(counts) == 3 / 5
    assert IGNORED == 255


def test_pictures_add_up_and_another_label_can_be_ignored():
    rng = rng_of(1)
    answers, labels = rng.integers(0, 3, (2, 4, 5)), rng.integers(0, 3, (2, 4, 5))
    each = [count_pixels(a, b, 3) for a, b in zip(answers, labels, strict=True)]
    added = np.sum(each, axis=0)
    np.testing.assert_array_equal(added, count_pixels(answers, labels, 3))
    without = count_pixels(answers, labels, 3, ignored=0)
    assert without[0].sum() == 0
    np.testing.assert_array_equal(without[1:], added[1:])


@pytest.mark.parametrize(
    ("answers", "labels", "classes", "error", "says"),
    [
        ([0, 1], np.array([0, 1]), 2, ArrayTypeError, "answers are list; they must be a NumPy"),
        (np.array([0.0]), np.array([0]), 2, ArrayTypeError, "answers are float64"),
        (np.array([0]), np.array([True]), 2, ArrayTypeError, "labels are bool"),
        (np.array([0]), np.array([[0]]), 2, ShapeError, "both must be of one size. Resize the lo"),
        (np.array([0, 2]), np.array([0, 1]), 2, RangeError, "answers run from 0 to 2"),
        (np.array([0, -1]), np.array([0, 1]), 2, RangeError, "answers run from -1 to 0"),
        (
            np.array([0, 1]),
            np.array([0, 2]),
            2,
            RangeError,
            "labels run from 0 to 2, .* must be 25",
        ),
        (np.array([0]), np.array([0]), 0, RangeError, "num_classes is 0"),
        (np.array([0]), np.array([0]), 2.0, RangeError, "num_classes is 2.0"),
    ],
)
def test_what_cannot_be_counted_is_refused(answers, labels, classes, error, says):
    with pytest.raises(error, match=says):
        count_pixels(answers, labels, classes)


def test_an_answer_that_is_no_class_does_no_harm_where_nothing_counts():
    counts = count_pixels(np.array([1, 200]), np.array([1, 255]), 2)
    assert counts.tolist() == [[0, 0], [0, 1]]


# Pictures of classes ------------------------------------------------------------------------------


def test_colours_are_those_of_voc():
    # background, aeroplane, bicycle, bird, boat, bottle, ..., tv monitor
    voc = class_colours(256)
    assert voc[:6] == (
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
    )
    assert voc[20] == (0, 64, 128)
    assert voc[255] == (224, 224, 192)
    assert len(set(voc)) == 256
    assert class_colours(3) == voc[:3]


def test_an_indexed_picture_is_the_class_map(tmp_path):
    classes = rng_of(2).integers(0, 5, (7, 9)).astype(np.int64)
    classes[0, 0] = 255
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9), (50, 60, 70)]
    indexed(classes, colours).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), classes)
        shown = np.asarray(image.convert("RGB"))
    assert tuple(shown[0, 0]) == (255, 255, 255)
    for y, x in np.argwhere(classes < 5):
        assert tuple(shown[y, x]) == colours[classes[y, x]]


def test_a_class_map_is_read_back_as_labels(root):
    expected = np.where(scene(2)[1] == VOID, 255, scene(2)[1])
    indexed(expected, class_colours(4)).save(root / "labels" / "002.png")
    np.testing.assert_array_equal(pairs(root).read(2)[1], expected)


@pytest.mark.parametrize("times", [1, 20])
def test_an_overlay_is_the_tinted_photo_with_a_legend(times):
    pixels = np.repeat(np.repeat(scene(3)[0], times, axis=0), times, axis=1)
    photo = Image.fromarray(pixels)
    labels = np.repeat(np.repeat(scene(3)[1] % VOID, times, axis=0), times, axis=1)
    colours = ((0, 0, 0), (0, 0, 200), (0, 200, 0), (200, 0, 0))
    H, W = labels.shape
    shown = overlay(photo, labels, CLASSES, colours, opacity=0.25)
    assert (shown.height, shown.mode) == (H, "RGB")
    assert W + 100 < shown.width < W + 300
    x = np.asarray(shown)[:, :W].astype(float)
    expected = 0.75 * pixels + 0.25 * np.array(colours)[labels]
    assert np.abs(x - expected).max() <= 1
    legend = np.asarray(shown)[:, W:]
    for k in np.argsort(-np.bincount(labels.ravel()))[: 1 if times == 1 else 4]:
        assert (legend == colours[k]).all(axis=2).any(), CLASSES[k]
    assert (legend == 255).all(axis=2).mean() > 0.5


def test_a_legend_names_only_what_is_there_and_never_what_has_no_answer():
    photo, classes = Image.new("RGB", (60, 200)), np.full((200, 60), 255)
    classes[:90] = 1
    colours = ((10, 0, 0), (20, 200, 30), (40, 50, 200))
    legend = np.asarray(overlay(photo, classes, "abc", colours))[:, 60:]
    there = [(legend == c).all(axis=2).sum() > 50 for c in colours]
    assert there == [False, True, False]


def test_a_legend_begins_with_what_covers_most(monkeypatch):
    texts, fills = [], []

    def text(self, at, words, **_):
        texts.append(words)

    def rectangle(self, box, fill, **_):
        fills.append(fill)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", rectangle)
    classes = np.full((100, 100), 2)
    classes[:29] = 0
    classes[29, :70] = 1
    classes[30, :40] = 3
    overlay(Image.new("RGB", (100, 100)), classes, CLASSES, loose(COLOURS))
    assert texts == ["square 70%", "ground 29%", "disc 1%", "bar <1%"]
    assert fills == [tuple(COLOURS[k]) for k in (2, 0, 1, 3)]


def test_colours_of_classes_are_vocs():
    expected = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert class_colours(5) == expected


def test_an_overlay_is_of_the_photos_size():
    with pytest.raises(ShapeError, match="the photo has 5x4 pixels and the class map 4x5"):
        overlay(Image.new("RGB", (5, 4)), np.zeros((5, 4), int), "a", [(0, 0, 0)])
