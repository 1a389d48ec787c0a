"""Trains a PVT on CIFAR-10 with the package's own gradients, on a CPU or on CUDA.

    python examples/train_cifar10.py --data DIR               DIR holds the binary version
    python examples/train_cifar10.py --data DIR --network v2  a PVT v2, on enlarged pictures
    python examples/train_cifar10.py --data DIR --resume      continues after Ctrl-C or a crash
    python examples/train_cifar10.py --data DIR --test FILE   accuracy of a model on the test set

Of the 50,000 training images 5,000 are held out, and the best epoch on them is kept. The test set
is used once, at the end. examples/cifar10_data.py downloads the data.
"""

import argparse
import dataclasses
import sys

import numpy as np
from cifar10_data import CLASSES, HOW_TO_GET_IT, TEST_FILES, TRAIN_FILES, read_cifar10
from PIL import Image
from training import add_run_arguments, finish, run

import pvt_ref
from pvt_ref import ModelInfo, PVTConfig, PVTError, PVTv2Config
from pvt_ref.errors import printable
from pvt_ref.train import LabelledImages, Recipe, evaluate
from pvt_ref.train.loop import BEST

#: The four stages have 16x16, 8x8, 4x4 and 2x2 tokens.
V1 = PVTConfig(
    img_size=32,
    num_classes=10,
    patch_sizes=(2, 2, 2, 2),
    embed_dims=(32, 64, 160, 256),
    num_heads=(1, 2, 5, 8),
    mlp_ratios=(4, 4, 4, 4),
    depths=(1, 2, 2, 2),
    sr_ratios=(4, 2, 1, 1),
    drop_path_rate=0.05,
)

#: The same numbers of tokens. Its first patches have stride 4, so the pictures are enlarged.
V2 = PVTv2Config(
    img_size=64,
    num_classes=10,
    embed_dims=(32, 64, 160, 256),
    num_heads=(1, 2, 5, 8),
    mlp_ratios=(4, 4, 4, 4),
    depths=(1, 2, 2, 1),
    sr_ratios=(4, 2, 1, 1),
    drop_path_rate=0.05,
)

RECIPE = Recipe(
    epochs=60,
    batch_size=128,
    lr=1e-3,
    warmup_epochs=3,
    mixup_alpha=0.2,
    drop_path_ramp_epochs=20,
)

HELD_OUT = 5_000


def split(data: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Holds out the last 5,000 of the training images; the files are in random order."""
    cut = len(data) - HELD_OUT
    return (
        LabelledImages(data.images[:cut], data.labels[:cut], data.preprocessing),
        LabelledImages(data.images[cut:], data.labels[cut:], data.preprocessing),
    )


def at_size(data: LabelledImages, side: int) -> LabelledImages:
    """The pictures at the network's img_size, enlarged unless it is 32."""
    if side == data.images.shape[-1]:
        return data
    images = np.empty((len(data), 3, side, side), np.uint8)
    for image, small in zip(images, data.images, strict=True):
        enlarged = Image.fromarray(small.transpose(1, 2, 0)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        image[...] = np.asarray(enlarged).transpose(2, 0, 1)
    return LabelledImages(images, data.labels, data.preprocessing)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains a PVT on CIFAR-10.")
    parser.add_argument("--data", required=True, metavar="DIR", help=HOW_TO_GET_IT)
    parser.add_argument("--test", metavar="FILE", help="only measure this: a file, or a known name")
    parser.add_argument("--network", choices=("v1", "v2"), default="v1", help="default v1")
    add_run_arguments(parser, RECIPE, folder="runs/cifar10")
    args = parser.parse_args(argv)
    config = {"v1": V1, "v2": V2}[args.network]
    try:
        if args.test:
            model = pvt_ref.load(args.test)
            test = at_size(read_cifar10(args.data, TEST_FILES), model.config.img_size)
            prepared = dataclasses.replace(test, preprocessing=model.info.preprocessing)
            loss, accuracy = evaluate(model.params, model.config, prepared)
            measured = f"test accuracy {accuracy:.4f}, loss {loss:.4f} ({len(test):,} images)"
            print(printable(f"{args.test}: {measured}"))
            return 0
        data, held_out = split(at_size(read_cifar10(args.data, TRAIN_FILES), config.img_size))
        info = ModelInfo(title="CIFAR-10, ten classes of 32x32 photos", classes=tuple(CLASSES))
        done = run(config, data, held_out, info, args)
        if not done.finished:
            return 130
        best = pvt_ref.load(done.folder / BEST)
        about = {"data": "CIFAR-10", "best_epoch": done.state.best_epoch}
        test = at_size(read_cifar10(args.data, TEST_FILES), config.img_size)
        finish(done, best, held_out, test, about, args)
        return 0
    except PVTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
