"""Pictures on disk to arrays: reading, geometry, normalisation, padding, and every refusal."""

import io
import math
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loose import loose
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

import pvt_ref
import pvt_ref.data.image
from pvt_ref.arrays import import_cupy
from pvt_ref.data.image import read_rgb, resize_and_crop
from pvt_ref.data.preprocessing import (
    Preprocessing,
    load_image,
    normalize,
    pad_to_multiple,
    preprocess,
)
from pvt_ref.errors import (
    ArrayTypeError,
    DeviceError,
    ImageError,
    MissingFileError,
    RangeError,
    ShapeError,
)

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

sides = st.integers(1, 300)
targets = st.integers(1, 120)


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height=40, width=60, seed=0):
    return Image.fromarray(noise(height, width, seed))


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def colour(image, at=(0, 0)) -> Any:
    """The colour of one pixel as read_rgb sees it; of a 1x1 picture, the colour."""
    rgb = read_rgb(image)
    assert rgb.mode == "RGB"
    return rgb.getpixel(at)


def png(rows, bit_depth, color_type, transparent=b""):
    """A PNG written by hand from rows of bytes, independent of Pillow's writer."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    width = len(rows[0]) * 8 // bit_depth // channels
    header = struct.pack(">IIBBBBB", width, len(rows), bit_depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    trns = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IHDR", header) + trns + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + body)


# Modes --------------------------------------------------------------------------------------------


def test_rgb_stays_as_it_is():
    pixels = noise(5, 7)
    assert np.array_equal(np.asarray(read_rgb(Image.fromarray(pixels))), pixels)


def test_bilevel():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert [colour(image, (x, 0)) for x in (0, 1)] == [BLACK, WHITE]


def test_grey():
    assert colour(Image.new("L", (1, 1), 77)) == (77, 77, 77)


def test_grey_with_alpha():
    image = Image.new("LA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (40, alpha))
    got = [colour(image, (x, 0)) for x in range(3)]
    assert got[0] == WHITE
    assert got[1] == pytest.approx([40 * 128 / 255 + 127] * 3, abs=1)
    assert got[2] == (40, 40, 40)


def test_grey_with_premultiplied_alpha():
    image = Image.new("La", (1, 1), (20, 128))  # 20 is already 40 * 128 / 255
    assert colour(image) == pytest.approx([20 + 127] * 3, abs=1)


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 1, 2, 3])
    image.putpixel((1, 0), 1)
    assert [colour(image, (x, 0)) for x in (0, 1)] == [(9, 8, 7), (1, 2, 3)]


def palette_of_three():
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, 0, 0, 255, 10, 20, 30])
    for x in range(3):
        image.putpixel((x, 0), x)
    return image


def test_palette_with_one_transparent_entry():
    file = saved(palette_of_three(), "PNG", transparency=1)
    assert [colour(file, (x, 0)) for x in range(3)] == [RED, WHITE, (10, 20, 30)]


def test_palette_with_an_alpha_for_each_entry():
    file = saved(palette_of_three(), "PNG", transparency=bytes([128, 0, 255]))
    got = [colour(file, (x, 0)) for x in range(3)]
    assert got[0] == pytest.approx((255, 127, 127), abs=1)
    assert got[1:] == [WHITE, (10, 20, 30)]


def test_palette_with_an_alpha_channel():
    image = Image.new("PA", (2, 1))
    image.putpalette([1, 2, 3, *RED])
    image.putpixel((0, 0), (1, 255))
    image.putpixel((1, 0), (1, 0))
    assert [colour(image, (x, 0)) for x in (0, 1)] == [RED, WHITE]


def test_transparent_colour_of_an_rgb_png_is_white():
    file = png([bytes([255, 0, 0, 1, 2, 3])], 8, 2, struct.pack(">3H", *RED))
    assert [colour(file, (x, 0)) for x in (0, 1)] == [WHITE, (1, 2, 3)]


def test_transparent_level_of_a_grey_png_is_white():
    file = png([bytes([10, 20])], 8, 0, struct.pack(">H", 20))
    assert [colour(file, (x, 0)) for x in (0, 1)] == [(10, 10, 10), WHITE]


def test_fully_transparent_is_white_whatever_lies_below():
    assert colour(Image.new("RGBA", (1, 1), (0, 0, 0, 0))) == WHITE
    assert colour(saved(Image.new("RGBA", (1, 1), (12, 200, 3, 0)), "PNG")) == WHITE


def test_half_transparent_blends_with_white():
    got = colour(Image.new("RGBA", (1, 1), (255, 100, 0, 51)))  # 51 / 255 = 1 / 5
    assert got == (255, 224, 204)  # (1 x + 4 * 255) / 5


def test_opaque_alpha_changes_nothing():
    assert colour(Image.new("RGBA", (1, 1), (12, 200, 3, 255))) == (12, 200, 3)


def test_premultiplied_alpha():
    assert colour(Image.new("RGBa", (1, 1), (51, 20, 0, 51))) == (255, 224, 204)


def test_cmyk():
    assert colour(Image.new("CMYK", (1, 1), (0, 255, 255, 0))) == RED
    assert colour(Image.new("CMYK", (1, 1), (0, 0, 0, 0))) == WHITE
    assert colour(Image.new("CMYK", (1, 1), (0, 0, 0, 255))) == BLACK


def test_cmyk_jpeg():
    file = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert colour(file) == pytest.approx(RED, abs=2)


def test_ycbcr():
    assert colour(Image.new("YCbCr", (1, 1), (76, 85, 255))) == pytest.approx(RED, abs=2)


def test_hsv():
    assert colour(Image.new("HSV", (1, 1), (0, 255, 255))) == RED
    assert colour(Image.new("HSV", (1, 1), (85, 255, 255))) == (0, 255, 0)


def test_lab():
    # L from 0 to 100 fills a byte; a and b are shifted by 128. Red is L 54.3, a 80.8, b 69.9 (D50)
    assert colour(Image.new("LAB", (1, 1), (255, 128, 128))) == pytest.approx(WHITE, abs=2)
    assert colour(Image.new("LAB", (1, 1), (0, 128, 128))) == pytest.approx(BLACK, abs=2)
    assert colour(Image.new("LAB", (1, 1), (138, 209, 198))) == pytest.approx(RED, abs=6)


def test_16_bit_grey_png_is_scaled_and_rounded_not_clipped():
    levels = [0, 128, 129, 255, 256, 32768, 65535]
    file = png([struct.pack(">7H", *levels)], 16, 0)
    got = [colour(file, (x, 0))[0] for x in range(7)]
    assert got == [0, 0, 1, 1, 1, 128, 255]
    assert got == [round(v * 255 / 65535) for v in levels]


def test_16_bit_grey_png_with_a_transparent_level():
    file = png([struct.pack(">2H", 1000, 1001)], 16, 0, struct.pack(">H", 1000))
    assert [colour(file, (x, 0)) for x in (0, 1)] == [WHITE, (4, 4, 4)]


def test_16_bit_colour_png():
    file = png([struct.pack(">3H", 65535, 32768, 0)], 16, 2)
    assert colour(file) == (255, 128, 0)


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_16_bit_grey_in_memory(mode):
    image = Image.new(mode, (3, 1))
    for x, level in enumerate((0, 32768, 65535)):
        image.putpixel((x, 0), level)
    assert [colour(image, (x, 0)) for x in range(3)] == [BLACK, (128, 128, 128), WHITE]


def test_float_grey_counts_to_255():
    image = Image.fromarray(np.array([[0, 76.6, 255]], dtype=np.float32))
    assert image.mode == "F"
    assert [colour(image, (x, 0))[0] for x in range(3)] == [0, 77, 255]


def test_float_grey_tiff(tmp_path):
    Image.new("F", (2, 2), 200.0).save(tmp_path / "grey.tiff")
    assert colour(tmp_path / "grey.tiff") == (200, 200, 200)


def test_black_is_black_in_every_deep_mode():
    for mode in ("F", "I", "I;16"):
        assert colour(Image.new(mode, (1, 1))) == BLACK


# Orientation, animation, sources ------------------------------------------------------------------

#: Where EXIF says the stored first row and first column lie: https://exiftool.org/TagNames/EXIF.html
STORED_AS = {  # stored pixels as a function of the upright ones
    1: lambda a: a,
    2: lambda a: a[:, ::-1],  # mirrored left to right
    3: lambda a: a[::-1, ::-1],  # turned by 180 degrees
    4: lambda a: a[::-1],  # mirrored top to bottom
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),  # to be turned clockwise by 90 degrees: np.rot90 turns back
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8], upright[8:, :8], upright[:8, 24:] = RED, (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    exact = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    file = saved(stored, format, exif=exif, **exact.get(format, {}))
    got = np.asarray(read_rgb(file)).astype(int)
    assert got.shape == upright.shape
    assert np.abs(got - upright).max() <= (3 if format == "JPEG" else 0)


def test_orientation_is_applied_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture(5, 9)
    file = saved(stored, "PNG", exif=exif)
    once = read_rgb(file)
    assert once.size == (5, 9)
    assert read_rgb(once).tobytes() == once.tobytes()
    assert np.array_equal(load_image(file, 32), preprocess(once, 32))
    assert np.array_equal(load_image(file, 32), preprocess(Image.open(file), 32))


def test_16_bit_picture_is_turned_too():
    levels = np.array([[0, 65535]], dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 8
    got = np.asarray(read_rgb(saved(Image.fromarray(levels), "PNG", exif=exif)))
    assert got[..., 0].tolist() == [[255], [0]]


@pytest.mark.parametrize(
    "block",
    [
        b"no TIFF header",  # Pillow raises SyntaxError
        b"II*\0\x08\0\0\0\x05\0\x12\x01",  # five entries announced, none there: it warns
    ],
)
def test_damaged_exif_does_not_hide_the_picture(block):
    image = picture(4, 4)
    file = saved(image, "PNG", exif=b"Exif\0\0" + block)
    with pytest.raises((SyntaxError, UserWarning)):  # warnings are errors in this suite
        Image.open(file).getexif()
    assert read_rgb(file).tobytes() == image.tobytes()


def test_animated_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 4), c) for c in (RED, (0, 0, 255))]
    file = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert loose(Image.open(file)).n_frames == 2
    assert colour(file) == RED


def test_the_callers_image_is_left_alone():
    image = picture()
    before = image.tobytes()
    got = read_rgb(image)
    got.putpixel((0, 0), tuple(255 - c for c in loose(image).getpixel((0, 0))))
    assert image.tobytes() == before


def test_png_round_trip(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").tobytes() == image.tobytes()
    assert np.array_equal(load_image(str(tmp_path / "a.png"), 32), preprocess(image, 32))


def test_jpeg_round_trip(tmp_path):
    smooth = np.add.outer(np.arange(40) * 3, np.arange(60))[..., None] + np.array([0, 10, 20])
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    got = np.asarray(read_rgb(tmp_path / "a.jpg")).astype(int)
    assert np.abs(got - smooth).max() <= 6
    assert np.abs(got - smooth).mean() < 1.5


def test_an_open_file_is_read_from_its_start_and_left_open(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        file.read(10)
        assert read_rgb(file).tobytes() == image.tobytes()
        assert not file.closed


# Geometry -----------------------------------------------------------------------------------------


def torchvision_resize_and_crop(image, size):
    """Resize(int(size * 256 / 224), BICUBIC), CenterCrop(size), from torchvision's documentation.

    "If size is an int, smaller edge of the image will be matched to this number", the other to
    int(size * long / short); the crop starts at int(round((image - crop) / 2.0)).
    """
    target = int((256 / 224) * size) if size > 32 else size
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = target, int(target * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    image = image.resize((new_w, new_h), Image.Resampling.BICUBIC)
    top = int(round((new_h - size) / 2.0))  # noqa: RUF046 (as written there)
    left = int(round((new_w - size) / 2.0))  # noqa: RUF046
    return image.crop((left, top, left + size, top + size))


@settings(deadline=None, max_examples=150)
@given(height=sides, width=sides, size=targets)
def test_square_is_torchvisions(height, width, size):
    image = picture(height, width)
    expected = torchvision_resize_and_crop(image, size)
    given_size: Any
    for given_size in (size, (size, size), [size, size], np.int64(size)):
        got = resize_and_crop(image, given_size)
        assert got.size == (size, size)
        assert got.tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=150)
@given(height=sides, width=sides, H=targets, W=targets)
def test_rectangle_covers_both_targets_tightly(height, width, H, W):
    margin = 256 / 224 if max(H, W) > 32 else 1
    Ht, Wt = int(H * margin), int(W * margin)
    scale = max(Ht / height, Wt / width)
    new_h = Ht if Ht * width >= Wt * height else math.floor(scale * height + 1e-9)
    new_w = Wt if Ht * width <= Wt * height else math.floor(scale * width + 1e-9)
    assert new_h == Ht or new_w == Wt
    assert new_h >= Ht
    assert new_w >= Wt
    image = picture(height, width)
    top, left = round((new_h - H) / 2), round((new_w - W) / 2)
    expected = image.resize((new_w, new_h), Image.Resampling.BICUBIC).crop(
        (left, top, left + W, top + H)
    )
    got = resize_and_crop(image, (H, W))
    assert got.size == (W, H)
    assert got.tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=60)
@given(height=sides, width=sides, H=targets, W=targets)
def test_transposed_picture_gives_the_transposed_crop(height, width, H, W):
    image = Image.fromarray(noise(height, width) // 4 + 96)  # clips nowhere on the way
    turned = resize_and_crop(image.transpose(Image.Transpose.TRANSPOSE), (W, H))
    straight = np.asarray(resize_and_crop(image, (H, W))).astype(int)
    # Pillow resizes rows before columns and rounds between, so the order shows by a level or two
    assert np.abs(np.asarray(turned).transpose(1, 0, 2) - straight).max() <= 3


def test_worked_example_landscape():
    # 480x640: the short side becomes 256, the long int(256 * 640 / 480) = 341; left is
    # round(117 / 2) = round(58.5) = 58, halves to even; top is round(32 / 2) = 16
    image = picture(480, 640)
    expected = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 58 + 224, 16 + 224))
    assert resize_and_crop(image).tobytes() == expected.tobytes()


def test_worked_example_rounds_up_to_even():
    # 256x259 needs no resize at 224; left is round(35 / 2) = round(17.5) = 18
    image = picture(256, 259)
    assert resize_and_crop(image, 224).tobytes() == image.crop((18, 16, 242, 240)).tobytes()


def test_worked_example_rectangle():
    # 400x400 to (224, 448): targets 256 and 512; the width decides: 512x512, top 144, left 32
    image = picture(400, 400)
    expected = image.resize((512, 512), Image.Resampling.BICUBIC).crop(
        (32, 144, 32 + 448, 144 + 224)
    )
    assert resize_and_crop(image, (224, 448)).tobytes() == expected.tobytes()


def test_up_to_32_there_is_no_margin():
    image = picture(32, 32)
    assert resize_and_crop(image, 32).tobytes() == image.tobytes()
    image = picture(33, 33)
    assert resize_and_crop(image, 33).tobytes() != image.tobytes()  # 33 has one: 37
    image = picture(37, 37)
    assert resize_and_crop(image, 33).tobytes() == image.crop((2, 2, 35, 35)).tobytes()
    image = picture(37, 36)
    assert resize_and_crop(image, (33, 32)).tobytes() == image.crop((2, 2, 34, 35)).tobytes()


def test_a_disc_in_the_middle_stays_round_and_in_the_middle():
    image = Image.new("RGB", (500, 300))
    ImageDraw.Draw(image).ellipse((200, 100, 299, 199), fill="white")
    light = np.asarray(resize_and_crop(image, 224))[..., 0] > 127
    rows, columns = np.nonzero(light.any(axis=1))[0], np.nonzero(light.any(axis=0))[0]
    assert abs(len(rows) - 100 * 256 / 300) <= 1
    assert abs(len(columns) - len(rows)) <= 1
    assert rows.mean() == pytest.approx(111.5, abs=1)
    assert columns.mean() == pytest.approx(111.5, abs=1)


def test_photo_agrees_with_pytorchs_bicubic():
    photo = load_sample_image("china.jpg")  # 427x640
    x = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].double()
    resized = torch.nn.functional.interpolate(
        x, (256, 383), mode="bicubic", align_corners=False, antialias=True
    )
    crop = resized[0, :, 16:240, 80:304].permute(1, 2, 0).numpy()  # round(159 / 2) = 80
    got = np.asarray(resize_and_crop(Image.fromarray(photo), 224)).astype(float)
    difference = np.abs(got - np.clip(crop, 0, 255))
    assert difference.max() <= 4  # Pillow rounds and clips between rows and columns, too
    assert difference.mean() < 0.3  # bilinear: 1.8, Lanczos: 1.3


# Normalisation ------------------------------------------------------------------------------------


def test_normalize_has_the_bits_of_totensor_and_normalize():
    pixels = np.stack([np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 3))])  # (1, 256, 3)
    x = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (MEAN, STD))
    assert np.array_equal(normalize(pixels)[0], x.sub(mean).div(std).numpy())


def test_normalize_against_float64():
    pixels = noise(64, 64)
    expected = ((pixels / 255.0 - MEAN) / STD).transpose(2, 0, 1)[None]
    got = normalize(pixels)
    assert got.dtype == np.float32
    # three roundings of values up to 1, divided by 0.22: the error is absolute
    assert np.abs(got - expected).max() < 3 * 2**-24 / 0.22
    assert np.abs(got - expected).max() > 0


def test_worked_example_normalize():
    x = normalize(np.array([[[255, 0, 51]]], dtype=np.uint8))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    assert x.shape == (1, 3, 1, 1)
    assert x.ravel() == pytest.approx(expected, rel=1e-6)


def test_normalize_layouts():
    batch = np.stack([noise(5, 7, seed) for seed in range(3)])
    got = normalize(batch)
    assert got.shape == (3, 3, 5, 7)
    assert got.flags.c_contiguous
    for i, pixels in enumerate(batch):
        assert np.array_equal(got[i : i + 1], normalize(pixels))
    mirrored = normalize(batch[:, :, ::-1])
    assert np.array_equal(mirrored, got[..., ::-1])
    assert mirrored.flags.c_contiguous
    batch.flags.writeable = False
    assert np.array_equal(normalize(batch), got)


def test_preprocess_one_and_many():
    images = [picture(50, 70), picture(90, 40, 1).convert("L"), Image.new("RGBA", (9, 9))]
    got = preprocess(images, (64, 96))
    assert got.shape == (3, 3, 64, 96)
    assert got.dtype == np.float32
    for i, image in enumerate(images):
        assert np.array_equal(got[i : i + 1], preprocess(image, (64, 96)))
    assert np.array_equal(preprocess(tuple(images), (64, 96)), got)


def test_load_image_is_its_parts(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(load_sample_image("china.jpg")).save(path)
    x = load_image(path)
    assert x.shape == (1, 3, 224, 224)
    assert x.dtype == np.float32
    crop = torchvision_resize_and_crop(Image.open(path), 224)
    assert np.array_equal(x, normalize(np.asarray(crop)))


def test_there_is_one_way_from_pixels_to_numbers(monkeypatch, tmp_path):
    image = picture(40, 40)
    image.save(tmp_path / "a.png")
    released = Preprocessing("RGB", tuple(MEAN), tuple(STD))
    pixels = np.asarray(resize_and_crop(image, 32))
    wanted = released.normalize(pixels.transpose(2, 0, 1)[None], np.empty(0, np.float32))
    seen = []

    def spy(self, pixels, like):
        seen.append(pixels.shape)
        return honest(self, pixels, like)

    honest = Preprocessing.normalize
    monkeypatch.setattr(Preprocessing, "normalize", spy)
    model = pvt_ref.load("cifar10")
    for call, released_too in (
        (lambda: load_image(tmp_path / "a.png", 32), True),
        (lambda: preprocess(image, 32), True),
        (lambda: normalize(pixels), True),
        (lambda: released([np.asarray(image)], 32), True),
        (lambda: model.preprocess(image), False),  # CIFAR-10 has its own mean and deviation
    ):
        x = call()
        assert seen.pop() == (1, 3, 32, 32)
        assert not seen
        if released_too:
            np.testing.assert_array_equal(x, wanted)


# Padding ------------------------------------------------------------------------------------------


def library_array(library, host):
    return host if library is np else library.asarray(host)


@pytest.mark.parametrize("library", [np, array_api_strict], ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(st.integers(1, 2), st.just(3), st.integers(1, 20), st.integers(1, 20)),
    multiple=st.integers(1, 16),
)
def test_pad(library, dtype, shape, multiple):
    host = np.random.default_rng(0).normal(size=shape).astype(dtype)
    images = library_array(library, host)
    padded = pad_to_multiple(images, multiple)
    assert type(padded) is type(images)
    assert padded.dtype == images.dtype
    got = np.asarray(padded)
    _, _, H, W = shape
    assert got.shape[:2] == shape[:2]
    for side, before in zip(got.shape[2:], (H, W), strict=True):
        assert side % multiple == 0
        assert before <= side < before + multiple  # the smallest such
    assert np.array_equal(got[:, :, :H, :W], host)
    assert np.count_nonzero(got) == np.count_nonzero(host)
    assert pad_to_multiple(padded, multiple) is padded


def test_pad_gives_the_mean_colour():
    pixels = np.rint(255 * np.broadcast_to(MEAN, (3, 3, 3))).astype(np.uint8)
    x = pad_to_multiple(normalize(pixels), 4)
    assert np.abs(x).max() < 0.01
    assert (x[:, :, 3:] == 0).all()
    assert (x[:, :, :3, :3] != 0).all()


def test_pad_half_precision_and_read_only():
    images = np.ones((1, 3, 5, 5), np.float16)
    images.flags.writeable = False
    padded = pad_to_multiple(images, loose(np.int64(4)))
    assert padded.dtype == np.float16
    assert padded.shape == (1, 3, 8, 8)
    assert padded.sum() == 75


@pytest.mark.gpu
def test_pad_on_cuda():
    try:
        cupy = import_cupy()
    except DeviceError as error:
        pytest.skip(str(error))
    host = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    padded = pad_to_multiple(cupy.asarray(host), 4)
    assert isinstance(padded, cupy.ndarray)
    assert np.array_equal(padded.get(), pad_to_multiple(host, 4))


# Bad input ----------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(MissingFileError, match=r"no file .*cat\.png.*full path is .*folder"):
        load_image(tmp_path / "cat.png")
    with pytest.raises(FileNotFoundError):
        load_image("no_such_folder/cat.png")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(MissingFileError, match="no file"):
        load_image(tmp_path / "file" / "cat.png")


def test_web_address():
    with pytest.raises(MissingFileError, match="not addresses: download it first"):
        load_image("https://example.org/cat.png")


def test_folder(tmp_path):
    with pytest.raises(ImageError, match="is a folder; name a picture inside"):
        load_image(tmp_path)


def test_impossible_names():
    with pytest.raises(ImageError, match=r"cannot be read \(.*embedded null"):
        load_image("cat\0.png")
    with pytest.raises(ImageError, match=r"cannot be read .*File name too long") as caught:
        load_image("x" * 100_000)
    assert len(str(caught.value)) < 400


def test_empty_file(tmp_path):
    (tmp_path / "cat.png").touch()
    with pytest.raises(ImageError, match=r"cat\.png' is empty \(0 bytes\).*interrupted"):
        load_image(tmp_path / "cat.png")


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"\n<!DOCTYPE html><html>", "web page or an SVG"),
        (b"%PDF-1.7", "a PDF"),
        (b"\x93NUMPY\x01\x00", "numpy.load reads it"),
        (b"PK\x03\x04....", "a zip archive or a weights file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\0\0\0\x18ftypheic", "HEIC photo; save it as JPEG"),
        (b"hello, world", "first bytes are b'hello, world'"),
    ],
)
def test_not_a_picture(data, hint):
    with pytest.raises(ImageError, match=f"not a picture in a supported format.*{hint}"):
        load_image(io.BytesIO(data))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_file(tmp_path, format):
    data = saved(picture(80, 80), format).getvalue()
    path = tmp_path / f"cut.{format.lower()}"
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(
        ImageError, match=rf"cut\.{format.lower()}' (cannot be decoded|is not a pic)"
    ):
        load_image(path)


def test_truncated_file_says_so():
    data = saved(picture(80, 80), "JPEG").getvalue()
    lazy = Image.open(io.BytesIO(data[: len(data) // 2]))
    for read in (read_rgb, resize_and_crop, preprocess):
        with pytest.raises(ImageError, match=r"cannot be decoded .*cut short or damaged: copy"):
            read(lazy)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "PPM"])
def test_damaged_files_raise_nothing_foreign(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if format in ("GIF", "PPM") else {"exif": exif}
    data = saved(picture(12, 9), format, **options).getvalue()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), rng.integers(20, 2000)), rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        try:
            assert read_rgb(io.BytesIO(damaged)).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused > 0


def test_decompression_bomb(monkeypatch):
    file = saved(Image.new("L", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)  # Pillow warns from here, fails at twice
    with pytest.raises(
        ImageError, match=r"suspiciously large: .*9999 pixels.*raise .*PIL\.Image\.MAX"
    ):
        load_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(ImageError, match="suspiciously large"):
        load_image(file)
    with pytest.raises(ImageError, match="suspiciously large"):
        resize_and_crop(picture(), 224)  # a crop is measured too
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert load_image(file, 64).shape == (1, 3, 64, 64)


def test_no_pixels():
    empty = Image.new("RGB", (0, 5))
    for read in (read_rgb, resize_and_crop, load_image):
        with pytest.raises(ImageError, match=r"0x5.* has no pixels"):
            read(empty)


def test_long_thin_picture():
    with pytest.raises(ImageError, match=r"resized to 10240000x256 .*crop the part of interest"):
        load_image(Image.new("RGB", (40_000, 1)))


def test_largest_resize_is_allowed(monkeypatch):
    monkeypatch.setattr(pvt_ref.data.image, "MAX_RESIZED_PIXELS", 256 * 512)
    assert resize_and_crop(picture(10, 20)).size == (224, 224)
    monkeypatch.setattr(pvt_ref.data.image, "MAX_RESIZED_PIXELS", 256 * 512 - 1)
    with pytest.raises(ImageError, match="more than the 131071 pixels"):
        resize_and_crop(picture(10, 20))


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (np.array([[-1, 300]], np.int32), r"levels from -1 to 300; 16-bit grey \(mode I\).*65535"),
        (np.array([[0, 65536]], np.int32), "from 0 to 65536.*Scale or clip the levels"),
        (np.array([[0, 200]], np.int32), "no level above 200;.*Multiply the levels by 257"),
        (
            np.array([[0, 255.5]], np.float32),
            r"255\.5; float grey \(mode F\) must be from 0 to 255",
        ),
        (np.array([[0, np.nan]], np.float32), "levels from nan to nan"),
        (np.array([[0, 1]], np.float32), "scale of 0 to 1.*Multiply the levels by 255"),
    ],
)
def test_deep_grey_of_the_wrong_scale(levels, words):
    with pytest.raises(ImageError, match=words):
        read_rgb(Image.fromarray(levels))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "source is a NoneType; it must be a path"),
        (3, "source is a int"),
        (np.zeros((4, 4, 3), np.uint8), "ndarray.*normalize"),
        (b"\x89PNG", "bytes.*io.BytesIO"),
        (["a.png", "b.png"], "list.*one at a time"),
        (io.StringIO("P3 1 1"), "opened as text.*'rb'"),
    ],
)
def test_not_a_source(source, words):
    with pytest.raises(ArrayTypeError, match=words):
        load_image(source)


def test_closed_and_write_only_files(tmp_path):
    with (
        open(tmp_path / "a.png", "wb") as file,
        pytest.raises(ImageError, match=r"cannot be read .*'rb'"),
    ):
        load_image(file)
    with pytest.raises(ImageError, match="is closed; read the picture inside"):
        load_image(file)


@pytest.mark.parametrize("size", [0, -224, 224.0, True, None, "224", (224,), (1, 2, 3), (0, 224)])
def test_bad_size(size):
    with pytest.raises(
        ShapeError, match=r"size is .*; it must be the side of a square or \(H, W\)"
    ):
        resize_and_crop(picture(), size)


def test_resize_refuses_other_modes_and_types():
    with pytest.raises(ImageError, match=r"mode P, 60x40\) must be in mode RGB; .*read_rgb"):
        resize_and_crop(picture().convert("P"))
    with pytest.raises(ArrayTypeError, match="image is a ndarray; it must be a PIL image"):
        resize_and_crop(loose(noise(4, 4)))


def test_preprocess_refuses_what_is_no_image():
    with pytest.raises(ShapeError, match="list of images is empty"):
        preprocess([])
    with pytest.raises(ArrayTypeError, match=r"hold a str; .*load_image\(path\)"):
        preprocess(loose("cat.png"))
    with pytest.raises(ArrayTypeError, match=r"hold a ndarray; .*normalize\(pixels\)"):
        preprocess([picture(), loose(noise(4, 4))])


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32; normalize takes raw uint8.*rint\(255 \* pix"),
        (np.zeros((4, 4, 3)), r"normalised already, the model takes them as \(B, 3, H, W\)"),
        (np.zeros((4, 4, 3), np.uint16), r"uint16.*pixels / 257"),
        (np.zeros((4, 4, 3), np.int64), r"int64.*astype\('uint8'\) if they lie in 0 to 255"),
        (np.zeros((4, 4, 3), bool), r"bool.*255 \* pixels"),
        ([[[0, 0, 0]]], "a list.*numpy.stack"),
        (Image.new("RGB", (4, 4)), r"preprocess\(image\) takes PIL images"),
        (array_api_strict.zeros((4, 4, 3)), "to_numpy"),
    ],
)
def test_normalize_refuses_other_types(pixels, words):
    with pytest.raises(ArrayTypeError, match=words):
        normalize(pixels)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 5), r"shape \(4, 5\).*For grey: numpy.stack"),
        ((3, 4, 5), r"channels-first: pixels.transpose\(1, 2, 0\)"),
        ((2, 3, 4, 5), r"channels-first: pixels.transpose\(0, 2, 3, 1\)"),
        ((4, 5, 4), r"shape \(4, 5, 4\).*takes grey and alpha"),
        ((4, 5, 1), "takes grey and alpha"),
        ((2, 4, 5, 4), r"must be \(H, W, 3\) or \(B, H, W, 3\)$"),
        ((3,), r"must be \(H, W, 3\) or"),
        ((1, 1, 4, 5, 3), r"must be \(H, W, 3\) or"),
        ((0, 4, 5, 3), "they are empty"),
        ((0, 5, 3), "they are empty"),
    ],
)
def test_normalize_refuses_other_shapes(shape, words):
    with pytest.raises(ShapeError, match=words):
        normalize(np.zeros(shape, np.uint8))


def test_pad_refuses():
    images = np.zeros((1, 3, 4, 4), np.float32)
    multiple: Any
    for multiple in (0, -32, 32.0, True, None):
        with pytest.raises(RangeError, match=r"multiple is .*; it must be a whole number"):
            pad_to_multiple(images, multiple)
    with pytest.raises(ArrayTypeError, match=r"expected an array, got a list"):
        pad_to_multiple([[1.0]], 32)
    with pytest.raises(ArrayTypeError, match=r"dtype uint8; pad normalised floats.*black"):
        pad_to_multiple(np.zeros((1, 3, 4, 4), np.uint8), 32)
    with pytest.raises(ShapeError, match=r"\(3, 4, 4\).*batch axis: images\[None\]"):
        pad_to_multiple(images[0], 32)
    with pytest.raises(ShapeError, match=r"shape \(4, 4\); they must be \(B, C, H, W\)$"):
        pad_to_multiple(images[0, 0], 32)
    with pytest.raises(ShapeError, match=r"look channels-last: \(8, 20, 20, 3\)"):
        pad_to_multiple(np.zeros((8, 20, 20, 3), np.float32), 32)
    with pytest.raises(ShapeError, match="they are empty"):
        pad_to_multiple(np.zeros((1, 3, 0, 4), np.float32), 32)


def test_threads_leave_the_warnings_filters_as_they_were(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (40, 40), "red").save(path)
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: load_image(path, 32), range(200)))
    assert list(warnings.filters) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="is a pipe or a device"):
        load_image(tmp_path / "pipe.png")
