"""From a picture to the array the network was trained on, and back to sizes the network accepts.

The classifier's preprocessing is that of the authors' released code (whai362/PVT, the evaluation
branch of ``build_transform``)::

    RGB  ->  short side to int(S * 256 / 224), bicubic  ->  centre S x S  ->  (x / 255 - mean) / std

:func:`load_image` does all of it. Its parts are public because each is a place where pipelines
quietly differ: :func:`read_rgb`, :func:`resize_and_crop`, :func:`normalize`. Dense prediction keeps
the whole picture instead, and :func:`pad_to_multiple` makes its size fit.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from pvt_ref.arrays import Array, array_module, dtype_name, from_host, is_array
from pvt_ref.checks import TOO_LARGE, is_whole
from pvt_ref.data.picture_file import (
    as_image_error,
    exif_is_harmless,
    load,
    open_picture,
    pixel_limit,
    read_file,
    read_path,
)
from pvt_ref.errors import ArrayTypeError, ImageError, RangeError, ShapeError, shown

#: Mean and standard deviation of the training pixels, red, green, blue, on a scale of 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Pixels that a picture may have between resizing and cropping: very long ones grow enormous.
MAX_RESIZED_PIXELS = 2**27

#: Pixels that are converted at once where a conversion needs more memory than its result.
_BAND_PIXELS = 2**20

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
            image (left as it is). A file, also one that a PIL image has yet to read, must be in one
            of :data:`pvt_ref.data.picture_file.FORMATS`. Of an animation, the first frame is taken; of a
            PIL image, the frame it stands on.

    Returns:
        A new PIL image in mode RGB, without metadata: reading it again changes nothing.

    Raises:
        MissingFileError: if there is no file at the path.
        ImageError: not a picture, of another format, damaged, without pixels, beyond a limit of
            :mod:`pvt_ref.data.picture_file`, or grey levels outside their range.
        ArrayTypeError: if source is none of the three.
    """
    what = _describe(source)
    with as_image_error(what):
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, str | os.PathLike):
            image = open_picture(read_path(source, what), what)
        else:
            image = open_picture(read_file(source, what), what)
        if 0 in image.size:
            raise ImageError(f"{what} has no pixels: its size is {image.width}x{image.height}")
        load(image, what)  # some formats tell transparency and orientation only now
        turn = _turn_upright(image)
        rgb = _to_rgb(image, what)
        del image  # with its decoder's memory: turning needs as much again
        if turn is not None:
            rgb = rgb.transpose(turn)
        rgb.info = {}  # or the next reader would turn it once more
        return rgb


def _describe(source: object) -> str:
    """The source in a few words, for messages."""
    if isinstance(source, Image.Image):
        return f"the PIL image (mode {source.mode}, {source.width}x{source.height})"
    if isinstance(source, str | os.PathLike):
        return shown(os.fspath(source), 200)
    if hasattr(source, "read"):
        return f"the file {shown(getattr(source, 'name', type(source).__name__), 200)}"
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


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey_to_rgb(image, what)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow has no direct way
            image = image.convert("LA")
        return _in_bands(image, "RGB", _on_white)
    return image.convert("RGB")


def _on_white(band: Image.Image) -> Image.Image:
    white = Image.new("RGBA", band.size, "white")
    return Image.alpha_composite(white, band.convert("RGBA")).convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Some rows after the other: the first row's number, and the rows."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_bands(
    image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """The picture converted band by band: beside picture and result, only a band needs memory."""
    result = Image.new(mode, image.size)
    for top, band in _bands(image):
        result.paste(convert(band), (0, top))
    return result


def _deep_grey_to_rgb(image: Image.Image, what: str) -> Image.Image:
    """Grey of more than 8 bits: Pillow's own conversion clips I;16, I and F at 255."""
    if image.mode == "F":
        white, mistaken_white, kind = 255, 1, "float grey (mode F)"
    else:
        white, mistaken_white, kind = 65535, 255, f"16-bit grey (mode {image.mode})"
    extremes = [(x.min(), x.max()) for x in (_levels(band) for _, band in _bands(image))]
    lowest, highest = np.min(extremes), np.max(extremes)
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
    transparent = image.info.get("transparency")

    def convert(band: Image.Image) -> Image.Image:
        levels = _levels(band)
        grey = np.rint(levels * (255 / white)).astype(np.uint8)
        if isinstance(transparent, int):  # the one level that a PNG declares see-through
            grey[levels == transparent] = 255
        return Image.fromarray(grey).convert("RGB")

    return _in_bands(image, "RGB", convert)


def _levels(band: Image.Image) -> np.ndarray:
    """Grey of any depth and byte order as (H, W) float64."""
    return np.asarray(band if band.mode == "F" else band.convert("I"), dtype=np.float64)


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
    if not exif_is_harmless(image):
        return None
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
            f"pvt_ref.data.image.read_rgb or PIL.Image.fromarray"
        )
    what = _describe(image)
    if image.mode != "RGB":  # Pillow would resize palettes without interpolation, silently
        raise ImageError(
            f"{what} must be in mode RGB; pvt_ref.data.image.read_rgb(image) converts it"
        )
    if 0 in image.size:
        raise ImageError(f"{what} has no pixels")
    with as_image_error(what):
        load(image, what)  # a PIL image may read its file only now
        return _resized_and_cropped(image, H, W, what)


def resize_and_crop_bands(pixels: np.ndarray, size: int | tuple[int, int] = 224) -> np.ndarray:
    """The same geometry for any number of channels, each on its own.

    Args:
        pixels: (H, W, C) uint8, not empty.
        size: S, or (H, W), in pixels.

    Returns:
        (S, S, C) or (H, W, C) uint8. Of three channels, the bits of :func:`resize_and_crop`.

    Raises:
        ImageError: if the picture is so long and thin that it would be enormous before the crop.
        ArrayTypeError: if pixels are not a NumPy array of uint8.
        ShapeError: if they are not (H, W, C) or empty, or size is not one or two positive whole
            numbers.
    """
    H, W = _check_size(size)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        kind = getattr(pixels, "dtype", type(pixels).__name__)
        raise ArrayTypeError(f"pixels are {kind}; they must be a NumPy array (H, W, C) of uint8")
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ShapeError(f"pixels have shape {pixels.shape}; they must be (H, W, C), not empty")
    what = f"the picture of shape {pixels.shape}"
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(pixels, 2, 0)]
    with as_image_error(what):
        resized = [np.asarray(_resized_and_cropped(band, H, W, what)) for band in bands]
    return np.stack(resized, axis=2)  # (H, W, C)


def _resized_and_cropped(image: Image.Image, H: int, W: int, what: str) -> Image.Image:
    height, width = _covering_size(image.height, image.width, *_with_margin(H, W))
    if height * width > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{what} would be resized to {width}x{height} to cover {W}x{H}, more than the "
            f"{MAX_RESIZED_PIXELS} pixels allowed here. Ask for a smaller size, or crop the "
            f"part of interest first: image.crop((left, top, right, bottom))"
        )
    allowed = pixel_limit()
    if allowed < H * W:
        raise ImageError(
            f"{W}x{H} pixels are suspiciously large; up to {allowed} are allowed. Ask for a "
            f"smaller size"
        )
    left, top = round((width - W) / 2), round((height - H) / 2)
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
            hint = "pvt_ref.data.image.preprocess(image) takes PIL images"
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
            hint = (
                ". pvt_ref.data.image.preprocess(PIL.Image.fromarray(pixels)) takes grey and alpha"
            )
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
