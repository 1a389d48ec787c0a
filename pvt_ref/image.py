"""From a picture to the array the network was trained on, and back to sizes the network accepts.

The classifier's preprocessing is that of the authors' released code (whai362/PVT, the evaluation
branch of ``build_transform``)::

    RGB  ->  short side to int(S * 256 / 224), bicubic  ->  centre S x S  ->  (x / 255 - mean) / std

:func:`load_image` does all of it. Its parts are public because each is a place where pipelines
quietly differ: :func:`read_rgb`, :func:`resize_and_crop`, :func:`normalize`. Dense prediction keeps
the whole picture instead, and :func:`pad_to_multiple` makes its size fit.
"""

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from pvt_ref.arrays import Array, array_module, dtype_name, from_host, is_array
from pvt_ref.config import TOO_LARGE, is_whole
from pvt_ref.errors import (
    ArrayTypeError,
    ImageError,
    MissingFileError,
    PVTError,
    RangeError,
    ShapeError,
    shown,
)

#: Mean and standard deviation of the training pixels, red, green, blue, on a scale of 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Pixels that a picture may have between resizing and cropping: very long ones grow enormous.
MAX_RESIZED_PIXELS = 2**27

#: Held while the warnings filters are changed.
_FILTERS = threading.RLock()

Source = str | os.PathLike[str] | BinaryIO | Image.Image


def load_image(source: Source, size: int | tuple[int, int] = 224) -> np.ndarray:
    """One picture, prepared for the classifier as the released weights expect.

    Args:
        source: a path, a file opened in binary mode, or a PIL image; see :func:`read_rgb`.
        size: side of the square, or (H, W), in pixels; see :func:`resize_and_crop`.

    Returns:
        (1, 3, H, W) float32, normalised. numpy.concatenate makes a batch of several.

    Raises:
        MissingFileError: if there is no file at the path.
        ImageError: if it is not a picture, is damaged, or cannot be brought to that size.
        ArrayTypeError: if source is none of the three.
        ShapeError: if size is not one or two positive whole numbers.
    """
    return preprocess(read_rgb(source), size)


def preprocess(
    images: Image.Image | Sequence[Image.Image], size: int | tuple[int, int] = 224
) -> np.ndarray:
    """PIL images, of any modes and sizes, as one batch for the classifier.

    Args:
        images: a PIL image, or a list or tuple of them.
        size: side of the square, or (H, W), in pixels; see :func:`resize_and_crop`.

    Returns:
        (B, 3, H, W) float32, normalised.

    Raises:
        ImageError: if a picture is damaged, or cannot be brought to that size.
        ShapeError: if size is not one or two positive whole numbers, or there is no picture.
        ArrayTypeError: if something is not a PIL image.
    """
    batch: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    for image in batch:
        if not isinstance(image, Image.Image):
            hint = (
                "pvt_ref.normalize(pixels) takes raw pixels"
                if is_array(image)
                else "pvt_ref.load_image(path) reads a file"
            )
            raise ArrayTypeError(
                f"images hold a {type(image).__name__}; preprocess takes PIL images. {hint}"
            )
    if not batch:
        raise ShapeError("the list of images is empty; a batch needs at least one")
    return normalize(np.stack([np.asarray(resize_and_crop(read_rgb(i), size)) for i in batch]))


# Reading ------------------------------------------------------------------------------------------


def read_rgb(source: Source) -> Image.Image:
    """A picture upright and in plain RGB, whatever it was stored as.

    The orientation in the EXIF data is applied, transparency is laid on white, palettes, CMYK,
    YCbCr, LAB and HSV are converted, 16-bit grey is scaled to 8 bits and rounded. Float grey (mode
    F) counts from 0 to 255, as everywhere in Pillow. Colour profiles are not applied.

    The authors' loader is ``image.convert("RGB")`` alone: for an upright opaque 8-bit picture, as
    those of ImageNet nearly all are, the two agree.

    Args:
        source: a path, a file opened in binary mode (read from its start, left open), or a PIL
            image (left as it is). Any format that Pillow reads; of an animation, the first frame
            (of a PIL image, the frame it stands on).

    Returns:
        A new PIL image in mode RGB, without metadata: reading it again changes nothing.

    Raises:
        MissingFileError: if there is no file at the path.
        ImageError: not a picture, damaged, without pixels, suspiciously large, or grey levels
            outside their range.
        ArrayTypeError: if source is none of the three.
    """
    what = _describe(source)
    with _as_image_error(what):
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, str | os.PathLike):
            image = _open(_read_path(source, what), what)
        else:
            image = _open(_read_open_file(source, what), what)
        if 0 in image.size:
            raise ImageError(f"{what} has no pixels: its size is {image.width}x{image.height}")
        image.load()  # some formats tell transparency and orientation only now
        rgb = _to_rgb(image, what)
        turn = _turn_upright(image)
        if turn is not None:
            rgb = rgb.transpose(turn)
        rgb.info = {}  # or the next reader would turn it once more
        return rgb


def _describe(source: object) -> str:
    """The source in a few words, for messages."""
    if isinstance(source, Image.Image):
        return f"the PIL image (mode {source.mode}, {source.width}x{source.height})"
    if isinstance(source, str | os.PathLike):
        return f"{os.fspath(source)!r:.200}"
    if hasattr(source, "read"):
        return f"the file {getattr(source, 'name', type(source).__name__)!r}"
    hint = ""
    if is_array(source):
        hint = ". pvt_ref.normalize(pixels) takes arrays of raw pixels"
    elif isinstance(source, bytes | bytearray | memoryview):
        hint = ". io.BytesIO(data) makes a file of bytes"
    elif isinstance(source, list | tuple):
        hint = ". Read one at a time; numpy.concatenate makes a batch of the results"
    raise ArrayTypeError(
        f"source is a {type(source).__name__}; it must be a path, a file opened in binary mode, or "
        f"a PIL image{hint}"
    )


@contextmanager
def _as_image_error(what: str) -> Iterator[None]:
    """Pillow's plugins raise errors of a dozen types, and warn: here all become ImageError."""
    # Filters belong to the whole process: threads that change them in turn, not one within another,
    # leave them as they were. Hidden are Pillow's notes only
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except PVTError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ImageError(
                f"{what} is suspiciously large: {error} If you trust it, shrink it with another "
                f"program, or raise PIL.Image.MAX_IMAGE_PIXELS (now {Image.MAX_IMAGE_PIXELS})"
            ) from error
        except Exception as error:
            raise ImageError(
                f"{what} cannot be decoded ({type(error).__name__}: {error}). It is probably cut "
                f"short or damaged: copy or download it again, and see whether a viewer opens it"
            ) from error


def _read_path(path: str | os.PathLike[str], what: str) -> bytes:
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe could keep us waiting for ever
            raise ImageError(f"{what} is no regular file; copy the picture into one")
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        name = os.fspath(path)
        cause = (
            "load_image reads files, not addresses: download it first"
            if "://" in name
            else f"It was looked for at {os.path.abspath(name)!r}; check the spelling, and the "
            f"folder that Python runs in"
        )
        raise MissingFileError(f"there is no file {what}. {cause}") from error
    except IsADirectoryError as error:
        raise ImageError(f"{what} is a folder; name a picture inside it") from error
    except (OSError, ValueError) as error:  # permissions, or a name that cannot be one
        cause = getattr(error, "strerror", None) or error  # without the path, which may be long
        raise ImageError(
            f"{what} cannot be read ({cause}). Check its name and its permissions"
        ) from error


def _read_open_file(file: BinaryIO, what: str) -> bytes:
    if getattr(file, "closed", False):
        raise ImageError(f"{what} is closed; read the picture inside the `with open(...)`")
    if isinstance(file, io.TextIOBase):
        raise ArrayTypeError(f"{what} was opened as text; pictures need open(path, 'rb')")
    try:
        if file.seekable():  # a pipe is not
            file.seek(0)
        return file.read()
    except OSError as error:
        raise ImageError(
            f"{what} cannot be read ({error}); open it with open(path, 'rb')"
        ) from error


#: First bytes of what people mistake for pictures.
_NOT_PICTURES = (
    (b"<", "a web page or an SVG drawing; save the picture itself, as PNG or JPEG"),
    (b"%PDF", "a PDF; export the page as PNG"),
    (b"\x93NUMPY", "a NumPy array; numpy.load reads it, pvt_ref.normalize takes its pixels"),
    (b"PK\x03\x04", "a zip archive or a weights file; unpack it, or pvt_ref.load reads weights"),
    (b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the picture"),
)


def _open(data: bytes, what: str) -> Image.Image:
    if not data:
        raise ImageError(f"{what} is empty (0 bytes): was the copy or download interrupted?")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        likely = [name for start, name in _NOT_PICTURES if data.lstrip().startswith(start)]
        if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
            likely = ["a HEIC photo; `pip install pillow-heif` and register it, or save it as JPEG"]
        cause = f"It looks like {likely[0]}" if likely else f"Its first bytes are {data[:12]!r}"
        raise ImageError(
            f"{what} is not a picture in a format that Pillow reads, such as JPEG or PNG. {cause}"
        ) from error


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey_to_rgb(image, what)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow has no direct way
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, what: str) -> Image.Image:
    """Grey of more than 8 bits: Pillow's own conversion clips I;16, I and F at 255."""
    if image.mode == "F":
        white, mistaken_white, kind = 255, 1, "float grey (mode F)"
        levels = np.asarray(image, dtype=np.float64)
    else:
        white, mistaken_white, kind = 65535, 255, f"16-bit grey (mode {image.mode})"
        levels = np.asarray(image.convert("I"), dtype=np.float64)  # from any byte order
    lowest, highest = levels.min(), levels.max()
    if not (lowest >= 0 and highest <= white):  # so written, NaN is refused too
        raise ImageError(
            f"{what} has levels from {lowest:g} to {highest:g}; {kind} must lie in 0 to {white}. "
            f"Scale the levels, or clip them, before"
        )
    if image.mode in ("F", "I") and 0 < highest <= mistaken_white:
        raise ImageError(
            f"{what} has no level above {highest:g}; {kind} counts to {white}, so it would be "
            f"black. Is it on a scale of 0 to {mistaken_white}? "
            f"Multiply the levels by {white // mistaken_white}"
        )
    grey = np.rint(levels * (255 / white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # the one level that a PNG declares see-through
        grey[levels == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


#: What undoes each EXIF orientation (tag 0x0112; 1 is upright).
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn_upright(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata is no reason to refuse intact pixels; viewers agree
        return None


# Geometry -----------------------------------------------------------------------------------------


def resize_and_crop(image: Image.Image, size: int | tuple[int, int] = 224) -> Image.Image:
    """The geometry of the released evaluation: resize with a margin, then cut out the centre.

    Square S: the short side becomes ``int(S * 256 / 224)`` and the long side follows in proportion,
    truncated; bicubic, with Pillow's antialiasing. The S x S centre is cut out at offsets
    ``round(difference / 2)``, halves to even. From S = 32 down there is no margin: the short side
    becomes S.

    (H, W): the same with two targets, ``int(H * 256 / 224)`` and ``int(W * 256 / 224)``. The
    picture is scaled until it covers both, so one side is exact and the other at least its target;
    no margin if neither side is above 32. For H = W it is the square rule. Nothing is padded, and
    proportions stay.

    Args:
        image: a PIL image in mode RGB.
        size: S, or (H, W), in pixels.

    Returns:
        A PIL image of W x H pixels.

    Raises:
        ImageError: if the image is in another mode, has no pixels, or is so long and thin that it
            would be enormous before the crop.
        ArrayTypeError: if image is not a PIL image.
        ShapeError: if size is not one or two positive whole numbers.
    """
    H, W = _check_size(size)
    if not isinstance(image, Image.Image):
        raise ArrayTypeError(
            f"image is a {type(image).__name__}; it must be a PIL image, from "
            f"pvt_ref.image.read_rgb or PIL.Image.fromarray"
        )
    what = _describe(image)
    if image.mode != "RGB":  # Pillow would resize palettes without interpolation, silently
        raise ImageError(f"{what} must be in mode RGB; pvt_ref.image.read_rgb(image) converts it")
    if 0 in image.size:
        raise ImageError(f"{what} has no pixels")
    height, width = _covering_size(image.height, image.width, *_with_margin(H, W))
    if height * width > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{what} would be resized to {width}x{height} to cover {W}x{H}, more than the "
            f"{MAX_RESIZED_PIXELS} pixels allowed here. Ask for a smaller size, or crop the "
            f"part of interest first: image.crop((left, top, right, bottom))"
        )
    left, top = round((width - W) / 2), round((height - H) / 2)
    with _as_image_error(what):  # a PIL image may read its file only now
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + W, top + H))


def _check_size(size: Any) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(_is_positive(side) for side in pair):
        raise ShapeError(
            f"size is {shown(size)}; it must be the side of a square or (H, W), in whole pixels, "
            f"each at least 1 and below 2**31"
        )
    return int(pair[0]), int(pair[1])


def _is_positive(value: Any) -> bool:
    return is_whole(value) and 0 < int(value) < TOO_LARGE


def _with_margin(H: int, W: int) -> tuple[int, int]:
    """What the resized picture must cover."""
    if max(H, W) <= 32:
        return H, W
    return H * 256 // 224, W * 256 // 224


def _covering_size(height: int, width: int, H: int, W: int) -> tuple[int, int]:
    """The least size of the same proportions, to truncation, that covers H x W."""
    if H * width >= W * height:  # H / height is the larger scale, so it decides
        return H, H * width // height
    return W * height // width, W


# Numbers ------------------------------------------------------------------------------------------


def normalize(pixels: np.ndarray) -> np.ndarray:
    """Raw pixels as the network's input: ``(x / 255 - mean) / std`` per colour.

    All in float32 and in this order, as torchvision's ToTensor and Normalize compute it; the bits
    are theirs.

    Args:
        pixels: (H, W, 3) or (B, H, W, 3) uint8, red, green, blue; of any size, which stays.

    Returns:
        (B, 3, H, W) float32, C-contiguous; B is 1 for a single picture.

    Raises:
        ArrayTypeError: if pixels are not a NumPy array of uint8.
        ShapeError: if the shape is another, or has a zero.
    """
    _check_pixels(pixels)
    batch = pixels if pixels.ndim == 4 else pixels[None]  # (B, H, W, 3)
    x = batch.transpose(0, 3, 1, 2).astype(np.float32, order="C")  # (B, 3, H, W)
    x /= np.float32(255)
    x -= np.asarray(IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    x /= np.asarray(IMAGENET_STD, dtype=np.float32)[:, None, None]
    return x


def _check_pixels(pixels: Any) -> None:
    if not isinstance(pixels, np.ndarray):
        hint = "numpy.stack(list_of_pictures) makes a batch"
        if isinstance(pixels, Image.Image):
            hint = "pvt_ref.image.preprocess(image) takes PIL images"
        elif is_array(pixels):
            hint = "pvt_ref.to_numpy(pixels) brings it to the host"
        raise ArrayTypeError(
            f"pixels are a {type(pixels).__name__}; they must be a NumPy array (H, W, 3) or "
            f"(B, H, W, 3) of uint8. {hint}"
        )
    shape = pixels.shape
    if pixels.dtype != np.uint8:
        hint = "numpy.rint(255 * pixels).astype('uint8') if they lie in 0 to 1"
        if pixels.dtype.kind == "f":
            hint += "; if they are normalised already, the model takes them as (B, 3, H, W)"
        elif pixels.dtype == np.uint16:
            hint = "numpy.rint(pixels / 257).astype('uint8') scales 16 bits to 8"
        elif pixels.dtype.kind in "iu":
            hint = "pixels.astype('uint8') if they lie in 0 to 255"
        raise ArrayTypeError(
            f"pixels have dtype {pixels.dtype}; normalize takes raw uint8, 0 to 255. {hint}"
        )
    if len(shape) not in (3, 4) or shape[-1] != 3:
        hint = ""
        if len(shape) == 2:
            hint = ". For grey: numpy.stack([pixels] * 3, axis=-1)"
        elif len(shape) in (3, 4) and shape[-3] == 3:
            axes = "1, 2, 0" if len(shape) == 3 else "0, 2, 3, 1"
            hint = f". It looks channels-first: pixels.transpose({axes})"
        elif len(shape) == 3:
            hint = ". pvt_ref.image.preprocess(PIL.Image.fromarray(pixels)) takes grey and alpha"
        raise ShapeError(f"pixels have shape {shape}; it must be (H, W, 3) or (B, H, W, 3){hint}")
    if 0 in shape:
        raise ShapeError(f"pixels have shape {shape}: there is nothing in them")


def pad_to_multiple(images: Array, multiple: int) -> Array:
    """Images enlarged at the right and bottom until H and W are multiples, for dense prediction.

    The new pixels are 0, which after :func:`normalize` is the mean colour of ImageNet; detectors
    pad so. No pixel moves, so coordinates stay valid, and ``F_i[:, :, :ceil(H / stride_i),
    :ceil(W / stride_i)]`` are the tokens that stand for the picture. Attention is global: the
    padding is seen by all tokens, so padded and unpadded results differ a little.

    Args:
        images: (B, C, H, W) normalised floats, of NumPy, CuPy or another array API library.
        multiple: of what H and W must be multiples; ``config.size_multiple`` (32 as published).

    Returns:
        (B, C, H', W'), the smallest such size, of images' dtype and on its device. images itself,
        not a copy, if it fits already.

    Raises:
        ArrayTypeError: if images are not an array of floats.
        ShapeError: if they are not (B, C, H, W), or have a zero there.
        RangeError: if multiple is not a positive whole number.
    """
    if not _is_positive(multiple):
        raise RangeError(
            f"multiple is {shown(multiple)}; it must be a whole number of pixels, at least 1 and "
            f"below 2**31, such as config.size_multiple"
        )
    xp = array_module(images)
    name = dtype_name(images)
    if not name.startswith(("float", "bfloat", "complex")):
        raise ArrayTypeError(
            f"images have dtype {name}; pad normalised floats, whose 0 is the mean colour (in raw "
            f"pixels it is black). Normalise first: pvt_ref.normalize(pixels)"
        )
    shape = tuple(images.shape)
    if len(shape) != 4:
        hint = ". A single image needs a batch axis: images[None]" if len(shape) == 3 else ""
        raise ShapeError(f"images have shape {shape}; they must be (B, C, H, W){hint}")
    B, C, H, W = shape
    if W == 3 and C != 3:
        raise ShapeError(
            f"looks channels-last: {shape}; images are (B, C, H, W). "
            f"images.transpose(0, 3, 1, 2) turns them"
        )
    if 0 in shape:
        raise ShapeError(f"images have shape {shape}: there is nothing in them")
    multiple = int(multiple)  # a NumPy uint8 would wrap round
    below, beside = -H % multiple, -W % multiple
    if below:
        images = xp.concat((images, _zeros((B, C, below, W), images)), axis=2)
    if beside:
        images = xp.concat((images, _zeros((B, C, H + below, beside), images)), axis=3)
    return images  # (B, C, H', W')


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    zeros = from_host(np.zeros(shape, dtype=np.float32), like=like)
    return array_module(like).astype(zeros, like.dtype)
