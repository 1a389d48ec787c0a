"""Pictures of the network's build, drawn from what it computes of a photo.

The stages, a block's wiring, and the way from R x R tokens to one key: every map, number and shape
in them is read off a watched run with the weights that come with the package. Cells are not
resampled, so that what is seen is what was computed.

    python docs/tools/anatomy.py        renews the picture of README, docs/images/stages.svg
"""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from draw import FAINT, INK, PAPER, SERIES, panels, show
from explore import PHOTO, SIDE, pixels
from in_notebook import STYLE
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image
from try_it import OPACITY, middle, most_varying, shares
from try_it import PHOTO as TEMPLE

import pvt_ref
from pvt_ref import REFERENCE, Model
from pvt_ref.app import as_seen
from pvt_ref.blocks.mlp import mlp
from pvt_ref.blocks.sra import merge_heads, sra
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.patch_embed import kernel_to_matrix, patchify
from pvt_ref.ops import Call

Array = np.ndarray

#: What marks the place that a picture speaks of, on photos and on maps: seen on both.
MARK = "#ff2020"


# On a sheet ---------------------------------------------------------------------------------------


@contextmanager
def sheet(width: float, height: float) -> Iterator[tuple[Figure, Any]]:
    """A figure to be drawn on in inches, from the left and from the top."""
    with panels(width=width, height=height) as (figure, ax):
        figure.set_layout_engine("none")
        ax.set_position((0, 0, 1, 1))
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")
        ax.autoscale(False)
        yield figure, ax


def cells(
    ax: Any, array: Array, left: float, top: float, width: float, height: float, **how: Any
) -> None:
    """An array as a picture of its cells, (h, w) by a colour map or (h, w, 3)."""
    there = (left, left + width, top + height, top)
    ax.imshow(array, extent=there, interpolation="none", aspect="auto", **how)


def mark(ax: Any, left: float, top: float, width: float, height: float) -> None:
    """A red frame around cells."""
    ax.add_patch(Rectangle((left, top), width, height, fill=False, color=MARK, lw=1.3))


def arrow(ax: Any, *points: tuple[float, float]) -> None:
    """A line through points, with a head at its last."""
    for start, end in itertools.pairwise(points[:-1]):
        ax.plot(*zip(start, end, strict=True), color=INK, lw=1.1, solid_capstyle="round")
    ax.add_patch(
        FancyArrowPatch(
            *points[-2:],
            arrowstyle="-|>",
            mutation_scale=8,
            lw=1.1,
            color=INK,
            shrinkA=0,
            shrinkB=0,
        )
    )


def box(ax: Any, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    """An operation, in a frame around its middle."""
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height,
            boxstyle="round,pad=0,rounding_size=0.06", fc=PAPER, ec=colour, lw=1.6,
        )
    )  # fmt: skip
    ax.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.25)


def fitting(figure: Figure, name: str, alt: str) -> str:
    """:func:`show` for a figure that fits a phone unscrolled; at a desk it is a fifth larger."""
    most = 1.2 * 72 * figure.get_figwidth()
    style = f'style="min-width:0;max-width:{most:.0f}pt"'
    return re.sub(r'style="max-width:\d+pt"', style, show(figure, name, alt), count=1)


def side_by_side(parts: Iterable[str]) -> str:
    """Figures in a row where there is room, else in as many rows as it takes."""
    parts = list(parts)
    how = (
        "display:grid;gap:0 0.3em;grid-template-columns:repeat(auto-fit,minmax(7.5em,1fr));"
        f"max-width:{11 * len(parts)}em;margin:auto"
    )
    return f'<div style="{how}">{"".join(parts)}</div>'


# The four stages ----------------------------------------------------------------------------------


class Stages(NamedTuple):
    """A photo and what each stage makes of it."""

    model: Model
    pixels: Array  # (H, W, 3) of uint8
    maps: list[Array]  # (C_i, H_i, W_i)

    def grid(self, i: int) -> tuple[int, int]:
        """Cells of map i; of the photo, map 0, pixels."""
        return self.maps[i - 1].shape[1:] if i else self.pixels.shape[:2]

    def channels(self, i: int) -> int:
        """C_i; 3 of the photo."""
        return len(self.maps[i - 1]) if i else self.pixels.shape[2]


@functools.cache
def stages() -> Stages:
    """The course's photo, and its four maps by the weights ``imagenette``."""
    model = pvt_ref.load("imagenette")
    images = model.preprocess([PHOTO])
    pixels = model.info.preprocessing.pixels([PHOTO], model.config.img_size)[0]
    return Stages(model, pixels, [feature_map[0] for feature_map in model.pyramid(images)])


def unlike_the_mean(feature_map: Array) -> Array:
    """Of a map (C, h, w), how far each cell is from the mean cell: a norm over channels, (h, w)."""
    return np.linalg.norm(feature_map - feature_map.mean(axis=(1, 2), keepdims=True), axis=0)


#: What is marked, row and column as fractions of the photo: an eye.
EYE = (0.31, 0.27)


def eye_on(grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the cell that lies on the eye."""
    return int(EYE[0] * grid[0]), int(EYE[1] * grid[1])


#: Of a part of the figure, in inches: all, a map's left and its side; a cell of what is to scale.
UNIT, LEFT, ENLARGED, CELL = (1.46, 3.42), 0.2, 1.2, 0.0078


def stage_figure(i: int) -> Figure:
    """Stage i, or the photo for 0: what it does, its map, and the array to scale."""
    seen = stages()
    config = seen.model.config
    H, W = seen.grid(i)
    C = seen.channels(i)
    with sheet(*UNIT) as (figure, ax):
        middle, top = LEFT + ENLARGED / 2, 0.76
        if i == 0:
            lines = ["the photo", "as the network", "gets it"]
            shape, letters = f"{H}×{W}×{C}", "$H$×$W$×3"
        else:
            P, R, L = config.patch_sizes[i - 1], config.sr_ratios[i - 1], config.depths[i - 1]
            keys = (H // R) * (W // R)
            lines = [
                f"stage {i}",
                f"patch embedding {P}×{P}",
                f"$L_{i}$ = {L} blocks",
                f"{keys} keys",
            ]
            s = config.strides[i - 1]
            shape, letters = f"{H}×{W}×{C}", f"$H/{s}$×$W/{s}$×$C_{i}$"
            arrow(ax, (0.0, top + ENLARGED / 2), (LEFT - 0.03, top + ENLARGED / 2))
        for k, line in enumerate(lines):
            how: dict[str, Any] = {"weight": "bold", "fontsize": 9} if k == 0 else {"fontsize": 8}
            ax.text(middle, 0.13 + 0.165 * k, line, ha="center", va="center", **how)
        picture = unlike_the_mean(seen.maps[i - 1]) if i else seen.pixels
        cells(ax, picture, LEFT, top, ENLARGED, ENLARGED)
        side = ENLARGED / seen.grid(4)[0]
        row, column = eye_on(seen.grid(4))
        mark(ax, LEFT + column * side, top + row * side, side, side)
        ax.text(middle, top + ENLARGED + 0.13, f"$F_{i}$: {shape}", ha="center", va="center")
        ax.text(middle, top + ENLARGED + 0.31, letters, ha="center", va="center", fontsize=9)
        # the array itself: all at one scale, channels backwards and at half of their length
        width, height, bottom = W * CELL, H * CELL, UNIT[1] - 0.06
        back = np.array([0.866, -0.5]) * C * CELL / 2
        left = LEFT + (ENLARGED - width - back[0]) / 2
        face = np.array(
            [(left, bottom - height), (left + width, bottom - height), (left + width, bottom)]
        )
        for a, b in ((0, 1), (1, 2)):
            side_face = [face[a], face[b], face[b] + back, face[a] + back]
            ax.add_patch(Polygon(side_face, fc=SERIES[0], ec=SERIES[0], lw=0.6, alpha=0.45))
        cells(ax, picture, left, bottom - height, width, height)
    return figure


def _of_stage(i: int) -> str:
    """The figure's part in words."""
    seen = stages()
    config = seen.model.config
    (H, W), C = seen.grid(i), seen.channels(i)
    if i == 0:
        return (
            f"A cat's face, {H} by {W} pixels of 3 colours; a red frame around an eye. "
            "Below it the same as a thin sheet, to which the next parts are to scale."
        )
    said = (
        "the outlines of eyes and nose, and the stripes of the fur, are bright on dark",
        "both eyes and the nose are bright patches",
        "the eyes are patches of a few bright cells",
        "large cells, no longer a face",
    )[i - 1]
    P, L = config.patch_sizes[i - 1], config.depths[i - 1]
    keys = H * W // config.sr_ratios[i - 1] ** 2
    framed = (H // seen.grid(4)[0]) ** 2
    return (
        f"Stage {i}: a patch embedding of {P} by {P} cells, then {L} blocks with {keys} keys. Its "
        f"map has {H} by {W} cells and {C} channels: {said}. The red frame on the eye holds "
        f"{framed} of them. Below, to scale, the map as a box as long as it has channels: from "
        "stage to stage its front is smaller and it is longer."
    )


def architecture() -> str:
    """The photo and the four stages, side by side where there is room, else one below another."""
    return side_by_side(fitting(stage_figure(i), f"stage-{i}", _of_stage(i)) for i in range(5))


# A photo, its maps, its classes -------------------------------------------------------------------


class Segmented(NamedTuple):
    """What a segmentation network makes of a photo."""

    model: Model
    pixels: Array  # (H, W, 3) of uint8
    maps: list[Array]  # (C_i, H_i, W_i)
    class_map: Array  # (H, W)


@functools.cache
def street_network() -> Segmented:
    """The temple, by the weights ``camvid``."""
    model = pvt_ref.load("camvid")
    photo = middle(Image.open(TEMPLE).convert("RGB"))
    (class_map,) = model.segment(photo)
    maps = model.pyramid(as_seen(model, photo, model.config.img_size))
    return Segmented(model, np.asarray(photo), [feature_map[0] for feature_map in maps], class_map)


def tinted(seen: Segmented) -> Array:
    """The photo under the colours of its classes."""
    tint = np.array(seen.model.info.colours)[seen.class_map]
    return np.round((1 - OPACITY) * seen.pixels + OPACITY * tint).astype(np.uint8)


def picture_figure(picture: Array, title: str, under: str, is_first: bool) -> Figure:
    """A picture between two lines of text, and an arrow to it from the one before."""
    height = ENLARGED * picture.shape[0] / picture.shape[1]
    with sheet(UNIT[0], height + 0.5) as (figure, ax):
        ax.text(
            LEFT + ENLARGED / 2, 0.12, title, ha="center", va="center", weight="bold", fontsize=9
        )
        cells(ax, picture, LEFT, 0.26, ENLARGED, height)
        ax.text(LEFT + ENLARGED / 2, height + 0.38, under, ha="center", va="center", fontsize=9)
        if not is_first:
            arrow(ax, (0.0, 0.26 + height / 2), (LEFT - 0.03, 0.26 + height / 2))
    return figure


def segmentation() -> str:
    """Photo, four maps and the class of every pixel, and how much of the photo each class has."""
    seen = street_network()
    H, W = seen.class_map.shape
    figure = picture_figure(seen.pixels, "a photo", f"{H}×{W} pixels", True)
    words = "A temple of several storeys above a lake, in the haze, with trees in front of it."
    parts = [fitting(figure, "segmented-photo", words)]
    said = (
        "Edges of roofs and storeys, and leaves, stand out in other colours than sky and lake.",
        "The temple, the trees, and sky with lake are three areas of different colours.",
        "Roofs and storeys of the temple are still told apart, in coarse cells.",
        "Large cells: the temple in one colour, sky and lake in another, trees in a third.",
    )
    for i, feature_map in enumerate(seen.maps, start=1):
        C, h, w = feature_map.shape
        picture = np.round(255 * most_varying(feature_map)[0]).astype(np.uint8)
        figure = picture_figure(picture, f"stage {i}", f"$F_{i}$: {h}×{w}×{C}", False)
        words = f"The map of stage {i}, {h} by {w} cells of {C} channels. {said[i - 1]}"
        parts.append(fitting(figure, f"segmented-{i}", words))
    figure = picture_figure(tinted(seen), "classes", "read from all four", False)
    words = (
        "The photo tinted by class: sky and, wrongly, the lake in one colour, trees in another, "
        "the temple in patches of several, its roofs in that of the trees."
    )
    parts.append(fitting(figure, "segmented-classes", words))
    swatch = '<span class="swatch" style="background: rgb({}, {}, {})"></span>'
    colours, names = seen.model.info.colours, seen.model.classes
    legend = " &ensp;".join(
        f'<span class="together">{swatch.format(*colours[k])}{names[k]} {share:.0%}</span>'
        for k, share in shares(seen.class_map, names)
        if share >= 0.005
    )
    return f'{side_by_side(parts)}<p style="text-align:center">{legend}</p>'


# A block ------------------------------------------------------------------------------------------


def calls_of(model: Model, images: Array, *operations: Any) -> dict[str, Call]:
    """The calls of operations in the pyramid of images, by the keys of their weights."""
    calls: dict[str, Call] = {}
    ops = REFERENCE.watched(
        lambda call: calls.update({call.path: call}), only=operations, params=model.params
    )
    pvt_ref.forward_pyramid(model.params, images, model.config, ops=ops)
    return calls


class Block(NamedTuple):
    """What flows through the first block of a stage, and between what."""

    grid: tuple[int, int]
    lines: dict[str, Array]  # (n, C), in the order of block_forward
    boxes: tuple[str, ...]  # what is between one line and the next


@functools.cache
def block_lines(i: int = 3) -> Block:
    """The arrays of the first block of stage i, at work on the photo."""
    model = pvt_ref.load("imagenette")
    config = model.config
    calls = calls_of(model, model.preprocess([PHOTO]), layer_norm, sra, mlp)
    norm1, attn, norm2, inner = (
        calls[f"block{i}.0.{name}"] for name in ("norm1", "attn", "norm2", "mlp")
    )
    x, branch = norm1.args[1][0], attn.result[0][0]
    middle, branch2 = norm2.args[1][0], inner.result[0][0]
    assert np.array_equal(x + branch, middle)
    lines = {
        "$x$": x,
        "LN$_1$($x$)": norm1.result[0][0],
        "SRA(LN$_1$($x$))": branch,
        "$x$′": middle,
        "LN$_2$($x$′)": norm2.result[0][0],
        "MLP(LN$_2$($x$′))": branch2,
        "$y$": middle + branch2,
    }
    keys = len(x) // config.sr_ratios[i - 1] ** 2
    E, C = inner.args[0].fc1.weight.shape
    boxes = (
        "LN$_1$", f"SRA: {len(x):,} queries,\n{keys} keys, {config.num_heads[i - 1]} heads", "+",
        "LN$_2$", f"MLP: {C}→{E}→{C},\neach token alone", "+",
    )  # fmt: skip
    return Block(attn.args[3], lines, boxes)


def as_map(tokens: Array, grid: tuple[int, int]) -> Array:
    """Tokens (n, C) as a map (C, h, w)."""
    return tokens.T.reshape(-1, *grid)


def wiring_figure() -> Figure:
    """A block from top to bottom, with the array on each line."""
    block = block_lines()
    row, column = eye_on(block.grid)
    maps = {name: unlike_the_mean(as_map(x, block.grid)) for name, x in block.lines.items()}
    most = max(x.max() for x in maps.values())
    pitch, side, first = 0.74, 0.62, 0.56
    skip, main, left = 0.24, 1.13, 2.07
    heights = [first + k * pitch for k in range(len(maps))]
    with sheet(3.64, heights[-1] + 0.56) as (figure, ax):
        ax.text(main, 0.2, "tokens in", ha="center", va="center", fontsize=9)
        arrow(ax, (main, 0.29), (main, first - 0.02))
        arrow(ax, (main, heights[-1]), (main, heights[-1] + 0.27))
        ax.text(main, heights[-1] + 0.38, "tokens out", ha="center", va="center", fontsize=9)
        for y, (name, x) in zip(heights, maps.items(), strict=True):
            ax.plot((main, left - 0.03), (y, y), color=FAINT, lw=0.8, ls=":")
            ax.plot(main, y, "o", color=INK, ms=3)
            cells(ax, x, left, y - side / 2, side, side, vmin=0, vmax=most)
            cell = side / len(x)
            mark(ax, left + column * cell, y - side / 2 + row * cell, cell, cell)
            n, C = block.lines[name].shape
            for k, text in enumerate((name, f"{n:,}×{C}", f"eye: {x[row, column]:.1f}")):
                ax.text(left + side + 0.07, y + 0.18 * (k - 1), text, va="center", fontsize=9)
        for k, text in enumerate(block.boxes):
            y = (heights[k] + heights[k + 1]) / 2
            deep = 0.2 if text == "+" else 0.38 if "\n" in text else 0.24
            arrow(ax, (main, heights[k]), (main, y - deep / 2))
            ax.plot((main, main), (y + deep / 2, heights[k + 1]), color=INK, lw=1.1)
            if text == "+":
                start = heights[k - 2]  # of the line that the branch began with
                arrow(ax, (main, start), (skip, start), (skip, y), (main - 0.1, y))
                ax.text(
                    skip - 0.1,
                    (start + y) / 2,
                    "skip",
                    rotation=90,
                    ha="center",
                    va="center",
                    fontsize=9,
                )
                ax.plot(main, y, "o", ms=13, mfc=PAPER, mec=SERIES[1], mew=1.6)
                ax.plot(main, y, "+", color=INK, ms=7, mew=1.3)
            else:
                box(ax, main, y, 1.46, deep, SERIES[0] if "\n" in text else FAINT, text)
    return figure


def wiring() -> str:
    """A block's wiring, drawn and in words."""
    block = block_lines()
    row, column = eye_on(block.grid)
    eye = [unlike_the_mean(as_map(x, block.grid))[row, column] for x in block.lines.values()]
    n, C = block.lines["$x$"].shape
    words = (
        "A line runs from top to bottom through LN 1, SRA and a plus sign, then LN 2, MLP and a "
        "plus sign. A skip leaves it before either norm and comes back at the plus sign. Beside "
        f"each of the seven pieces of the line stand its shape, always {n} by {C}, and a map of "
        f"its {block.grid[0]} by {block.grid[1]} tokens, light where a token is unlike the mean. "
        "In x the cat's eyes are lighter; SRA's map is nearly dark; in the MLP's, and most of all "
        f"in y, the eyes are bright. For a token on an eye the numbers are: x {eye[0]:.1f}, SRA "
        f"{eye[2]:.1f}, their sum {eye[3]:.1f}, MLP {eye[5]:.1f}, y {eye[6]:.1f}."
    )
    return fitting(wiring_figure(), "wiring", words)


# R x R tokens become a key ------------------------------------------------------------------------


class Key(NamedTuple):
    """One patch of R x R tokens on its way to a key, and the keys of all."""

    pixels: Array  # (H, W, 3) of uint8
    grid: tuple[int, int]  # of tokens
    R: int
    place: tuple[int, int]  # of the patch among patches, row and column
    patch: Array  # (R, R, C), normalised tokens
    row: Array  # (R*R*C,)
    W_S: Array  # (C, R*R*C)
    projected: Array  # (C,), before the norm
    reduced: Array  # (C,)
    key: Array  # (C,), all heads
    keys: Array  # (m, C), of all patches


@functools.cache
def one_patch(i: int = 2) -> Key:
    """The eye's patch in the first block of stage i, by the weights ``cifar10``."""
    model = pvt_ref.load("cifar10")
    images = model.preprocess([PHOTO], SIDE)
    p, x, _, grid, settings = calls_of(model, images, sra)[f"block{i}.0.attn"].args[:5]
    _, cache = sra.forward(p, x, REFERENCE, grid, settings)
    C, _, R, _ = p.sr.weight.shape
    place = eye_on((grid[0] // R, grid[1] // R))
    number = place[0] * (grid[1] // R) + place[1]
    tokens = x[0].reshape(*grid, C)
    patch = tokens[place[0] * R : (place[0] + 1) * R, place[1] * R : (place[1] + 1) * R]
    row = patchify(x.reshape(1, *grid, C), R)[0, number]
    W_S = kernel_to_matrix(p.sr.weight)
    keys = merge_heads(cache.attention.k)[0]
    return Key(
        pixels(images), grid, R, place, patch, row, W_S, W_S @ row + p.sr.bias,
        cache.kv.x[0, number], keys[number], keys,
    )  # fmt: skip


def key_figure() -> Figure:
    """R x R tokens laid out in a row, times W^S, normalised, and a key made of it."""
    seen = one_patch()
    (H, W), R, C = seen.grid, seen.R, len(seen.key)
    left, unit, high = 0.1, 2.4 / seen.row.size, 0.15  # inches: of the sheet, a channel, a strip
    with sheet(3.6, 4.86) as (figure, ax):

        def say(x: float, y: float, text: str, **how: Any) -> None:
            ax.text(x, y, text, **{"va": "center", "fontsize": 9, **how})

        def signed(x: Array, *place: float, most: float | None = None) -> None:
            end = float(np.abs(x).max()) if most is None else most
            cells(ax, x, *place, cmap="RdBu_r", vmin=-end, vmax=end)

        # the photo, cut into tokens
        top, side = 0.3, 1.36
        say(left, 0.14, f"$n$ = {H}×{W} tokens")
        cells(ax, seen.pixels, left, top, side, side)
        for k in range(1, W):
            line, thin = side * k / W, {"color": "#ffffff", "lw": 0.4, "alpha": 0.6}
            ax.plot((left + line,) * 2, (top, top + side), **thin)
            ax.plot((left, left + side), (top + line,) * 2, **thin)
        patch = side * R / W
        corner = left + seen.place[1] * patch, top + seen.place[0] * patch
        mark(ax, *corner, patch, patch)
        # its tokens, a strip of channels each
        x, y, strip = 1.86, 0.62, 0.72
        say(x, 0.14, f"{R}×{R} of them,")
        say(x, 0.31, f"$C$ = {C} channels each")
        for k, end in enumerate((y - 0.1, y + 0.63)):
            ax.plot((corner[0] + patch, x - 0.08), (corner[1] + k * patch, end), color=MARK, lw=0.8)
        most = np.abs(seen.row).max()
        for s in range(R):
            for t in range(R):
                place = x + t * (strip + 0.14), y + 0.4 * s
                say(place[0], place[1] - 0.09, f"$s$ = {s}, $t$ = {t}", fontsize=8)
                signed(seen.patch[s, t][None], *place, strip, high, most=most)
        # the same as one row
        y = top + side + 0.4
        arrow(ax, (2.2, 1.26), (2.2, y - 0.03))
        say(left, y - 0.12, f"in one row: $R$·$R$·$C$ = {seen.row.size}")
        signed(seen.row[None], left, y, seen.row.size * unit, high, most=most)
        # W^S right below, so that each column stands under the number that it multiplies
        y += high + 0.3
        deep = C * unit * 1.2
        say(left, y - 0.11, rf"times $\mathbf{{W}}^\mathrm{{S}}$, {C}×{seen.row.size}")
        most = float(np.percentile(np.abs(seen.W_S), 99))
        signed(seen.W_S, left, y, seen.row.size * unit, deep, most=most)
        x = left + seen.row.size * unit
        steps = (
            ("", r"$\tilde{r}$", seen.projected),
            ("LN", "$r$", seen.reduced),
            (r"$\mathbf{W}^\mathrm{K}$", "$k$", seen.key),
        )
        for how, name, values in steps:
            arrow(ax, (x + 0.02, y + deep / 2), (x + 0.2, y + deep / 2))
            say(x + 0.11, y - 0.11, how, ha="center")
            signed(values[:, None], x + 0.22, y, 0.12, deep)
            say(x + 0.28, y + deep + 0.11, name, ha="center")
            x += 0.34
        # all keys
        side, top, x_k = 1.2, y + deep + 0.34, x - 0.06
        keys = unlike_the_mean(as_map(seen.keys, (H // R, W // R)))
        grid_left = 1.9
        cells(ax, keys, grid_left, top, side, side)
        patch = side * R / W
        middle = top + (seen.place[0] + 0.5) * patch
        mark(ax, grid_left + seen.place[1] * patch, top + seen.place[0] * patch, patch, patch)
        arrow(ax, (x_k, y + deep + 0.2), (x_k, middle), (grid_left + side + 0.03, middle))
        m = len(seen.keys)
        lines = (
            f"$m$ = {H // R}×{W // R} = {m} keys,",
            "one for each patch.",
            f"All {H * W} queries",
            f"ask these {m}.",
        )
        for k, line in enumerate(lines):
            say(left, top + side / 2 + 0.19 * (k - 1.5), line)
    return figure


def to_one_key() -> str:
    """The way from R x R tokens to a key, drawn and in words."""
    seen = one_patch()
    (H, W), R, C = seen.grid, seen.R, len(seen.key)
    words = (
        f"From top to bottom. A photo of a cat's face under a grid of {H} by {W} tokens, a red "
        f"frame around {R} by {R} of them at the eye. Beside it these tokens, as strips of {C} "
        "channels, blue where negative and red where positive. Below, the strips end to end in "
        f"one row of {seen.row.size}. Under the row lies the matrix W S, {C} by {seen.row.size} "
        f"and as wide as the row; right of it three columns of {C} numbers: their product, the "
        "same after layer norm, and the key. An arrow leads from the key to its cell, framed in "
        f"red, in a map of {H // R} by {W // R} keys."
    )
    return fitting(key_figure(), "one-key", words)


# README's -----------------------------------------------------------------------------------------


README_PICTURE = Path(__file__).parents[1] / "images" / "stages.svg"


def on_its_own(parts: Sequence[str], width: float, height: float) -> str:
    """Figures of :func:`show` in a row, as a file: with the page's colours for day and night.

    Args:
        parts: HTML, a figure each.
        width: of each, in inches.
        height: of each, in inches.
    """
    colours = re.findall(r"--figure-\w+: #\w+;", STYLE.read_text("utf-8"))  # by day, by night
    day, night = (" ".join(colours[k : k + 8]) for k in (0, 8))
    style = (
        f"svg {{ {day} }} @media (prefers-color-scheme: dark) {{ svg {{ {night} }} }} "
        "image { image-rendering: pixelated }"
    )
    w, h = 72 * width, 72 * height
    inside = []
    for k, part in enumerate(parts):
        drawn = re.search(r"<svg .*</svg>", part)
        assert drawn is not None
        place = f'<svg x="{k * w:g}" width="{w:g}" height="{h:g}"'
        inside.append(re.sub(r'<svg role="img" aria-label="[^"]*" style="[^"]*"', place, drawn[0]))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{len(parts) * w * 1.5:g}" height="{h * 1.5:g}" '
        f'viewBox="0 0 {len(parts) * w:g} {h:g}">\n'
        f"<style>{style}</style>\n"
        '<rect width="100%" height="100%" style="fill: var(--figure-paper)"/>\n'
        + "\n".join(inside)
        + "\n</svg>\n"
    )


def readme_picture() -> str:
    """The four stages as an SVG file."""
    parts = [show(stage_figure(i), f"stage-{i}", _of_stage(i)) for i in range(5)]
    return on_its_own(parts, *UNIT)


if __name__ == "__main__":
    README_PICTURE.write_text(readme_picture(), "utf-8")
