"""Ships the segmentation network of a finished run of examples/train_camvid.py with the package.

    python tools/ship_camvid.py RUN

Copies RUN/model.safetensors to pvt_ref/weights/camvid.safetensors, and renews everything that
depends on it: the stored answers that a test compares, README's picture, and its row in README's
table of trainings. Without RUN, all this is renewed for the current weights.
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
#: Pixels per panel, chosen so that the picture has less than 400 kB.
PANEL = 400


def answers(model: pvt_ref.Model) -> dict[str, np.ndarray]:
    """Logits for random images, and each class's fraction of a photo."""
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 96)).astype(np.float32)
    (found,) = model.segment(PHOTO)
    share = np.bincount(found.ravel(), minlength=len(model.classes)) / found.size
    return {"logits": model(images), "cat": share}


def row(model: pvt_ref.Model) -> str:
    """The network's row in README's table."""
    said = model.info.training
    parameters = pvt_ref.count_cost(model.config).parameters
    iou, right = (f"{100 * said[f'test_{x}']:.1f} %" for x in ("miou", "pixel_accuracy"))
    data = f"[CamVid](docs/results/training_camvid.md), {said['frames']['test']} test frames"
    score = f"mIoU {iou}; {right} of the pixels"
    how = f"{said['epochs']} epochs, from the backbone of `imagenette`"
    return f"| {data} | {parameters:,} | {score} | {how} | version {said['pvt_ref']} |"


def with_row(readme: str, new: str) -> str:
    """README with the row in place of an older one, or after Imagenette's."""
    lines = [line for line in readme.split("\n") if not line.startswith("| [CamVid]")]
    (before,) = [i for i, line in enumerate(lines) if line.startswith("| [Imagenette]")]
    return "\n".join([*lines[: before + 1], new, *lines[before + 1 :]])


def main() -> int:
    """Renews everything; returns the exit status of the program that draws the picture."""
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
