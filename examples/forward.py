"""What a trained Pyramid Vision Transformer sees, step by step, on the CPU.

    python examples/forward.py                       a temple, and digits nobody trained on
    python examples/forward.py photo.jpg             one of Imagenette's classes, whatever it shows
    python examples/forward.py cat.jpg --weights pvt_small.pth        ImageNet's thousand classes
    python examples/forward.py street.png --variant pvt_tiny --size 512 768       random weights

Prints what each stage works on and how long it takes, and the five likeliest classes, and writes
pyramid.png: the photo, the four feature maps, and where one query looks at every stage. Without
arguments it also segments the photo, as segment.py does, and writes segmentation.png.

Imagenette's ten classes are all that the default weights know, and a temple is none of them: they
say church, the class that is nearest. The temple comes with scikit-learn; without it the photo is
the cat beside this file, for which no class is near. Both are shown at 128x128, as in the training.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import segment
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from pictures import (
    ATTENTION_RANGE,
    as_rgb,
    check_output,
    default_photo,
    one_line,
    query_attention,
)

import pvt_ref
from pvt_ref import VARIANTS, Model, Preprocessing, PVTConfig, PVTError
from pvt_ref.errors import CheckpointError, ImageError, printable
from pvt_ref.models.architecture import architecture_of
from pvt_ref.report.tables import text_table
from pvt_ref.report.times import time_stages

#: What is used unless --weights or --variant says otherwise.
WEIGHTS = "imagenette"

#: Weights that know no more classes than this have all of them named.
FEW_CLASSES = 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One photo through a PVT, on the CPU.")
    parser.add_argument("image", nargs="?", help="JPEG or PNG (default: a temple, and ten digits)")
    parser.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help=f"{WEIGHTS} (default), cifar10, digits, pvt_tiny ... pvt_large (fetched), or a "
        "checkpoint",
    )
    parser.add_argument(
        "--variant",
        choices=[name for name, config in VARIANTS.items() if isinstance(config, PVTConfig)],
        help="random weights of this model; with --weights: what they are",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="default: that of the weights' training",
    )
    parser.add_argument("--output", default="pyramid.png", help="default pyramid.png")
    return parser.parse_args(argv)


def second_output(path: str) -> Path:
    """Where the second picture goes: beside the first. Raises ImageError if that is its place."""
    second = Path(path).with_stem("segmentation")
    if second == Path(path):
        raise ImageError(f"--output is {path!r}, where the second picture goes. Name another")
    return second


def get_model(weights: str | None, variant: str | None) -> Model:
    """Weights by name or file; random ones, drawn from seed 0, if only a variant is named."""
    if weights or not variant:
        model = pvt_ref.load(weights or WEIGHTS)
        if architecture_of(model.config).dense:
            what = f"{weights} holds a segmentation network, and this program draws a classifier"
            raise CheckpointError(f"{what}. examples/segment.py draws such a network")
        if variant and model.config.depths != VARIANTS[variant].depths:
            raise CheckpointError(f"{weights} holds another model than {variant}: {model.source}")
        return model
    config = VARIANTS[variant]
    params = pvt_ref.init_params(config, np.random.default_rng(0))
    return Model(params, config, f"{variant} with RANDOM weights (--weights names trained ones)")


def get_images(path: str | None, model: Model, size: tuple[int, int]) -> tuple[str, NDArray]:
    """What the photo is called, and (1, C, H, W) float32, as the model wants it."""
    if path:
        return one_line(path), model.preprocess([path], size)
    photo = default_photo()
    return photo.credit, model.preprocess([photo.path], size)


def few_classes(model: Model) -> str:
    """The classes that the weights know, in a line; "" if they are many or have no names."""
    names = model.info.classes
    return ", ".join(map(one_line, names)) if len(names) <= FEW_CLASSES else ""


def stage_table(model: Model, images: NDArray) -> str:
    cost = pvt_ref.count_cost(model.config, images.shape[2:])
    times = time_stages(model.params, images, model.config)
    rows = [
        [
            f"{s.stage}",
            f"{s.grid[0]}x{s.grid[1]}",
            f"{s.channels}",
            f"{s.tokens}",
            f"{s.keys}",
            f"{cost.of_stage(s.stage).macs / 1e6:,.1f}",
            f"{1000 * seconds:,.1f}",
        ]
        for s, seconds in zip(cost.stages, times, strict=False)
    ]
    total = ["all", "", "", "", "", f"{cost.macs / 1e6:,.1f}", f"{1000 * sum(times):,.1f}"]
    heading = ["stage", "grid", "channels", "tokens", "keys", "MMACs", "ms"]
    return text_table(heading, rows, total)


def top_five(model: Model, images: NDArray) -> str:
    if not model.config.has_classifier:
        return "These weights are a backbone without a classifier: feature maps only, no classes."
    (answers,) = model.predict(images)
    return text_table(
        ["class", "probability"], [[one_line(a.label), f"{a.probability:.4f}"] for a in answers]
    )


def read_ten_digits() -> tuple[list[NDArray], list[str]]:
    """The first of each digit among those held out of the training, as pixels, and their names."""
    from train_digits import read_digits

    _, held_out = read_digits()
    first = [int(np.argmax(held_out.labels == digit)) for digit in range(10)]
    return [held_out.images[k, 0] for k in first], [str(held_out.labels[k]) for k in first]


# The picture --------------------------------------------------------------------------------------


def displayable(images: NDArray, preprocessing: Preprocessing) -> NDArray:
    """The photo as the network gets it, (H, W, 3) in 0..1."""
    pixels = images[0].transpose(1, 2, 0) * preprocessing.std + preprocessing.mean
    return np.broadcast_to(np.clip(pixels, 0, 1), (*pixels.shape[:2], 3))  # grey: three alike


def draw(model: Model, name: str, images: NDArray, path: Path, digits: bool) -> None:
    """Writes the figure: feature maps, below them the attention of one query, and maybe digits."""
    H, W = images.shape[2:]
    height = 2 * (2.7 * H / W) + 3.2  # two rows of pictures, and the text around them
    # without pyplot: a file is written, no window opened, and no setting outlives this
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 8}):
        figure = Figure(figsize=(14, height + 2.2 * digits), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[height, 2.2]) if digits else [figure]
        draw_pyramid(parts[0], model, name, images)
        if digits:
            draw_digits(parts[1])
        figure.savefig(path, dpi=110)


def draw_digits(figure: FigureBase) -> None:
    """Ten digits and what the model for digits takes them for."""
    model = pvt_ref.load("digits")
    pixels, labels = read_ten_digits()
    answers = model.predict(pixels, top=1)
    axes = figure.subplots(1, 10)
    for ax, picture, label, (answer,) in zip(axes, pixels, labels, answers, strict=True):
        ax.imshow(picture, cmap="gray")
        ax.set(xticks=[], yticks=[])
        right = answer.label == label
        ax.set_title(
            f"{answer.label}: {answer.probability:.0%}" + ("" if right else f"\nit is {label}"),
            color="black" if right else "red",
        )
    figure.suptitle(
        "Ten handwritten digits of scikit-learn's that the training did not see, and what the "
        "weights 'digits' take them for",
        fontsize=10,
    )


def draw_pyramid(figure: FigureBase, model: Model, name: str, images: NDArray) -> None:
    """The photo with its likeliest classes, its feature maps, and where one query looks."""
    config: PVTConfig = model.config
    H, W = images.shape[2:]
    photo, point = displayable(images, model.info.preprocessing), (0.55, 0.5)
    maps = model.pyramid(images)
    attention = query_attention(model, images, point)
    strides = config.strides

    axes = figure.subplots(2, 5)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    axes[0, 0].imshow(photo)
    axes[0, 0].set_title(f"the photo\n{H}×{W} pixels, {images.shape[1]} channels")
    if model.info.classes:
        (answers,) = model.predict(images, top=3)
        axes[0, 0].set_xlabel(
            "\n".join(f"{one_line(a.label)}: {a.probability:.1%}" for a in answers),
            fontsize=10,
            parse_math=False,  # a label may hold dollar signs
        )
    axes[1, 0].imshow(photo)
    axes[1, 0].set_title("red: the query's own token\nat stages 1 to 4")
    for i, stride in enumerate(strides):  # the token's own pixels, smaller at earlier stages
        row, col = (int(f * side / stride) * stride for f, side in zip(point, (H, W), strict=True))
        axes[1, 0].add_patch(
            Rectangle((col - 0.5, row - 0.5), stride, stride, fill=False, color="red", lw=1)
        )
        C, h, w = maps[i].shape[1:]
        ax = axes[0, i + 1]
        ax.imshow(as_rgb(maps[i][0]), interpolation="nearest")
        ax.set_title(f"$F_{i + 1}$: {h}×{w} cells, {C} channels")
        ax.set_xlabel(f"a cell is {stride}×{stride} pixels")

        cls = config.has_classifier and i == len(strides) - 1
        seen, with_cls = attention[i].size + cls, " (with the cls token)" if cls else ""
        keys, R, N = attention[i], config.sr_ratios[i], config.num_heads[i]
        ax = axes[1, i + 1]
        ax.imshow(photo.mean(axis=-1), cmap="gray", vmin=-0.3, vmax=1.3)
        shown = ax.imshow(
            keys * seen,  # 1 where a key has the weight that all would have if they were alike
            extent=(-0.5, W - 0.5, H - 0.5, -0.5),
            vmin=0,
            vmax=ATTENTION_RANGE,
            cmap="viridis",
            alpha=0.65,
        )
        ax.add_patch(
            Rectangle((col - 0.5, row - 0.5), stride, stride, fill=False, color="red", lw=1.2)
        )
        heads = "1 head" if N == 1 else f"mean of {N} heads"
        ax.set_title(f"stage {i + 1}: {h * w} queries × {keys.size} keys\n{heads}")
        merged = f"{R}×{R} tokens ($R_{i + 1}$ = {R})" if R > 1 else f"one token ($R_{i + 1}$ = 1)"
        ax.set_xlabel(
            f"a key is {merged}\nweights {keys.min():.4f} to {keys.max():.4f}\n"
            f"all alike would be {1 / seen:.4f}{with_cls}"
        )
    bar = figure.colorbar(
        shown, cax=axes[1, 0].inset_axes((0, -0.09, 1, 0.05)), orientation="horizontal"
    )
    bar.set_label("a key's weight × number of keys (1: all alike)")
    bar.ax.set_xticks(
        range(ATTENTION_RANGE + 1), [*map(str, range(ATTENTION_RANGE)), f"≥{ATTENTION_RANGE}"]
    )
    trained = config.img_size
    title = one_line(model.info.title or model.source)
    if not H == W == trained:
        title += f" (weights for {trained}×{trained} pixels; their position tables are resized)"
    lines = [f"Photo: {name}", f"Network: {title}"]
    if classes := few_classes(model):
        lines += [fill(f"It knows {len(model.info.classes)} classes and no other: {classes}", 160)]
    lines += [
        "Above: each feature map, its three principal components as red, green and blue. Finer "
        "cells at first, more channels later.",
        "Below: how one query of the last block spreads its attention. Spatial reduction keeps the "
        "keys few where the queries are many.",
    ]
    # a file name may hold dollar signs
    figure.suptitle("\n".join(lines), fontsize=10, parse_math=False)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        check_output(args.output)
        alone = not (args.image or args.weights or args.variant or args.size)
        second = second_output(args.output) if alone else None
        model = get_model(args.weights, args.variant)
        plain = not args.image and not args.variant and args.weights in (None, WEIGHTS)
        trained = model.config.img_size
        size = tuple(args.size) if args.size else (trained, trained)
        model.config.grids(*size)  # before any work
        name, images = get_images(args.image, model, size)
        print(f"photo:   {name}, brought to {size[0]}x{size[1]} pixels")
        about = f"{model.info.title}; " if model.info.title else ""
        print(f"weights: {one_line(about + model.source)}")
        if size != (trained, trained):
            print(f"         for {trained}x{trained} pixels; their position tables are resized")
        if classes := few_classes(model):
            print(f"classes: {classes}; no other is known")
        print()
        print(stage_table(model, images), "\n")
        print(top_five(model, images))
        if plain:
            print(default_photo().truth)
        if "RANDOM" in model.source:
            print("The weights are random, so the classes mean nothing. The arithmetic is real.")
        plain = plain and find_spec("sklearn") is not None  # the digits come with it
        if plain:
            pixels, labels = read_ten_digits()
            read = [answer.label for (answer,) in pvt_ref.load("digits").predict(pixels, top=1)]
            print(f"\nTen digits that no training saw: {' '.join(labels)}")
            print(f"are read as:                     {' '.join(read)}")
        draw(model, name, images, Path(args.output), digits=plain)
        print(f"\nwritten: {args.output}")
        if second:
            print("\nThe class of every pixel:\n")
            segment.show(None, None, None, second)
    except (PVTError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
