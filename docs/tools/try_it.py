"""The page on which the networks run in the browser: its files, and what it shows without them.

As a hook of mkdocs it writes the networks into the site, as ONNX files. The page calls the other
functions: the same pictures and numbers, of the photo that comes with it and by the package itself,
for who has no JavaScript or reads the page from a file. assets/try.js replaces them.
"""

import base64
import functools
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from draw import bare, panels, show
from explore import table_of, widget
from matplotlib.patches import Rectangle
from PIL import Image

import pvt_ref
from pvt_ref import Model
from pvt_ref.data.overlay import indexed

#: By danielbuechele, CC BY 2.0; reduced.
PHOTO = Path(__file__).parents[1] / "images" / "temple.jpg"

#: Height and width at which streets are looked at: in the proportions of CamVid's frames.
STREET = (192, 256)

#: Of a class's colour over the photo.
OPACITY = 0.55

#: The query that is shown first, row and column as fractions of the picture: on the temple.
POINT = (0.4, 0.3)

_RUNTIME = "onnxruntime/ort.wasm.bundle.min.mjs", "onnxruntime/ort-wasm-simd-threaded.wasm"
_NETWORKS = "networks/imagenette.onnx", "networks/camvid.onnx"


# --8<-- [start:export]
def export(folder: Path) -> None:
    """Writes both networks, weights in half the space: they are stored so in the package, too."""
    folder.mkdir(parents=True, exist_ok=True)
    classifier, streets = (folder / Path(name).name for name in _NETWORKS)
    options: Any = {"float16": True, "with_preprocessing": True}
    what = ("logits", "pyramid", "attention")
    pvt_ref.export_onnx(_classifier(), classifier, what=what, **options)
    pvt_ref.export_onnx(_streets(), streets, size=STREET, resized=True, **options)


# --8<-- [end:export]


def on_post_build(config: Any) -> None:
    """Called by mkdocs when all pages are written."""
    export(Path(config["site_dir"]) / "assets" / "networks")


@functools.cache
def _classifier() -> Model:
    return pvt_ref.load("imagenette")


@functools.cache
def _streets() -> Model:
    return pvt_ref.load("camvid")


def middle(photo: Image.Image) -> Image.Image:
    """The middle of a photo, as wide for its height as STREET, at that size."""
    H, W = STREET
    width, height = photo.size
    wide, high = min(width, height * W // H), min(height, width * H // W)
    left, top = (width - wide) // 2, (height - high) // 2
    cut = photo.crop((left, top, left + wide, top + high))
    return cut.resize((W, H), Image.Resampling.BILINEAR)


def controls() -> str:
    """The place of the buttons, and what the script has to know."""
    classifier, streets = _classifier(), _streets()
    config = classifier.config
    side = config.img_size
    blocks = [
        {
            "stage": i, "block": k, "grid": [H, W], "keys": [H // R, W // R], "heads": N,
            "cls": int(i == len(config.depths)),
        }
        for i, ((H, W), R, N, depth) in enumerate(
            zip(config.grids(side, side), config.sr_ratios, config.num_heads, config.depths,
                strict=True), start=1,
        )
        for k in range(depth)
    ]  # fmt: skip
    data = {
        "photo": f"images/{PHOTO.name}",
        "runtime": [f"assets/{name}" for name in _RUNTIME],
        "networks": [f"assets/{name}" for name in _NETWORKS],
        "side": side, "classes": classifier.classes, "blocks": blocks, "point": POINT,
        "street": STREET, "kinds": streets.classes, "opacity": OPACITY,
        "colours": [f"rgb({r}, {g}, {b})" for r, g, b in streets.info.colours],
    }  # fmt: skip
    return widget("try", data, "")


def _part(name: str, fallback: str) -> str:
    return f'<div class="explore" id="try-{name}"><div class="made">{fallback}</div></div>'


def classes() -> str:
    """How likely each class is."""
    (answers,) = _classifier().predict(PHOTO, top=10)
    rows = [[html.escape(a.label), f"{a.probability:.4f}"] for a in answers]
    return _part("classes", table_of(["class", "probability"], rows))


def most_varying(feature_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map (C, h, w) as (h, w, 3): the three channels that vary most, and their numbers."""
    best = np.argsort(-feature_map.var(axis=(1, 2)), kind="stable")[:3]
    x = feature_map[best]
    low, high = (f(x, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    return ((x - low) / (high - low)).transpose(1, 2, 0), best


@functools.cache
def _seen() -> tuple[np.ndarray, np.ndarray]:
    """The photo as the classifier gets it: (H, W, 3) of uint8, and normalised."""
    model = _classifier()
    return (
        model.info.preprocessing.pixels([PHOTO], model.config.img_size)[0],
        model.preprocess([PHOTO]),
    )


def maps() -> str:
    """The four feature maps."""
    pixels, images = _seen()
    with panels(1, 5, height=1.85) as (figure, axes):
        bare(*axes)
        axes[0].imshow(pixels)
        axes[0].set_title("{}×{}\n3 channels".format(*pixels.shape))
        for ax, (i, feature_map) in zip(
            axes[1:], enumerate(_classifier().pyramid(images), start=1), strict=True
        ):
            C, h, w = feature_map[0].shape
            ax.imshow(most_varying(feature_map[0])[0], interpolation="nearest")
            ax.set_title(f"F$_{i}$: {h}×{w}\n{C} channels")
    words = (
        "Five pictures: a temple with tiled roofs behind trees, at 128 by 128 pixels, and its four "
        "feature maps as colours, of 64 by 64, 32 by 32, 16 by 16 and 8 by 8 cells. In the first "
        "the outlines of roofs and trees can be seen; the last is coarse squares of colour."
    )
    return _part("maps", show(figure, "try-maps", words))


def looks() -> str:
    """Where one query looks, at every stage: last block, mean of the heads."""
    pixels, images = _seen()
    model = _classifier()
    config, side = model.config, model.config.img_size
    attention = pvt_ref.attention_maps(model.params, images, config)
    with panels(1, 4, height=2.6) as (figure, axes):
        bare(*axes)
        for i, ax in enumerate(axes):
            (H, W), R = config.grids(side, side)[i], config.sr_ratios[i]
            A = attention[i + 1, config.depths[i] - 1][0].mean(axis=0)  # (queries, keys)
            cls = len(A) - H * W
            row, column, s = int(POINT[0] * H), int(POINT[1] * W), side // H
            look = A[cls + row * W + column, cls:].reshape(H // R, W // R)
            ax.imshow(pixels.mean(axis=-1), cmap="gray", vmin=-60, vmax=320)
            there = (-0.5, side - 0.5, side - 0.5, -0.5)
            ax.imshow(look, extent=there, alpha=0.65, interpolation="nearest")
            corner = (column * s - 0.5, row * s - 0.5)
            ax.add_patch(Rectangle(corner, s, s, fill=False, color="#ff2020", lw=1.6))
            ax.set_title(f"stage {i + 1}\n{H}×{W} queries\n{H // R}×{W // R} keys")
            ax.set_xlabel(f"{look.min():.4f} to {look.max():.4f}")
    words = (
        "Four times the temple, under the attention of one query on its walls, at stages 1 to 4, "
        "in the last block, mean of the heads. A red square marks the query, 2 pixels wide in "
        "stage 1 and 16 in stage 4. The keys are 8 by 8 squares in all four; under each picture "
        "stand the smallest and the largest weight."
    )
    return _part("attention", show(figure, "try-looks", words))


def _picture(image: Image.Image, alt: str) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'


def shares(class_map: np.ndarray, kinds: Sequence[str]) -> list[tuple[int, float]]:
    """Number and share of the classes that are somewhere, the largest first."""
    counts = np.bincount(class_map.ravel(), minlength=len(kinds))
    order = np.argsort(-counts, kind="stable")
    return [(int(k), float(counts[k]) / class_map.size) for k in order if counts[k]]


def segmentation() -> str:
    """The photo tinted by class, and how much of it each class has."""
    model = _streets()
    photo = middle(Image.open(PHOTO).convert("RGB"))
    (class_map,) = model.segment(photo)
    colours = model.info.colours
    tinted = Image.blend(photo, indexed(class_map, colours).convert("RGB"), OPACITY)
    found = shares(class_map, model.classes)
    rows = [
        [
            '<span class="swatch" style="background: rgb({}, {}, {})"></span>'.format(*colours[k])
            + html.escape(model.classes[k]),
            f"{share:.1%}",
        ]
        for k, share in found
    ]
    words = (
        "The temple above a lake, tinted by class: the sky in one colour and, wrongly, the lake in "
        "the same; the trees in another; the temple in patches of several, roofs as trees."
    )
    return _part(
        "segmentation", _picture(tinted, words) + table_of(["class", "share of the pixels"], rows)
    )
