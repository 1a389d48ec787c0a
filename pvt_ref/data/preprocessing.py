"""From a picture to the array that a network expects: :class:`Preprocessing` does it all.

:func:`load_image`, :func:`preprocess` and :func:`normalize` call it with the constants of the
authors' released code. For dense prediction, :func:`pad_to_multiple` pads the picture instead.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

from pvt_ref.arrays import (
    Array,
    array_module,
    describe_type,
    dtype_name,
    from_host,
    is_array,
    is_foreign,
    is_numpy,
)
from pvt_ref.checks import TOO_LARGE, Size, batch_shape, is_whole
from pvt_ref.data.image import Source, read_rgb, resize_and_crop, resize_and_crop_bands
from pvt_ref.errors import ArrayTypeError, ConfigError, RangeError, ShapeError, shown

#: Mean and standard deviation of the training pixels, red, green, blue, on a scale of 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Channels of each mode; bands have as many as means.
_CHANNELS = {"RGB": 3, "L": 1, "bands": None}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From a picture to numbers: ``(x / 255 - mean) / std`` per channel, after resizing.

    Attributes:
        mode: ``"RGB"``; ``"L"`` for grey (one channel); or ``"bands"`` for any number of channels
            other than colours, which only arrays can hold.
        mean: of the training pixels on a scale of 0 to 1, one number per channel.
        std: their standard deviation, one number per channel, above 0.

    Raises:
        ConfigError: if they do not fit together.
    """

    mode: str = "RGB"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in _CHANNELS:
            known = "'RGB', 'L' (grey), or 'bands' (any number of channels, given as arrays)"
            raise ConfigError(f"mode is {shown(self.mode)}; it must be {known}")
        mean, std = _numbers(self.mean), _numbers(self.std)
        channels = _CHANNELS[self.mode] or len(mean)
        needs = f"mode {self.mode!r} needs {channels or 'at least one'} finite numbers"
        if len(mean) != channels or not channels:
            raise ConfigError(f"mean is {shown(self.mean)}; {needs}")
        if len(std) != channels or min(std) <= 0:
            needs += " above 0" + ", as many as mean has" * (self.mode == "bands")
            raise ConfigError(f"std is {shown(self.std)}; {needs}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def __repr__(self) -> str:
        mean, std = shown_tuple(self.mean), shown_tuple(self.std)
        return f"Preprocessing(mode={self.mode!r}, mean={mean}, std={std})"

    @property
    def channels(self) -> int:
        """3 for colours, 1 for grey, the number of bands for bands."""
        return len(self.mean)

    def pixels(self, pictures: Sequence[Any], size: Size) -> np.ndarray:
        """Pictures of any kind and size, resized and cropped.

        Args:
            pictures: a list of paths, open files, PIL images, or arrays (H, W, 3) or (H, W) of
                uint8. In mode bands a list of arrays (H, W, C) of uint8; also (H, W) if C = 1.
            size: side of a square, or (H, W), in pixels, as for :func:`load_image`.

        Returns:
            (B, H, W, C) uint8, C = :attr:`channels`.

        Raises:
            ShapeError: if there is no picture, an array has the wrong shape, or size is not a size.
            ArrayTypeError: if a picture is none of these, or an array not uint8.
            PVTError: as :func:`pvt_ref.load_image`.
        """
        if not isinstance(pictures, list | tuple | np.ndarray):
            hint = "For one picture, call preprocessing(picture, size)"
            kind = type(pictures).__name__
            raise ArrayTypeError(f"pictures are a {kind}; they must be a list. {hint}")
        if len(pictures) == 0:
            raise ShapeError("the list of images is empty; a batch needs at least one")
        return np.stack([self._prepared(picture, size) for picture in pictures])

    def _prepared(self, picture: Any, size: Size) -> np.ndarray:
        """One picture as (H, W, C) uint8."""
        self._check_kind(picture)
        if self.mode == "bands":
            if picture.ndim == 2 and self.channels == 1:
                picture = picture[:, :, None]
            self._check_shape(picture)
            return resize_and_crop_bands(picture, size)
        if isinstance(picture, np.ndarray):
            self._check_shape(picture)
            picture = Image.fromarray(picture)
        rgb = resize_and_crop(read_rgb(picture), size)
        return np.asarray(rgb.convert("L"))[:, :, None] if self.mode == "L" else np.asarray(rgb)

    def _check_kind(self, picture: Any) -> None:
        C, usable = self.channels, is_numpy(picture) or isinstance(picture, Image.Image)
        if not usable and (is_array(picture) or is_foreign(picture)):
            raise ArrayTypeError(
                f"a picture is {describe_type(picture)}. Pictures are paths, PIL images, or arrays "
                f"(H, W, 3) of uint8; normalised images, one array (B, {C}, H, W) of floats"
            )
        if self.mode == "bands" and not isinstance(picture, np.ndarray):
            raise ArrayTypeError(
                f"a picture is a {type(picture).__name__}; with {C} bands, which no file has, it "
                f"must be an array (H, W, {C}) of uint8, 0 to 255. numpy.asarray(image) makes one"
            )
        if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
            needed = "uint8, 0 to 255: numpy.rint(255 * x).astype('uint8') of floats in 0 to 1"
            raise ArrayTypeError(f"a picture has dtype {picture.dtype}; arrays must be {needed}")

    def _check_shape(self, picture: np.ndarray) -> None:
        C, shape = self.channels, picture.shape
        if self.mode == "bands":
            if len(shape) != 3 or shape[2] != C or 0 in shape:
                first = ". It looks channels-first: picture.transpose(1, 2, 0)"
                needed = f"(H, W, {C})" + first * (len(shape) == 3 and shape[0] == C)
                raise ShapeError(f"a picture has shape {shape}; with {C} bands it must be {needed}")
        elif len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 3) or 0 in shape:
            raise ShapeError(
                f"a picture has shape {shape}; raw pixels are (H, W, 3), red, green, blue, or "
                f"(H, W), grey. For others use a model with Preprocessing('bands', mean, std)"
            )

    def normalize(self, pixels: Array, like: Array) -> Array:
        """Raw pixels as normalised floats, bit for bit as torchvision's ToTensor and Normalize.

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
            needed = f"(B, {self.channels}, H, W), the channels of mode {self.mode!r}"
            raise ShapeError(f"pixels have shape {shape}; they must be {needed}")

        def there(host: np.ndarray) -> Array:
            return array_module(like).astype(from_host(host, like=like), like.dtype)

        x = there(pixels)  # (B, C, H, W)
        mean, std = (there(np.asarray(v)[:, None, None]) for v in (self.mean, self.std))
        x /= 255
        x -= mean
        x /= std
        return x

    def __call__(self, pictures: Any, size: Size) -> np.ndarray:
        """Pictures as a batch: :meth:`pixels`, then :meth:`normalize`.

        Args:
            pictures: one picture or a list of them, of the kinds that :meth:`pixels` takes, or an
                array (B, H, W, C) of uint8.
            size: side of a square, or (H, W), in pixels.

        Returns:
            (B, C, H, W) float32, normalised.

        Raises:
            PVTError: as :meth:`pixels`.
        """
        stacked = isinstance(pictures, np.ndarray) and pictures.ndim == 4
        several = stacked or isinstance(pictures, list | tuple)
        return self._normalized(self.pixels(list(pictures) if several else [pictures], size))

    def _normalized(self, pixels: np.ndarray) -> np.ndarray:
        """(B, H, W, C) uint8 as (B, C, H, W) float32, C-contiguous."""
        channels_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # (B, C, H, W)
        return self.normalize(channels_first, like=np.empty(0, np.float32))


def shown_tuple(values: tuple[Any, ...]) -> str:
    """A tuple for a repr; of a long one, the first items and the length."""
    if len(values) <= 4:
        return f"({', '.join(shown(v, 30) for v in values)}{',' * (len(values) == 1)})"
    return f"({', '.join(shown(v, 30) for v in values[:3])}, ... {len(values)} in all)"


def _numbers(values: Any) -> tuple[float, ...]:
    """A list as finite floats; empty if it is anything else."""
    good = isinstance(values, Sequence) and all(isinstance(v, Real) for v in values)
    with suppress(OverflowError):  # an integer beyond any float
        if good and all(map(math.isfinite, values)):
            return tuple(map(float, values))
    return ()


IMAGENET = Preprocessing()


def load_image(source: Source, size: Size = 224) -> np.ndarray:
    """One picture, preprocessed as the released classifiers expect.

    Args:
        source: a path, a binary file or a PIL image, as for :func:`pvt_ref.data.image.read_rgb`.
        size: side, or (H, W), in pixels, as for :func:`pvt_ref.data.image.resize_and_crop`.

    Returns:
        (1, 3, H, W) float32, normalised. numpy.concatenate joins several to a batch.

    Raises:
        PVTError: as these two functions.
    """
    return IMAGENET(read_rgb(source), size)


def preprocess(images: Image.Image | Sequence[Image.Image], size: Size = 224) -> np.ndarray:
    """PIL images, of any modes and sizes, as one batch for the classifier.

    Args:
        images: a PIL image, or a list or tuple of them.
        size: side of the square, or (H, W), in pixels, as for :func:`load_image`.

    Returns:
        (B, 3, H, W) float32, normalised.

    Raises:
        ArrayTypeError: if something is not a PIL image.
        PVTError: as :func:`load_image`.
    """
    batch: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    for image in batch:
        if not isinstance(image, Image.Image):
            hint = "load_image(path) reads a file"
            if is_array(image):
                hint = "normalize(pixels) takes raw pixels"
            needed = f"preprocess takes PIL images. pvt_ref.{hint}"
            raise ArrayTypeError(f"images hold a {type(image).__name__}; {needed}")
    return IMAGENET(batch, size)


def normalize(pixels: np.ndarray) -> np.ndarray:
    """Raw pixels as the network's input: ``(x / 255 - mean) / std`` per colour.

    Args:
        pixels: (H, W, 3) or (B, H, W, 3) uint8, red, green, blue; of any size, which is kept.

    Returns:
        (B, 3, H, W) float32, C-contiguous; B is 1 for a single picture.

    Raises:
        ArrayTypeError: if pixels are not a NumPy array of uint8.
        ShapeError: if the shape is wrong or has a zero.
    """
    if not isinstance(pixels, np.ndarray):
        hint = "numpy.stack(list_of_pictures) makes a batch"
        if isinstance(pixels, Image.Image):
            hint = "pvt_ref.preprocess(image) takes PIL images"
        elif is_array(pixels):
            hint = "pvt_ref.to_numpy(pixels) brings it to the host"
        needed = f"a NumPy array (H, W, 3) or (B, H, W, 3) of uint8. {hint}"
        raise ArrayTypeError(f"pixels are a {type(pixels).__name__}; they must be {needed}")
    shape, dtype = pixels.shape, pixels.dtype
    if dtype != np.uint8:
        hint = "numpy.rint(255 * pixels).astype('uint8') if they lie in 0 to 1"
        if dtype.kind == "f":
            hint += "; if they are normalised already, the model takes them as (B, 3, H, W)"
        elif dtype == np.uint16:
            hint = "numpy.rint(pixels / 257).astype('uint8') scales 16 bits to 8"
        elif dtype.kind in "iu":
            hint = "pixels.astype('uint8') if they lie in 0 to 255"
        needed = f"raw uint8, 0 to 255. {hint}"
        raise ArrayTypeError(f"pixels have dtype {dtype}; normalize takes {needed}")
    if len(shape) not in (3, 4) or shape[-1] != 3:
        hint = ""
        if len(shape) == 2:
            hint = ". For grey: numpy.stack([pixels] * 3, axis=-1)"
        elif len(shape) in (3, 4) and shape[-3] == 3:
            axes = "1, 2, 0" if len(shape) == 3 else "0, 2, 3, 1"
            hint = f". It looks channels-first: pixels.transpose({axes})"
        elif len(shape) == 3:
            hint = ". pvt_ref.preprocess(PIL.Image.fromarray(pixels)) takes grey and alpha"
        raise ShapeError(f"pixels have shape {shape}; it must be (H, W, 3) or (B, H, W, 3){hint}")
    if 0 in shape:
        raise ShapeError(f"pixels have shape {shape}: they are empty")
    return IMAGENET._normalized(pixels if pixels.ndim == 4 else pixels[None])


def pad_to_multiple(images: Array, multiple: int) -> Array:
    """Images padded at the right and bottom until H and W are multiples, for dense prediction.

    The new pixels are 0, the mean colour after :func:`normalize`. No pixel moves, so ``F_i[:, :,
    :ceil(H / stride_i), :ceil(W / stride_i)]`` are the tokens of the picture. Attention is global:
    all tokens see the padding, so padded and unpadded results differ slightly.

    Args:
        images: (B, C, H, W) normalised floats, of NumPy, CuPy or another array API library.
        multiple: H and W become multiples of it; ``config.size_multiple`` (32 as published).

    Returns:
        (B, C, H', W'), the smallest such size, of images' dtype and device; images itself if it
        fits already.

    Raises:
        ArrayTypeError: if images are not an array of floats.
        ShapeError: if they are not (B, C, H, W) or are empty.
        RangeError: if multiple is not a positive whole number.
    """
    if not is_whole(multiple) or not 0 < multiple < TOO_LARGE:
        needed = "a whole number of pixels from 1 to 2**31, such as config.size_multiple"
        raise RangeError(f"multiple is {shown(multiple)}; it must be {needed}")
    xp = array_module(images)
    name = dtype_name(images)
    if not name.startswith(("float", "bfloat", "complex")):
        why = "whose 0 is the mean colour (in pixels it is black): pvt_ref.normalize(pixels)"
        raise ArrayTypeError(f"images have dtype {name}; pad normalised floats, {why}")
    B, C, H, W = shape = batch_shape(images, channels=3)
    if 0 in shape:
        raise ShapeError(f"images have shape {shape}: they are empty")
    multiple = int(multiple)  # a NumPy uint8 would wrap round
    below, beside = -H % multiple, -W % multiple
    zero = xp.zeros_like(images[:, :, :1, :1])  # (B, C, 1, 1)
    if below:
        images = xp.concat((images, xp.broadcast_to(zero, (B, C, below, W))), axis=2)
    if beside:
        images = xp.concat((images, xp.broadcast_to(zero, (B, C, H + below, beside))), axis=3)
    return images  # (B, C, H', W')
