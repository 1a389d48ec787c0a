"""Picture files of strangers: no program is started, no lock held, and every limit is kept."""

import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loose import loose
from PIL import Image, ImageFile

import pvt_ref
from pvt_ref.data import picture_file
from pvt_ref.data.image import read_rgb, resize_and_crop
from pvt_ref.data.picture_file import FORMATS
from pvt_ref.data.preprocessing import load_image, preprocess
from pvt_ref.errors import ArrayTypeError, ImageError, MissingFileError

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 30
%%EndComments
0 0 40 30 rectfill showpage
%%EOF
"""
PACKAGE = str(Path(pvt_ref.__file__).parents[1])


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def run(script, *arguments, **variables):
    """A script in a process of its own; the time limit only ends what would never end."""
    environment = {**os.environ, "PYTHONPATH": PACKAGE, **variables}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Formats ------------------------------------------------------------------------------------------


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A false `gs`, first in PATH, that leaves a trace when it is started."""
    folder, trace = tmp_path / "bin", tmp_path / "started"
    folder.mkdir()
    script = folder / "gs"
    script.write_text(f"#!/bin/sh\ntouch '{trace}'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # look for it anew
    return trace


@pytest.mark.skipif(sys.platform == "win32", reason="the trap is a shell script")
def test_postscript_named_jpg_starts_no_program(tmp_path, ghostscript):
    path = tmp_path / "cat.jpg"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(ImageError, match=r"cat\.jpg' is not a picture.*PostScript"):
        load_image(path)
    with Image.open(path) as lazy:
        assert lazy.format == "EPS"
        for read in (read_rgb, load_image, preprocess, resize_and_crop):
            with pytest.raises(ImageError, match=r"is a EPS file that is not loaded yet"):
                read(lazy)
        with pytest.raises(ImageError, match="not loaded yet"):
            pvt_ref.Preprocessing()([lazy], 32)
        assert not ghostscript.exists()
        with pytest.raises((OSError, subprocess.CalledProcessError)):
            lazy.load()
    assert ghostscript.exists()  # the trap was set


@pytest.mark.parametrize("format", ["TGA", "PCX", "ICO", "SGI", "JPEG2000", "EPS", "DDS"])
def test_other_formats_are_refused(format):
    data = saved(Image.new("RGB", (32, 32), "red"), format)
    with pytest.raises(ImageError, match=r"not a picture in a supported format \(JPEG, P"):
        read_rgb(io.BytesIO(data))


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "MPO"])
def test_the_formats_of_the_list_are_read(format):
    data = saved(Image.new("RGB", (32, 32), (200, 0, 0)), format)
    red, *rest = loose(read_rgb(io.BytesIO(data))).getpixel((9, 9))
    assert abs(red - 200) < 8
    assert max(rest) < 8


def test_a_jpeg_with_another_behind_it_is_read():
    images = [Image.new("RGB", (32, 32), c) for c in ("red", "blue")]
    data = saved(images[0], "MPO", save_all=True, append_images=images[1:])
    with Image.open(io.BytesIO(data)) as lazy:
        assert lazy.format == "MPO"
        assert loose(read_rgb(lazy)).getpixel((9, 9))[0] > 240
    assert loose(read_rgb(io.BytesIO(data))).getpixel((9, 9))[0] > 240


def test_a_picture_of_another_format_that_was_loaded_is_taken():
    lazy = Image.open(io.BytesIO(saved(Image.new("RGB", (8, 8), "red"), "TGA")))
    with pytest.raises(ImageError, match=r"is a TGA file that is not loaded yet.*image\.load\(\)"):
        read_rgb(lazy)
    lazy.load()
    assert read_rgb(lazy).getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_of_no_named_format_is_not_loaded():
    class Strange(ImageFile.ImageFile):
        def _open(self):
            self._mode, self._size = "RGB", (4, 4)

        def load(self):
            raise AssertionError("loaded")

    with pytest.raises(ImageError, match="is a None file that is not loaded yet"):
        read_rgb(Strange(io.BytesIO(b"x")))


# Threads, forks, warnings -------------------------------------------------------------------------


class Slow(io.BytesIO):
    """A file whose first read waits until it is told to go on."""

    def __init__(self, data):
        super().__init__(data)
        self.reading, self.go_on = threading.Event(), threading.Event()

    def read(self, *arguments):
        self.reading.set()
        assert self.go_on.wait(120)
        return super().read(*arguments)


def test_one_slow_picture_stops_no_other():
    data = saved(Image.new("RGB", (40, 40), "red"), "PNG")
    slow, results = Slow(data), []
    thread = threading.Thread(target=lambda: results.append(load_image(slow, 32)))
    thread.start()
    assert slow.reading.wait(60)
    assert load_image(io.BytesIO(data), 32).shape == (1, 3, 32, 32)  # while the other one waits
    assert not results
    slow.go_on.set()
    thread.join(60)
    assert len(results) == 1


def test_two_threads_decode_at_the_same_time(monkeypatch):
    meeting, decode = threading.Barrier(2), ImageFile.ImageFile.load
    here = threading.local()

    def load(image):
        if not hasattr(here, "met"):
            here.met = meeting.wait(60)  # breaks unless the other one is inside, too
        return decode(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    data = saved(Image.new("RGB", (40, 40), "red"), "JPEG")
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: load_image(io.BytesIO(data), 32), range(2))
    assert np.array_equal(one, other)


def test_limits_hold_in_many_threads():
    good = saved(Image.new("RGB", (40, 40), "red"), "PNG")
    wanted = load_image(io.BytesIO(good), 32)
    refused = {
        "suspiciously large": png(9460, 9460, data=zlib.compress(b"")),
        "100 scans": jpeg_with_scans(101),
        "64 profiles": png(8, 8, extra=chunk(b"zTXt", b"t\0\0" + zlib.compress(b"a")) * 65),
        "PostScript": POSTSCRIPT,
        "a tile of": tiff_of_tile(22_500),
        "numbers in its tags": tiff_of_numbers(2**18 + 1),
    }
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)

    def answer(data):
        try:
            return load_image(io.BytesIO(data), 32)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, [good, *refused.values()] * 20))
    for at, got in enumerate(answers):
        if at % (1 + len(refused)):
            assert list(refused)[at % (1 + len(refused)) - 1] in got
        else:
            assert np.array_equal(got, wanted)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_other_threads_read_pictures(tmp_path):
    Image.effect_noise((400, 400), 90).convert("RGB").save(tmp_path / "a.jpg")
    out = run(
        """
import io, os, signal, sys, threading
from pvt_ref import load_image
path = sys.argv[1]
class Waiting(io.BytesIO):
    def read(self, *arguments):
        reading.set()
        stop.wait()
        return super().read(*arguments)
reading, stop = threading.Event(), threading.Event()
def forever():
    while not stop.is_set():
        load_image(path, 64)
threads = [threading.Thread(target=forever) for _ in range(3)]
threads.append(threading.Thread(target=load_image, args=(Waiting(open(path, "rb").read()), 64)))
for thread in threads:
    thread.start()
reading.wait()
for _ in range(25):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for ever is killed, and counts as failed
        os._exit(0 if load_image(path, 64).shape == (1, 3, 64, 64) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
print("done")
""",
        tmp_path / "a.jpg",
    )
    assert out == "done\n"


def test_warnings_filters_stay_as_they_are_meanwhile():
    before, seen = list(warnings.filters), []

    class Watching(io.BytesIO):
        def read(self, *arguments):
            seen.append(list(warnings.filters))
            return super().read(*arguments)

    load_image(Watching(saved(Image.new("RGB", (40, 40)), "PNG")), 32)
    assert seen
    assert all(filters == before for filters in seen)
    assert list(warnings.filters) == before


def test_a_warning_of_pillows_is_a_warning_unless_it_is_to_be_an_error():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"  # five entries announced, none there
    data = saved(Image.new("RGB", (16, 16), "red"), "JPEG", exif=exif)
    data = data[:2] + data[20:]  # without JFIF's density, Pillow looks for Exif's on opening
    with pytest.raises(ImageError, match=r"is unusual, and warnings are errors in this process"):
        read_rgb(io.BytesIO(data))
    with pytest.warns(UserWarning, match="EXIF"):
        assert read_rgb(io.BytesIO(data)).size == (16, 16)


# Limits -------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bit_depth=8, color_type=0, extra=b"", data=None):
    """A PNG with all rows zero, written by hand so that it can be larger than anything here."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    if data is None:
        packer = zlib.compressobj(9)
        row = bytes(1 + width * channels * bit_depth // 8)
        data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


PEAK = """
import resource, sys
from pvt_ref import load_image
load_image(sys.argv[1], 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_image(sys.argv[2], 32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is counted in KiB on Linux only")
@pytest.mark.parametrize(("bit_depth", "color_type"), [(16, 0), (8, 4), (8, 6)])
def test_memory_is_twelve_bytes_a_pixel(tmp_path, bit_depth, color_type):
    (tmp_path / "small.png").write_bytes(png(64, 64, bit_depth, color_type))
    side = 3000
    (tmp_path / "large.png").write_bytes(png(side, side, bit_depth, color_type))
    peak = int(run(PEAK, tmp_path / "small.png", tmp_path / "large.png"))
    assert peak * 1024 < 12 * side**2 + 2**25  # and a band


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is counted in KiB on Linux only")
def test_the_largest_16_bit_grey_is_read_within_a_gibibyte(tmp_path):
    (tmp_path / "small.png").write_bytes(png(64, 64, 16))
    (tmp_path / "large.png").write_bytes(png(9400, 9400, 16))
    assert (tmp_path / "large.png").stat().st_size < 2**18
    assert int(run(PEAK, tmp_path / "small.png", tmp_path / "large.png")) < 2**20


def test_more_pixels_than_allowed(monkeypatch):
    limit = picture_file.MAX_PIXELS
    assert limit == Image.MAX_IMAGE_PIXELS == 89_478_485
    data = png(9460, 9460, data=zlib.compress(b""))  # 89,491,600: refused before it is decoded
    for category in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(category)
            with pytest.raises(ImageError, match=r"suspiciously large: more than the 89478485"):
                read_rgb(io.BytesIO(data))
    with pytest.raises(ImageError, match=r"suspiciously large"):
        read_rgb(io.BytesIO(png(60_000, 60_000, data=b"")))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some scripts do
    for side in (9460, 60_000):
        with pytest.raises(ImageError, match="more than the 89478485"):
            read_rgb(io.BytesIO(png(side, side, data=b"")))
        lazy = Image.open(io.BytesIO(png(side, side, color_type=2, data=b"")))
        with pytest.raises(ImageError, match="more than the 89478485"):
            resize_and_crop(lazy)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "MPO"])
def test_the_limit_of_pixels_holds_for_every_format(format, monkeypatch):
    data = saved(Image.new("RGB", (32, 32)), format)
    monkeypatch.setattr(picture_file, "MAX_PIXELS", 32 * 32 - 1)
    with pytest.raises(ImageError, match="more than the 1023 pixels"):
        read_rgb(io.BytesIO(data))
    monkeypatch.setattr(picture_file, "MAX_PIXELS", 32 * 32)
    assert read_rgb(io.BytesIO(data)).size == (32, 32)


def jpeg_with_scans(n, size=16):
    """A progressive JPEG of n scans: those added refine the first coefficient, out of no bytes."""
    data = saved(Image.new("RGB", (size, size), (200, 10, 10)), "JPEG", progressive=True)
    scan = bytes.fromhex("ffda000c03010002000300 000010".replace(" ", ""))
    own = data.count(b"\xff\xda")
    assert n >= own
    end = data.rindex(b"\xff\xd9")
    return data[:end] + scan * (n - own) + data[end:]


def test_scans_of_a_jpeg():
    assert picture_file.MAX_SCANS == 100
    assert read_rgb(io.BytesIO(jpeg_with_scans(100))).size == (16, 16)
    for n in (101, 500):
        data = jpeg_with_scans(n)
        with pytest.raises(ImageError, match="more than 100 scans"):
            read_rgb(io.BytesIO(data))
        lazy = Image.open(io.BytesIO(data))
        for read in (read_rgb, resize_and_crop, preprocess):
            with pytest.raises(ImageError, match="more than 100 scans"):
                read(lazy)
    lazy = Image.open(io.BytesIO(jpeg_with_scans(50)))
    assert read_rgb(lazy).size == (16, 16)


def test_scans_are_counted_where_the_decoder_sees_them():
    data = saved(Image.new("RGB", (16, 16), "red"), "JPEG", restart_marker_blocks=1)
    segment = b"\xff\xe1" + struct.pack(">H", 2002) + b"\xff\xda" * 1000
    inside = data[:2] + segment + data[2:]  # a preview in the metadata, say
    behind = data + b"\0\2" + b"\xff\xda\0\2" * 1000  # a film behind the photo
    for harmless in (data, inside, behind):
        assert loose(read_rgb(io.BytesIO(harmless))).getpixel((0, 0))[0] > 240
    fill = jpeg_with_scans(101).replace(b"\xff\xda", b"\xff\xff\xff\xda")  # the same to a decoder
    hidden = jpeg_with_scans(101).replace(b"\xff\xda", b"\xff\x05\x00\xff\xff\xda")
    for data in (fill, hidden):
        with pytest.raises(ImageError, match="more than 100 scans"):
            read_rgb(io.BytesIO(data))


def test_segments_of_a_jpeg(monkeypatch):
    data = saved(Image.new("RGB", (16, 16)), "JPEG")
    comments = data[:2] + b"\xff\xfe\x00\x02" * 60 + data[2:]
    exif = data[:2] + b"\xff\xe1\x00\x08Exif\0\0" * 65 + data[2:]
    assert read_rgb(io.BytesIO(comments)).size == (16, 16)
    monkeypatch.setattr(picture_file, "MAX_PARTS", 50)
    with pytest.raises(ImageError, match="more than 50 segments"):
        read_rgb(io.BytesIO(comments))
    monkeypatch.undo()
    with pytest.raises(ImageError, match="more than 64 Exif segments"):
        read_rgb(io.BytesIO(exif))


def test_chunks_of_a_png(monkeypatch):
    bomb = zlib.compress(bytes(2**20 - 100), 9)
    for kind, start in ((b"iCCP", b"p\0\0"), (b"zTXt", b"t\0\0")):
        few = png(8, 8, extra=chunk(kind, start + bomb) * 60)
        many = png(8, 8, extra=chunk(kind, start + bomb) * 65)
        assert read_rgb(io.BytesIO(few)).size == (8, 8)
        with pytest.raises(ImageError, match="more than 64 profiles and packed texts"):
            read_rgb(io.BytesIO(many))
    texts = png(8, 8, extra=chunk(b"tEXt", b"a\0b") * 60)
    assert read_rgb(io.BytesIO(texts)).size == (8, 8)
    monkeypatch.setattr(picture_file, "MAX_PARTS", 62)
    with pytest.raises(ImageError, match="more than 62 chunks"):
        read_rgb(io.BytesIO(texts))


def test_blocks_of_a_gif(monkeypatch):
    data = saved(Image.new("P", (8, 8)), "GIF")
    for start in (data.index(b","), 13 + 3 * 2 ** ((data[10] & 7) + 1)):
        for extra in (b"!\xfe\x01a\0", b"!\xfe" + b"\x01a" * 3 + b"\0", b"\0", b"!\x01\x01,\0"):
            few = data[:start] + extra * 9 + data[start:]
            many = data[:start] + extra * 60 + data[start:]
            with monkeypatch.context() as patch:
                patch.setattr(picture_file, "MAX_PARTS", 59)
                assert read_rgb(io.BytesIO(few)).size == (8, 8)
                with pytest.raises(ImageError, match="more than 59 blocks"):
                    read_rgb(io.BytesIO(many))
    frames = [Image.new("P", (8, 8), c) for c in range(90)]
    film = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(picture_file, "MAX_PARTS", 59)
    assert read_rgb(io.BytesIO(film)).size == (8, 8)  # later frames are not counted: not read


def run_lengths(side):
    """A BMP of 8 bits in runs of one pixel."""
    data = (b"\1\0" * side + b"\0\0") * side + b"\0\1"
    sizes = 14 + 40 + 1024
    header = struct.pack("<2sIHHI", b"BM", sizes + len(data), 0, 0, sizes)
    header += struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(data), 0, 0, 256, 0)
    return header + bytes(1024) + data


@pytest.mark.parametrize(
    "data",
    [
        b"P2 8 8 255 " + b"7 " * 64 + b" " * 2000,
        b"P3 1 1 #" + b"c" * 2000 + b"\n255 1 2 3",
        b"P6 1 #" + b"c" * 70_000 + b"\n1 255 abc",
        run_lengths(32),
    ],
    ids=["digits", "comment in digits", "comment", "run lengths"],
)
def test_what_is_read_byte_by_byte(data, monkeypatch):
    assert read_rgb(io.BytesIO(data)).mode == "RGB"
    monkeypatch.setattr(picture_file, "MAX_SLOW_BYTES", len(data) - 1)
    with pytest.raises(ImageError, match="bytes, which are read one by one"):
        read_rgb(io.BytesIO(data))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "F"])
def test_what_is_read_at_once_may_be_larger(mode, monkeypatch):
    monkeypatch.setattr(picture_file, "MAX_SLOW_BYTES", 20)
    for format in ("PPM", *["BMP"] * (mode != "F")):
        data = saved(Image.new(mode, (64, 64), 200), format)
        assert read_rgb(io.BytesIO(data)).size == (64, 64)
    commented = b"P6\n# by hand\n2 1\n# levels\n255\nabcdef"
    assert read_rgb(io.BytesIO(commented)).size == (2, 1)


def tiff_of_numbers(count, order="<", big=False):
    """A TIFF with one tag of so many fractions, whose place in the file is its own start."""
    mark = b"II" if order == "<" else b"MM"
    if big:
        header = mark + struct.pack(f"{order}HHHQ", 43, 8, 0, 16)
        return header + struct.pack(f"{order}QHHQQQ", 1, 0x011A, 5, count, 0, 0)
    return mark + struct.pack(f"{order}HIHHHIII", 42, 8, 1, 0x011A, 5, count, 0, 0)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_in_the_tags_of_a_tiff(order, big):
    with pytest.raises(ImageError, match="more than 262144 numbers in its tags"):
        read_rgb(io.BytesIO(tiff_of_numbers(2**18 + 1, order, big)))
    with pytest.raises(ImageError) as caught:  # it has no pixels, but that is another matter
        read_rgb(io.BytesIO(tiff_of_numbers(2**18, order, big)))
    assert "numbers" not in str(caught.value)


def tiff_of_tile(side):
    """A TIFF that says that it has one tile of side x side pixels."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, side) for tag in (322, 323))
    return struct.pack("<2sHIH", b"II", 42, 8, 2) + entries + bytes(4)


def test_numbers_in_exif():
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(image, "PNG", exif=exif)
    assert read_rgb(io.BytesIO(turned)).size == (2, 4)
    for prefix in (b"", b"Exif\0\0", b"Exif\0\0" * 2):
        many = saved(image, "PNG", exif=b"Exif\0\0" + prefix + tiff_of_numbers(2**18 + 1))
        assert read_rgb(io.BytesIO(many)).size == (4, 2)  # not looked at
        assert not picture_file.exif_is_harmless(Image.open(io.BytesIO(many)))


def test_bytes_of_a_file(tmp_path, monkeypatch):
    assert picture_file.MAX_FILE_BYTES == 2**28
    data = saved(Image.new("RGB", (16, 16)), "BMP")
    path = tmp_path / "a.bmp"
    path.write_bytes(data)
    monkeypatch.setattr(picture_file, "MAX_FILE_BYTES", len(data))
    for source in (path, io.BytesIO(data)):
        assert read_rgb(source).size == (16, 16)
    monkeypatch.setattr(picture_file, "MAX_FILE_BYTES", len(data) - 1)
    for source in (path, io.BytesIO(data)):
        with pytest.raises(ImageError, match=f"larger than the {len(data) - 1} bytes allowed"):
            read_rgb(source)


def test_a_file_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(picture_file, "MAX_FILE_BYTES", 2**22)

    class Endless(io.RawIOBase):
        read_so_far = 0

        def readable(self):
            return True

        def read(self, n=-1):
            assert n > 0
            self.read_so_far += n
            return bytes(n)

    file: Any = Endless()
    with pytest.raises(ImageError, match="larger than the 4194304 bytes"):
        read_rgb(file)
    assert file.read_so_far < 2**24


def test_a_file_that_gives_little_at_a_time_is_read_whole():
    class Drop(io.BytesIO):
        def read(self, n=-1):
            return super().read(min(n, 7))

    data = saved(Image.new("RGB", (16, 16), "red"), "PNG")
    assert read_rgb(Drop(data)).getpixel((3, 3)) == (255, 0, 0)


# Sources that are no files ------------------------------------------------------------------------


def in_one_sentence(caught):
    """No message inside another one, and nothing of Python's names for errors."""
    text = str(caught.value)
    return "Error" not in text and text.count("cannot be") <= 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_in_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", os.devnull):
        with pytest.raises(ImageError, match="' is a pipe or a device; copy") as e:
            load_image(path)
        assert in_one_sentence(e)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    plain = os.stat(__file__)
    monkeypatch.setattr(picture_file.os, "stat", lambda *_, **__: plain)  # it was a file then
    with pytest.raises(ImageError, match="is a pipe or a device"):
        load_image(path)


def test_a_folder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ImageError, match="is a folder; name a picture inside it") as caught:
        load_image(tmp_path)
    assert in_one_sentence(caught)


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be deleted there")
def test_a_working_folder_that_was_deleted(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(MissingFileError, match=r"no file 'cat\.png'\. The folder .* deleted") as e:
        load_image("cat.png")
    assert in_one_sentence(e)


def test_names_are_shown_as_text(tmp_path):
    for name in ("a\x1b[31mred.png", "two\nlines.png", "left\u202eright.png", "\udcff.png"):
        with pytest.raises(MissingFileError) as caught:
            load_image(tmp_path / name)
        assert str(caught.value).isprintable()


def test_bytes_as_a_name(tmp_path):
    class Name:
        def __fspath__(self):
            return b"nothing.png"

    with pytest.raises(MissingFileError, match="no file"):
        load_image(loose(Name()))


def test_a_file_that_gives_texts():
    class Text:
        def seekable(self):
            return False

        def read(self, n=-1):
            return "P3 1 1"

    with pytest.raises(ArrayTypeError, match="opened as text"):
        load_image(loose(Text()))


def test_bands_change_no_bit(monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 65536, (50, 30), dtype=np.uint16)),
        Image.fromarray((255 * rng.random((50, 30))).astype(np.float32)),
        Image.fromarray(rng.integers(0, 256, (50, 30, 4), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 256, (50, 30, 4), dtype=np.uint8)).convert("LA"),
    ]
    whole = [read_rgb(p).tobytes() for p in pictures]
    for pixels in (1, 64, 999):
        monkeypatch.setattr("pvt_ref.data.image._BAND_PIXELS", pixels)
        assert [read_rgb(p).tobytes() for p in pictures] == whole
