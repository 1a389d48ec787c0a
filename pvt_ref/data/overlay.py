"""Class maps as pictures: an overlay on the photo with a legend, and a picture with a palette."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pvt_ref.errors import ShapeError

#: Red, green, blue, from 0 to 255.
RGB = tuple[int, int, int]

_LEGEND_WIDTH = 150  # pixels, beside a photo whose short side is 320 or less


def class_colours(count: int) -> tuple[RGB, ...]:
    """Default colours for classes, all different, from the bits of the number as in VOC.

    Args:
        count: K, at most 256.

    Returns:
        K colours. That of class 0 is black.
    """

    def colour(k: int) -> RGB:
        levels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                levels[channel] |= ((k >> (3 * bit + channel)) & 1) << (7 - bit)
        return levels[0], levels[1], levels[2]

    return tuple(colour(k) for k in range(count))


def indexed(class_map: np.ndarray, colours: Sequence[RGB]) -> Image.Image:
    """A picture with a palette whose indices are the classes; PNG stores it without loss.

    Args:
        class_map: (H, W) integers in [0, K), or 255 where there is no answer.
        colours: of the K classes.

    Returns:
        A picture in mode P.
    """
    image = Image.fromarray(class_map.astype(np.uint8), "P")
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = colours
    palette[255] = 255  # no answer is white
    image.putpalette(palette.tobytes())
    return image


def overlay(
    photo: Image.Image,
    class_map: np.ndarray,
    classes: Sequence[str],
    colours: Sequence[RGB],
    opacity: float = 0.55,
) -> Image.Image:
    """The photo tinted by class, with a legend of its largest classes beside it.

    Args:
        photo: in mode RGB.
        class_map: (H, W) integers, of the photo's size.
        classes: names of the K classes.
        colours: of the K classes.
        opacity: of the tint, from 0 to 1.

    Returns:
        An RGB picture, as high as the photo and wider by the legend.

    Raises:
        ShapeError: if the two are of different sizes.
    """
    H, W = class_map.shape
    if photo.size != (W, H):
        what = f"the photo has {photo.width}x{photo.height} pixels and the class map {W}x{H}"
        raise ShapeError(f"{what}; both must be of one size")
    tint = indexed(class_map, colours).convert("RGB")
    tinted = Image.blend(photo, tint, opacity)
    scale = max(1.0, min(W, H) / 320)
    line, margin = round(17 * scale), round(8 * scale)
    font = ImageFont.load_default(round(12 * scale))
    canvas = Image.new("RGB", (W + round(_LEGEND_WIDTH * scale), H), "white")
    canvas.paste(tinted, (0, 0))
    draw = ImageDraw.Draw(canvas)
    counts = np.bincount(class_map.ravel(), minlength=len(classes))[: len(classes)]
    shown = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
    for row, k in enumerate(shown[: max(1, (H - margin) // line)]):
        top = margin + row * line
        box = (W + margin, top, W + margin + line - margin // 2, top + line - margin // 2)
        draw.rectangle(box, fill=tuple(colours[k]), outline="black")
        share = f"{counts[k] / class_map.size:.0%}" if counts[k] * 200 > class_map.size else "<1%"
        text = f"{classes[k]} {share}"
        draw.text((W + margin + line, top - margin // 4), text, fill="black", font=font)
    return canvas
