"""Measures the accuracy of the shipped Imagenette network on Imagenette's validation photos.

    python examples/score_imagenette.py DIR            DIR holds n01440764, n02102040, ...
    python examples/score_imagenette.py DIR --every 10

DIR is the folder ``val`` of Imagenette's archive, from its project page
https://github.com/fastai/imagenette. A photo is prepared as for a prediction: its shorter side is
resized to 256/224 of 128 pixels, and the central 128x128 pixels are used.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import pvt_ref
from pvt_ref import PVTError
from pvt_ref.errors import printable
from pvt_ref.train import ImageFolder, confusion_matrix

#: Folders of the ten classes, in the order of the network's outputs, with their names.
CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def photos(model: pvt_ref.Model, folder: str | Path) -> ImageFolder:
    """The photos of one of Imagenette's two folders, prepared for the model."""
    size, preprocessing = model.config.img_size, model.info.preprocessing
    return ImageFolder(folder, size, preprocessing=preprocessing, classes=tuple(CLASSES))


def report(counts: np.ndarray) -> str:
    """Numbers of correct photos, by class and in total, from a confusion matrix (10, 10)."""
    lines = [
        f"{name:18} {counts[k, k]:4} of {counts[k].sum()}"
        for k, name in enumerate(CLASSES.values())
    ]
    right, of = np.trace(counts), counts.sum()
    return "\n".join([*lines, f"{right} of {of} photos are right: {right / of:.2%}"])


def main(argv: list[str] | None = None) -> int:
    """Prints the numbers of correct photos; returns the exit status."""
    parser = argparse.ArgumentParser(description="Scores a network on Imagenette.")
    parser.add_argument("folder", help="Imagenette's folder val")
    parser.add_argument("--weights", default="imagenette", help="a name or file")
    parser.add_argument("--every", type=int, default=1, help="every n-th photo only")
    args = parser.parse_args(argv)
    try:
        model = pvt_ref.load(args.weights)
        found = photos(model, args.folder)
        found = found.subset(range(0, len(found), args.every))
        print(report(confusion_matrix(model.params, model.config, found)))
    except PVTError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
