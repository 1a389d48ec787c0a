"""Trains on a few photos of new classes, from pretrained weights and from random ones.

    python benchmarks/fine_tuning.py --data DIR --work FOLDER

DIR holds train and test with a folder of photos for each class, such as CIFAR-10's, which are
enlarged. The first --photos of each class are used for training, and as many of test are held out.
The same network is trained for the same number of steps, once from the weights "imagenette" and
once from random ones. Writes fine_tuning.md, .json and .svg into docs/results/. An existing work
folder is resumed.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import matplotlib
from machine import cores, describe_machine
from matplotlib.figure import Figure
from rich.console import Console

import pvt_ref
from pvt_ref.train import Options, read_metrics, train_folder
from pvt_ref.train.from_folder import RUN

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
KINDS = {"imagenette": "begun with the weights imagenette", "nothing": "begun with random weights"}


def choose(data: Path, work: Path, count: int) -> Path:
    """Links to the first photos of each class, by name: train for training, val held out."""
    chosen = work / "photos"
    for part, source in (("train", "train"), ("val", "test")):
        for folder in sorted(path for path in (data / source).iterdir() if path.is_dir()):
            place = chosen / part / folder.name
            place.mkdir(parents=True, exist_ok=True)
            for photo in sorted(folder.iterdir())[:count]:
                link = place / photo.name
                if not link.exists():
                    os.symlink(photo.resolve(), link)
    return chosen


def learn(kind: str, photos: Path, work: Path, size: int, epochs: int) -> list[dict]:
    """The lines of the epochs of one training."""
    out = work / kind
    shared = {"epochs": epochs, "batch_size": 50, "ema_decay": 0.99, "crop_padding": 0}
    shared |= {"warmup_epochs": 2.0}
    if kind == "imagenette":
        recipe = {**shared, "lr": 3e-4, "layer_decay": 0.75}
        options = Options(weights="imagenette", size=size, augment="light", recipe=recipe)
        config = None
    else:
        recipe = {**shared, "lr": 1e-3}
        options = Options(size=size, augment="light", recipe=recipe)
        config = pvt_ref.load("imagenette").config
    resume = (out / RUN).exists()
    train_folder(
        photos, out, Options() if resume else options, config=None if resume else config,
        resume=resume, console=Console(),
    )  # fmt: skip
    return [line for line in read_metrics(out / "metrics.jsonl") if "held_out_accuracy" in line]


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "pvt_ref", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        ax = figure.subplots()
        for kind, lines in runs.items():
            epochs = [line["epoch"] for line in lines]
            ax.plot(epochs, [line["held_out_accuracy"] for line in lines], label=KINDS[kind])
        ax.set(xlabel="epoch", ylabel="accuracy on photos held out", ylim=(0, 1))
        ax.grid(alpha=0.3)
        ax.legend()
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--photos", type=int, default=100, help="photos of each class")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    photos = choose(args.data, args.work, args.photos)
    runs = {kind: learn(kind, photos, args.work, args.size, args.epochs) for kind in KINDS}
    machine = describe_machine(cores())
    found = {"machine": machine, "photos": args.photos, "size": args.size, "runs": runs}
    (RESULTS / "fine_tuning.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(runs, RESULTS / "fine_tuning.svg")
    rows = []
    for kind, lines in runs.items():
        accuracy = [line["held_out_accuracy"] for line in lines]
        after = [accuracy[i - 1] for i in (1, 5, 10) if i <= len(accuracy)]
        shown = " | ".join(f"{x:.1%}" for x in [*after, accuracy[-1]])
        rate = statistics.median(line["images_per_second"] for line in lines)
        rows.append(f"| {KINDS[kind]} | {shown} | {rate:.0f} |")
    table = "\n".join(rows)
    classes = len(list((photos / "train").iterdir()))
    (RESULTS / "fine_tuning.md").write_text(
        f"""# Fine-tuning

The network of `load("imagenette")` was trained on {args.photos} photos of each of CIFAR-10's
{classes} classes, enlarged from 32×32 to {args.size}×{args.size} pixels, once from its weights and
once from random ones. As many other photos were held out. Imagenette has none of these classes
except one kind of lorry. `python benchmarks/fine_tuning.py` wrote this page. The accuracies are
those of the epochs named, not of the best.

![With the weights imagenette, the accuracy on held-out photos is soon far above that of random
weights, and stays there](fine_tuning.svg)

| | 1 epoch | 5 | 10 | {args.epochs} | images/s |
| --- | --- | --- | --- | --- | --- |
{table}

The first used a learning rate of 3e-4 with a layer decay of 0.75, the second 1e-3; everything else
is the same, seed 0, one run each. Measured {machine["date"]} with pvt_ref {machine["pvt_ref"]}
(commit {machine["commit"]}) on {machine["processor"]}, shared with other work.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
