"""Photos in folders named after their classes, read from disk when a step needs them.

The convention of most data sets and tools: ``root/tench/a.jpg``, ``root/golf ball/b.jpg``. Only
names, labels and sizes of files are kept in memory.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pvt_ref.checks import Size, as_size, check_type
from pvt_ref.data.ahead import in_order
from pvt_ref.data.image import read_rgb
from pvt_ref.data.photo_augment import PhotoAugment
from pvt_ref.data.picture_file import SUFFIXES
from pvt_ref.data.preprocessing import IMAGENET, Preprocessing
from pvt_ref.data.samples import Samples
from pvt_ref.draws import What, generator
from pvt_ref.errors import (
    ArrayTypeError,
    ConfigError,
    MissingFileError,
    PVTError,
    TrainingError,
    reason,
    shown,
)
from pvt_ref.tree import digest

#: Photos that are being read while :meth:`ImageFolder.check` waits for the next one.
_AHEAD = 64

#: The fields that say how a photo is processed: see :meth:`ImageFolder.replace`.
_SETTINGS = ("size", "preprocessing", "augment")


class Damaged(NamedTuple):
    """A file with a photo's suffix that cannot be read, and the reason."""

    file: str  # below the root, with slashes
    why: str


class ImageFolder(Samples):
    """A folder of labelled photos, of any size and in the formats that prediction takes.

    Folders directly in path are the classes, sorted by code point. All photos in a class's folder,
    at any depth, are its samples, sorted likewise. Hidden files and folders are skipped, and so are
    names that end in none of :data:`pvt_ref.data.picture_file.SUFFIXES`.

    Args:
        path: the folder.
        size: of the processed photo: the side of a square, or (H, W), in pixels.
        preprocessing: how pixels become numbers, for colours or grey.
        augment: the random changes of photos in a training step. None always resizes and crops
        them as for prediction.
        classes: the class names in another order, or more of them (a split need not have photos
        of every class). A folder that is not among them is refused.

    Attributes:
        root: the folder, an absolute path.
        files: names of the photos below it, with slashes.
        labels: (N,) int64, the index of each photo's class in ``classes``.
        classes: names of the classes.
        sizes: (N,) int64, bytes of the files.

    Raises:
        MissingFileError: if there is no such folder.
        TrainingError: if there is no class or no photo in it, or a folder that is not a class.
        ConfigError: if preprocessing is for bands, which no file has, or a class comes twice.
        ShapeError, ArrayTypeError: if size or another argument is not as above.
    """

    from_files = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: Size = 224,
        *,
        preprocessing: Preprocessing = IMAGENET,
        augment: PhotoAugment | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self._settle(size, preprocessing, augment)
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise ArrayTypeError(f"path is a {type(path).__name__}; it must be a str or Path")
        several = isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)
        if classes is not None and not several:
            raise ArrayTypeError(f"classes are {shown(classes)}; they must be a list of names")
        try:
            self.root = Path(path).absolute()
            found = _folders(self.root)
            photos = [(name, *photo) for name in found for photo in _photos(self.root, name)]
        except FileNotFoundError as error:
            what = f"there is no folder {shown(error.filename or os.fspath(path), 200)}"
            raise MissingFileError(f"{what}; check the spelling") from error
        except (OSError, ValueError) as error:  # permissions, or a name that cannot be one
            what = f"the folder {shown(os.fspath(path), 200)} cannot be read ({reason(error)})"
            raise TrainingError(f"{what}. Check name and permissions") from error
        self.classes = tuple(found if classes is None else classes)
        place = {name: k for k, name in enumerate(self.classes)}
        if len(place) < len(self.classes):
            raise ConfigError(f"classes are {shown(self.classes)}; a name comes twice")
        if strange := [name for name in found if name not in place]:
            what = f"{self._shown()} has the folder {shown(strange[0])}, which is not a class"
            raise TrainingError(f"{what}. Classes are {shown(self.classes, 200)}")
        if not photos:
            raise TrainingError(self._why_empty(found))
        of_class, files, sizes = zip(*photos, strict=True)
        self.files: tuple[str, ...] = files
        self.sizes = np.array(sizes, np.int64)
        self.labels = np.array([place[name] for name in of_class], np.int64)

    def __repr__(self) -> str:
        what = f"{len(self)} photos of {len(self.classes)} classes"
        return f"ImageFolder({self._shown()}: {what}, {self._size[0]}x{self._size[1]} pixels)"

    def _shown(self) -> str:
        return shown(str(self.root), 200)

    def _why_empty(self, classes: list[str]) -> str:
        expected = "It must have folders named after the classes, with photos in them: cat/1.jpg"
        if not classes:
            there = any(name.lower().endswith(SUFFIXES) for name in os.listdir(self.root))
            photos = ", but photos: which class are they?" if there else ""
            return f"{self._shown()} has no folders in it{photos}. {expected}"
        names = f"no file there ends in one of {', '.join(SUFFIXES)}"
        return f"{self._shown()} has {len(classes)} folders and no photo: {names}. {expected}"

    def subset(self, chosen: Sequence[int] | np.ndarray) -> "ImageFolder":
        """Some of the photos; the classes stay.

        Args:
            chosen: (n,) whole numbers, in any order.

        Returns:
            A folder of these photos in that order.

        Raises:
            TrainingError: if there are none.
        """
        if not len(chosen):
            raise TrainingError(f"none of the photos of {self._shown()} is left")
        new = copy.copy(self)
        new.files = tuple(self.files[i] for i in chosen)
        new.sizes, new.labels = self.sizes[chosen], self.labels[chosen]
        return new

    def replace(self, **changes: Any) -> "ImageFolder":
        """The same photos with other processing.

        Args:
            changes: the new size, preprocessing or augment.

        Returns:
            A folder of the same photos.

        Raises:
            PVTError: as the constructor.
        """
        new = copy.copy(self)
        new._settle(**({name: getattr(self, name) for name in _SETTINGS} | changes))
        return new

    def _settle(self, size: Any, preprocessing: Any, augment: Any) -> None:
        """Checks and sets how photos are processed."""
        self._size = as_size(size, "the side of a square", least=1)
        check_type("preprocessing", preprocessing, Preprocessing)
        if preprocessing.mode == "bands":
            what = "preprocessing has mode 'bands', but photos in files are in colour or grey"
            raise ConfigError(f"{what}. LabelledImages takes arrays of bands")
        if augment is not None:
            check_type("augment", augment, PhotoAugment, "or None")
        self.preprocessing, self.augment = preprocessing, augment

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the processed photos."""
        return self._size

    def path(self, i: int) -> Path:
        """The path of a photo.

        Args:
            i: its number.

        Returns:
            An absolute path.
        """
        return self.root / self.files[i]

    def pixels(self, chosen: np.ndarray | slice) -> np.ndarray:
        """Photos processed as for prediction.

        Args:
            chosen: (B,) whole numbers, or a slice.

        Returns:
            (B, C, H, W) uint8.

        Raises:
            ImageError, MissingFileError: if one cannot be read; the message names it.
        """
        paths = [self.path(i) for i in np.arange(len(self))[chosen]]
        return self._channels_first(self.preprocessing.pixels(paths, self.size))

    def drawn_pixels(self, chosen: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Photos with the random changes of ``augment``.

        Args:
            chosen: (B,) whole numbers.
            seed: of the training.
            epoch: from 0. A photo's changes depend only on seed, epoch and its number.

        Returns:
            (B, C, H, W) uint8.

        Raises:
            ImageError, MissingFileError: as :meth:`pixels`.
        """
        if self.augment is None:
            return self.pixels(chosen)
        H, W = self.size
        drawn: list[np.ndarray] = []
        for i in chosen.tolist():
            rng = generator(seed, What.PHOTO, epoch, i)
            photo = self.augment(read_rgb(self.path(i)), (H, W), rng)
            if self.preprocessing.mode == "L":
                photo = photo.convert("L")
            drawn.append(np.asarray(photo).reshape(H, W, -1))
        return self._channels_first(np.stack(drawn))

    @staticmethod
    def _channels_first(pixels: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # (B, C, H, W)

    def describe(self) -> dict[str, Any]:
        """The number of photos, and the SHA-256 of names, file sizes, labels and processing.

        It does not cover their content: reading all of a large folder would take long.
        """
        names = np.frombuffer("\0".join(self.files).encode("utf-8", "surrogateescape"), np.uint8)
        arrays = {"names": names, "sizes": self.sizes, "labels": self.labels}
        augment = None if self.augment is None else self.augment.to_dict()
        made = [asdict(self.preprocessing), self.size, augment, self.classes]
        return {"samples": len(self), "sha256": digest(arrays, made)}

    def check(self, workers: int | None = None) -> Iterator[Damaged | None]:
        """Reads every photo.

        Args:
            workers: threads that decode; None takes the kernels' number.

        Returns:
            An iterator: for each photo, in order, None or what is wrong with it.
        """

        def fault(i: int) -> Damaged | None:
            try:
                read_rgb(self.path(i))
            except PVTError as error:
                return Damaged(self.files[i], str(error))
            return None

        return in_order(fault, range(len(self)), _AHEAD, workers)


def _folders(root: Path) -> list[str]:
    """Names of the folders in root that are not hidden, sorted by code point."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.name[0] != "." and e.is_dir())


def _photos(root: Path, name: str) -> Iterator[tuple[str, int]]:
    """Photos in a class's folder, by their names below root: the name, and the file's bytes."""
    found: list[tuple[str, int]] = []
    seen = set[tuple[int, int]]()  # visited folders, so that a link to a parent ends
    waiting = [name]
    while waiting:
        folder = waiting.pop()
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                below = f"{folder}/{entry.name}"
                if entry.is_dir():
                    waiting.append(below)
                elif entry.name.lower().endswith(SUFFIXES):
                    size = 0
                    with suppress(FileNotFoundError):  # a broken link, which check finds
                        size = entry.stat().st_size
                    found.append((below, size))
    yield from sorted(found)
