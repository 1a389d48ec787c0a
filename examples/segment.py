"""Shows a segmentation network's class map, feature maps, attention and errors, on the CPU.

    python examples/segment.py                       a temple above a lake
    python examples/segment.py street.jpg            your own photo
    python examples/segment.py photo.jpg --weights segmentor.pth --size 512

Prints the fraction of the photo that each class gets, and writes segmentation.png: the photo, its
class map, the feature maps, and one query's attention at every stage, in the photo's proportions.

The default weights know eleven classes of street scenes, filmed from a car in Cambridge. The temple
is a very different scene. Points of a grid were labelled by hand, and the answers are compared with
the labels. The network gets the photo at its training size.
"""

import argparse
import itertools
import sys
from collections import Counter
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from pictures import (
    ATTENTION_RANGE,
    KINDS,
    Photo,
    as_rgb,
    check_output,
    default_photo,
    one_line,
    query_attention,
)

import pvt_ref
from pvt_ref import Model, PVTConfig, PVTError
from pvt_ref.app import as_seen
from pvt_ref.checks import check_number
from pvt_ref.data.image import read_rgb
from pvt_ref.data.overlay import class_colours
from pvt_ref.errors import printable
from pvt_ref.report.tables import text_table

#: The default for --weights.
WEIGHTS = "camvid"

#: The query whose attention is drawn: row and column as fractions of the photo.
QUERY = (0.55, 0.35)

#: Smallest width of a panel in pixels, and the largest without --panel.
NARROWEST, WIDEST = 200, 1280

#: Most classes in the legend.
IN_LEGEND = 12


class Point(NamedTuple):
    """A point labelled by hand, and the network's answer there."""

    place: tuple[float, float]  # row and column as fractions of the photo
    truth: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the label."""
        return self.truth == self.answer


class Seen(NamedTuple):
    """A photo and the network's results for it."""

    model: Model
    name: str
    photo: NDArray  # (H, W, 3) uint8
    class_map: NDArray  # (H, W) uint8, numbers of classes
    images: NDArray  # (1, 3, h, w), the network's input
    points: list[Point]
    truth: str  # what the photo shows; "" if not known


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Segments a photo, and draws the results.")
    parser.add_argument("image", nargs="?", help="JPEG or PNG (default: a temple above a lake)")
    text = f"{WEIGHTS} (default), or the file of a segmentation network"
    parser.add_argument("--weights", metavar="NAME|FILE", help=text)
    text = "short side of the network's input (default: the training size)"
    parser.add_argument("--size", type=int, metavar="PIXELS", help=text)
    parser.add_argument("--output", default="segmentation.png", help="default %(default)s")
    text = f"width of each picture in it (default: the photo's own, at most {WIDEST})"
    parser.add_argument("--panel", type=int, metavar="PIXELS", help=text)
    return parser.parse_args(argv)


def see(model: Model, picture: Any, name: str, size: int | None, about: Photo | None) -> Seen:
    """The class map of a picture, and the network's input."""
    (class_map,) = model.segment(picture, size)
    photo = read_rgb(picture)
    points = [] if about is None else judge(about, class_map, model.classes)
    truth = "" if about is None else about.dense_truth
    images = as_seen(model, photo, size or model.config.img_size)
    return Seen(model, name, np.asarray(photo), class_map, images, points, truth)


def judge(about: Photo, class_map: NDArray, classes: tuple[str, ...]) -> list[Point]:
    """The answers at the points labelled by hand."""
    H, W = class_map.shape
    found = []
    for i, row in enumerate(about.points):
        for j, letter in enumerate(row):
            if letter in KINDS:
                place = (i + 0.5) / len(about.points), (j + 0.5) / len(row)
                answer = class_map[int(place[0] * H), int(place[1] * W)]
                found.append(Point(place, KINDS[letter], classes[answer]))
    return found


def shares(seen: Seen) -> list[tuple[int, float]]:
    """The predicted classes and their fractions of the photo, largest first."""
    counts = np.bincount(seen.class_map.ravel(), minlength=len(seen.model.classes))
    order = np.argsort(-counts, kind="stable")
    return [(int(k), float(counts[k]) / seen.class_map.size) for k in order if counts[k]]


def errors_in_words(seen: Seen, absent: tuple[str, ...]) -> str:
    """The wrong answers at the labelled points."""
    rows = []
    for truth in dict.fromkeys(KINDS.values()):
        of_kind = [point for point in seen.points if point.truth == truth]
        wrong = Counter(point.answer for point in of_kind if not point.is_right)
        taken = ", ".join(f"{name} {count}" for name, count in wrong.most_common())
        right = sum(point.is_right for point in of_kind)
        rows.append([truth, f"{len(of_kind)}", f"{right}", taken or "-"])
    right = sum(point.is_right for point in seen.points)
    lines = [
        f"{len(seen.points)} points of a grid were labelled by hand; the answer is right at "
        f"{right}:\n",
        text_table(["label", "points", "right", "wrong answers"], rows),
    ]
    impossible = [
        f"{name} {share:.1%}"
        for k, share in shares(seen)
        if (name := seen.model.classes[k]) in absent
    ]
    if impossible:
        lines += [f"\nPredicted, but not in the photo: {', '.join(impossible)}"]
    return "\n".join(lines)


# The picture --------------------------------------------------------------------------------------


#: Sizes in inches: the width of a panel, the gap between two, the text above each row, the text
#: below each of the three rows, and the text at the top of the figure.
WIDTH, GAP, ABOVE, BELOW, HEAD = 3.2, 0.12, 0.48, (0.45, 0.3, 0.95), 1.2


def draw(seen: Seen, path: Path, panel: int | None = None) -> None:
    """Writes the figure: photo and class map; feature maps; attention of one query."""
    pixels = panel or max(min(seen.class_map.shape[1], WIDEST), NARROWEST)
    # without pyplot, no window opens, and no setting is changed for good
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10}):
        figure = figure_of(seen)
        figure.savefig(path, dpi=pixels / WIDTH)


def figure_of(seen: Seen) -> Figure:
    """The figure as an object; all panels have one size, in the photo's proportions."""
    H, W = seen.class_map.shape
    height = WIDTH * H / W
    has_attention = isinstance(seen.model.config.backbone, PVTConfig)
    rows = 2 + has_attention
    whole = 4 * WIDTH + 5 * GAP, HEAD + rows * (ABOVE + height) + sum(BELOW[:rows])
    figure = Figure(figsize=whole)

    def panel(row: int, column: int, title: str) -> Any:
        top = HEAD + row * (ABOVE + height) + sum(BELOW[:row]) + ABOVE
        left = GAP + column * (WIDTH + GAP)
        place = left / whole[0], 1 - (top + height) / whole[1], WIDTH / whole[0], height / whole[1]
        ax = figure.add_axes(place)
        ax.set(xticks=[], yticks=[], title=title)
        for spine in ax.spines.values():
            spine.set_visible(False)
        return ax

    _draw_answers(seen, panel)
    maps = seen.model.pyramid(seen.images)
    for i, (feature_map, stride) in enumerate(zip(maps, seen.model.config.strides, strict=True)):
        C, h, w = feature_map.shape[1:]
        ax = panel(1, i, f"$F_{i + 1}$: {h}×{w} cells, {C} channels")
        ax.imshow(as_rgb(feature_map[0]), extent=(0, W, H, 0), interpolation="nearest")
        ax.set_xlabel(f"a cell is {stride}×{stride} of the network's pixels")
    if has_attention:
        _draw_attention(seen, panel)
    h, w = seen.images.shape[2:]
    title = one_line(seen.model.info.title or seen.model.source)
    lines = [
        f"Photo: {seen.name}, {H}×{W} pixels",
        f"Network: {title}; input of {h}×{w} pixels",
        "Second row: the first three principal components of the feature maps, as red, green and "
        "blue. The class map uses all maps.",
    ]
    if has_attention:
        lines += [
            "Third row: the attention of one query in the last block of each stage. Spatial "
            "reduction keeps the keys few where there are many queries."
        ]
    if seen.truth:
        lines.insert(2, fill(seen.truth, 160))
    middle = 0.5, 1 - 0.1 / whole[1]
    # a file name may hold dollar signs
    figure.text(*middle, "\n".join(lines), ha="center", va="top", fontsize=11, parse_math=False)
    return figure


def _draw_answers(seen: Seen, panel: Any) -> None:
    """The first row: photo, class map, right and wrong points, legend."""
    H, W = seen.class_map.shape
    whole: Any = {"extent": (0, W, H, 0)}
    photo = thinned(seen.photo)
    colours = np.array(seen.model.info.colours or class_colours(len(seen.model.classes)))
    tint = colours[thinned(seen.class_map)] / 255
    ax = panel(0, 0, "the photo")
    ax.imshow(photo, **whole)
    if isinstance(seen.model.config.backbone, PVTConfig):
        ax.set_xlabel("red: the query of the third row,\nits token at stages 1 to 4")
        for left, top, width, height in query_cells(seen):
            ax.add_patch(Rectangle((left, top), width, height, fill=False, color="red", lw=1))
    ax = panel(0, 1, "the class of every pixel")
    ax.imshow(0.45 * photo / 255 + 0.55 * tint, **whole)
    if seen.points:
        right = sum(point.is_right for point in seen.points)
        ax = panel(0, 2, f"errors: {right} of {len(seen.points)} points are right")
        ax.imshow(photo.mean(axis=-1), "gray", **whole, vmin=-255, vmax=300)
        sides = itertools.cycle((("top", 0.02 * H), ("bottom", -0.02 * H)))  # of a mark
        for point in seen.points:
            row, col = point.place[0] * H, point.place[1] * W
            if point.is_right:
                ax.plot(col, row, "o", color="green", ms=4)
            else:
                ax.plot(col, row, "x", color="red", ms=6, mew=2)
                va, beside = next(sides)
                ax.text(
                    col, row + beside, point.answer, color="red", fontsize=7, ha="center", va=va
                )
        ax.set_xlabel(
            "labelled by hand; green: right;\nred: wrong, with the answer beside the mark"
        )
    else:
        ax = panel(0, 2, "the same without the photo")
        ax.imshow(tint, **whole, interpolation="nearest")
    found = shares(seen)
    ax = panel(0, 3, "fraction of the photo for each class")
    ax.set(xlim=(0, 1), ylim=(IN_LEGEND + 1, 0))
    for place, (k, share) in enumerate(found[:IN_LEGEND]):
        ax.add_patch(Rectangle((0.1, place + 0.1), 0.1, 0.8, color=colours[k] / 255))
        said = f"{share:.1%}" if share >= 0.001 else "<0.1%"
        ax.text(
            0.24, place + 0.55, f"{one_line(seen.model.classes[k])}: {said}", va="center",
            fontsize=11, parse_math=False,
        )  # fmt: skip
    rest = len(seen.model.classes) - len(found[:IN_LEGEND])
    ax.set_xlabel(f"{rest} other classes are not shown" if rest else "")


def thinned(picture: NDArray) -> NDArray:
    """The picture, reduced to at most a panel's width by leaving out pixels."""
    step = -(-picture.shape[1] // WIDEST)  # rounded up
    return picture[::step, ::step]


def query_cells(seen: Seen) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of the query's token at each stage, in pixels of the photo."""
    H, W = seen.class_map.shape
    h, w = seen.images.shape[2:]
    cells = []
    for stride in seen.model.config.strides:
        row, col = (int(f * n / stride) for f, n in zip(QUERY, (h, w), strict=True))
        height, width = stride * H / h, stride * W / w
        cells.append((col * width, row * height, width, height))
    return cells


def _draw_attention(seen: Seen, panel: Any) -> None:
    """The third row: the query's attention at each stage."""
    H, W = seen.class_map.shape
    whole: Any = {"extent": (0, W, H, 0)}
    config = seen.model.config.backbone
    grids = config.grids(*seen.images.shape[2:])
    attention = query_attention(seen.model, seen.images, QUERY)
    for i, (keys, (left, top, width, height)) in enumerate(
        zip(attention, query_cells(seen), strict=True)
    ):
        queries, R, N = grids[i][0] * grids[i][1], config.sr_ratios[i], config.num_heads[i]
        heads = "1 head" if N == 1 else f"mean of {N} heads"
        ax = panel(2, i, f"stage {i + 1}: {queries:,} queries × {keys.size} keys\n{heads}")
        ax.imshow(thinned(seen.photo).mean(axis=-1), "gray", **whole, vmin=-77, vmax=332)
        shown = ax.imshow(
            keys * keys.size,  # 1 for the uniform weight
            **whole,
            vmin=0,
            vmax=ATTENTION_RANGE,
            cmap="viridis",
            alpha=0.6,
        )
        ax.add_patch(Rectangle((left, top), width, height, fill=False, color="red", lw=1.2))
        merged = f"{R}×{R} tokens ($R_{i + 1}$ = {R})" if R > 1 else f"one token ($R_{i + 1}$ = 1)"
        ax.set_xlabel(f"a key is {merged}")
        if i == 0:
            place = ax.inset_axes((0.1, -0.2, 0.8, 0.05))
            bar = ax.figure.colorbar(shown, cax=place, orientation="horizontal")
            bar.set_label("a key's weight × number of keys (1: uniform)")
            ends = range(ATTENTION_RANGE + 1)
            bar.ax.set_xticks(ends, [*map(str, ends[:-1]), f"≥{ATTENTION_RANGE}"])


def show(
    image: str | None,
    weights: str | None,
    size: int | None,
    output: Path,
    panel: int | None = None,
) -> None:
    """Segments a photo, prints the results, and draws them. Raises: PVTError, OSError."""
    if panel is not None:
        check_number("--panel", panel, least=NARROWEST, most=4096, whole=True)
    model = pvt_ref.load(weights or WEIGHTS)
    photo = default_photo()
    about = photo if not image and weights in (None, WEIGHTS) else None
    name = one_line(image) if image else photo.credit
    seen = see(model, image or photo.path, name, size, about)
    (H, W), (h, w) = seen.class_map.shape, seen.images.shape[2:]
    print(f"photo:   {name}, {H}x{W} pixels, input of {h}x{w}")
    print(f"weights: {one_line(model.info.title or model.source)}")
    if len(model.classes) <= IN_LEGEND:
        print(f"classes: {', '.join(map(one_line, model.classes))} (no others)")
    print()
    rows = [[one_line(model.classes[k]), f"{share:.1%}"] for k, share in shares(seen)]
    print(text_table(["class", "of the photo"], rows))
    if about:
        print(f"\n{about.dense_truth}")
        if seen.points:
            print(errors_in_words(seen, about.absent))
    draw(seen, output, panel)
    print(f"\nwritten: {output}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        check_output(args.output)
        show(args.image, args.weights, args.size, Path(args.output), args.panel)
    except (PVTError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
