"""A PVT for 32x32 pixels learns CIFAR-10 with the package's own gradients, on a CPU or on CUDA.

    python examples/train_cifar10.py --data DIR               DIR holds the binary version
    python examples/train_cifar10.py --data DIR --resume      goes on after Ctrl-C or a crash
    python examples/train_cifar10.py --data DIR --test FILE   accuracy of a model on the test set

Of the 50,000 training images 5,000 are held out, and the epoch that does best on them is kept. The
test set is looked at once, at the end. Where the data come from: see examples/cifar10_data.py.
"""

import argparse
import dataclasses
import sys

from cifar10_data import CLASSES, HOW_TO_GET_IT, TEST_FILES, TRAIN_FILES, read_cifar10
from training import add_run_arguments, finish, run

import pvt_ref
from pvt_ref import ModelInfo, PVTConfig, PVTError
from pvt_ref.errors import printable
from pvt_ref.train import LabelledImages, Recipe, evaluate
from pvt_ref.train.loop import BEST

#: The four stages see 16x16, 8x8, 4x4 and 2x2 tokens.
CONFIG = PVTConfig(
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
    """The last 5,000 of the training images are held out; the files are in random order."""
    cut = len(data) - HELD_OUT
    return (
        LabelledImages(data.images[:cut], data.labels[:cut], data.preprocessing),
        LabelledImages(data.images[cut:], data.labels[cut:], data.preprocessing),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains a PVT on CIFAR-10.")
    parser.add_argument("--data", required=True, metavar="DIR", help=HOW_TO_GET_IT)
    parser.add_argument(
        "--test", metavar="FILE", help="train nothing: measure this model (or 'cifar10')"
    )
    add_run_arguments(parser, RECIPE, folder="runs/cifar10")
    args = parser.parse_args(argv)
    try:
        if args.test:
            model = pvt_ref.load(args.test)
            test = read_cifar10(args.data, TEST_FILES)
            prepared = dataclasses.replace(test, preprocessing=model.info.preprocessing)
            loss, accuracy = evaluate(model.params, model.config, prepared)
            measured = f"test accuracy {accuracy:.4f}, loss {loss:.4f} ({len(test):,} images)"
            print(printable(f"{args.test}: {measured}"))
            return 0
        data, held_out = split(read_cifar10(args.data, TRAIN_FILES))
        info = ModelInfo(title="CIFAR-10, ten classes of 32x32 photos", classes=tuple(CLASSES))
        done = run(CONFIG, data, held_out, info, args)
        if not done.finished:
            return 130
        best = pvt_ref.load(done.folder / BEST)
        about = {"data": "CIFAR-10", "best_epoch": done.state.best_epoch}
        finish(done, best, held_out, read_cifar10(args.data, TEST_FILES), about, args)
        return 0
    except PVTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
