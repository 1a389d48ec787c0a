"""Random changes of a photo together with its label map, for segmentation.

They are those of the released training (mmsegmentation's configuration for ADE20K): scaling, a
crop that no class fills, mirroring, and colour distortion. Labels are never interpolated.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from pvt_ref.checks import check_flag, check_interval, check_number
from pvt_ref.data.iou import IGNORED
from pvt_ref.data.preprocessing import IMAGENET_MEAN
from pvt_ref.draws import Generator
from pvt_ref.errors import RangeError, shown

#: How many crops are drawn at most until one is not filled by a class.
_TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAugment:
    """Random changes of a photo and its labels before normalisation.

    The order of draws is: the scale; the crop, until it fits; the mirroring; and the distortions.
    Raises: RangeError if a number is outside its range.
    """

    scale: tuple[float, float] = (0.5, 2.0)  # least and largest factor of the whole picture's size
    most_of_a_class: float = 0.75  # share of the crop's labelled pixels; above it, draw again
    flip: bool = True  # whether half of all crops are mirrored
    #: Whether colours are distorted: each with probability 1/2, brightness by up to 32 of 255
    #: levels; contrast times 0.5 to 1.5, here or at the end; saturation times 0.5 to 1.5; hue by
    #: up to 36 degrees.
    distort: bool = True
    fill: tuple[int, ...] = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # beyond the picture

    def __post_init__(self) -> None:
        scale = check_interval("scale", self.scale, above=0, most=16)
        object.__setattr__(self, "scale", scale)
        share = check_number("most_of_a_class", self.most_of_a_class, above=0, most=1)
        object.__setattr__(self, "most_of_a_class", share)
        check_flag("flip", self.flip)
        check_flag("distort", self.distort)
        if not isinstance(self.fill, tuple | list) or len(self.fill) != 3:
            raise RangeError(f"fill is {shown(self.fill)}; it must be three levels, as (0, 0, 0)")
        object.__setattr__(self, "fill", tuple(self.fill))
        for i, level in enumerate(self.fill):
            check_number(f"fill[{i}]", level, least=0, most=255, whole=True)

    def __call__(
        self,
        image: Image.Image,
        labels: Image.Image,
        whole: tuple[int, int],
        crop: tuple[int, int],
        rng: Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One photo with its labels, changed at random.

        Args:
            image: in mode RGB, of any size.
            labels: in mode L, classes and 255 for pixels that do not count; of any size.
            whole: (H, W) that both are stretched to, times the scale.
            crop: (h, w) of the result.
            rng: the source of all random numbers.

        Returns:
            (h, w, 3) uint8 and (h, w) uint8; outside the picture they are fill and 255.
        """
        factor = rng.uniform(*self.scale)
        H, W = (max(1, round(side * factor)) for side in whole)
        labels = labels.resize((W, H), Image.Resampling.NEAREST)
        box = self._crop(np.asarray(labels), crop, rng)
        target = np.full(crop, IGNORED, np.uint8)  # (h, w)
        pixels = np.empty((*crop, 3), np.uint8)  # (h, w, 3)
        pixels[:] = self.fill
        top, left = box
        h, w = min(crop[0], H - top), min(crop[1], W - left)
        target[:h, :w] = np.asarray(labels)[top : top + h, left : left + w]
        # only the crop is resized: most of a large picture is not needed
        part = (left * image.width / W, top * image.height / H)
        part += ((left + w) * image.width / W, (top + h) * image.height / H)
        cut = image.resize((w, h), Image.Resampling.BILINEAR, box=part, reducing_gap=3.0)
        if self.flip and rng.random() < 0.5:
            target[:h, :w] = target[:h, :w][:, ::-1]
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        colours = np.asarray(cut)
        pixels[:h, :w] = distort_colours(colours, rng) if self.distort else colours
        return pixels, target

    def _crop(self, labels: np.ndarray, crop: tuple[int, int], rng: Generator) -> tuple[int, int]:
        """Top and left of a crop of labels (H, W) that no class fills, if one is found in time."""
        room = [max(0, side - part) for side, part in zip(labels.shape, crop, strict=True)]
        top = left = 0
        for _ in range(_TRIES):
            top, left = (int(rng.integers(0, free + 1)) for free in room)
            part = labels[top : top + crop[0], left : left + crop[1]]
            counts = np.bincount(part.ravel(), minlength=256)[:IGNORED]
            if np.count_nonzero(counts) > 1 and counts.max() < self.most_of_a_class * counts.sum():
                break
        return top, left

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists by field name, fit for JSON; ``PairAugment(**values)`` is this again.

        Returns:
            A new dictionary.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def distort_colours(pixels: np.ndarray, rng: Generator) -> np.ndarray:
    """Photometric distortion (Liu et al. 2016, arXiv 1512.02325, section 2.2), on 8-bit values.

    Args:
        pixels: (h, w, 3) uint8, red, green, blue.
        rng: draws whether and how much, in the order brightness, when the contrast, contrast,
            saturation, hue.

    Returns:
        (h, w, 3) uint8, a new array.
    """
    x = pixels.astype(np.float32)
    if rng.random() < 0.5:
        x = _whole(x + rng.uniform(-32, 32))
    early = rng.random() < 0.5
    factor = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else None
    if early and factor is not None:
        x = _whole(x * factor)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    turn = int(rng.integers(-18, 18)) if rng.random() < 0.5 else 0  # of 180
    if saturation != 1.0 or turn:
        hue, grey, value = Image.fromarray(x.astype(np.uint8)).convert("HSV").split()
        shift = round(255 * turn / 180) % 255  # in Pillow red is both 0 and 255
        hue = hue.point([(h + shift) % 255 for h in range(256)])
        grey = grey.point([min(255, math.floor(s * saturation)) for s in range(256)])
        x = np.asarray(Image.merge("HSV", (hue, grey, value)).convert("RGB"), np.float32)
    if not early and factor is not None:
        x = _whole(x * factor)
    return x.astype(np.uint8)


def _whole(x: np.ndarray) -> np.ndarray:
    """Levels clipped to 0 and 255 and truncated, as 8-bit values."""
    return np.trunc(np.clip(x, 0, 255))
