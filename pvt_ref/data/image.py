"""Pictures in Pillow: read, turned upright, converted to plain RGB, resized and cropped.

The geometry is that of the authors' released evaluation (whai362/PVT, ``build_transform``).
"""

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from pvt_ref.arrays import is_array
from pvt_ref.checks import Size, as_size
from pvt_ref.data.picture_file import as_image_error, decode, open_picture, orientation, pixel_limit
from pvt_ref.errors import ArrayTypeError, ImageError, ShapeError, shown

#: Limit of pixels between resizing and cropping: very long pictures would become enormous.
MAX_RESIZED_PIXELS = 2**27

#: Pixels to convert at once if a conversion needs more memory than its result.
_BAND_PIXELS = 2**20

Source = str | os.PathLike[str] | BinaryIO | Image.Image


def read_rgb(source: Source) -> Image.Image:
    """A picture upright and in plain RGB, in whatever form it was stored, without metadata.

    The orientation in the EXIF data is applied, transparency is laid on white, palettes, CMYK,
    YCbCr, LAB and HSV are converted, 16-bit grey is scaled to 8 bits and rounded. Float grey (mode
    F) is from 0 to 255, as everywhere in Pillow. Colour profiles are not applied. The authors'
    ``image.convert("RGB")`` gives the same for an upright opaque 8-bit picture.

    Args:
        source: a path, a file opened in binary mode (read from its start, left open), or a PIL
            image (left as it is). Files must be in one of
            :data:`pvt_ref.data.picture_file.FORMATS`. Of an animation, the first frame is taken.

    Raises:
        MissingFileError: if there is no file at the path.
        ImageError: not a picture, of another format, damaged, without pixels, beyond a limit of
            :mod:`pvt_ref.data.picture_file`, or grey levels outside their range.
    """
    what = _describe(source)
    with as_image_error(what):
        image = source if isinstance(source, Image.Image) else open_picture(source, what)
        if 0 in image.size:
            raise ImageError(f"{what} has no pixels: its size is {image.width}x{image.height}")
        decode(image, what)  # some formats give transparency and orientation only after this
        turned = orientation(image)
        rgb = _to_rgb(image, what)
        del image  # frees its decoder's memory: turning needs as much again
        rgb.info = {}  # else the next reader would turn it once more
        if turned in range(2, 9):
            rgb.getexif()[ExifTags.Base.Orientation] = turned  # of all its Exif, this alone
            ImageOps.exif_transpose(rgb, in_place=True)
        return rgb


def _describe(source: object) -> str:
    """The source in a few words, for messages."""
    if isinstance(source, Image.Image):
        return f"the PIL image (mode {source.mode}, {source.width}x{source.height})"
    if isinstance(source, str | os.PathLike):
        return shown(os.fspath(source), 200)
    if hasattr(source, "read"):
        return f"the file {shown(getattr(source, 'name', type(source).__name__), 200)}"
    needed = "a path, a file opened in binary mode, or a PIL image"
    if is_array(source):
        needed += ". pvt_ref.normalize(pixels) takes arrays of raw pixels"
    elif isinstance(source, bytes | bytearray | memoryview):
        needed += ". io.BytesIO(data) makes a file of bytes"
    elif isinstance(source, list | tuple):
        needed += ". Read one at a time; numpy.concatenate makes a batch of the results"
    raise ArrayTypeError(f"source is a {type(source).__name__}; it must be {needed}")


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey_to_rgb(image, what)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow has no direct conversion
            image = image.convert("LA")
        return _in_bands(image, _on_white)
    return image.convert("RGB")


def _on_white(band: Image.Image) -> Image.Image:
    white = Image.new("RGBA", band.size, "white")
    return Image.alpha_composite(white, band.convert("RGBA")).convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture in bands of rows: the first row's number, and the rows."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """RGB made band by band: besides picture and result, only a band takes memory."""
    result = Image.new("RGB", image.size)
    for top, band in _bands(image):
        result.paste(convert(band), (0, top))
    return result


def _deep_grey_to_rgb(image: Image.Image, what: str) -> Image.Image:
    """Grey of more than 8 bits: Pillow's own conversion clips I;16, I and F at 255."""
    white, mistaken, kind = 65535, 255, f"16-bit grey (mode {image.mode})"
    if image.mode == "F":
        white, mistaken, kind = 255, 1, "float grey (mode F)"
    extremes = [(x.min(), x.max()) for x in (_levels(band) for _, band in _bands(image))]
    lowest, highest = np.min(extremes), np.max(extremes)
    if not (lowest >= 0 and highest <= white):  # written so that NaN is refused too
        needed = f"{kind} must be from 0 to {white}. Scale or clip the levels first"
        raise ImageError(f"{what} has levels from {lowest:g} to {highest:g}; {needed}")
    if image.mode in ("F", "I") and 0 < highest <= mistaken:
        raise ImageError(
            f"{what} has no level above {highest:g}; {kind} goes to {white}: it would be black. "
            f"Is it on a scale of 0 to {mistaken}? Multiply the levels by {white // mistaken}"
        )
    transparent = image.info.get("transparency")

    def convert(band: Image.Image) -> Image.Image:
        levels = _levels(band)
        grey = np.rint(levels * (255 / white)).astype(np.uint8)
        if isinstance(transparent, int):  # the one level that a PNG declares transparent
            grey[levels == transparent] = 255
        return Image.fromarray(grey).convert("RGB")

    return _in_bands(image, convert)


def _levels(band: Image.Image) -> np.ndarray:
    """Grey of any depth and byte order as (H, W) float64."""
    return np.asarray(band if band.mode == "F" else band.convert("I"), dtype=np.float64)


def resize_and_crop(image: Image.Image, size: Size = 224) -> Image.Image:
    """The geometry of the released evaluation: resize with a margin, then crop the centre.

    For a square S, the short side becomes ``int(S * 256 / 224)`` and the long side scales with it,
    truncated; bicubic, with Pillow's antialiasing. The S x S centre is cropped at offsets
    ``round(difference / 2)``, halves to even. For S up to 32 there is no margin: the short side
    becomes S.

    For (H, W) there are two targets: the picture is scaled until it covers both, so one side is
    exact and the other at least its target. There is no margin if neither side is above 32.

    Raises:
        ImageError: if the image is not RGB, has no pixels, or would be enormous before the crop.
        ArrayTypeError: if image is not a PIL image.
        ShapeError: if size is not one or two positive whole numbers.
    """
    H, W = as_size(size, "the side of a square", least=1)
    what = check_rgb(image)
    with as_image_error(what):
        decode(image, what)  # a PIL image may not have read its file yet
        return _resized_and_cropped(image, H, W, what)


def check_rgb(image: object) -> str:
    """Checks for an RGB PIL image with pixels; returns its name for messages. Raises: PVTError."""
    if not isinstance(image, Image.Image):
        needed = "a PIL image, from pvt_ref.data.image.read_rgb or PIL.Image.fromarray"
        raise ArrayTypeError(f"image is a {type(image).__name__}; it must be {needed}")
    what = _describe(image)
    if image.mode != "RGB":  # Pillow would resize palettes without interpolation, silently
        raise ImageError(f"{what} must be in mode RGB; pvt_ref.data.image.read_rgb converts it")
    if 0 in image.size:
        raise ImageError(f"{what} has no pixels")
    return what


def resize_and_crop_bands(pixels: np.ndarray, size: Size = 224) -> np.ndarray:
    """:func:`resize_and_crop` for (H, W, C) uint8, channel by channel, with the same errors."""
    H, W = as_size(size, "the side of a square", least=1)
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


def check_pixels(H: int, W: int) -> None:
    """Refuses a size above the limit for reading pictures. Raises: ImageError."""
    allowed = pixel_limit()
    if allowed < H * W:
        limits = f"up to {allowed} are allowed. Ask for a smaller size"
        raise ImageError(f"{W}x{H} pixels are suspiciously large; {limits}")


def _resized_and_cropped(image: Image.Image, H: int, W: int, what: str) -> Image.Image:
    margin = (1, 1) if max(H, W) <= 32 else (256, 224)
    tall, wide = (side * margin[0] // margin[1] for side in (H, W))
    # the smallest size of the same proportions, up to truncation, that covers tall x wide
    height, width = tall, tall * image.width // image.height
    if tall * image.width < wide * image.height:  # wide / width is the larger scale, so it decides
        height, width = wide * image.height // image.width, wide
    if height * width > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{what} would be resized to {width}x{height} to cover {W}x{H}, more than the "
            f"{MAX_RESIZED_PIXELS} pixels allowed here. Ask for a smaller size, or crop the "
            f"part of interest first: image.crop((left, top, right, bottom))"
        )
    check_pixels(H, W)
    left, top = round((width - W) / 2), round((height - H) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + W, top + H))
