"""Photos in folders: which are found, in what order, what becomes of them, and who reads them."""

import dataclasses
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_training import fingerprint, what_counts
from PIL import Image
from small_photos import AUGMENT, CLASSES, GREY, photos, write_colours, write_photos
from small_training import CONFIG, RECIPE

import pvt_ref
from pvt_ref.data.ahead import Ahead, in_order
from pvt_ref.data.folder import Damaged, ImageFolder
from pvt_ref.data.labelled import LabelledImages, batches, confusion_matrix, evaluate
from pvt_ref.data.photo_augment import PhotoAugment
from pvt_ref.data.preprocessing import Preprocessing
from pvt_ref.errors import (
    ArrayTypeError,
    ConfigError,
    ImageError,
    MissingFileError,
    PVTError,
    ShapeError,
    TrainingError,
)
from pvt_ref.train import Recipe, fit, read_metrics
from pvt_ref.train.loop import METRICS

HERE = Path(__file__).parent
#: As much chance as the small training has, but for what photos have instead.
OF_PHOTOS = dataclasses.replace(RECIPE, crop_padding=1, cutout=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 27, 1)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return photos(write_photos(tmp_path_factory.mktemp("held_out"), 9, 2))


def picture(path: Path, *colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour or (9, 9, 9)).save(path)


# What is found ------------------------------------------------------------------------------------


def test_classes_and_photos_come_by_code_point(tmp_path):
    of_b = ("b/10.png", "b/2.png", "b/Z.png", "b/a.png")
    for name in (*reversed(of_b), "a/é.png", "a/z.png", "B/x.png", "é/x.png"):
        picture(tmp_path / name)
    found = ImageFolder(tmp_path, 4)
    assert found.classes == ("B", "a", "b", "é")
    assert found.files == ("B/x.png", "a/z.png", "a/é.png", *of_b, "é/x.png")
    assert found.labels.tolist() == [0, 1, 1, 2, 2, 2, 2, 3]
    assert found.labels.dtype == np.int64
    assert found.path(3) == tmp_path / "b" / "10.png"
    assert len(found) == 8


def test_photos_of_a_class_may_lie_deeper(tmp_path):
    for name in ("cat/a.png", "cat/home/b.png", "cat/home/old/c.png", "dog/a.png"):
        picture(tmp_path / name)
    assert ImageFolder(tmp_path).files == (
        *("cat/a.png", "cat/home/b.png", "cat/home/old/c.png", "dog/a.png"),
    )


def test_what_is_no_photo_is_not_looked_at(tmp_path):
    picture(tmp_path / "cat/a.png")
    picture(tmp_path / "cat/.thumb.png")
    picture(tmp_path / "cat/.cache/a.png")
    picture(tmp_path / ".git/a.png")
    picture(tmp_path / "stray.png")
    (tmp_path / "cat/notes.txt").write_text("a cat")
    (tmp_path / "cat/upper.PNG").write_bytes((tmp_path / "cat/a.png").read_bytes())
    found = ImageFolder(tmp_path)
    assert found.files == ("cat/a.png", "cat/upper.PNG")
    assert found.classes == ("cat",)


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_links_are_followed_and_circles_end(tmp_path):
    picture(tmp_path / "elsewhere/a.png")
    root = tmp_path / "data"
    picture(root / "dog/b.png")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "dog/again").symlink_to(root / "dog")
    (root / "dog/gone.png").symlink_to(root / "nowhere")
    found = ImageFolder(root)
    assert found.files == ("cat/a.png", "dog/b.png", "dog/gone.png")
    (fault,) = [fault for fault in found.check() if fault]
    assert fault.file == "dog/gone.png"


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_a_link_that_leads_back_hides_no_other_folder(tmp_path):
    """Whichever of the two is looked at first, the other one is still to come."""
    for name in ("young", "old"):
        picture(tmp_path / f"cat/{name}/a.png")
        (tmp_path / f"cat/{name}/back").symlink_to(tmp_path / "cat")
    assert ImageFolder(tmp_path).files == ("cat/old/a.png", "cat/young/a.png")


def test_classes_can_be_given(tmp_path):
    picture(tmp_path / "b/1.png")
    found = ImageFolder(tmp_path, classes=["c", "b", "a"])
    assert found.labels.tolist() == [1]
    assert found.classes == ("c", "b", "a")
    with pytest.raises(TrainingError, match=r"the folder 'b', which is not a class"):
        ImageFolder(tmp_path, classes=["a", "c"])
    with pytest.raises(ConfigError, match="a name comes twice"):
        ImageFolder(tmp_path, classes=["b", "b"])


def test_subset_and_replace_leave_the_first(root):
    whole = photos(root)
    part = whole.subset([4, 0])
    assert part.files == (whole.files[4], whole.files[0])
    assert part.labels.tolist() == [whole.labels[4], whole.labels[0]]
    assert part.sizes.tolist() == [whole.sizes[4], whole.sizes[0]]
    assert part.classes == whole.classes
    assert len(whole) == 27
    larger = whole.replace(size=(8, 12), augment=AUGMENT)
    assert larger.size == (8, 12)
    assert (whole.size, whole.augment) == ((16, 16), None)
    assert repr(part).endswith("2 photos of 3 classes, 16x16 pixels)")


def test_known_again_by_names_sizes_and_what_becomes_of_them(root, tmp_path):
    whole = photos(root)
    copy = tmp_path / "moved"
    write_photos(copy, 27, 1)
    assert photos(copy).describe() == whole.describe()  # wherever it lies
    others = [
        whole.subset(range(26)),
        whole.subset([*range(25), 26, 25]),
        whole.replace(size=8),
        whole.replace(augment=AUGMENT),
        whole.replace(augment=dataclasses.replace(AUGMENT, crop_area=(0.4, 1.0))),
        whole.replace(preprocessing=Preprocessing("L", (0.4,), (0.25,))),
    ]
    (copy / whole.files[0]).write_bytes(b"longer" * 999)
    others.append(photos(copy))
    described = [str(other.describe()) for other in [whole, *others]]
    assert len(set(described)) == len(described)


def test_classes_without_photos_are_known_again_too(root):
    others = [photos(root, classes=(*CLASSES, *more)) for more in ((), ("x",), ("y",))]
    assert len({str(other.describe()) for other in others}) == 3


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: None, TrainingError, r"has no folders in it\. It must have folders named after"),
        (lambda p: picture(p / "a.png"), TrainingError, r"but photos: which class are they\?"),
        (lambda p: (p / "cat").mkdir(), TrainingError, r"1 folders and no photo"),
        (lambda p: p.rmdir(), MissingFileError, r"there is no folder"),
    ],
)
def test_folders_without_samples_are_refused(make, error, match, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    with pytest.raises(error, match=match):
        ImageFolder(folder)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be read"):
        ImageFolder(tmp_path / "file")


@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        (None, ArrayTypeError, "path is a NoneType"),
        (b"photos", ArrayTypeError, "path is a bytes"),
        ("nul\0", TrainingError, "cannot be read"),
        ("", TrainingError, "has no folders"),  # the working folder, which is empty
    ],
)
def test_what_is_no_path_is_refused(path, error, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        ImageFolder(path)


def test_a_folder_below_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    picture(tmp_path / "cat/a.png")
    inner = os.scandir

    def scandir(path):
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return inner(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(TrainingError, match=r"cannot be read \(PermissionError: Permission denied"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("classes", ["cat", 5, [1], {"cat"}])
def test_classes_that_are_no_names_are_refused(classes, root):
    with pytest.raises(ArrayTypeError, match=r"classes are .* must be a list of names"):
        ImageFolder(root, classes=classes)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"size": 0}, ShapeError, "size is 0"),
        ({"size": "large"}, ShapeError, "size is 'large'"),
        ({"preprocessing": "RGB"}, ArrayTypeError, "preprocessing is a str"),
        ({"preprocessing": Preprocessing("bands", (0.5,), (1,))}, ConfigError, "mode 'bands'"),
        ({"augment": "strong"}, ArrayTypeError, "augment is a str"),
    ],
)
def test_wrong_settings_are_refused(settings, error, match, root):
    with pytest.raises(error, match=match):
        ImageFolder(root, **settings)
    with pytest.raises(error, match=match):
        photos(root).replace(**settings)


def test_an_empty_subset_is_refused(root):
    with pytest.raises(TrainingError, match="none of the photos"):
        photos(root).subset([])


# What becomes of a photo --------------------------------------------------------------------------


def test_pixels_are_those_of_a_prediction(tmp_path):
    root = write_colours(tmp_path, 2)
    for size in (24, (20, 36)):
        samples = ImageFolder(root, size)
        paths = [samples.path(i) for i in range(6)]
        like = np.empty(0, np.float32)
        expected = Preprocessing()(paths, size)
        np.testing.assert_array_equal(samples.batch(slice(None), like), expected)
        np.testing.assert_array_equal(samples.batch(np.array([5, 1]), like), expected[[5, 1]])


def test_without_augment_a_step_draws_the_same(root):
    samples = photos(root)
    chosen = np.array([3, 20, 7])
    np.testing.assert_array_equal(samples.drawn_pixels(chosen, 1, 2), samples.pixels(chosen))


def test_draws_depend_on_seed_epoch_and_sample_only(root):
    samples = photos(root, augment=AUGMENT)
    chosen = np.array([3, 20, 7, 11])
    drawn = samples.drawn_pixels(chosen, 1, 2)
    assert drawn.shape == (4, 1, 16, 16)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(samples.drawn_pixels(chosen[::-1], 1, 2), drawn[::-1])
    np.testing.assert_array_equal(samples.drawn_pixels(chosen[1:2], 1, 2), drawn[1:2])
    for seed, epoch in ((2, 2), (1, 3)):
        assert (samples.drawn_pixels(chosen, seed, epoch) != drawn).any(axis=(1, 2, 3)).all()


def test_colours_are_drawn_in_colour(tmp_path):
    samples = ImageFolder(write_colours(tmp_path, 1), 16, augment=PhotoAugment())
    drawn = samples.drawn_pixels(np.array([0, 1, 2]), 0, 0)
    assert drawn.shape == (3, 3, 16, 16)
    means = drawn.mean(axis=(2, 3))
    assert means.argmax(axis=1).tolist() == [2, 1, 0]  # blue, green, red


def test_a_drawn_photo_of_any_shape_stands_upright(tmp_path):
    """Black at the left and white at the right, as it is, wider and higher."""
    (tmp_path / "halves").mkdir()
    halves = np.zeros((16, 24, 3), np.uint8)
    halves[:, 12:] = 255
    Image.fromarray(halves).save(tmp_path / "halves/a.png")
    for H, W in ((16, 24), (8, 20), (20, 8)):
        samples = ImageFolder(tmp_path, (H, W), augment=PhotoAugment(crop_area=None))
        drawn = samples.drawn_pixels(np.array([0]), 0, 0)
        assert drawn.shape == (1, 3, H, W)
        assert drawn[..., : W // 2 - 2].max() < 30
        assert drawn[..., W // 2 + 2 :].min() > 225


def test_grey_is_luminance_when_drawn_as_for_a_prediction(tmp_path):
    samples = ImageFolder(write_colours(tmp_path, 1), 16, preprocessing=GREY)
    drawn = samples.replace(augment=PhotoAugment(crop_area=None))
    chosen = np.arange(3)
    expected = samples.pixels(chosen).mean(axis=(1, 2, 3))
    found = drawn.drawn_pixels(chosen, 0, 0).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, atol=5)


# Who reads them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_workers_change_no_bit_and_no_order(workers, root):
    samples = photos(root, augment=AUGMENT)
    order = np.random.default_rng(0).permutation(27)
    with Ahead(samples, workers) as ahead:
        assert ahead.size == samples.size
        assert len(ahead) == 27
        assert ahead.describe() == samples.describe()
        for start in range(0, 27, 6):
            ahead.expect(order[start : start + 12], 5, 1)
            chosen = order[start : start + 6]
            expected = samples.drawn_pixels(chosen, 5, 1)
            np.testing.assert_array_equal(ahead.drawn_pixels(chosen, 5, 1), expected)
        # what nobody expected is read all the same
        expected = samples.drawn_pixels(order[:3], 5, 2)
        np.testing.assert_array_equal(ahead.drawn_pixels(order[:3], 5, 2), expected)
        np.testing.assert_array_equal(ahead.pixels(slice(2, 5)), samples.pixels(slice(2, 5)))
        assert ahead.waited > 0


def test_coming_steps_are_read_before_they_are_asked_for(root):
    """Both samples are being read at once although nobody waits: each waits for the other."""
    meeting = threading.Barrier(2, timeout=60)

    class Meeting(ImageFolder):
        def drawn_pixels(self, chosen, seed, epoch):
            meeting.wait()
            return super().drawn_pixels(chosen, seed, epoch)

    with Ahead(Meeting(root, 16, preprocessing=GREY), 2) as ahead:
        ahead.expect(np.array([1]), 0, 0)
        ahead.expect(np.array([2]), 0, 0)
        assert ahead.drawn_pixels(np.array([1, 2]), 0, 0).shape == (2, 1, 16, 16)


def test_threads_end_with_the_reading(root):
    before = threading.active_count()
    with Ahead(photos(root), 3) as ahead:
        ahead.expect(np.arange(27), 0, 0)
        assert threading.active_count() > before
    assert threading.active_count() == before
    iterator: Any = batches(photos(root), 4, np.empty(0))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    assert threading.active_count() == before


def test_pixels_that_a_step_has_had_are_let_go(root):
    """Else all photos of an epoch would be in memory at its end."""
    read = []

    class Watched(ImageFolder):
        def drawn_pixels(self, chosen, seed, epoch):
            pixels = super().drawn_pixels(chosen, seed, epoch)
            read.append(weakref.ref(pixels))
            return pixels

    with Ahead(Watched(root, 16, preprocessing=GREY), 1) as ahead:
        ahead.drawn_pixels(np.arange(8), 0, 0)
        ahead.drawn_pixels(np.array([8]), 0, 0)  # so the one thread is done with those before
        assert len(read) == 9
        assert [pixels() for pixels in read[:8]] == [None] * 8


def test_samples_in_memory_need_no_thread(root):
    data = LabelledImages(np.zeros((3, 1, 16, 16), np.uint8), np.arange(3), GREY)
    before = threading.active_count()
    with Ahead(data) as ahead:
        ahead.expect(np.arange(3), 0, 0)
        ahead.drawn_pixels(np.arange(3), 0, 0)
        assert ahead.waited == 0
        assert threading.active_count() == before


def test_in_order_stays_ahead_by_so_many():
    begun = []

    def begin(i):
        begun.append(i)
        return i

    results = in_order(begin, iter(range(100)), ahead=5, workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(begun) <= 3 + 5
    assert list(results) == list(range(3, 100))
    assert sorted(begun) == list(range(100))


def test_what_a_reader_raises_comes_in_its_turn(root, tmp_path):
    def read(i):
        if i == 2:
            raise ImageError("damaged")
        return i

    results = in_order(read, range(5), ahead=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ImageError, match="damaged"):
        next(results)


def test_evaluation_of_a_folder_is_that_of_its_pixels(root):
    samples = photos(root)
    data = LabelledImages(samples.pixels(slice(None)), samples.labels, GREY)
    params = pvt_ref.init_params(CONFIG, np.random.default_rng(0))
    for size in (None, 1, 5, 27, 100):
        assert evaluate(params, CONFIG, samples, size) == evaluate(params, CONFIG, data, size)
    counts = confusion_matrix(params, CONFIG, samples)
    np.testing.assert_array_equal(counts, confusion_matrix(params, CONFIG, data))
    assert counts.sum(axis=1).tolist() == np.bincount(samples.labels).tolist()
    assert np.trace(counts) / 27 == evaluate(params, CONFIG, samples)[1]
    answers = pvt_ref.forward(params, data.batch(slice(None), params.head.bias), CONFIG).argmax(1)
    assert counts[1, 2] == np.sum((samples.labels == 1) & (answers == 2))


# Photos of all kinds ------------------------------------------------------------------------------


def many_kinds(root: Path) -> list[str]:
    """Good and damaged photos; returns the names of the damaged ones, in order."""
    colours = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    good = Image.fromarray(colours)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    good.convert("CMYK").save(root / "a/cmyk.jpg")
    good.convert("P").save(root / "a/palette.gif")
    good.convert("RGBA").save(root / "a/alpha.png")
    frames = [good, good.rotate(90)]
    frames[0].save(root / "a/moves.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    good.save(root / "b/turned.jpg", exif=exif)
    Image.new("L", (3000, 10)).save(root / "b/long.png")
    Image.new("RGB", (1, 1)).save(root / "b/dot.bmp")
    whole = (root / "b/turned.jpg").read_bytes()
    (root / "a/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a/empty.jpg").write_bytes(b"")
    (root / "b/huge.png").write_bytes(huge_png())
    (root / "b/page.png").write_text("<html>not found</html>")
    return ["a/cut.jpg", "a/empty.jpg", "b/huge.png", "b/page.png"]


def huge_png() -> bytes:
    """A PNG that says it has 100,000 x 100,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_check_names_the_damaged_and_no_others(tmp_path):
    damaged = many_kinds(tmp_path)
    samples = ImageFolder(tmp_path, 32, augment=PhotoAugment())
    for workers in (None, 1, 5):
        faults = list(samples.check(workers))
        assert len(faults) == len(samples) == 11
        assert [f.file for f in faults if isinstance(f, Damaged)] == damaged
        assert all(f.why for f in faults if f)
    good = [i for i, fault in enumerate(faults) if fault is None]
    assert samples.pixels(np.array(good)).shape == (7, 3, 32, 32)
    assert samples.drawn_pixels(np.array(good), 0, 0).shape == (7, 3, 32, 32)
    with pytest.raises(PVTError, match=r"cut\.jpg' cannot be decoded"):
        samples.pixels(slice(0, 4))


LARGE = """
import os, resource, sys
import numpy as np
from PIL import Image
from pvt_ref.data.folder import ImageFolder
from pvt_ref.data.ahead import Ahead
from pvt_ref.data.labelled import batches
root, count = sys.argv[1], 100_000
Image.new("RGB", (8, 8), (9, 8, 7)).save(os.path.join(root, "one.png"))
for k in range(10):
    os.mkdir(os.path.join(root, str(k)))
    for i in range(count // 10):  # names of the same file, as many as a folder can hold of it
        if i % 30_000 == 0:
            source = os.path.join(root, f"source{k}-{i}.png")
            with open(os.path.join(root, "one.png"), "rb") as a, open(source, "wb") as b:
                b.write(a.read())
        os.link(source, os.path.join(root, str(k), f"{i}.png"))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
import gc; gc.freeze(); gc.disable()
like = np.empty(0, np.float32)
before = peak()
samples = ImageFolder(root, 8)
assert len(samples) == count
with Ahead(samples) as ahead:
    for step in range(50):
        ahead.expect(np.arange(64 * step, 64 * step + 192), 0, 0)
        ahead.drawn_pixels(np.arange(64 * step, 64 * step + 64), 0, 0)
seen = 0
for labels, images in batches(samples.subset(range(20_000)), 256, like):
    seen += len(labels)
assert seen == 20_000
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux counts it")
def test_a_hundred_thousand_photos_need_little_memory(tmp_path):
    """All pixels would take 77 MB as bytes and four times that as numbers; names take some 20."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60


# Training -----------------------------------------------------------------------------------------


def train(root, held_out, folder, **options):
    samples = photos(root, augment=AUGMENT)
    return fit(CONFIG, OF_PHOTOS, samples, held_out, folder, log_steps=1, **options)


@pytest.fixture(scope="module")
def whole(root, held_out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    return train(root, held_out, folder, workers=1)


def test_workers_change_no_bit_of_a_training(whole, root, held_out, tmp_path):
    other = train(root, held_out, tmp_path / "run", workers=5)
    assert fingerprint(other.state) == fingerprint(whole.state)
    assert what_counts(other.folder) == what_counts(whole.folder)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resumed_is_bit_for_bit_the_same(stop, whole, root, held_out, tmp_path):
    folder = tmp_path / "run"
    assert not train(root, held_out, folder, stop_at_step=stop).finished
    done = train(root, held_out, folder, resume=True, workers=3)
    assert fingerprint(done.state) == fingerprint(whole.state)
    assert what_counts(folder) == what_counts(whole.folder)


def test_metrics_say_how_long_steps_waited(whole):
    lines = read_metrics(whole.folder / METRICS)
    assert all(0 <= line["data_wait"] <= 1 for line in lines)


def test_other_photos_do_not_go_on(whole, root, held_out, tmp_path):
    folder = tmp_path / "run"
    train(root, held_out, folder, stop_at_step=2)
    other = write_photos(tmp_path / "photos", 27, 1)
    (other / CLASSES[0] / "0000.png").unlink(missing_ok=True)
    (other / CLASSES[1] / "0000.png").unlink(missing_ok=True)
    (other / CLASSES[2] / "0000.png").unlink(missing_ok=True)
    with pytest.raises(TrainingError, match=r"data\.samples is 27 there and 26 here"):
        train(other, held_out, folder, resume=True)


def test_a_photo_damaged_meanwhile_ends_the_training_by_name(held_out, tmp_path):
    root = write_photos(tmp_path / "photos", 27, 1)
    samples = photos(root, augment=AUGMENT)
    (root / samples.files[5]).write_bytes(b"")
    with pytest.raises(ImageError, match=f"{Path(samples.files[5]).name}' is empty"):
        fit(CONFIG, OF_PHOTOS, samples, held_out, tmp_path / "run")


def test_photos_of_another_mode_or_size_are_refused(root, held_out, tmp_path):
    recipe = Recipe(epochs=1, batch_size=2)
    colours = photos(root, preprocessing=Preprocessing())
    with pytest.raises(TrainingError, match="images have 3 channels, but the configuration"):
        fit(CONFIG, recipe, colours, colours, tmp_path / "run")
    with pytest.raises(ShapeError, match="17"):
        fit(CONFIG, recipe, photos(root, 17), held_out, tmp_path / "run")
    two = dataclasses.replace(CONFIG, num_classes=2)
    with pytest.raises(TrainingError, match="labels run from 0 to 2"):
        fit(two, recipe, photos(root), held_out, tmp_path / "run")
