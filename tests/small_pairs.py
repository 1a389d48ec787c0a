"""Folders of small scenes: coloured shapes on a grey ground, and maps of what is where."""

from pathlib import Path

import numpy as np
from PIL import Image
from segmentors import SEGMENTORS

from pvt_ref.data.pair_augment import PairAugment
from pvt_ref.data.pairs import LabelledPairs
from pvt_ref.train.recipe import SegmentationRecipe

CLASSES = ("ground", "disc", "square", "bar")
#: Of the classes, so far apart that a pixel's colour tells its class, and that of no class.
COLOURS = np.array([(90, 90, 90), (220, 40, 40), (40, 200, 60), (50, 70, 230)], np.uint8)
VOID_COLOUR = (250, 250, 20)
#: In the files, where a pixel does not count; LabelledPairs makes 255 of it.
VOID = 9
HEIGHT, WIDTH = 24, 32

CONFIG = SEGMENTORS["pvt"]
#: All that is random is on, so that whatever is not resumed shows.
AUGMENT = PairAugment(scale=(0.7, 1.5))
RECIPE = SegmentationRecipe(
    epochs=3,
    batch_size=4,
    accumulate=2,
    lr=3e-3,
    lr_floor=0.0,
    warmup_epochs=0.5,
    class_weights=(0.5, 2.0, 1.0, 1.5),
    ema_decay=0.9,
    drop_path_ramp_epochs=2,
    seed=5,
)


def scene(seed: int, noise: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A photo (H, W, 3) and its label map (H, W), uint8: a disc, a square, a bar, a void border."""
    rng = np.random.default_rng([seed, 77])
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    top, left = rng.integers(3, HEIGHT - 3), rng.integers(3, WIDTH - 3)
    labels[(y - top) ** 2 + (x - left) ** 2 <= 36] = 1
    top, left = rng.integers(0, HEIGHT - 9), rng.integers(0, WIDTH - 9)
    labels[top : top + 9, left : left + 9] = 2
    labels[:, (left := int(rng.integers(0, WIDTH - 5))) : left + 5] = 3
    labels[-2:] = VOID
    photo = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    photo[labels < VOID] = COLOURS[labels[labels < VOID]]
    photo[labels == VOID] = VOID_COLOUR
    drawn = photo.astype(int) + rng.integers(-noise, noise + 1, photo.shape)
    return drawn.clip(0, 255).astype(np.uint8), labels


def write_pairs(root: Path, count: int, seed: int = 0, noise: int = 12) -> Path:
    """Photos in ``root/images`` and label maps in ``root/labels``, as PNG; returns root."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photo, labels = scene(1000 * seed + i, noise)
        Image.fromarray(photo).save(root / "images" / f"{i:03}.png")
        Image.fromarray(labels).save(root / "labels" / f"{i:03}.png")
    return root


def pairs(root: Path, size=(32, 64), **settings) -> LabelledPairs:
    """What :func:`write_pairs` wrote; a PVT's last map then has two cells."""
    given = {"replaced": {VOID: 255}, **settings}
    return LabelledPairs(root / "images", root / "labels", CLASSES, size, **given)
