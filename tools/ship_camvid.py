"""The segmentation network of a finished run of examples/train_camvid.py becomes the package's.

    python tools/ship_camvid.py RUN

Copies RUN/model.safetensors to pvt_ref/weights/camvid.safetensors, and renews what follows from
it: the answers that a test knows it by, README's picture, and its row of README's table of
trainings. Without RUN they are renewed for the weights that are there.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import pvt_ref

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "pvt_ref" / "weights" / "camvid.safetensors"
ANSWERS = ROOT / "tests" / "golden" / "camvid.npz"
PHOTO = ROOT / "examples" / "chelsea.jpg"
PICTURE = "docs/images/segmentation.jpg"
#: Pixels a panel: the picture then has less than 400 kB.
PANEL = 400


def answers(model: pvt_ref.Model) -> dict[str, np.ndarray]:
    """Logits for drawn numbers, and how much of a photo each class gets."""
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 96)).astype(np.float32)
    (found,) = model.segment(PHOTO)
    share = np.bincount(found.ravel(), minlength=len(model.classes)) / found.size
    return {"logits": model(images), "cat": share}


def row(model: pvt_ref.Model) -> str:
    """Its row of README's table."""
    said = model.info.training
    parameters = pvt_ref.count_cost(model.config).parameters
    iou, right = (f"{100 * said[f'test_{x}']:.1f} %" for x in ("miou", "pixel_accuracy"))
    data = f"[CamVid](docs/results/training_camvid.md), {said['frames']['test']} test frames"
    score = f"mIoU {iou}; {right} of the pixels"
    how = f"{said['epochs']} epochs, begun with the backbone of `imagenette`"
    return f"| {data} | {parameters:,} | {score} | {how} | version {said['pvt_ref']} |"


def with_row(readme: str, new: str) -> str:
    """README with the row in the place of an older one, or behind Imagenette's."""
    lines = [line for line in readme.split("\n") if not line.startswith("| [CamVid]")]
    (before,) = [i for i, line in enumerate(lines) if line.startswith("| [Imagenette]")]
    return "\n".join([*lines[: before + 1], new, *lines[before + 1 :]])


def main() -> int:
    """Renews all; returns the exit status of what draws the picture."""
    parser = argparse.ArgumentParser(description="Puts a trained network into the package.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder of the run")
    args = parser.parse_args()
    if args.run:
        shutil.copyfile(Path(args.run) / "model.safetensors", WEIGHTS)
    model = pvt_ref.load("camvid")
    np.savez_compressed(ANSWERS, allow_pickle=False, **answers(model))
    readme = ROOT / "README.md"
    readme.write_text(with_row(readme.read_text("utf-8"), row(model)), "utf-8")
    command = ["examples/segment.py", "--panel", f"{PANEL}", "--output", PICTURE]
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
