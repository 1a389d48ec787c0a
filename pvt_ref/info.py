"""What a model's file says beside its weights: class names, preprocessing, and where it was learnt.

Weights alone answer with an index, and only if the pixels were prepared as in their training.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

from pvt_ref.arrays import Array, array_module, from_host
from pvt_ref.errors import ArrayTypeError, ConfigError, ShapeError
from pvt_ref.image import IMAGENET_MEAN, IMAGENET_STD, Source, read_rgb, resize_and_crop

_CHANNELS = {"RGB": 3, "L": 1}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From a picture to numbers: ``(x / 255 - mean) / std`` per channel, after resizing.

    Attributes:
        mode: ``"RGB"``, or ``"L"`` for grey (one channel).
        mean: of the training pixels on a scale of 0 to 1, one number a channel.
        std: their standard deviation, one number a channel, above 0.

    Raises:
        ConfigError: if they do not fit together.
    """

    mode: str = "RGB"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        channels = _CHANNELS.get(self.mode) if isinstance(self.mode, str) else None
        if channels is None:
            raise ConfigError(f"mode is {self.mode!r}; it must be 'RGB' or 'L' (grey)")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if (
                not isinstance(values, Sequence)
                or len(values) != channels
                or not all(isinstance(v, Real) and math.isfinite(v) for v in values)
                or (name == "std" and not all(v > 0 for v in values))
            ):
                raise ConfigError(
                    f"{name} is {values!r}; mode {self.mode!r} needs {channels} finite numbers"
                    + (" above 0" if name == "std" else "")
                )
            object.__setattr__(self, name, tuple(float(v) for v in values))

    @property
    def channels(self) -> int:
        """3 for colours, 1 for grey."""
        return _CHANNELS[self.mode]

    def pixels(self, pictures: Sequence[Any], size: int | tuple[int, int]) -> np.ndarray:
        """Pictures of any kind and size, resized and cut.

        Args:
            pictures: a list of paths, open files, PIL images, or arrays (H, W, 3) or (H, W) of
                uint8.
            size: side of a square, or (H, W), in pixels; see
                :func:`pvt_ref.image.resize_and_crop`.

        Returns:
            (B, H, W, C) uint8, C = 3 for colours, 1 for grey.

        Raises:
            ShapeError: if there is no picture, an array has another shape, or size is not one or
                two positive whole numbers.
            ArrayTypeError: if a picture is none of these, or an array not uint8.
            ImageError: as :func:`pvt_ref.load_image`.
            MissingFileError: as :func:`pvt_ref.load_image`.
        """
        if not pictures:
            raise ShapeError("the list of images is empty; a batch needs at least one")
        batch = [resize_and_crop(read_rgb(_as_source(p)), size) for p in pictures]
        if self.mode == "L":
            return np.stack([np.asarray(image.convert("L"))[:, :, None] for image in batch])
        return np.stack([np.asarray(image) for image in batch])

    def normalize(self, pixels: Array, like: Array) -> Array:
        """Raw pixels as normalised floats.

        Args:
            pixels: (B, C, H, W) uint8, on the host.
            like: an array of float32 or float64, of any shape.

        Returns:
            (B, C, H, W) of like's library, device and dtype.

        Raises:
            ArrayTypeError: if like is not an array.
            ValueError: if mode is RGB and pixels do not have 3 channels there.
        """
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
                array (B, H, W, 3) of uint8.
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


def _as_source(picture: Any) -> Source:
    """What read_rgb understands; raw pixels become a PIL image."""
    if not isinstance(picture, np.ndarray):
        return picture
    shape = picture.shape
    if picture.dtype != np.uint8:
        raise ArrayTypeError(
            f"a picture has dtype {picture.dtype}; arrays of raw pixels are uint8, 0 to 255. "
            f"numpy.rint(255 * x).astype('uint8') makes it of floats in 0 to 1"
        )
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 3) or 0 in shape:
        raise ShapeError(
            f"a picture has shape {shape}; an array of raw pixels is (H, W, 3), red, green, blue, "
            f"or (H, W) for grey"
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
            raise ConfigError(f"classes are {given!r}; they must be a list of names")
        if not isinstance(self.title, str):
            raise ConfigError(f"title is a {type(self.title).__name__}; it must be a text")
        if not isinstance(self.preprocessing, Preprocessing):
            raise ConfigError(
                f"preprocessing is a {type(self.preprocessing).__name__}; it must be a "
                f"pvt_ref.Preprocessing"
            )
        object.__setattr__(self, "classes", names)
        object.__setattr__(self, "training", _as_json(self.training))

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
            ConfigError: if a field is of another type.
            TypeError: if there is a field that this version does not know.
            KeyError: if there is no preprocessing.
        """
        return cls(**{**values, "preprocessing": Preprocessing(**values["preprocessing"])})


def _as_json(training: Any) -> dict[str, Any]:
    """A copy as a file would give it back; refused now rather than when it is saved."""
    if not isinstance(training, Mapping):
        raise ConfigError(f"training is a {type(training).__name__}; it must be a mapping")
    try:
        return json.loads(json.dumps(dict(training), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"training holds what JSON does not ({error}); it must hold texts, finite numbers, "
            f"truth values, lists and mappings. float(x) makes a plain number of NumPy's"
        ) from error


#: Of weights of which nothing is known: ImageNet's preprocessing, and no class names.
UNKNOWN = ModelInfo()
