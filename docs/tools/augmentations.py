"""Draws docs/images/augment.jpg: a photo under each augmentation, as the package changes it.

    python docs/tools/augmentations.py

A test draws it again and compares.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pvt_ref.data.image import read_rgb
from pvt_ref.data.photo_augment import TRANSFORMATIONS
from pvt_ref.data.preprocessing import IMAGENET
from pvt_ref.train import PhotoAugment, cutmix, cutout, mixup, random_erasing

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "examples" / "chelsea.jpg"
PICTURE = ROOT / "docs" / "images" / "augment.jpg"

SIDE, LABEL, GAP, COLUMNS = 152, 20, 8, 5


def changed() -> dict[str, Image.Image]:
    """Pictures by what was done to them."""
    photo = read_rgb(PHOTO)
    whole = PhotoAugment(crop_area=None)
    still = whole(photo, SIDE, np.random.default_rng(0))
    pictures = {"the photo": still}
    for seed in (1, 3, 5):
        pictures[f"crop, {seed // 2 + 1}"] = PhotoAugment()(
            photo, SIDE, np.random.default_rng(seed)
        )
    strengths = {"brightness": 0.6, "contrast": 0.6, "saturation": 0.9, "hue": 0.2}
    for place, (name, strength) in enumerate(strengths.items()):
        jitter: Any = [0.0] * 4
        jitter[place] = strength
        augment = PhotoAugment(crop_area=None, jitter=jitter)
        pictures[f"jitter: {name}"] = augment(photo, SIDE, np.random.default_rng(10))
    for name, transform in TRANSFORMATIONS.items():
        if name != "identity":
            pictures[name] = transform(still, 0.9, whole.fill)
    return pictures | of_a_batch(still)


def of_a_batch(photo: Image.Image) -> dict[str, Image.Image]:
    """What is done to numbers: the photo, and its mirror image in grey as the other sample."""
    other = ImageOps.mirror(photo.convert("L")).convert("RGB")
    pixels, targets = (
        np.stack([np.asarray(photo), np.asarray(other)]).transpose(0, 3, 1, 2),
        np.eye(2, dtype=np.float32),
    )
    images = IMAGENET.normalize(pixels, like=targets)  # (B, 3, H, W)
    rng = np.random.default_rng(2)
    batches = {
        "cutout": cutout(images, SIDE // 3, rng),
        "erasing": random_erasing(images, 1.0, rng),
        "mixup": mixup(images, targets, 1e9, np.random.default_rng(3))[0],
        "cutmix": cutmix(images, targets, 1e9, np.random.default_rng(3))[0],
    }
    mean, std = (np.array(x)[:, None, None] for x in (IMAGENET.mean, IMAGENET.std))
    levels = {name: 255 * (x[0] * std + mean) for name, x in batches.items()}
    return {
        name: Image.fromarray(np.rint(x).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        for name, x in levels.items()
    }


def draw() -> Image.Image:
    """All of them side by side, each with its name below."""
    pictures = changed()
    rows = -(-len(pictures) // COLUMNS)
    size = (COLUMNS * (SIDE + GAP) - GAP, rows * (SIDE + LABEL + GAP) - GAP)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(14)
    for number, (name, picture) in enumerate(pictures.items()):
        row, column = divmod(number, COLUMNS)
        left, top = column * (SIDE + GAP), row * (SIDE + LABEL + GAP)
        sheet.paste(picture, (left, top))
        middle = (left + SIDE // 2, top + SIDE + LABEL // 2)
        ImageDraw.Draw(sheet).text(middle, name, "black", font, anchor="mm")
    return sheet


if __name__ == "__main__":
    draw().save(PICTURE, quality=85, optimize=True)
