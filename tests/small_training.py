"""A training so small that it can be done, broken off and killed many times over."""

import dataclasses

import numpy as np

from pvt_ref import Preprocessing, PVTConfig
from pvt_ref.train import LabelledImages, Recipe

CONFIG = PVTConfig(
    img_size=16,
    in_chans=1,
    num_classes=3,
    patch_sizes=(4, 2, 1, 2),
    embed_dims=(8, 8, 12, 8),
    num_heads=(1, 2, 3, 2),
    mlp_ratios=(2, 2, 1, 2),
    depths=(1, 2, 1, 1),
    sr_ratios=(2, 1, 1, 1),
    drop_path_rate=0.3,
)

#: Everything random is on, so that whatever is not resumed shows.
RECIPE = Recipe(
    epochs=3,
    batch_size=6,
    accumulate=2,
    lr=3e-3,
    warmup_epochs=1,
    mixup_alpha=0.5,
    cutmix_alpha=1.0,
    crop_padding=2,
    cutout=4,
    erasing=0.3,
    ema_decay=0.9,
    drop_path_ramp_epochs=2,
    seed=5,
)

PREPROCESSING = Preprocessing("L", (0.5,), (0.25,))


def stripes(samples: int, seed: int) -> LabelledImages:
    """Three kinds of noisy pictures: stripes across, stripes along, and none."""
    rng = np.random.default_rng([seed])
    labels = rng.integers(0, 3, samples)
    wave = np.where(np.arange(16) // 2 % 2, 220, 30)
    kinds = np.stack([np.tile(wave, (16, 1)), np.tile(wave, (16, 1)).T, np.full((16, 16), 125)])
    images = kinds[labels] + rng.integers(-30, 30, (samples, 16, 16))
    return LabelledImages(images[:, None].clip(0, 255).astype(np.uint8), labels, PREPROCESSING)


DATA, HELD_OUT = stripes(27, 1), stripes(9, 2)  # 4 steps an epoch, and 3 samples left over


def without_chance(recipe: Recipe) -> Recipe:
    """The same with every batch as it is."""
    still = {"crop_padding": 0, "flip": False, "cutout": 0, "erasing": 0.0}
    return dataclasses.replace(recipe, mixup_alpha=0.0, cutmix_alpha=0.0, **still)
