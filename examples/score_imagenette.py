"""The accuracy of the shipped Imagenette network on Imagenette's validation photos.

    python examples/score_imagenette.py DIR            DIR holds n01440764, n02102040, ...
    python examples/score_imagenette.py DIR --every 10

DIR is the folder ``val`` of Imagenette, which its project page offers as an archive:
https://github.com/fastai/imagenette. A photo is prepared as for a prediction: shorter side to
256/224 of 128 pixels, then the middle 128x128.
"""

import argparse
import sys
from pathlib import Path

import pvt_ref
from pvt_ref import PVTError
from pvt_ref.errors import printable

#: Folders of the ten classes, in the order of the network's outputs.
FOLDERS = (
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)


def photos(root: Path) -> list[tuple[Path, int]]:
    """Every photo with its class, by folder and name."""
    missing = [folder for folder in FOLDERS if not (root / folder).is_dir()]
    if missing:
        raise FileNotFoundError(f"{root} has no folder {missing[0]}; it must be Imagenette's val")
    return [(p, y) for y, folder in enumerate(FOLDERS) for p in sorted((root / folder).iterdir())]


def main(argv: list[str] | None = None) -> int:
    """Prints how many are right, class by class; returns the exit status."""
    parser = argparse.ArgumentParser(description="Scores the shipped Imagenette network.")
    parser.add_argument("folder", type=Path, help="Imagenette's folder val")
    parser.add_argument("--weights", default="imagenette", help="a name or file")
    parser.add_argument("--every", type=int, default=1, help="every n-th photo only")
    args = parser.parse_args(argv)
    try:
        model = pvt_ref.load(args.weights)
        samples = photos(args.folder)[:: args.every]
    except (PVTError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    right, count = [0] * len(FOLDERS), [0] * len(FOLDERS)
    answers = model.predict_each((path for path, _ in samples), top=1)
    for (path, label), answer in zip(samples, answers, strict=True):
        if isinstance(answer, PVTError):
            print(f"error: {printable(f'{path}: {answer}')}", file=sys.stderr)
            return 2
        right[label] += answer[0].index == label
        count[label] += 1
    for name, r, n in zip(model.classes, right, count, strict=True):
        print(f"{name:18} {r:4} of {n}")
    print(f"{sum(right)} of {sum(count)} photos are right: {sum(right) / sum(count):.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
