"""Trains a small PVT on handwritten digits in two minutes, with the package's own gradients.

    python examples/train_digits.py              writes runs/digits/model.safetensors
    python examples/train_digits.py --resume     continues after Ctrl-C

The data come with scikit-learn: 1,797 digits of 8x8 pixels in 17 levels of grey, by 43 people (the
test part of Alpaydin and Kaynak's set in the UCI repository). They are enlarged to 32x32. A fixed
random fifth of each class is held out.
"""

import argparse
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from training import add_run_arguments, finish, run

from pvt_ref import Model, ModelInfo, Preprocessing, PVTConfig, PVTError, to_numpy
from pvt_ref.train import LabelledImages, Recipe

CONFIG = PVTConfig(
    img_size=32,
    in_chans=1,
    num_classes=10,
    patch_sizes=(4, 2, 2, 1),
    embed_dims=(32, 64, 96, 96),
    num_heads=(1, 2, 3, 3),
    mlp_ratios=(4, 4, 4, 4),
    depths=(1, 2, 1, 1),
    sr_ratios=(2, 1, 1, 1),
    drop_path_rate=0.05,
)

RECIPE = Recipe(
    epochs=60,
    batch_size=64,
    lr=2e-3,
    warmup_epochs=3,
    crop_padding=3,
    flip=False,  # a mirrored 2 is not a digit
    ema_decay=0.99,
)

PREPROCESSING = Preprocessing("L", (0.3,), (0.35,))


def read_digits() -> tuple[LabelledImages, LabelledImages]:
    """The training samples (1,437) and the held-out ones (360)."""
    pixels, targets = (np.asarray(x) for x in load_digits(return_X_y=True))
    levels = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 levels to 0..255
    pictures = [Image.fromarray(image) for image in levels]
    images = PREPROCESSING.pixels(pictures, CONFIG.img_size).transpose(0, 3, 1, 2)  # (N, 1, 32, 32)
    samples = train_test_split(np.arange(1797), test_size=360, stratify=targets, random_state=0)
    learnt, held_out = (np.sort(part) for part in samples)
    return (
        LabelledImages(images[learnt], targets[learnt], PREPROCESSING),
        LabelledImages(images[held_out], targets[held_out], PREPROCESSING),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains a small PVT on handwritten digits.")
    add_run_arguments(parser, RECIPE, folder="runs/digits")
    args = parser.parse_args(argv)
    try:
        data, held_out = read_digits()
        info = ModelInfo(
            title="handwritten digits, light on dark, 32x32 grey",
            classes=tuple("0123456789"),
            preprocessing=PREPROCESSING,
        )
        done = run(CONFIG, data, held_out, info, args)
        if not done.finished:
            return 130
        # the last weights, not the best, so the held-out samples select nothing
        last = Model(to_numpy(done.state.average), CONFIG, info=info)
        finish(done, last, held_out, None, {"data": "scikit-learn's digits"}, args)
    except PVTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
