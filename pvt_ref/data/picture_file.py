"""Untrusted picture files: which formats are opened, and how much a file may cost.

Pillow opens some forty formats. One of them starts another program (PostScript, Ghostscript), and
several put no bound on the cost of a small file. Here only :data:`FORMATS` are opened, and a file
is measured before it is decoded. This takes no lock and changes no setting of Pillow and no
warnings filter, so threads decode in parallel and a fork meets no lock.
"""

import io
import os
import re
import stat
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, BinaryIO

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from pvt_ref.errors import ArrayTypeError, ImageError, MissingFileError, PVTError, reason, shown

# Import all plugins now: a fork during an import would leave its lock taken in the child
_PLUGINS = ("Jpeg", "Png", "WebP", "Avif", "Gif", "Bmp", "Tiff", "Ppm")
for _name in (*_PLUGINS, "Mpo"):
    with suppress(ImportError):  # Avif comes with Pillow 11.3
        import_module(f"PIL.{_name}ImagePlugin")
_OPENED = tuple(name.upper() for name in _PLUGINS if name.upper() in Image.OPEN)

#: The formats that are read, by Pillow's names: AVIF if Pillow has it; PPM includes PGM, PBM and
#: PFM; MPO is Pillow's name for a JPEG followed by others in the same file.
FORMATS = (*_OPENED, "MPO")

#: Bytes of a picture file.
MAX_FILE_BYTES = 2**28
#: Pixels of a picture in a file. Reading takes up to 12 bytes for each, 1 GiB in all.
#: ``PIL.Image.MAX_IMAGE_PIXELS`` is obeyed too; by default it is the same number.
MAX_PIXELS = 2**30 // 12
#: Pixels of a WebP or AVIF, whose decoders keep copies. Reading takes up to 20 bytes for each.
MAX_COPIED_PIXELS = 2**30 // 20
_COPYING = ("WEBP", "AVIF")
#: Scans of a JPEG: each visits every pixel, however few bytes it has. 1 to 10 are usual.
MAX_SCANS = 100
#: Bytes of a file, and levels of its pixels, that go through Python one by one: a PNM in digits or
#: with an odd maximum, a BMP of run lengths. A microsecond each.
MAX_SLOW_BYTES = 2**24
#: Parts of a file: chunks of a PNG, segments of a JPEG, blocks of a GIF before its first frame.
MAX_PARTS = 2**17
#: Parts that are unpacked or joined: profiles and packed texts of a PNG, Exif of a JPEG.
MAX_METADATA_PARTS = 64
#: Numbers in all tags of a TIFF or of Exif: each becomes a Python object.
MAX_TAG_NUMBERS = 2**18


@contextmanager
def as_image_error(what: str) -> Generator[None]:
    """Turns the errors of Pillow's plugins, of a dozen types, into ImageError."""
    try:
        yield
    except PVTError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_many_pixels(what, pixel_limit()) from error
    except Warning as error:  # only where the caller's filters turn warnings into errors
        raise ImageError(
            f"{what} is unusual, and warnings are errors in this process ({_brief(error)}). Save "
            f"it again, or allow it: warnings.filterwarnings('default', module='PIL')"
        ) from error
    except Exception as error:
        raise ImageError(
            f"{what} cannot be decoded ({_brief(error)}). It is probably cut short or damaged: "
            f"copy or download it again, and check whether a viewer opens it"
        ) from error


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _too_many_pixels(what: str, limit: int) -> ImageError:
    name = "MAX_COPIED_PIXELS" if limit == MAX_COPIED_PIXELS < MAX_PIXELS else "MAX_PIXELS"
    own = f"pvt_ref.data.picture_file.{name} (now {globals()[name]})"
    return ImageError(
        f"{what} is suspiciously large: more than the {limit} pixels allowed. Shrink it, or, if "
        f"you trust it, raise {own} and PIL.Image.MAX_IMAGE_PIXELS (now {Image.MAX_IMAGE_PIXELS})"
    )


def pixel_limit(format: str | None = None) -> int:
    """The smaller of :data:`MAX_PIXELS` and Pillow's own limit; for some formats, a lower one."""
    pillows = Image.MAX_IMAGE_PIXELS
    own = min(MAX_PIXELS, MAX_COPIED_PIXELS) if format in _COPYING else MAX_PIXELS
    return own if pillows is None else min(own, pillows)


def read_path(path: str | os.PathLike[str], what: str) -> bytes:
    """All bytes of a regular file. Raises: MissingFileError, ImageError."""
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISREG(kind):
            # A pipe that replaces the file meanwhile must not block us forever
            flags = getattr(os, "O_NONBLOCK", 0)
            with open(path, "rb", opener=lambda name, own: os.open(name, own | flags)) as file:
                kind = os.fstat(file.fileno()).st_mode
                if stat.S_ISREG(kind):
                    return _read(file, what)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"there is no file {what}. {_where(os.fsdecode(path))}") from error
    except (OSError, ValueError) as error:  # permissions, or a name that cannot be one
        if isinstance(error, PVTError):
            raise
        cause = reason(error)  # without the path, which may be long
        raise ImageError(f"{what} cannot be read ({cause}). Check name and permissions") from error
    if stat.S_ISDIR(kind):
        raise ImageError(f"{what} is a folder; name a picture inside it")
    raise ImageError(f"{what} is a pipe or a device; copy the picture into a regular file")


def _where(name: str) -> str:
    if "://" in name:
        return "Only files are read, not addresses: download it first"
    try:
        place = shown(os.path.abspath(name), 200)
    except OSError:  # a relative name needs the working folder
        gone = "The folder that Python runs in has been deleted"
        return f"{gone}: change to another (os.chdir), or give the full path"
    return f"The full path is {place}; check the spelling, and the folder that Python runs in"


_AS_TEXT = "{} was opened as text; pictures need open(path, 'rb')"


def read_file(file: BinaryIO, what: str) -> bytes:
    """All bytes of an open file, from its start if it can seek. It is left open."""
    if getattr(file, "closed", False):
        raise ImageError(f"{what} is closed; read the picture inside the `with open(...)`")
    try:
        if getattr(file, "seekable", lambda: False)():  # a pipe is not; some lack it
            file.seek(0)
        return _read(file, what)
    except PVTError:
        raise
    except UnicodeDecodeError as error:
        raise ArrayTypeError(_AS_TEXT.format(what)) from error
    except Exception as error:  # an object with read may raise anything
        hint = "open it with open(path, 'rb')"
        raise ImageError(f"{what} cannot be read ({_brief(error)}); {hint}") from error


def _read(file: Any, what: str) -> bytes:
    parts, size = [], 0
    while part := file.read(2**20):
        if isinstance(part, str):
            raise ArrayTypeError(_AS_TEXT.format(what))
        if not isinstance(part, bytes | bytearray | memoryview):
            raise ArrayTypeError(f"{what} gives a {type(part).__name__}; its read must give bytes")
        parts.append(part)
        size += len(part)
        if size > MAX_FILE_BYTES:
            raise ImageError(
                f"{what} is larger than the {MAX_FILE_BYTES} bytes allowed for a picture. Shrink "
                f"it with another program, or raise pvt_ref.data.picture_file.MAX_FILE_BYTES"
            )
    if part is None:
        why = "is not at its end, but has nothing to read now (it is non-blocking)"
        raise ImageError(f"{what} {why}. Wait for all of it, and pass io.BytesIO(data)")
    return b"".join(parts)


#: First bytes of files that are often mistaken for readable pictures.
_OTHERS = (
    (b"%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing, a program; export it as PNG"),
    (b"<", "a web page or an SVG drawing; save the picture itself, as PNG or JPEG"),
    (b"%PDF", "a PDF; export the page as PNG"),
    (b"\x93NUMPY", "a NumPy array; numpy.load reads it, pvt_ref.normalize takes its pixels"),
    (b"PK\x03\x04", "a zip archive or a weights file; unpack it, or pvt_ref.load reads weights"),
    (b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the picture"),
    (b"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000; save it as PNG"),
    (b"8BPS", "a Photoshop document; export it as PNG"),
    (b"\0\0\1\0", "an icon; save it as PNG"),
    (b"(?s).{4}ftyp(heic|heix|mif1|msf1)", "a HEIC photo; save it as JPEG"),
)
_NAMES = ", ".join(_OPENED)

#: Suffixes of files in these formats, in lower case.
SUFFIXES = tuple(sorted(s for s, format in Image.EXTENSION.items() if format in FORMATS))


class _Counted(io.BytesIO):
    """A file whose parts have been counted."""


def open_picture(source: str | os.PathLike[str] | BinaryIO, what: str) -> Image.Image:
    """A picture of known size and mode, not decoded yet; an ImageError if the format is unknown."""
    is_path = isinstance(source, str | os.PathLike)
    data = read_path(source, what) if is_path else read_file(source, what)
    if not data:
        raise ImageError(f"{what} is empty (0 bytes): was the copy or download interrupted?")
    _check_parts(data, what)
    try:
        return Image.open(_Counted(data), formats=_OPENED)
    except UnidentifiedImageError as error:
        likely = [name for start, name in _OTHERS if re.match(start, data[:64].lstrip())]
        begun = [] if likely else [name for name in _OPENED if _begins_as(name, data)]
        if begun:
            floats = begun[0] == "TIFF" and 3 in _values(data, _SAMPLE_FORMAT)
            kind = "of float samples" if floats else "cut short, damaged, or of a rare kind"
            raise ImageError(
                f"{what} cannot be decoded: it begins as a {begun[0]}, but is {kind}, and Pillow "
                f"does not read it. Save it again with another program, as 8-bit PNG"
            ) from error
        cause = f"It looks like {likely[0]}" if likely else f"Its first bytes are {data[:12]!r}"
        known = f"a picture in a supported format ({_NAMES})"
        raise ImageError(f"{what} is not {known}. {cause}") from error


def _begins_as(format: str, data: bytes) -> bool:
    accept = Image.OPEN[format][1]
    text = format == "PPM" and not data[2:3].isspace()  # a text may begin with P too
    return accept is not None and not text and bool(accept(data[:16]))


#: Pillow multiplies grey levels of 2 and 4 bits, but not the one that is transparent.
_FACTORS = {"L;2": 85, "L;4": 17}


def decode(image: Image.Image, what: str) -> None:
    """Decodes a PIL image within the limits; one that is decoded already stays as it is."""
    has_pixels = _has_pixels(image, what)
    if not isinstance(image, ImageFile.ImageFile):
        return
    waiting = bool(image.tile) or not has_pixels
    if image.format not in FORMATS:
        if waiting:  # decoding could start another program
            raise ImageError(
                f"{what} is a {image.format} file that is not loaded yet; only {_NAMES} are. Save "
                f"it as PNG with another program or, if you trust it, call image.load() first"
            )
        return
    file: Any = getattr(image, "fp", None)
    gone = file is None or getattr(file, "closed", False)  # WebP and AVIF need no file
    if waiting:
        limit = pixel_limit(image.format)
        if image.width * image.height > limit:
            raise _too_many_pixels(what, limit)
        if not gone:
            _check_file(image, file, what)
    packing = image.tile[0][3] if image.format == "PNG" and image.tile else None
    if packing == "RGB;16B" and "transparency" in image.info:
        why = "Pillow keeps 8 bits, so others become equal to it. Save it with alpha, or in 8 bits"
        raise ImageError(f"{what} is a PNG of 16 bits a colour with one that is transparent. {why}")
    try:
        image.load()
    except Exception as error:
        if not gone:
            raise
        raise _closed(what) from error
    transparent = image.info.get("transparency")
    if packing in _FACTORS and isinstance(transparent, int):
        factor = _FACTORS[packing]
        image.info["transparency"] = transparent % (1 + 255 // factor) * factor


def _check_file(image: ImageFile.ImageFile, file: Any, what: str) -> None:
    """Refuses a file of too many parts, and large pictures that Pillow decodes in Python."""
    if isinstance(file, _Counted):
        length = file.getbuffer().nbytes
    else:
        here = file.tell()
        file.seek(0)
        data = _read(file, what)
        length = len(data)
        file.seek(here)
        _check_parts(data, what)
    if any(tile[0] in Image.DECODERS for tile in image.tile):  # the decoders written in Python
        levels = image.width * image.height * len(image.getbands())
        _at_most("MAX_SLOW_BYTES", length, _SLOW, what)
        _at_most("MAX_SLOW_BYTES", levels, "levels, which are made one by one", what)


def _has_pixels(image: Image.Image, what: str) -> bool:
    try:
        return bool(image.im.mode)
    except ValueError as error:  # after image.close()
        raise _closed(what) from error
    except Exception:  # Pillow's error if there are none yet differs between releases
        return False


def _closed(what: str) -> ImageError:
    return ImageError(
        f"{what} is closed; read it inside the `with Image.open(...)`, and before image.close()"
    )


def exif_is_harmless(image: Image.Image) -> bool:
    """Whether Exif is small enough to read without exhausting memory."""
    block = image.info.get("exif")
    while isinstance(block, bytes) and block.startswith(b"Exif\0\0"):  # as in Pillow
        block = block[6:]
    return not isinstance(block, bytes) or _has_few_numbers(block)


def orientation(image: Image.Image) -> Any:
    """The tag of Exif that says how to turn the picture; None if it cannot be read."""
    with suppress(Exception):  # damaged metadata must not make intact pixels unreadable
        return image.getexif().get(ExifTags.Base.Orientation) if exif_is_harmless(image) else None


_SLOW = "bytes, which are read one by one"


def _at_most(limit: str, count: int, things: str, what: str) -> None:
    """Refuses more things than the limit of that name allows."""
    if count > globals()[limit]:
        raise ImageError(
            f"{what} has more than {globals()[limit]} {things}, and could take very long. Save it "
            f"again or, if you trust it, raise pvt_ref.data.picture_file.{limit}"
        )


#: The limit for the number of each kind of part of a file.
_LIMITS = dict.fromkeys(("segments", "chunks", "blocks"), "MAX_PARTS") | {"scans": "MAX_SCANS"}
_LIMITS |= dict.fromkeys(("Exif segments", "profiles and packed texts"), "MAX_METADATA_PARTS")


def _check_parts(data: bytes, what: str) -> None:
    walks = {b"\xff\xd8": _jpeg_parts, b"\x89PNG": _png_parts, b"GIF8": _gif_parts}
    counts = dict.fromkeys(_LIMITS, 0)
    for start, walk in walks.items():
        for part in walk(data) if data.startswith(start) else ():
            counts[part] += 1
            _at_most(_LIMITS[part], counts[part], part, what)
    if data.startswith((b"II", b"MM")):
        _check_tiff(data, what)
    if data.startswith(b"P") and not _PNM.match(data[: 2**16]):  # a comment of any length
        _at_most("MAX_SLOW_BYTES", len(data), _SLOW, what)


#: A marker: not a stuffed byte, nor a restart, nor one of the fill bytes before it.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")


def _jpeg_parts(data: bytes) -> Iterator[str]:
    """Walks the segments as libjpeg does: bytes between two of them are skipped."""
    at = 2
    while marker := _MARKER.search(data, at):
        kind, at = marker[1][0], marker.end()
        if kind == 0xD9:  # end of image: libjpeg stops, so appended bytes do not count
            return
        if kind >= 0xC0:  # the others have no length
            at += max(int.from_bytes(data[at : at + 2], "big"), 2)
        yield "segments"
        if kind == 0xDA:
            yield "scans"
        elif kind == 0xE1 and data.startswith(b"Exif\0\0", marker.end() + 2):
            yield "Exif segments"


def _png_parts(data: bytes) -> Iterator[str]:
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + length
        yield "chunks"
        if kind in (b"iCCP", b"zTXt", b"iTXt"):
            yield "profiles and packed texts"


def _gif_parts(data: bytes) -> Iterator[str]:
    """Walks the blocks before the first frame, as Pillow does: stray bytes are skipped."""
    at = 13
    if len(data) > 10 and data[10] & 128:  # a palette
        at += 3 << ((data[10] & 7) + 1)
    in_extension = False
    while at < len(data) and (in_extension or data[at] not in b",;"):
        yield "blocks"
        if in_extension:
            in_extension = data[at] > 0
            at += 1 + data[at]
        else:
            in_extension = data[at] == 0x21
            at += 1 + in_extension  # a label follows


#: A PNM's mark, and its numbers with white space or comments before each.
_PNM = re.compile(
    rb"P[14](?:(?:\s|#[^\r\n]*[\r\n])+\d+){2}|P.(?:(?:\s|#[^\r\n]*[\r\n])+[-+.\d]+){3}"
)


_TILE_SIDES, _SAMPLE_FORMAT = (322, 323), 339


def _check_tiff(data: bytes, what: str) -> None:
    if not _has_few_numbers(data):
        _at_most("MAX_TAG_NUMBERS", MAX_TAG_NUMBERS + 1, "numbers in its tags", what)
    # a tile is unpacked whole, however little of it is visible; a strip ends with the picture
    width, height = (max(_values(data, tag), default=0) for tag in _TILE_SIDES)
    if width * height > pixel_limit():
        raise _too_many_pixels(f"a tile of {what}", pixel_limit())


def _has_few_numbers(tiff: bytes) -> bool:
    """Whether the tags of a TIFF's first directory hold at most MAX_TAG_NUMBERS numbers."""
    total = 0
    for i, (_, kind, count, _) in enumerate(_entries(tiff)):
        total += count if kind not in (1, 2, 6, 7) else 0  # bytes and texts stay as they are
        if max(total, i) > MAX_TAG_NUMBERS:
            return False
    return True


#: Bytes of the kinds of whole numbers.
_WHOLE = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 16: 8, 17: 8}


def _values(tiff: bytes, wanted: int) -> list[int]:
    """The first whole numbers of a tag, from every place where it occurs."""
    order: Any = "little" if tiff[:2] == b"II" else "big"
    values = []
    for tag, kind, count, field in _entries(tiff):
        if tag == wanted and kind in _WHOLE:
            size, count = _WHOLE[kind], min(count, 16)
            if size * count > len(field):  # then the field holds their offset
                at = int.from_bytes(field, order)
                field = tiff[at : at + size * count]
            values += [int.from_bytes(field[i * size :][:size], order) for i in range(count)]
    return values


def _entries(tiff: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The entries of a TIFF's first directory: tag, kind, number of values, and their field."""
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        if tiff[2:4] in (b"\x2b\0", b"\0\x2b"):  # BigTIFF
            entry, (at,) = f"{order}HHQ8s", struct.unpack_from(f"{order}Q", tiff, 8)
            (count,), first = struct.unpack_from(f"{order}Q", tiff, at), at + 8
        else:
            entry, (at,) = f"{order}HHI4s", struct.unpack_from(f"{order}I", tiff, 4)
            (count,), first = struct.unpack_from(f"{order}H", tiff, at), at + 2
        for i in range(count):
            yield struct.unpack_from(entry, tiff, first + i * struct.calcsize(entry))
    except struct.error:  # cut short: Pillow reports it, or leaves the tag out
        return
