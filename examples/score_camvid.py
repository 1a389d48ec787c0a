"""Scores the shipped segmentation network on CamVid's test frames.

    python examples/score_camvid.py DIR
    python examples/score_camvid.py DIR --weights RUN/model.safetensors
    python examples/score_camvid.py DIR --every 10

DIR is SegNet's copy of CamVid, as for train_camvid.py. A frame is segmented as in the training's
own evaluation: it is stretched to 256 x 192 pixels, and the logits are resized to its 480 x 360.
Scores are computed from the counts of all frames together.
"""

import argparse
import sys
from pathlib import Path

from train_camvid import CLASSES, frames, report

import pvt_ref
from pvt_ref import PVTError
from pvt_ref.checks import check_number
from pvt_ref.errors import ConfigError, printable
from pvt_ref.train import LabelledPairs, evaluate_pixels


def thinned(pairs: LabelledPairs, every: int) -> LabelledPairs:
    """Every n-th pair, from the first on. Raises: RangeError if every is not an integer >= 1."""
    check_number("--every", every, least=1, whole=True)
    pairs.files = pairs.files[::every]
    return pairs


def main(argv: list[str] | None = None) -> int:
    """Prints the score of each class and the total; returns the exit status."""
    parser = argparse.ArgumentParser(description="Scores a network on CamVid's test frames.")
    parser.add_argument("folder", metavar="DIR", help="SegNet's copy of CamVid")
    parser.add_argument("--weights", default="camvid", help="a name or file (default camvid)")
    parser.add_argument("--every", type=int, default=1, help="every n-th frame only")
    args = parser.parse_args(argv)
    try:
        model = pvt_ref.load(args.weights)
        if model.classes != tuple(CLASSES):
            what = f"{args.weights} does not have CamVid's {len(CLASSES)} classes"
            raise ConfigError(f"{what}. Use weights of train_camvid.py")
        pairs = thinned(frames(Path(args.folder), "test"), args.every)
        report(evaluate_pixels(model.params, model.config, pairs)[1])
    except (PVTError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
