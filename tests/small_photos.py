"""A folder of small photos, of which three kinds of stripes are the classes."""

from pathlib import Path

import numpy as np
from PIL import Image
from small_training import stripes

from pvt_ref.data.folder import ImageFolder
from pvt_ref.data.photo_augment import PhotoAugment
from pvt_ref.data.preprocessing import Preprocessing

#: Not in the order in which an alphabet that forgets capitals would have them.
CLASSES = ("Across", "along", "none")
GREY = Preprocessing("L", (0.5,), (0.25,))
AUGMENT = PhotoAugment(crop_area=(0.5, 1.0), jitter=(0.2, 0.2, 0.0, 0.0), rand_augment=(1, 3))


def write_photos(root: Path, samples: int, seed: int, suffix: str = ".png") -> Path:
    """Photos of 16 x 16, grey, in a folder for each class; returns root."""
    data = stripes(samples, seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)
    for i, (pixels, label) in enumerate(zip(data.images[:, 0], data.labels, strict=True)):
        Image.fromarray(pixels).save(root / CLASSES[label] / f"{i:04}{suffix}")
    return root


def write_colours(root: Path, count: int, side: int = 40) -> Path:
    """So many photos of each of three colours, noisy, as JPEG; returns root."""
    rng = np.random.default_rng(3)
    for name, colour in (("blue", (40, 60, 200)), ("green", (50, 180, 60)), ("red", (200, 50, 40))):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.array(colour) + rng.integers(-40, 40, (side, side + i % 3, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.jpg")
    return root


def photos(root: Path, size: int = 16, **settings) -> ImageFolder:
    """What :func:`write_photos` wrote."""
    return ImageFolder(root, size, **{"preprocessing": GREY, **settings})
