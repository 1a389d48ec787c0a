"""Trains a PVT or a PVT v2 from scratch on Imagenette's ten classes of photos.

    python examples/train_imagenette.py --data DIR --out RUN
    python examples/train_imagenette.py --data DIR --out RUN --network v2
    python examples/train_imagenette.py --data DIR --out RUN --resume

Network v1 has 4.7 million parameters, v2 is PVT v2 b0 with 3.4 million. --resume continues a run.

DIR is the unpacked archive of Imagenette's project (https://github.com/fastai/imagenette). It
contains train and val, each with a folder for every class. A tenth of train is held out, and the
best epoch on it is kept. The photos in val are scored once, at the end.

This is ``python -m pvt_ref train`` with an unnamed network, a recipe, and that final score.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from score_imagenette import CLASSES, photos, report

import pvt_ref
from pvt_ref import PVTConfig, PVTError
from pvt_ref.errors import printable
from pvt_ref.train import Options, Recipe, confusion_matrix, train_folder
from pvt_ref.train.from_folder import MODEL
from pvt_ref.train.options import STOPPED, add_recipe_options, recipe_values

#: The network of the weights in the package. At 128 pixels its stages have 64x64, 32x32, 16x16 and
#: 8x8 tokens, like the published networks at 256.
V1 = PVTConfig(
    img_size=128,
    patch_sizes=(2, 2, 2, 2),
    embed_dims=(32, 96, 192, 256),
    num_heads=(1, 3, 6, 8),
    mlp_ratios=(4, 4, 4, 2),
    depths=(2, 2, 4, 2),
    sr_ratios=(8, 4, 2, 1),
    drop_path_rate=0.1,
)
V2 = pvt_ref.VARIANTS["pvt_v2_b0"]

RECIPE = Recipe(
    epochs=150,
    batch_size=64,
    warmup_epochs=5,
    mixup_alpha=0.3,
    cutmix_alpha=0.4,
    erasing=0.1,
    crop_padding=0,
)
SCORE = "val.json"


def main(argv: list[str] | None = None) -> int:
    """Trains, and scores the best epoch; returns the exit status."""
    parser = argparse.ArgumentParser(description="Trains a PVT on Imagenette.")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="contains the folders train and val"
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the folder of the run")
    parser.add_argument("--network", choices=("v1", "v2"), default="v1", help="default v1")
    parser.add_argument("--size", type=int, default=128, help="side of a photo (default 128)")
    parser.add_argument("--resume", action="store_true", help="continue the run in RUN")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--workers", type=int, help="threads that read photos (default: cores)")
    add_recipe_options(parser, RECIPE)
    args = parser.parse_args(argv)
    options = Options()
    if not args.resume:
        recipe = recipe_values(args)
        options = Options(size=args.size, class_names=CLASSES, recipe=recipe)
    data, out = Path(args.data), Path(args.out)
    try:
        done = train_folder(
            data / "train",
            out,
            options,
            config=None if args.resume else {"v1": V1, "v2": V2}[args.network],
            resume=args.resume,
            device=args.device,
            workers=args.workers,
            console=Console(),
        )
        if not done.finished:
            print(f"Stopped and saved after step {done.state.step}. --resume continues")
            return STOPPED
        score = out / SCORE
        if not score.exists():  # once only: repeated scores would start to guide choices
            model = pvt_ref.load(out / MODEL)
            counts = confusion_matrix(model.params, model.config, photos(model, data / "val"))
            score.write_text(json.dumps(counts.tolist()) + "\n")
        print(f"Score on the photos in val, which were not used to select anything ({score}):")
        print(report(np.array(json.loads(score.read_text()))))
    except (PVTError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
