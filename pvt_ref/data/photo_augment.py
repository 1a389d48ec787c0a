"""Random changes of a photo before normalisation: crop, colours, RandAugment.

They run in Pillow, on the host, on eight bits per colour. Mirroring and the augmentations of a
normalised batch are in :mod:`pvt_ref.data.augment`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from pvt_ref.checks import Size, as_size, check_interval, check_number, check_rng
from pvt_ref.data.image import check_pixels, check_rgb
from pvt_ref.data.picture_file import as_image_error, decode
from pvt_ref.data.preprocessing import IMAGENET_MEAN
from pvt_ref.draws import Generator
from pvt_ref.errors import RangeError, shown

#: A part of a picture: left, top, right, bottom, as in Pillow.
Box = tuple[int, int, int, int]

#: Red, green, blue, from 0 to 255.
Colour = tuple[int, ...]

#: How many crops are drawn at most until one fits.
_TRIES = 10


def draw_crop(
    size: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float], rng: Generator
) -> Box:
    """A random part of a picture (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    Its share of the area is uniform, its width / height log-uniform, and its position uniform. If
    its sides do not fit into the picture, share and ratio are drawn again, up to ten times; after
    that it is the largest centred part whose width / height is within ratio. torchvision's
    ``RandomResizedCrop`` does the same.

    Args:
        size: (width, height) of the picture, in pixels, each at least 1.
        area: least and largest share of the area, at most 1.
        ratio: least and largest width / height.
        rng: draws area and ratio in each try, then left and top of the one that fits.

    Returns:
        Whole pixels, with left < right <= width and top < bottom <= height.
    """
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        pixels = width * height * rng.uniform(*area)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            top = int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    return _middle(width, height, ratio)


def _middle(width: int, height: int, ratio: tuple[float, float]) -> Box:
    """The largest centred part with width / height within ratio, in whole pixels."""
    shape = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * shape)))
    h = min(height, max(1, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# The transformations of RandAugment -------------------------------------------------------------


def _enhance(kind: Any) -> Callable[[Image.Image, float, Colour], Image.Image]:
    """Colour, contrast, brightness or sharpness times 1 + 0.9 s."""
    return lambda image, s, fill: kind(image).enhance(1 + 0.9 * s)


def _affine(image: Image.Image, fill: Colour, *matrix: float) -> Image.Image:
    """The image whose pixel (x, y) is image's at (a x + b y + c, d x + e y + f)."""
    kind, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return image.transform(image.size, kind, matrix, bicubic, fillcolor=fill)


def _shear_x(image: Image.Image, s: float, fill: Colour) -> Image.Image:
    return _affine(image, fill, 1, 0.3 * s, -0.3 * s * image.height / 2, 0, 1, 0)


def _shear_y(image: Image.Image, s: float, fill: Colour) -> Image.Image:
    return _affine(image, fill, 1, 0, 0, 0.3 * s, 1, -0.3 * s * image.width / 2)


def _translate_x(image: Image.Image, s: float, fill: Colour) -> Image.Image:
    return _affine(image, fill, 1, 0, -round(150 / 331 * s * image.width), 0, 1, 0)


def _translate_y(image: Image.Image, s: float, fill: Colour) -> Image.Image:
    return _affine(image, fill, 1, 0, 0, 0, 1, -round(150 / 331 * s * image.height))


def _rotate(image: Image.Image, s: float, fill: Colour) -> Image.Image:
    return image.rotate(30 * s, Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize(image: Image.Image, s: float, fill: Colour) -> Image.Image:
    return ImageOps.solarize(image, round(256 * (1 - abs(s))))


def _posterize(image: Image.Image, s: float, fill: Colour) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * abs(s)))


#: The transformations of RandAugment: image, strength s from -1 to 1, fill colour -> image.
#: s is magnitude / 10 with a sign. Magnitude 10 is the maximum of AutoAugment (arXiv 1805.09501):
#: rotated by 30 degrees; sheared by 0.3 around the centre; translated by 150 / 331 of the side;
#: colour, contrast, brightness and sharpness times 0.1 or 1.9; posterized to 4 bits; solarized,
#: that is levels from 256 (1 - s) on inverted, here all of them. At magnitude 0 these change
#: nothing; autocontrast and equalize do not depend on the magnitude.
TRANSFORMATIONS: dict[str, Callable[[Image.Image, float, Colour], Image.Image]] = {
    "identity": lambda image, s, fill: image,
    "autocontrast": lambda image, s, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, s, fill: ImageOps.equalize(image),
    "rotate": _rotate,
    "solarize": _solarize,
    "posterize": _posterize,
    "colour": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear x": _shear_x,
    "shear y": _shear_y,
    "translate x": _translate_x,
    "translate y": _translate_y,
}


# Jitter -----------------------------------------------------------------------------------------


def turn_hue(image: Image.Image, turns: float) -> Image.Image:
    """Every hue moved along the colour circle by a number of turns, rounded to 255ths."""
    shift = round(255 * turns) % 255  # red is both 0 and 255
    if shift == 0:
        return image  # conversion to HSV and back would round
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(h + shift) % 255 for h in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoAugment:
    """Random changes of a photo before normalisation: crop, jitter, RandAugment.

    The order of draws is: the crop (:func:`draw_crop`); the order of the active jitters, then a
    number for each in that order; and for each transformation its kind and its sign. A field that
    is off draws nothing.
    Raises: RangeError if a number is outside its range.
    """

    crop_area: tuple[float, float] | None = (0.08, 1.0)  # share of the area; None: the centre
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop, before resizing
    #: Brightness, contrast and saturation times 1 - s to 1 + s, at least 0; hue by -s to s turns.
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    #: How many transformations (0: off), and their magnitude from 0 to 10, with TRANSFORMATIONS.
    rand_augment: tuple[int, float] = (0, 0.0)
    fill: Colour = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # outside the picture

    def __post_init__(self) -> None:
        settled: dict[str, Any] = {}
        if self.crop_area is not None:
            settled["crop_area"] = check_interval("crop_area", self.crop_area, above=0, most=1)
        settled["crop_ratio"] = check_interval("crop_ratio", self.crop_ratio, least=0.01, most=100)
        jitter = _items(self, "jitter", 4, "brightness, contrast, saturation, hue")
        most = (10, 10, 10, 0.5)
        settled["jitter"] = tuple(
            check_number(f"jitter[{i}]", jitter[i], least=0, most=most[i]) for i in range(4)
        )
        count, magnitude = _items(self, "rand_augment", 2, "count, magnitude")
        count = check_number("rand_augment[0]", count, least=0, most=100, whole=True)
        magnitude = check_number("rand_augment[1]", magnitude, least=0, most=10)
        settled["rand_augment"] = count, magnitude
        settled["fill"] = tuple(
            check_number(f"fill[{i}]", level, least=0, most=255, whole=True)
            for i, level in enumerate(_items(self, "fill", 3, "red, green, blue"))
        )
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def __call__(self, image: Image.Image, size: Size, rng: Generator) -> Image.Image:
        """One photo, changed at random.

        Args:
            image: in mode RGB, of any size, as :func:`pvt_ref.data.image.read_rgb` gives it.
            size: (H, W) of the result, in pixels, or one side of a square.
            rng: the source of all random numbers.

        Returns:
            A new RGB image of that size, resized bicubically from the crop with antialiasing.

        Raises:
            ArrayTypeError: if image is not a PIL image, or rng not a NumPy generator.
            ImageError: if image is not RGB, has no pixels or is damaged, or size is enormous.
            ShapeError: if size is not one or two positive whole numbers.
        """
        H, W = as_size(size, least=1)
        check_rng(rng)
        what = check_rgb(image)
        check_pixels(H, W)
        with as_image_error(what):
            decode(image, what)  # a PIL image may read its file only now
        if self.crop_area is None:
            box = _middle(*image.size, (W / H, W / H))  # nothing is drawn, and nothing distorted
        else:
            box = draw_crop(image.size, self.crop_area, self.crop_ratio, rng)
        # the gap saves three quarters of the time of a large photo, and moves levels by about 2
        image = image.resize((W, H), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        image = self._jittered(image, rng)
        count, magnitude = self.rand_augment
        for _ in range(count):
            transform = list(TRANSFORMATIONS.values())[rng.integers(len(TRANSFORMATIONS))]
            sign = 1 if rng.random() < 0.5 else -1
            image = transform(image, sign * magnitude / 10, self.fill)
        return image

    def _jittered(self, image: Image.Image, rng: Generator) -> Image.Image:
        for which in rng.permutation([i for i, s in enumerate(self.jitter) if s > 0]):
            strength = self.jitter[which]
            if which == 3:
                image = turn_hue(image, rng.uniform(-strength, strength))
            else:
                factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
                image = _ENHANCERS[which](image).enhance(factor)
        return image

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists by field name, fit for JSON; ``PhotoAugment(**values)`` is this again.

        Returns:
            A new dictionary.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _items(record: PhotoAugment, name: str, count: int, words: str) -> list[Any]:
    """A field as a list of count items; it may be a list or a tuple. Raises: RangeError."""
    values = getattr(record, name)
    if not isinstance(values, list | tuple) or len(values) != count:
        raise RangeError(f"{name} is {shown(values)}; it must be {count} numbers, ({words})")
    return list(values)
