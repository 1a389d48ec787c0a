"""Argument checks: one for numbers, one for arrays, one for images, shared by all networks.

The code inside trusts its arrays: a caller's mistakes are caught here, once.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from numbers import Integral, Real
from operator import ge, gt, le, lt
from typing import Any

import numpy as np

from pvt_ref.arrays import (
    FLOAT_DTYPES,
    Array,
    array_module,
    describe_type,
    dtype_name,
    is_array,
    library_and_dtype,
    same_library,
)
from pvt_ref.draws import Draws
from pvt_ref.errors import ArrayTypeError, NonFiniteError, PVTError, RangeError, ShapeError, shown

#: Numbers from here on are refused: no array is this large, and floats lose their last digits.
TOO_LARGE = 2**31

#: The bound of whole numbers. A seed may have as many bits as NumPy's own.
_LARGEST_WHOLE = 2**128

#: Bounds of numbers: their words in messages, and the comparison that must hold.
_BOUNDS = {"least": ("at least", ge), "above": ("above", gt)}
_BOUNDS |= {"most": ("at most", le), "below": ("below", lt)}

#: An image size in pixels: a side, or (H, W).
Size = int | tuple[int, int]


def as_size(size: Any, side: str = "a side", least: int = -TOO_LARGE) -> tuple[int, int]:
    """(H, W) of an image size that may be given as one side. Raises: ShapeError."""
    pair = (size, size) if is_whole(size) else size
    good = isinstance(pair, tuple | list) and len(pair) == 2 and all(map(is_whole, pair))
    if not good or not all(least <= int(pixels) < TOO_LARGE for pixels in pair):
        needed = f"{side} or (H, W), in whole pixels, each at least 1 and below 2**31"
        raise ShapeError(f"size is {shown(size)}; it must be {needed}")
    return int(pair[0]), int(pair[1])


def is_whole(value: object) -> bool:
    """Whether value is a Python or NumPy integer, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether value is a real number, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_moderate(value: object) -> bool:
    """Whether value is a real number within +-TOO_LARGE; NaN is not."""
    return is_real(value) and -TOO_LARGE < value < TOO_LARGE  # type: ignore[operator]


def check_number(name: str, value: Any, *, whole: bool = False, **bounds: float | None) -> Any:
    """value as a plain int or float, because NumPy's scalars would widen float32 arrays.

    Bounds are called least, above, most, below. Raises: RangeError, also if value is not finite.
    """
    if isinstance(value, np.generic):  # it would compare bounds in float32
        value = value.item()
    limit = _LARGEST_WHOLE if whole else sys.float_info.max
    good = (is_whole(value) if whole else is_real(value)) and -limit <= value <= limit
    held = [(*_BOUNDS[key], bound) for key, bound in bounds.items() if bound is not None]
    if not good or not all(holds(value, bound) for _, holds, bound in held):
        limits = " and ".join(f"{words} {bound:g}" for words, _, bound in held)
        kind = "a whole number" if whole else "a number"
        raise RangeError(f"{name} is {shown(value)}; it must be {kind} {limits}".rstrip())
    return int(value) if whole else float(value)


def settle(record: Any, name: str, **bounds: Any) -> None:
    """For a frozen record's __post_init__: sets a field to the number check_number returns."""
    object.__setattr__(record, name, check_number(name, getattr(record, name), **bounds))


def check_interval(name: str, pair: Any, *, most: float, **bounds: Any) -> tuple[float, float]:
    """Two numbers within bounds, the first at most the second, as floats. Raises: RangeError."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise RangeError(f"{name} is {shown(pair)}; it must be two numbers, the smaller one first")
    least = check_number(f"{name}[0]", pair[0], **bounds, most=most)
    return least, check_number(f"{name}[1]", pair[1], least=least, most=most)


def check_flag(name: str, value: object) -> None:
    """Refuses anything but True and False. Raises: RangeError."""
    if not isinstance(value, bool):
        raise RangeError(f"{name} is {shown(value)}; it must be True or False")


def check_type(
    name: str, value: object, kind: type, advice: str = "", error: type[PVTError] = ArrayTypeError
) -> None:
    """Raises error if value is not of that kind; the advice says how to get one that is."""
    if not isinstance(value, kind):
        needed = f"a {kind.__name__}" + (f", {advice}" if advice else "")
        raise error(f"{name} is a {type(value).__name__}; it must be {needed}")


def check_float(name: str, x: Array) -> None:
    """Refuses an array that is not float32 or float64. Raises: ArrayTypeError."""
    if dtype_name(x) not in FLOAT_DTYPES:
        needed = "it must be float32 or float64. x.astype('float32') converts it"
        raise ArrayTypeError(f"{name} has dtype {dtype_name(x)}; {needed}")


def _check_library(what: str, x: Array, weight: Array) -> None:
    """Refuses an array of another library or device than the weights'. Raises: ArrayTypeError."""
    if not same_library(x, weight):
        raise ArrayTypeError(
            f"{what} {library_and_dtype(x)} and the weights are {library_and_dtype(weight)}; both "
            f"must be on one device. Move one: pvt_ref.to_device(x, 'cuda') or pvt_ref.to_numpy(x)"
        )


def batch_shape(
    images: Array, channels: int | None = None, C: object = "C"
) -> tuple[int, int, int, int]:
    """(B, C, H, W) of images; refuses images with the channels last. Raises: ShapeError."""
    shape = tuple(images.shape)
    needed = f"they must be (B, {C}, H, W)"
    if len(shape) != 4:
        hint = ". A single image needs a batch axis: images[None]" * (len(shape) == 3)
        raise ShapeError(f"images have rank {len(shape)}, shape {shape}; {needed}{hint}")
    if shape[1] != channels == shape[3]:
        raise ShapeError(
            f"images look channels-last: {shape}; they must be (B, {C}, H, W). "
            f"images.transpose(0, 3, 1, 2) moves the channels"
        )
    return shape


def check_images(images: Array, weight: Array, config: Any) -> Array:
    """images (B, in_chans, H, W), checked, and cast to the dtype of the weights."""
    if not is_array(images):
        raise ArrayTypeError(
            f"images are {describe_type(images)}. They must be one array (B, {config.in_chans}, H, "
            f"W) of floats: numpy.stack(list_of_images) joins several, and "
            f"pvt_ref.load_image(path) reads one from a file"
        )
    _check_library("images are", images, weight)
    xp = array_module(images)
    name = dtype_name(images)
    if not name.startswith(("float", "bfloat")):
        needed = "float32 or float64, or other floats. x.astype('float32') fixes a byte order too"
        if name == "object":
            needed += " (is it a list of arrays of different shapes?)"
        elif name.startswith(("int", "uint", "bool")):
            needed = "normalised floats, and these look like raw pixels. Preprocess them first: "
            needed += "pvt_ref.load_image(path), or pvt_ref.normalize(pixels)"
        raise ArrayTypeError(f"images have dtype {name}; they must be {needed}")
    C = config.in_chans
    shape = batch_shape(images, C, C)
    if shape[1] != C:
        needed = f"the configuration has in_chans={C}, so they must be (B, {C}, H, W)"
        raise ShapeError(f"images have {shape[1]} channels, shape {shape}; {needed}")
    if shape[0] == 0:
        raise ShapeError(f"the batch is empty: images have shape {shape}; B must be at least 1")
    config.grids(shape[2], shape[3])  # refuses sizes that would lose pixels
    return xp.astype(images, weight.dtype, copy=False)


def check_cotangent(name: str, dy: Array, shape: tuple[int, ...], like: Array) -> Array:
    """A gradient of that shape, checked, and cast to the dtype of the weight like."""
    if not is_array(dy):
        raise ArrayTypeError(f"{name} is {describe_type(dy)}. It must be an array {shape}")
    _check_library(f"{name} is", dy, like)
    check_float(name, dy)
    if tuple(dy.shape) != shape:
        why = f"the forward returned {shape}, and dL/dy has the shape of y"
        raise ShapeError(f"{name} has shape {tuple(dy.shape)}; {why}")
    return array_module(dy).astype(dy, like.dtype, copy=False)


def check_pyramid_cotangents(
    dmaps: Sequence[Array | None], shapes: Sequence[tuple[int, ...]], like: Array
) -> list[Array]:
    """A gradient for every map, checked, with zeros of the map's shape in place of None."""
    n = len(shapes)
    if not isinstance(dmaps, Sequence) or len(dmaps) != n:
        given = len(dmaps) if isinstance(dmaps, Sequence) else f"a {type(dmaps).__name__}"
        needed = f"a list of {n} arrays, dL/dF_1 to dL/dF_{n} (None where a map is not in the loss)"
        raise ShapeError(f"dmaps must be {needed}; got {given}")
    xp = array_module(like)
    return [
        xp.zeros(shape, dtype=like.dtype)
        if dmap is None
        else check_cotangent(f"dmaps[{i}]", dmap, shape, like)
        for i, (dmap, shape) in enumerate(zip(dmaps, shapes, strict=True))
    ]


def check_stages(stages: Iterable[int], count: int) -> set[int]:
    """The stages as a set, each a whole number from 1 to count. Raises: RangeError."""
    with suppress(TypeError):  # not iterable; arrays without an axis only say so here
        wanted = list(stages)
        if all(is_whole(s) and 1 <= s <= count for s in wanted):
            return {int(s) for s in wanted}
    needed = f"a list of numbers from 1 to {count}, such as {sorted({1, count})}"
    raise RangeError(f"stages are {shown(stages)}; they must be {needed}")


def check_blocks(blocks: Iterable[int], count: int) -> tuple[int, ...]:
    """Rising numbers of blocks, each from 0 to count - 1. Raises: RangeError."""
    with suppress(TypeError):
        numbers = list(blocks)
        good = numbers and all(is_whole(k) and 0 <= k < count for k in numbers)
        if good and all(k < following for k, following in pairwise(numbers)):
            return tuple(map(int, numbers))
    example = f"such as {sorted({0, count - 1})}, or None for the last block"
    needed = f"a list of rising numbers from 0 to {count - 1}, {example}"
    raise RangeError(f"blocks are {shown(blocks)}; they must be {needed}")


def check_finite(name: str, x: Array, cause: str) -> None:
    """Refuses a host array that holds NaN or infinity; the cause ends the message.

    Arrays on a device are not checked: reading them would make the host wait.
    """
    if isinstance(x, np.ndarray) and x.dtype.kind == "f" and not np.isfinite(x).all():
        bad = np.argwhere(~np.isfinite(x))
        where = tuple(map(int, bad[0]))
        raise NonFiniteError(
            f"{name} holds {len(bad)} values of {x.size} that are NaN or infinite, the first at "
            f"index {where}. {cause}"
        )


def check_rng(rng: object, *, draws: bool = False) -> None:
    """Refuses anything but a NumPy generator or, if draws, a Draws. Raises: ArrayTypeError."""
    if not isinstance(rng, np.random.Generator) and not (draws and isinstance(rng, Draws)):
        raise ArrayTypeError(
            f"rng is {type(rng).__name__}; it must be a NumPy generator, such as "
            f"numpy.random.default_rng(0). (Masks and weights are drawn on the host, so that a "
            f"seed means the same on every device.)"
        )
