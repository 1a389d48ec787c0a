"""Shows how a trained Pyramid Vision Transformer processes a photo, stage by stage, on the CPU.

    python examples/forward.py                       a temple, and held-out digits
    python examples/forward.py photo.jpg             always one of Imagenette's ten classes
    python examples/forward.py cat.jpg --weights pvt_small.pth        ImageNet's thousand classes
    python examples/forward.py street.png --variant pvt_tiny --size 512 768       random weights

Prints grid, tokens, MACs and time of each stage and the five likeliest classes, and writes
pyramid.png: the photo, the four feature maps, and one query's attention at every stage. Without
arguments it also segments the photo, as segment.py does, and writes segmentation.png.

The default weights know only Imagenette's ten classes, and a temple is none of them; the answer is
church, the closest class. The temple comes with scikit-learn; without it the photo is the cat
beside this file, which is close to no class. The network gets both at 128x128, as in training.
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

#: The default for --weights.
WEIGHTS = "imagenette"

#: The classes are listed if there are at most this many.
FEW_CLASSES = 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs a PVT on a photo, on the CPU.")
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
        help="random weights of this model; with --weights: the variant that they must be",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="default: the training size of the weights",
    )
    parser.add_argument("--output", default="pyramid.png", help="default pyramid.png")
    return parser.parse_args(argv)


def second_output(path: str) -> Path:
    """The path of the second picture, beside the first. Raises ImageError if both are the same."""
    second = Path(path).with_stem("segmentation")
    if second == Path(path):
        raise ImageError(f"--output is {path!r}, the name of the second picture. Choose another")
    return second


def get_model(weights: str | None, variant: str | None) -> Model:
    """Weights by name or file; random ones, drawn from seed 0, if only a variant is named."""
    if weights or not variant:
        model = pvt_ref.load(weights or WEIGHTS)
        if architecture_of(model.config).dense:
            what = f"{weights} holds a segmentation network, but this program needs a classifier"
            raise CheckpointError(f"{what}. Use examples/segment.py for such a network")
        if variant and model.config.depths != VARIANTS[variant].depths:
            raise CheckpointError(f"{weights} holds another model than {variant}: {model.source}")
        return model
    config = VARIANTS[variant]
    params = pvt_ref.init_params(config, np.random.default_rng(0))
    return Model(params, config, f"{variant} with RANDOM weights (--weights names trained ones)")


def get_images(path: str | None, model: Model, size: tuple[int, int]) -> tuple[str, NDArray]:
    """The photo's name, and the model's input (1, C, H, W) float32."""
    if path:
        return one_line(path), model.preprocess([path], size)
    photo = default_photo()
    return photo.credit, model.preprocess([photo.path], size)


def few_classes(model: Model) -> str:
    """The classes of the weights in one line; "" if they are many or have no names."""
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
        return "These weights are a backbone without a classifier: they give feature maps only."
    (answers,) = model.predict(images)
    return text_table(
        ["class", "probability"], [[one_line(a.label), f"{a.probability:.4f}"] for a in answers]
    )


def read_ten_digits() -> tuple[list[NDArray], list[str]]:
    """The first held-out sample of each digit, as pixels, and their labels."""
    from train_digits import read_digits

    _, held_out = read_digits()
    first = [int(np.argmax(held_out.labels == digit)) for digit in range(10)]
    return [held_out.images[k, 0] for k in first], [str(held_out.labels[k]) for k in first]


# The picture --------------------------------------------------------------------------------------


def displayable(images: NDArray, preprocessing: Preprocessing) -> NDArray:
    """The network's input as a photo, (H, W, 3) in 0..1."""
    pixels = images[0].transpose(1, 2, 0) * preprocessing.std + preprocessing.mean
    return np.broadcast_to(np.clip(pixels, 0, 1), (*pixels.shape[:2], 3))  # grey becomes RGB


def draw(model: Model, name: str, images: NDArray, path: Path, digits: bool) -> None:
    """Writes the figure: feature maps, the attention of one query, and digits if asked for."""
    H, W = images.shape[2:]
    height = 2 * (2.7 * H / W) + 3.2  # two rows of pictures, and the text around them
    # without pyplot, no window opens, and no setting is changed for good
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 8}):
        figure = Figure(figsize=(14, height + 2.2 * digits), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[height, 2.2]) if digits else [figure]
        draw_pyramid(parts[0], model, name, images)
        if digits:
            draw_digits(parts[1])
        figure.savefig(path, dpi=110)


def draw_digits(figure: FigureBase) -> None:
    """Ten digits and the predictions of the model for digits."""
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
        "Ten held-out handwritten digits from scikit-learn, and the predictions of the weights "
        "'digits'",
        fontsize=10,
    )


def draw_pyramid(figure: FigureBase, model: Model, name: str, images: NDArray) -> None:
    """The photo with its likeliest classes, its feature maps, and one query's attention."""
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
            keys * seen,  # 1 for the uniform weight
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
            f"uniform weight {1 / seen:.4f}{with_cls}"
        )
    bar = figure.colorbar(
        shown, cax=axes[1, 0].inset_axes((0, -0.09, 1, 0.05)), orientation="horizontal"
    )
    bar.set_label("a key's weight × number of keys (1: uniform)")
    bar.ax.set_xticks(
        range(ATTENTION_RANGE + 1), [*map(str, range(ATTENTION_RANGE)), f"≥{ATTENTION_RANGE}"]
    )
    trained = config.img_size
    title = one_line(model.info.title or model.source)
    if not H == W == trained:
        title += f" (weights for {trained}×{trained} pixels; their position tables are resized)"
    lines = [f"Photo: {name}", f"Network: {title}"]
    if classes := few_classes(model):
        lines += [fill(f"It only knows {len(model.info.classes)} classes: {classes}", 160)]
    lines += [
        "Top: the first three principal components of each feature map, as red, green and blue. "
        "Early maps have finer cells, later ones more channels.",
        "Bottom: the attention of one query in the last block of each stage. Spatial reduction "
        "keeps the keys few where there are many queries.",
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
        model.config.grids(*size)  # refuses a bad size before any work
        name, images = get_images(args.image, model, size)
        print(f"photo:   {name}, resized and cropped to {size[0]}x{size[1]} pixels")
        about = f"{model.info.title}; " if model.info.title else ""
        print(f"weights: {one_line(about + model.source)}")
        if size != (trained, trained):
            print(f"         for {trained}x{trained} pixels; their position tables are resized")
        if classes := few_classes(model):
            print(f"classes: {classes} (no others)")
        print()
        print(stage_table(model, images), "\n")
        print(top_five(model, images))
        if plain:
            print(default_photo().truth)
        if "RANDOM" in model.source:
            print("The weights are random, so the classes are meaningless.")
        plain = plain and find_spec("sklearn") is not None  # it contains the digits
        if plain:
            pixels, labels = read_ten_digits()
            read = [answer.label for (answer,) in pvt_ref.load("digits").predict(pixels, top=1)]
            print(f"\nTen held-out digits: {' '.join(labels)}")
            print(f"predictions:         {' '.join(read)}")
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
