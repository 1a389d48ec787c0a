"""Photos with label maps, pictures whose pixels are classes: the data for segmentation.

The convention of ADE20K, Cityscapes and CamVid: a folder of photos, a folder of label maps, and
the same file names in both, ``images/a.jpg`` and ``labels/a.png``.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pvt_ref.arrays import Array
from pvt_ref.checks import Size, as_size, check_type
from pvt_ref.data.ahead import in_order
from pvt_ref.data.folder import Damaged
from pvt_ref.data.image import read_rgb
from pvt_ref.data.iou import IGNORED
from pvt_ref.data.pair_augment import PairAugment
from pvt_ref.data.picture_file import SUFFIXES, as_image_error, decode, open_picture
from pvt_ref.data.preprocessing import IMAGENET, Preprocessing
from pvt_ref.data.samples import Samples
from pvt_ref.draws import What, generator
from pvt_ref.errors import (
    ArrayTypeError,
    ConfigError,
    ImageError,
    MissingFileError,
    PVTError,
    TrainingError,
    reason,
    shown,
)
from pvt_ref.tree import digest

#: Pairs that are being read while :meth:`LabelledPairs.check` waits for the next one.
_AHEAD = 16


class LabelledPairs(Samples):
    """Two folders: photos, and maps of their labels.

    A label map is a picture of one channel whose values are classes, or one with a palette, whose
    indices are classes; its colours do not matter. Its size may differ from the photo's.

    Args:
        images: the folder of photos.
        labels: the folder of label maps; every photo needs one, ``.png``, of its name.
        classes: names of the K classes, in the order of their numbers.
        size: (h, w) of the crop for a training step, or the side of a square, in pixels.
        whole: (H, W) to which a photo is stretched before cropping, and when it is evaluated as a
        whole; None takes size.
        preprocessing: how pixels become numbers.
        augment: the random changes of pairs in a training step. None stretches the whole photo to
        size.
        replaced: new values for values in the files: {11: 255} ignores class 11, and {0: 255, 1: 0,
        2: 1, ...} counts from 0, as in trainings on ADE20K. Others stay; 255 is always ignored.
        names: the photos to take, without suffix; None takes all, sorted by code point.

    Attributes:
        files: (name of the photo, name of its label map), below the folders.
        classes: names of the classes.

    Raises:
        MissingFileError: if there is no such folder, photo or label map.
        TrainingError: if there is no photo, or two of one name.
        ConfigError, RangeError, ShapeError, ArrayTypeError: if an argument is not as above.
    """

    from_files = has_label_maps = True

    def __init__(
        self,
        images: str | os.PathLike[str],
        labels: str | os.PathLike[str],
        classes: Sequence[str],
        size: Size,
        *,
        whole: Size | None = None,
        preprocessing: Preprocessing = IMAGENET,
        augment: PairAugment | None = None,
        replaced: Mapping[int, int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._size = as_size(size, "the side of a square", least=1)
        self._whole = self._size if whole is None else as_size(whole, least=1)
        check_type("preprocessing", preprocessing, Preprocessing)
        if preprocessing.mode != "RGB":
            raise ConfigError(f"preprocessing has mode {preprocessing.mode!r}; needed is 'RGB'")
        if augment is not None:
            check_type("augment", augment, PairAugment, "or None")
        several = isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)
        if not several or not 0 < len(classes) <= IGNORED:
            what = f"classes are {shown(classes)}"
            raise ArrayTypeError(f"{what}; they must be a list of 1 to {IGNORED} names")
        self.classes = tuple(classes)
        self.preprocessing, self.augment = preprocessing, augment
        self._table = _table(replaced or {})
        self.images, self.maps = (_folder(path) for path in (images, labels))
        self.files = tuple(_pairs(self.images, self.maps, names))

    def __repr__(self) -> str:
        what = f"{len(self)} photos with labels of {len(self.classes)} classes"
        return f"LabelledPairs({shown(str(self.images), 200)}: {what})"

    def __len__(self) -> int:
        return len(self.files)

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the crop for a training step."""
        return self._size

    def read(self, i: int) -> tuple[Image.Image, Image.Image]:
        """A photo, and its label map in mode L, at the sizes of the files.

        Args:
            i: its number.

        Returns:
            Two pictures; the second holds classes, and 255 for pixels that do not count.

        Raises:
            ImageError, MissingFileError: if one cannot be read, or the label map holds a value that
                is not a class; the message names it.
        """
        photo, labels = self.files[i]
        return read_rgb(self.images / photo), self._read_labels(self.maps / labels)

    def _read_labels(self, path: Path) -> Image.Image:
        what = f"the label map {shown(str(path), 200)}"
        with as_image_error(what):
            image = open_picture(path, what)
            if image.mode not in ("L", "P", "1"):
                needed = "a picture of one channel, mode L, or with a palette, mode P"
                raise ImageError(f"{what} is of mode {image.mode}; it must be {needed}")
            decode(image, what)
            values = self._table[np.array(image, np.uint8)]  # (H, W)
        wrong = (values >= len(self.classes)) & (values != IGNORED)
        if wrong.any():
            last = len(self.classes) - 1
            kinds = ", ".join(map(str, np.unique(values[wrong])[:5]))
            raise ImageError(
                f"{what} holds {kinds}; classes are 0 to {last}, and {IGNORED} where a pixel does "
                f"not count. Does it count from 1, or should a class be ignored? replaced={{...}} "
                f"maps the values"
            )
        return Image.fromarray(values)

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """A whole photo as input for a network, and the labels at their own size.

        Args:
            i: its number.

        Returns:
            (3, H, W) uint8, stretched to ``whole``, and (H', W') uint8.

        Raises:
            PVTError: as :meth:`read`.
        """
        photo, labels = self.read(i)
        H, W = self._whole
        pixels = np.asarray(photo.resize((W, H), Image.Resampling.BILINEAR))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), np.asarray(labels)

    def pixels(self, chosen: np.ndarray | slice) -> np.ndarray:
        """Whole photos, stretched to ``size``, with their labels as a last channel.

        Args:
            chosen: (B,) whole numbers, or a slice.

        Returns:
            (B, 3 + 1, h, w) uint8.
        """
        h, w = self._size
        made: list[tuple[np.ndarray, np.ndarray]] = []
        for i in np.arange(len(self))[chosen]:
            photo, labels = self.read(int(i))
            resized = photo.resize((w, h), Image.Resampling.BILINEAR)
            made.append((np.asarray(resized), np.asarray(labels.resize((w, h), _NEAREST))))
        return _stacked(made)

    def drawn_pixels(self, chosen: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Photos with their labels as a last channel, with the random changes of ``augment``.

        Args:
            chosen: (B,) whole numbers.
            seed: of the training.
            epoch: from 0. The changes of a pair depend only on seed, epoch and its number.

        Returns:
            (B, 3 + 1, h, w) uint8.
        """
        if self.augment is None:
            return self.pixels(chosen)
        made: list[tuple[np.ndarray, np.ndarray]] = []
        for i in chosen.tolist():
            rng = generator(seed, What.PHOTO, epoch, i)
            made.append(self.augment(*self.read(i), self._whole, self._size, rng))
        return _stacked(made)

    def batch(self, chosen: np.ndarray | slice, like: Array) -> Array:
        """Whole photos with some indices, stretched to ``size`` and normalised.

        Args:
            chosen: (B,) integers, or a slice.
            like: an array of float32 or float64, of any shape.

        Returns:
            (B, 3, h, w) of like's library, device and dtype.
        """
        return self.preprocessing.normalize(self.pixels(chosen)[:, :-1], like)

    def describe(self) -> dict[str, Any]:
        """The number of pairs, and the SHA-256 of names, file sizes and processing."""
        sizes = [
            os.path.getsize(folder / name)
            for pair in self.files
            for folder, name in zip((self.images, self.maps), pair, strict=True)
        ]
        names = "\0".join(name for pair in self.files for name in pair)
        coded = np.frombuffer(names.encode("utf-8", "surrogateescape"), np.uint8)
        arrays = {"names": coded, "sizes": np.array(sizes, np.int64), "table": self._table}
        augment = None if self.augment is None else self.augment.to_dict()
        made = [asdict(self.preprocessing), self._size, self._whole, augment, self.classes]
        return {"samples": len(self), "sha256": digest(arrays, made)}

    def check_fits(self, config: Any, name: str) -> None:
        """Refuses samples that do not fit a model; label values are only checked when read.

        Args:
            config: of the model.
            name: of the samples, for the message.

        Raises:
            TrainingError: if the number of classes or channels differs from the model's.
        """
        for what, here, there in (
            ("classes", len(self.classes), config.num_classes),
            ("channels", self.preprocessing.channels, config.in_chans),
        ):
            if here != there:
                raise TrainingError(f"{name} have {here} {what}, but the model has {there}")
        config.grids(*self._size)

    def check(self, workers: int | None = None) -> Iterator[Damaged | None]:
        """Reads every pair.

        Args:
            workers: threads that decode; None takes the kernels' number.

        Returns:
            An iterator: for each pair, in order, None or what is wrong with it.
        """

        def fault(i: int) -> Damaged | None:
            try:
                self.read(i)
            except PVTError as error:
                return Damaged(self.files[i][0], str(error))
            return None

        return in_order(fault, range(len(self)), _AHEAD, workers)


_NEAREST = Image.Resampling.NEAREST


def _stacked(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Pixels (h, w, 3) and labels (h, w) of each, as (B, 3 + 1, h, w)."""
    whole = np.stack([np.dstack(pair) for pair in pairs])  # (B, h, w, 3 + 1)
    return np.ascontiguousarray(whole.transpose(0, 3, 1, 2))


def _table(replaced: Mapping[int, int]) -> np.ndarray:
    """(256,) uint8: the class for each value in a file."""
    table = np.arange(256, dtype=np.uint8)
    for value, new in replaced.items():
        if not all(type(x) is int and 0 <= x < 256 for x in (value, new)):
            what = f"replaced maps {shown(value)} to {shown(new)}"
            raise ConfigError(f"{what}; both must be whole numbers from 0 to 255")
        table[value] = new
    return table


def _folder(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArrayTypeError(f"a folder is a {type(path).__name__}; it must be a str or Path")
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder {shown(str(path), 200)}; check the spelling")
    return folder


def _pairs(images: Path, maps: Path, names: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """The names of each photo and its label map."""
    try:
        found = [name for name in os.listdir(images) if name.lower().endswith(SUFFIXES)]
        there = set(os.listdir(maps))
    except OSError as error:
        what = f"the folder {shown(str(error.filename), 200)} cannot be read ({reason(error)})"
        raise TrainingError(f"{what}. Check name and permissions") from error
    photos: dict[str, str] = {}
    for name in sorted(name for name in found if name[0] != "."):
        stem = name.rpartition(".")[0]
        if stem in photos:
            what = f"{shown(str(images), 200)} has the photos {photos[stem]} and {name}"
            raise TrainingError(f"{what}, which would share a label map. Move one away")
        photos[stem] = name
    if not photos:
        raise TrainingError(f"there is no photo in {shown(str(images), 200)}")
    for stem in photos if names is None else names:
        if stem not in photos:
            what = f"{shown(str(images), 200)} has no photo {shown(stem)}"
            raise MissingFileError(f"{what}, which the list names")
        if f"{stem}.png" not in there:
            what = f"{shown(str(maps), 200)} has no label map {shown(f'{stem}.png')}"
            raise MissingFileError(f"{what} for the photo {photos[stem]}")
        yield photos[stem], f"{stem}.png"
