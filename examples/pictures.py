"""Shared by the demos: the default photo, and functions that turn maps into pictures."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import pvt_ref
from pvt_ref import Model
from pvt_ref.errors import ImageError, printable

#: Upper end of the colour scale of attention, in multiples of the uniform weight. All stages and
#: models share it, so that nearly uniform attention looks uniform.
ATTENTION_RANGE = 4


#: Meaning of the letters in a photo's points. A lake is not a class of "camvid".
KINDS = {"S": "Sky", "B": "Building", "T": "Tree", "-": "a lake"}


class Photo(NamedTuple):
    """A default photo: its path, its author, and what it shows."""

    path: Path
    credit: str
    truth: str  # printed beside the answers of the weights "imagenette"
    dense_truth: str  # printed beside the answers of the weights "camvid"
    # labels of the points of a grid: a letter of KINDS for each, or "." where it is hard to tell
    points: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()  # classes of "camvid" that do not occur in it


#: Stefan van der Walt waived all rights; from scikit-image's data.
CAT = Photo(
    Path(__file__).with_name("chelsea.jpg"),
    "chelsea.jpg by Stefan van der Walt (CC0, comes with the examples)",
    "The photo shows a cat, which is none of the ten classes; every answer is wrong.",
    "The photo shows a cat and no part of a street; every answer is wrong.",
)


def default_photo() -> Photo:
    """The temple among scikit-learn's pictures, or the cat without scikit-learn."""
    sklearn = find_spec("sklearn")  # importing it would take seconds
    if sklearn and sklearn.origin:
        path = Path(sklearn.origin).parent / "datasets" / "images" / "china.jpg"
        if path.is_file():
            return Photo(
                path,
                f"{path.name} by danielbuechele (CC BY 2.0, comes with scikit-learn)",
                "The photo shows a temple, which is none of the ten classes. Church is closest.",
                "The photo shows a temple above a lake. A lake is none of the classes, so every "
                "answer there is wrong.",
                (
                    "SSSSSSSSS",
                    "S.BBSSSSS",
                    "SBBBBSSST",
                    ".BBBB---T",
                    ".BBBB.TTT",
                    "TTT..TTTT",
                ),
                ("Road", "SignSymbol", "Car", "Bicyclist"),
            )
    return CAT


def one_line(text: str) -> str:
    """An untrusted name or label as one line of text, without terminal control characters."""
    return printable(" ".join(text.split()))


def check_output(path: str) -> None:
    """Raises ImageError unless a picture can be written there; called before the computation."""
    suffixes = (".png", ".jpg", ".pdf", ".svg")
    if Path(path).suffix.lower() not in suffixes:
        raise ImageError(f"--output is {path!r}; it must end in one of {', '.join(suffixes)}")
    if not Path(path).resolve().parent.is_dir():
        raise ImageError(f"--output is {path!r}, but there is no folder {Path(path).parent}")


def as_rgb(feature_map: NDArray) -> NDArray:
    """(C, h, w) as (h, w, 3): the first three principal components of its cells."""
    C, h, w = feature_map.shape
    cells = feature_map.reshape(C, h * w).T.astype(np.float64)  # (h*w, C)
    cells -= cells.mean(axis=0)
    _, _, directions = np.linalg.svd(cells, full_matrices=False)
    shown = np.zeros((h * w, 3))
    found = min(3, len(directions))
    shown[:, :found] = cells @ directions[:found].T
    low, high = np.percentile(shown, [2, 98], axis=0)
    return np.clip((shown - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(h, w, 3)


def query_attention(model: Model, images: NDArray, point: tuple[float, float]) -> list[NDArray]:
    """Attention of the query at point, by stage: last block, mean of the heads, (h, w) keys.

    The cls token of stage 4 is left out, since it has no position in the image.

    Args:
        model: a PVT, as classifier or as backbone of a segmentation network.
        images: (1, C, H, W), of a size that the network takes without stretching.
        point: row and column as fractions of the image.
    """
    config = getattr(model.config, "backbone", model.config)
    maps = pvt_ref.attention_maps(model.params, images, model.config)
    result = []
    for i, (H, W) in enumerate(config.grids(*images.shape[2:])):
        weights = maps[i + 1, config.depths[i] - 1][0].mean(axis=0)  # (queries, keys)
        R = config.sr_ratios[i]
        cls = weights.shape[0] - H * W  # 1 with a cls token
        query = int(point[0] * H) * W + int(point[1] * W)
        result.append(weights[cls + query, cls:].reshape(H // R, W // R))
    return result
