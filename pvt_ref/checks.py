"""What is refused: one number check, one array check, one image check, for all networks.

Inside, arrays are trusted: what a caller can get wrong about them is caught here, once.
"""

import sys
from collections.abc import Iterable, Sequence
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
from pvt_ref.errors import ArrayTypeError, NonFiniteError, RangeError, ShapeError, shown

#: Numbers from here on are refused: no array is so large, and floats lose their last digits.
TOO_LARGE = 2**31

#: Of whole numbers. A seed may have as many bits as NumPy's own.
_LARGEST_WHOLE = 2**128


#: Of an image: a side, or (H, W), in pixels.
Size = int | tuple[int, int]


def as_size(size: Any) -> tuple[int, int]:
    """(H, W) of an image size that may be given as one side. Raises: ShapeError."""
    pair = (size, size) if is_whole(size) else size
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_whole, pair)):
        raise ShapeError(f"size is {shown(size)}; it must be a side or (H, W), in whole pixels")
    if not all(abs(side) < TOO_LARGE for side in pair):
        raise ShapeError(f"size is {shown(size)}; each side must be below 2**31")
    return int(pair[0]), int(pair[1])


def is_whole(value: object) -> bool:
    """Whether value is an integer, of Python or of NumPy, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether value is a real number, and not a truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_moderate(value: object) -> bool:
    """A number that is neither NaN, infinite, nor beyond all use."""
    return is_real(value) and -TOO_LARGE < value < TOO_LARGE  # type: ignore[operator]


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> Any:
    """value as a plain int or float: NumPy's scalars would widen float32 arrays.

    Raises:
        RangeError: unless it is a finite (whole) number within the bounds.
    """
    if isinstance(value, np.generic):  # which would compare bounds in float32
        value = value.item()
    number: Any = value
    limit = _LARGEST_WHOLE if whole else sys.float_info.max
    bounds: list[Any] = [("at least", ge, least), ("above", gt, above), ("at most", le, most)]
    bounds = [b for b in (*bounds, ("below", lt, below)) if b[2] is not None]
    good = (is_whole(number) if whole else is_real(number)) and -limit <= number <= limit
    if not good or not all(holds(number, bound) for _, holds, bound in bounds):
        limits = " and ".join(f"{word} {bound:g}" for word, _, bound in bounds)
        kind = "a whole number" if whole else "a number"
        raise RangeError(f"{name} is {shown(value)}; it must be {kind} {limits}".rstrip())
    return int(number) if whole else float(number)


def settle(record: Any, name: str, **bounds: Any) -> None:
    """In a frozen record's __post_init__: a field becomes the number that check_number returns."""
    object.__setattr__(record, name, check_number(name, getattr(record, name), **bounds))


def check_flag(name: str, value: object) -> None:
    """Refuses what is neither True nor False. Raises: RangeError."""
    if not isinstance(value, bool):
        raise RangeError(f"{name} is {shown(value)}; it must be True or False")


def check_type(name: str, value: object, kind: type, advice: str = "") -> None:
    """Refuses another kind; the advice says how to get the right one. Raises: ArrayTypeError."""
    if not isinstance(value, kind):
        raise ArrayTypeError(
            f"{name} is a {type(value).__name__}; it must be a {kind.__name__}"
            + (f", {advice}" if advice else "")
        )


def check_float(name: str, x: Array) -> None:
    """Refuses an array of another dtype than float32 or float64. Raises: ArrayTypeError."""
    if dtype_name(x) not in FLOAT_DTYPES:
        raise ArrayTypeError(
            f"{name} has dtype {dtype_name(x)}; it must be float32 or float64. "
            f"x.astype('float32') converts it"
        )


def check_images(images: Array, weight: Array, config: Any) -> Array:
    """images (B, in_chans, H, W), checked, and cast to the dtype of the weights.

    Raises:
        ArrayTypeError: not an array, integers, objects, or on another device than the weights.
        ShapeError: wrong rank, channels or size; an empty batch.
    """
    if not is_array(images):
        raise ArrayTypeError(
            f"images are {describe_type(images)}. They must be one array (B, {config.in_chans}, H, "
            f"W) of floats: numpy.stack(list_of_images) makes one of several, and "
            f"pvt_ref.load_image(path) reads one from a file"
        )
    if not same_library(images, weight):
        raise ArrayTypeError(
            f"images are {library_and_dtype(images)} and the weights {library_and_dtype(weight)}; "
            f"both must lie on one device. Move one: pvt_ref.to_device(x, 'cuda') or "
            f"pvt_ref.to_numpy(x)"
        )
    xp = array_module(images)
    name = dtype_name(images)
    if name.startswith(("int", "uint", "bool")):
        raise ArrayTypeError(
            f"images have dtype {name}, which looks like raw pixels; they must be normalised "
            f"floats. Preprocess them first: pvt_ref.load_image(path), or pvt_ref.normalize(pixels)"
        )
    if not name.startswith(("float", "bfloat")):
        raise ArrayTypeError(
            f"images have dtype {name}; they must be float32 or float64, or other floats to be "
            f"cast. x.astype('float32') also mends another byte order"
            + (" (is it a ragged list of arrays?)" if name == "object" else "")
        )
    shape = tuple(images.shape)
    C = config.in_chans
    if len(shape) != 4:
        hint = " A single image needs a batch axis: images[None]." if len(shape) == 3 else ""
        raise ShapeError(
            f"images have rank {len(shape)}, shape {shape}; they must be (B, {C}, H, W).{hint}"
        )
    if shape[1] != C:
        if shape[3] == C:
            raise ShapeError(
                f"looks channels-last: {shape}; images are (B, {C}, H, W). "
                f"images.transpose(0, 3, 1, 2) turns them"
            )
        raise ShapeError(
            f"images have {shape[1]} channels, shape {shape}; the configuration has in_chans={C}, "
            f"so they must be (B, {C}, H, W)"
        )
    if shape[0] == 0:
        raise ShapeError(f"the batch is empty: images have shape {shape}; B must be at least 1")
    config.grids(shape[2], shape[3])  # refuses sizes that would lose pixels
    return xp.astype(images, weight.dtype, copy=False)


def check_cotangent(name: str, dy: Array, shape: tuple[int, ...], like: Array) -> Array:
    """A gradient of that shape, cast to the dtype of the weight like.

    Raises:
        ArrayTypeError: if dy is no array of floats, or lies on another device than like.
        ShapeError: if it has another shape.
    """
    if not is_array(dy):
        raise ArrayTypeError(f"{name} is {describe_type(dy)}. It must be an array {shape}")
    if not same_library(dy, like):
        raise ArrayTypeError(
            f"{name} is {library_and_dtype(dy)} and the weights are {library_and_dtype(like)}; "
            f"both must lie on one device. Move one: pvt_ref.to_device(x, 'cuda') or "
            f"pvt_ref.to_numpy(x)"
        )
    check_float(name, dy)
    if tuple(dy.shape) != shape:
        raise ShapeError(
            f"{name} has shape {tuple(dy.shape)}; the forward returned {shape}, and a gradient has "
            f"the shape of what it belongs to"
        )
    return array_module(dy).astype(dy, like.dtype, copy=False)


def check_pyramid_cotangents(
    dmaps: Sequence[Array | None], shapes: Sequence[tuple[int, ...]], like: Array
) -> list[Array]:
    """A gradient for every map, checked, with zeros of the map's shape in the place of None."""
    if not isinstance(dmaps, Sequence) or len(dmaps) != len(shapes):
        given = f"{len(dmaps)}" if isinstance(dmaps, Sequence) else f"a {type(dmaps).__name__}"
        raise ShapeError(
            f"dmaps must be a list of {len(shapes)} arrays, dL/dF_1 to dL/dF_{len(shapes)} (None "
            f"where the loss does not use a map); got {given}"
        )
    xp = array_module(like)
    return [
        xp.zeros(shape, dtype=like.dtype)
        if dmap is None
        else check_cotangent(f"dmaps[{i}]", dmap, shape, like)
        for i, (dmap, shape) in enumerate(zip(dmaps, shapes, strict=True))
    ]


def check_stages(stages: Iterable[int], count: int) -> set[int]:
    """The stages as a set, each a whole number from 1 to count. Raises: RangeError."""
    wanted: list[Any]
    try:
        wanted = list(stages)
    except TypeError:  # not iterable, which arrays without an axis find out only now
        wanted = [None]
    if not all(is_whole(s) and 1 <= s <= count for s in wanted):
        raise RangeError(
            f"stages are {shown(stages)}; they must be a list of numbers from 1 to {count}, such "
            f"as {sorted({1, count})}"
        )
    return {int(s) for s in wanted}


def check_blocks(blocks: Iterable[int], count: int) -> tuple[int, ...]:
    """Numbers of blocks, from 0 to count - 1, each larger than the one before.

    Raises: RangeError.
    """
    numbers: list[Any]
    try:
        numbers = list(blocks)
    except TypeError:
        numbers = []
    good = numbers and all(is_whole(k) and 0 <= k < count for k in numbers)
    if not good or any(k >= following for k, following in pairwise(numbers)):
        raise RangeError(
            f"blocks are {shown(blocks)}; they must be a list of rising numbers from 0 to "
            f"{count - 1}, such as {sorted({0, count - 1})}, or None for the last block"
        )
    return tuple(map(int, numbers))


def check_finite(name: str, x: Array, cause: str) -> None:
    """Refuses a host array that holds NaN or infinity; the cause ends the message.

    Arrays on a device are passed over: looking at them would make the host wait.

    Raises:
        NonFiniteError: with how many there are, and where the first is.
    """
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f" or bool(np.isfinite(x).all()):
        return
    bad = ~np.isfinite(x)
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    raise NonFiniteError(
        f"{name} holds {int(bad.sum())} values of {x.size} that are NaN or infinite, the first at "
        f"index {where}. {cause}"
    )


def check_rng(rng: object, *, draws: bool = False) -> None:
    """Refuses all but a NumPy generator or, if draws, a Draws. Raises: ArrayTypeError."""
    if not isinstance(rng, np.random.Generator) and not (draws and isinstance(rng, Draws)):
        raise ArrayTypeError(
            f"rng is {type(rng).__name__}; it must be a NumPy generator, such as "
            f"numpy.random.default_rng(0). (Masks and weights are drawn on the host, so that a "
            f"seed means the same on every device.)"
        )
