"""What the demos share: a photo for those who name none, and how maps become pictures."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import pvt_ref
from pvt_ref import Model
from pvt_ref.errors import ImageError, printable

#: Where the colours of attention end, in units of the weight that all keys would have if they were
#: alike. The same for every stage and every model, so that what is nearly alike looks alike.
ATTENTION_RANGE = 4


#: What letters stand for in the points of a photo. A lake is no class of "camvid".
KINDS = {"S": "Sky", "B": "Building", "T": "Tree", "-": "a lake"}


class Photo(NamedTuple):
    """A picture for those who name none: where it is, whose it is, and the truth about it."""

    path: Path
    credit: str
    truth: str  # beside what the weights "imagenette" say
    dense_truth: str  # beside what the weights "camvid" say
    # labels of the points of a grid, a letter each of KINDS, or "." where it is hard to tell
    points: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()  # classes of "camvid" that are surely nowhere on it


#: Stefan van der Walt waived all rights; from scikit-image's data.
CAT = Photo(
    Path(__file__).with_name("chelsea.jpg"),
    "chelsea.jpg by Stefan van der Walt (CC0, comes with the examples)",
    "The photo shows a cat, which is none of the ten classes; every answer is wrong.",
    "The photo shows a cat and nothing of a street; the answer is wrong at every pixel.",
)


def default_photo() -> Photo:
    """The temple among scikit-learn's pictures, or the cat where there is none."""
    sklearn = find_spec("sklearn")  # found, not imported: that takes seconds
    if sklearn and sklearn.origin:
        path = Path(sklearn.origin).parent / "datasets" / "images" / "china.jpg"
        if path.is_file():
            return Photo(
                path,
                f"{path.name} by danielbuechele (CC BY 2.0, comes with scikit-learn)",
                "The photo shows a temple, which is none of the ten classes; a church is nearest.",
                "The photo shows a temple above a lake. A lake is none of the classes, so there "
                "every answer is wrong.",
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
    """A stranger's name or label as text: on one line, without what a terminal would obey."""
    return printable(" ".join(text.split()))


def check_output(path: str) -> None:
    """Raises ImageError unless a picture can be written there: better now than after the work."""
    suffixes = (".png", ".jpg", ".pdf", ".svg")
    if Path(path).suffix.lower() not in suffixes:
        raise ImageError(f"--output is {path!r}; it must end in one of {', '.join(suffixes)}")
    if not Path(path).resolve().parent.is_dir():
        raise ImageError(f"--output is {path!r}, but there is no folder {Path(path).parent}")


def as_rgb(feature_map: NDArray) -> NDArray:
    """(C, h, w) as (h, w, 3): the three directions in which its cells differ most."""
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
    """Where the query at point looks at each stage: last block, mean of the heads, (h, w) keys.

    The cls token of stage 4, which has no place in the image, is left out.

    Args:
        model: with a PVT, as classifier or as backbone of a segmentation network.
        images: (1, C, H, W), of a size that it takes without stretching.
        point: row and column as fractions of the image.
    """
    config = getattr(model.config, "backbone", model.config)
    maps = pvt_ref.attention_maps(model.params, images, model.config)
    result = []
    for i, (H, W) in enumerate(config.grids(*images.shape[2:])):
        weights = maps[i + 1, config.depths[i] - 1][0].mean(axis=0)  # (queries, keys)
        R = config.sr_ratios[i]
        cls = weights.shape[0] - H * W  # 1 where the cls token is among them
        query = int(point[0] * H) * W + int(point[1] * W)
        result.append(weights[cls + query, cls:].reshape(H // R, W // R))
    return result
