"""Kinds of picture files in which Pillow takes much more than the pixels shown, or errs."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from loose import loose
from PIL import Image
from test_picture_file import PEAK, chunk, run, saved

import pvt_ref
from pvt_ref.data import picture_file
from pvt_ref.data.image import read_rgb, resize_and_crop
from pvt_ref.data.preprocessing import load_image, preprocess
from pvt_ref.errors import ArrayTypeError, ImageError

# Tiles --------------------------------------------------------------------------------------------

KINDS = {3: "H", 4: "I", 16: "Q"}


def tiff(entries, data=b"", order="<", big=False):
    """A TIFF of (tag, kind, values); data stands first, at offset 16, and longer values behind."""
    mark = b"II" if order == "<" else b"MM"
    start = 16 + len(data)
    if big:
        header = mark + struct.pack(f"{order}HHHQ", 43, 8, 0, start)
        slot, count, size = 8, struct.pack(f"{order}Q", len(entries)), 20
    else:
        header = (mark + struct.pack(f"{order}HI", 42, start)).ljust(16, b"\0")
        slot, count, size = 4, struct.pack(f"{order}H", len(entries)), 12
    fields, behind = [], b""
    end = start + len(count) + size * len(entries) + slot
    for tag, kind, values in entries:
        packed = struct.pack(f"{order}{len(values)}{KINDS[kind]}", *values)
        if len(packed) > slot:
            place, behind = end + len(behind), behind + packed
            packed = struct.pack(f"{order}{'Q' if big else 'I'}", place)
        number = struct.pack(f"{order}HH{'Q' if big else 'I'}", tag, kind, len(values))
        fields.append(number + packed.ljust(slot, b"\0"))
    return header + data + count + b"".join(fields) + bytes(slot) + behind


def tiled(width, height, tiles, order="<", big=False, kind=4):
    """A grey picture of 1 x 1 in one deflated tile of width x height."""
    data = zlib.compress(b"\x4d" * min(width * height, 2**16), 9)
    sides = [(tag, kind, [side]) for tag, side in zip((322, 323), (width, height), strict=True)]
    entries = [(256, 4, [1]), (257, 4, [1]), (258, 3, [8]), (259, 3, [8]), (262, 3, [1])]
    entries += [(277, 3, [1]), *(sides * tiles), (324, 4, [16]), (325, 4, [len(data)])]
    return tiff(entries, data, order, big)


@pytest.mark.parametrize(
    ("order", "big", "kind"),  # Pillow reads no BigTIFF with the large end first
    [("<", False, 3), ("<", False, 4), ("<", True, 4), ("<", True, 16), (">", False, 3)],
)
def test_tiles_count_with_all_their_pixels(order, big, kind, monkeypatch):
    data = tiled(256, 128, 1, order, big, kind)
    assert read_rgb(io.BytesIO(data)).getpixel((0, 0)) == (77, 77, 77)
    monkeypatch.setattr(picture_file, "MAX_PIXELS", 256 * 128)
    assert read_rgb(io.BytesIO(data)).size == (1, 1)
    monkeypatch.setattr(picture_file, "MAX_PIXELS", 256 * 128 - 1)
    with pytest.raises(ImageError, match=r"a tile of .* suspiciously large: more than the 32767"):
        read_rgb(io.BytesIO(data))
    lazy = Image.open(io.BytesIO(data))
    for read in (read_rgb, preprocess):
        with pytest.raises(ImageError, match=r"a tile of .* suspiciously large"):
            read(lazy)


def test_a_tile_beyond_the_limit_is_not_unpacked():
    for sides in ((22_500, 22_500), (2**31, 2**31), (1, 2**32 - 1)):
        with pytest.raises(ImageError, match=r"a tile of .* more than the 89478485 pixels"):
            read_rgb(io.BytesIO(tiled(*sides, 1)))
    # libtiff takes the first of two entries, Pillow the last: the larger one counts
    data = tiled(22_500, 22_500, 2)
    at = data.rindex(struct.pack("<HHII", 322, 4, 1, 22_500))
    small = struct.pack("<HHII", 322, 4, 1, 16)
    last_small = data[:at] + small + data[at + 12 :]
    for two in (last_small, data.replace(data[at : at + 12], small, 1)):
        assert two.count(small) == 1
        with pytest.raises(ImageError, match="a tile of"):
            read_rgb(io.BytesIO(two))


def test_strips_end_with_the_picture():
    data = zlib.compress(bytes([7, 9]))
    entries = [(256, 4, [2]), (257, 4, [1]), (258, 3, [8]), (259, 3, [8]), (262, 3, [1])]
    entries += [(273, 4, [16]), (277, 3, [1]), (278, 4, [2**32 - 1]), (279, 4, [len(data)])]
    assert read_rgb(io.BytesIO(tiff(entries, data))).getpixel((1, 0)) == (9, 9, 9)


# Decoders that keep copies ------------------------------------------------------------------------

COPYING = [f for f in ("WEBP", "AVIF") if f in picture_file.FORMATS]


@pytest.mark.parametrize("format", COPYING)
def test_fewer_pixels_where_the_decoder_keeps_copies(format, monkeypatch):
    assert picture_file.MAX_COPIED_PIXELS == 2**30 // 20 == 53_687_091
    data, png = (saved(Image.new("RGBA", (32, 32)), f) for f in (format, "PNG"))
    monkeypatch.setattr(picture_file, "MAX_COPIED_PIXELS", 32 * 32)
    assert read_rgb(io.BytesIO(data)).size == (32, 32)
    monkeypatch.setattr(picture_file, "MAX_COPIED_PIXELS", 32 * 32 - 1)
    for source in (io.BytesIO(data), Image.open(io.BytesIO(data))):
        with pytest.raises(ImageError, match=r"more than the 1023 .*MAX_COPIED_PIXELS \(now 1023"):
            read_rgb(source)
    assert read_rgb(io.BytesIO(png)).size == (32, 32)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is counted in KiB on Linux only")
@pytest.mark.parametrize("format", COPYING)
def test_memory_is_twenty_bytes_a_pixel_there(tmp_path, format):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned, which needs a copy too
    options = {"WEBP": {"lossless": True, "quality": 0, "method": 0}}
    options["AVIF"] = {"speed": 10, "subsampling": "4:4:4"}
    side = 3000
    for name, size in (("small", 64), ("large", side)):
        image = Image.new("RGBA", (size, size), (1, 2, 3, 128))
        image.save(tmp_path / name, format, exif=exif, **options[format])
    peak = int(run(PEAK, tmp_path / "small", tmp_path / "large"))
    assert peak * 1024 < 20 * side**2 + 2**25  # and a band


# Decoders in Python -------------------------------------------------------------------------------


def run_lengths(side, bits):
    """A BMP with a run of one pixel, and an end of line, in each row."""
    data = b"\1\0\0\0" * side + b"\0\1"
    colours = 2**bits
    sizes = 14 + 40 + 4 * colours
    header = struct.pack("<2sIHHI", b"BM", sizes + len(data), 0, 0, sizes)
    kind = {8: 1, 4: 2}[bits]
    header += struct.pack("<IiiHHIIii", 40, side, side, 1, bits, kind, len(data), 0, 0)
    return header + struct.pack("<II", colours, 0) + bytes(4 * colours) + data


@pytest.mark.parametrize(
    ("data", "levels"),
    [
        (run_lengths(256, 8), 2**16),
        (run_lengths(256, 4), 2**16),
        (b"P5 40 30 254\n" + bytes(1200), 1200),
        (b"P5 40 30 1000\n" + bytes(2400), 2400),
        (b"P5 40 30 65534\n" + bytes(2400), 2400),
        (b"P6 40 30 254\n" + bytes(3600), 3600),
        (b"P6 40 30 65535\n" + bytes(7200), 7200),
        (b"P1 40 30\n" + b"0" * 1200, 1200),
    ],
    ids=lambda value: repr(value[:14]) if isinstance(value, bytes) else None,
)
def test_levels_that_are_made_one_by_one(data, levels, monkeypatch):
    count = max(levels, len(data))
    monkeypatch.setattr(picture_file, "MAX_SLOW_BYTES", count)
    assert read_rgb(io.BytesIO(data)).mode == "RGB"
    monkeypatch.setattr(picture_file, "MAX_SLOW_BYTES", count - 1)
    for source in (io.BytesIO(data), Image.open(io.BytesIO(data))):
        with pytest.raises(ImageError, match=r"which are .* one by one.*MAX_SLOW_BYTES"):
            read_rgb(source)


def test_a_small_file_of_run_lengths_for_a_large_picture():
    data = run_lengths(9400, 8)
    assert len(data) < 40_000
    with pytest.raises(ImageError, match="more than 16777216 levels, which are made one by one"):
        read_rgb(io.BytesIO(data))


@pytest.mark.parametrize(
    "data",
    [
        b"P5 40 30 255\n" + bytes(1200),
        b"P5 40 30 65535\n" + bytes(2400),
        b"P6 40 30 255\n" + bytes(3600),
        b"P4 40 30\n" + bytes(150),
    ],
    ids=lambda data: repr(data[:14]),
)
def test_the_usual_maxima_are_read_at_once(data, monkeypatch):
    monkeypatch.setattr(picture_file, "MAX_SLOW_BYTES", 100)
    assert read_rgb(io.BytesIO(data)).size == (40, 30)


# The transparent colour of a PNG ------------------------------------------------------------------


def png(bits, colour, row, width, transparent=None):
    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    extra = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def levels_of(source):
    return np.asarray(read_rgb(source))[0, :, 0].tolist()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_level_turns_white_and_no_other(bits):
    count = 2**bits
    number = sum(level << bits * (count - 1 - level) for level in range(count))
    row = number.to_bytes(-(-count * bits // 8), "big")
    if bits == 1:
        row = b"\x40"
    grey = [255 * level // (count - 1) for level in range(count)]
    assert levels_of(io.BytesIO(png(bits, 0, row, count))) == grey
    for transparent in range(count):
        wanted = [255 if level == transparent else grey[level] for level in range(count)]
        data = png(bits, 0, row, count, transparent)
        assert levels_of(io.BytesIO(data)) == wanted
        lazy = Image.open(io.BytesIO(data))
        assert levels_of(lazy) == levels_of(lazy) == wanted
    if bits in (2, 4):  # of its two bytes, only so many bits count
        assert levels_of(io.BytesIO(png(bits, 0, row, count, 2**bits))) == [255, *grey[1:]]


def test_a_transparent_colour_of_16_bits_is_refused():
    row = struct.pack(">6H", 0x12FF, 0x1234, 0x80FF, 0xFFFF, 0, 0)
    plain = png(16, 2, row, 2)
    assert read_rgb(io.BytesIO(plain)).getpixel((1, 0)) == (255, 0, 0)
    at = plain.index(b"IDAT") - 4
    data = plain[:at] + chunk(b"tRNS", struct.pack(">3H", 0x12FF, 0x1234, 0x80FF)) + plain[at:]
    for source in (io.BytesIO(data), Image.open(io.BytesIO(data))):
        for _ in range(2):
            with pytest.raises(ImageError, match="16 bits a colour with one that is transparent"):
                read_rgb(source)


# Sources that cannot be read, and why -------------------------------------------------------------


def test_a_picture_opened_as_text(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((40, 40), 90).save(path)
    for encoding in ("utf-8", "latin-1"):
        with (
            open(path, encoding=encoding) as file,
            pytest.raises(ArrayTypeError, match=r"opened as text; pictures need open\(path, 'rb'"),
        ):
            load_image(loose(file))
    with open(path, encoding="utf-8") as file:
        (answer,) = pvt_ref.load("digits").predict_each(file)
    assert "opened as text" in str(answer)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_closed_images_are_called_closed(tmp_path, format):
    path = tmp_path / "a"
    Image.new("RGB", (40, 40), "red").save(path, format)
    never_read, read_before = Image.open(path), Image.open(path)
    read_before.load()
    plain = Image.new("RGB", (40, 40))
    for image in (never_read, read_before, plain):
        image.close()
        for read in (read_rgb, preprocess, resize_and_crop):
            with pytest.raises(ImageError, match=r"is closed; read it inside the `with Image\.op"):
                read(image)
    with Image.open(path) as left:
        pass
    with open(path, "rb") as file:
        of_closed_file = Image.open(file)
    if format != "WEBP":  # which has all of its file in memory
        for image in (left, of_closed_file):
            with pytest.raises(ImageError, match="is closed"):
                read_rgb(image)
    with Image.open(path) as image:
        image.load()
    assert read_rgb(image).size == (40, 40)  # its pixels are still there


def test_files_that_have_only_read():
    data = saved(Image.new("RGB", (40, 40), "red"), "PNG")

    class OnlyRead:
        def __init__(self, kind):
            self.rest, self.kind = data, kind

        def read(self, n):
            part, self.rest = self.rest[:n], self.rest[n:]
            return self.kind(part)

    for kind in (bytes, bytearray, memoryview):
        assert read_rgb(loose(OnlyRead(kind))).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ArrayTypeError, match="gives a list; its read must give bytes"):
        read_rgb(loose(OnlyRead(list)))

    class Broken:
        def read(self, n):
            raise RuntimeError("the line is dead")

    with pytest.raises(ImageError, match=r"cannot be read \(RuntimeError: the line is dead\)"):
        read_rgb(loose(Broken()))


def test_a_file_that_does_not_block():
    class Waiting(io.RawIOBase):
        parts = (b"\x89PNG", None)

        def read(self, n=-1):
            part, *self.parts = self.parts
            return part

    with pytest.raises(ImageError, match=r"nothing to read now .*io\.BytesIO\(data\)"):
        read_rgb(loose(Waiting()))


def test_what_begins_as_a_picture_is_not_called_none():
    floats = struct.pack("<6f", 0, 0.5, 1, 1, 1, 0)
    entries = [(256, 4, [2]), (257, 4, [1]), (258, 3, [32] * 3), (259, 3, [1]), (262, 3, [2])]
    entries += [(273, 4, [16]), (277, 3, [3]), (278, 4, [1]), (279, 4, [24]), (339, 3, [3] * 3)]
    with pytest.raises(ImageError, match=r"begins as a TIFF, but is of float samples") as caught:
        read_rgb(io.BytesIO(tiff(entries, floats)))
    assert "not a picture" not in str(caught.value)
    with pytest.raises(ImageError, match=r"begins as a PNG, but is cut short, damaged, or of a"):
        read_rgb(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"\0" * 40))
    with pytest.raises(ImageError, match=r"not a picture .* first bytes are b'Python is a '"):
        read_rgb(io.BytesIO(b"Python is a language"))


# One bad input among many -------------------------------------------------------------------------


class Strange:
    def __fspath__(self):
        raise RuntimeError("no such thing")


def test_a_foreign_exception_costs_only_its_picture():
    model = pvt_ref.load("digits")
    good = Image.new("RGB", (40, 40))
    first, second = model.predict_each([Strange(), good], top=1)
    assert isinstance(first, ImageError)
    assert "(RuntimeError: no such thing)" in str(first)
    assert isinstance(first.__cause__, RuntimeError)
    assert second == model.predict(good, top=1)[0]
    with pytest.raises(ImageError, match="RuntimeError: no such thing"):
        model.predict([good, Strange()])


def test_no_memory_ends_it(monkeypatch):
    def full(*_):
        raise MemoryError

    model = pvt_ref.load("digits")
    monkeypatch.setattr(pvt_ref.Preprocessing, "__call__", full)
    with pytest.raises(MemoryError):
        list(model.predict_each([Image.new("RGB", (40, 40))]))
