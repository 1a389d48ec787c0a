"""What a model's file says beside its weights: class names, preprocessing, and where it was learnt.

Weights alone answer with an index, and only if the pixels were prepared as in their training.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

from pvt_ref.arrays import Array, array_module, from_host
from pvt_ref.data.image import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Source,
    read_rgb,
    resize_and_crop,
    resize_and_crop_bands,
)
from pvt_ref.errors import ArrayTypeError, ConfigError, ShapeError, shown

#: Channels that a mode makes; of bands there are as many as means.
_CHANNELS = {"RGB": 3, "L": 1, "bands": None}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From a picture to numbers: ``(x / 255 - mean) / std`` per channel, after resizing.

    Attributes:
        mode: ``"RGB"``; ``"L"`` for grey (one channel); or ``"bands"`` for any number of channels
            that are no colours, which only arrays can hold.
        mean: of the training pixels on a scale of 0 to 1, one number a channel.
        std: their standard deviation, one number a channel, above 0.

    Raises:
        ConfigError: if they do not fit together.
    """

    mode: str = "RGB"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in _CHANNELS:
            raise ConfigError(
                f"mode is {shown(self.mode)}; it must be 'RGB', 'L' (grey), or 'bands' (any number "
                f"of channels, given as arrays)"
            )
        mean, std = _numbers(self.mean), _numbers(self.std)
        channels = _CHANNELS[self.mode] or (len(mean) if mean else 0)
        if mean is None or len(mean) != channels or not channels:
            few = f"{channels}" if channels else "at least one"
            raise ConfigError(
                f"mean is {shown(self.mean)}; mode {self.mode!r} needs {few} finite numbers"
            )
        if std is None or len(std) != channels or min(std) <= 0:
            raise ConfigError(
                f"std is {shown(self.std)}; mode {self.mode!r} needs {channels} finite numbers "
                f"above 0" + ", as many as mean has" * (self.mode == "bands")
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def __repr__(self) -> str:
        return f"Preprocessing(mode={self.mode!r}, mean={_few(self.mean)}, std={_few(self.std)})"

    @property
    def channels(self) -> int:
        """3 for colours, 1 for grey, of bands as many as there are."""
        return len(self.mean)

    def pixels(self, pictures: Sequence[Any], size: int | tuple[int, int]) -> np.ndarray:
        """Pictures of any kind and size, resized and cut.

        Args:
            pictures: a list of paths, open files, PIL images, or arrays (H, W, 3) or (H, W) of
                uint8. In mode bands a list of arrays (H, W, C) of uint8; also (H, W) if C = 1.
            size: side of a square, or (H, W), in pixels; see
                :func:`pvt_ref.data.image.resize_and_crop`.

        Returns:
            (B, H, W, C) uint8, C = :attr:`channels`.

        Raises:
            ShapeError: if there is no picture, an array has another shape, or size is not one or
                two positive whole numbers.
            ArrayTypeError: if a picture is none of these, or an array not uint8.
            ImageError: as :func:`pvt_ref.load_image`.
            MissingFileError: as :func:`pvt_ref.load_image`.
        """
        if not isinstance(pictures, list | tuple | np.ndarray):
            raise ArrayTypeError(
                f"pictures are a {type(pictures).__name__}; they must be a list. One picture is "
                f"prepared by calling the preprocessing: preprocessing(picture, size)"
            )
        if len(pictures) == 0:
            raise ShapeError("the list of images is empty; a batch needs at least one")
        return np.stack([self._prepared(picture, size) for picture in pictures])

    def _prepared(self, picture: Any, size: int | tuple[int, int]) -> np.ndarray:
        """One picture as (H, W, C) uint8."""
        if self.mode == "bands":
            return resize_and_crop_bands(self._checked_bands(picture), size)
        image = resize_and_crop(read_rgb(_as_source(picture)), size)
        return np.asarray(image.convert("L"))[:, :, None] if self.mode == "L" else np.asarray(image)

    def _checked_bands(self, picture: Any) -> np.ndarray:
        C = self.channels
        if not isinstance(picture, np.ndarray):
            raise ArrayTypeError(
                f"a picture is a {type(picture).__name__}; this preprocessing has {C} bands, which "
                f"no picture file names: give arrays (H, W, {C}) of uint8, 0 to 255. "
                f"numpy.asarray(image) makes one of a PIL image with {C} channels"
            )
        _check_uint8(picture)
        if picture.ndim == 2 and C == 1:
            picture = picture[:, :, None]
        if picture.ndim != 3 or picture.shape[2] != C or 0 in picture.shape:
            hint = ""
            if picture.ndim == 3 and picture.shape[0] == C:
                hint = ". It looks channels-first: picture.transpose(1, 2, 0)"
            raise ShapeError(
                f"a picture has shape {picture.shape}; of {C} bands it must be (H, W, {C}){hint}"
            )
        return picture

    def normalize(self, pixels: Array, like: Array) -> Array:
        """Raw pixels as normalised floats.

        Args:
            pixels: (B, C, H, W) uint8, on the host.
            like: an array of float32 or float64, of any shape.

        Returns:
            (B, C, H, W) of like's library, device and dtype.

        Raises:
            ArrayTypeError: if like is not an array.
            ShapeError: if pixels are not (B, C, H, W) with C = :attr:`channels`.
        """
        shape = tuple(getattr(pixels, "shape", ()))
        if len(shape) != 4 or shape[1] != self.channels:
            raise ShapeError(
                f"pixels have shape {shape}; they must be (B, {self.channels}, H, W), as mode "
                f"{self.mode!r} has {self.channels} channels"
            )
        xp = array_module(like)
        x = xp.astype(from_host(pixels, like=like), like.dtype)
        mean = from_host(np.asarray(self.mean)[:, None, None], like=like)
        std = from_host(np.asarray(self.std)[:, None, None], like=like)
        x /= 255
        x -= xp.astype(mean, like.dtype)
        x /= xp.astype(std, like.dtype)
        return x

    def __call__(self, pictures: Any, size: int | tuple[int, int]) -> np.ndarray:
        """Pictures as a batch: :meth:`pixels`, then :meth:`normalize`.

        Args:
            pictures: one picture or a list of them, of the kinds that :meth:`pixels` takes, or an
                array (B, H, W, C) of uint8.
            size: side of a square, or (H, W), in pixels.

        Returns:
            (B, C, H, W) float32, normalised.

        Raises:
            ShapeError: as :meth:`pixels`.
            ArrayTypeError: as :meth:`pixels`.
            ImageError: as :meth:`pixels`.
            MissingFileError: as :meth:`pixels`.
        """
        several = isinstance(pictures, list | tuple) or getattr(pictures, "ndim", 0) == 4
        pixels = self.pixels(list(pictures) if several else [pictures], size)
        channels_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return self.normalize(channels_first, like=np.empty(0, np.float32))


def _few(values: tuple[Any, ...]) -> str:
    """A tuple for a repr: the first of a long one, and how many there are."""
    if len(values) <= 4:
        return f"({', '.join(shown(v, 30) for v in values)}{',' * (len(values) == 1)})"
    return f"({', '.join(shown(v, 30) for v in values[:3])}, ... {len(values)} in all)"


def _numbers(values: Any) -> tuple[float, ...] | None:
    """Finite floats of a list of them, else None."""
    if not isinstance(values, Sequence) or not all(isinstance(v, Real) for v in values):
        return None
    try:
        numbers = tuple(float(v) for v in values)
    except OverflowError:  # a whole number beyond any float
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _check_uint8(picture: np.ndarray) -> None:
    if picture.dtype != np.uint8:
        raise ArrayTypeError(
            f"a picture has dtype {picture.dtype}; arrays of raw pixels are uint8, 0 to 255. "
            f"numpy.rint(255 * x).astype('uint8') makes it of floats in 0 to 1"
        )


def _as_source(picture: Any) -> Source:
    """What read_rgb understands; raw pixels become a PIL image."""
    if not isinstance(picture, np.ndarray):
        return picture
    _check_uint8(picture)
    shape = picture.shape
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 3) or 0 in shape:
        raise ShapeError(
            f"a picture has shape {shape}; an array of raw pixels is (H, W, 3), red, green, blue, "
            f"or (H, W) for grey. Of other channels: a model whose info has "
            f"Preprocessing('bands', mean, std)"
        )
    return Image.fromarray(picture)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known of a model beside its weights and configuration. Fit for JSON.

    Attributes:
        title: in a sentence, what it was made for.
        classes: the names of the outputs, in order. Empty if they are not known.
        preprocessing: what its training did to pixels.
        training: how it came about: command, seed, data set, accuracy. Numbers, texts, lists.

    Raises:
        ConfigError: if a field is of another type.
    """

    title: str = ""
    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing = Preprocessing()
    training: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        given = self.classes
        several = isinstance(given, Iterable) and not isinstance(given, str)
        names = tuple(given) if several and not hasattr(given, "shape") else None  # no arrays
        if names is None or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"classes are {shown(given)}; they must be a list of names")
        if not isinstance(self.title, str):
            raise ConfigError(f"title is a {type(self.title).__name__}; it must be a text")
        if not isinstance(self.preprocessing, Preprocessing):
            raise ConfigError(
                f"preprocessing is a {type(self.preprocessing).__name__}; it must be a "
                f"pvt_ref.Preprocessing"
            )
        object.__setattr__(self, "classes", names)
        object.__setattr__(self, "training", _as_json(self.training))

    def __repr__(self) -> str:
        return (
            f"ModelInfo(title={shown(self.title)}, classes={_few(self.classes)}, "
            f"preprocessing={self.preprocessing!r}, training={shown(self.training, 160)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name, fit for JSON; :meth:`from_dict` reads them.

        Returns:
            Texts, numbers, lists and dicts; a copy.
        """
        return {
            "title": self.title,
            "classes": list(self.classes),
            "preprocessing": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self.preprocessing).items()
            },
            "training": _as_json(self.training),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelInfo":
        """The inverse of :meth:`to_dict`.

        Args:
            values: what to_dict returned.

        Returns:
            An equal record.

        Raises:
            ConfigError: if a field is of another type, missing, or not known to this version.
        """
        known = _checked_fields(values, cls, "an info")
        if "preprocessing" not in known:
            raise ConfigError("an info needs the field preprocessing, and it has none")
        parts = _checked_fields(known["preprocessing"], Preprocessing, "a preprocessing")
        return cls(**{**known, "preprocessing": Preprocessing(**parts)})


def _checked_fields(values: Any, record: type, what: str) -> dict[str, Any]:
    """The values by name, if all are names of the record's fields."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} is a {type(values).__name__}; it must be a mapping of fields")
    names = [f.name for f in fields(record)]
    strange = [name for name in values if name not in names]
    if strange:
        raise ConfigError(
            f"{what} has the field {shown(strange[0])}, which this version does not know; known "
            f"are {', '.join(names)}"
        )
    return dict(values)


def _as_json(training: Any) -> dict[str, Any]:
    """A copy as a file would give it back; refused now rather than when it is saved."""
    if not isinstance(training, Mapping):
        raise ConfigError(f"training is a {type(training).__name__}; it must be a mapping")
    try:
        return json.loads(json.dumps(dict(training), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"training holds what JSON does not ({shown(str(error), 200)}); it must hold texts, "
            f"finite numbers, truth values, lists and mappings. float(x) makes a plain number of "
            f"NumPy's"
        ) from error


#: Of weights of which nothing is known: ImageNet's preprocessing, and no class names.
UNKNOWN = ModelInfo()
