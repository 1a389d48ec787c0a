"""From the small logit map of a segmentation network to a class for every pixel of a picture.

As in the released code (mmsegmentation), logits are resized to the size of the network's input,
then to that of the picture; then the most likely class is taken. Large pictures can be processed
window by window.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pvt_ref.api import default_ops, forward
from pvt_ref.arrays import Array, Grid, array_module, from_host
from pvt_ref.checks import Size, as_size
from pvt_ref.errors import ConfigError, ShapeError
from pvt_ref.layers.resize import resize, resize_matrix
from pvt_ref.models.architecture import architecture_of
from pvt_ref.ops import Ops


def check_dense(config: Any) -> None:
    """Refuses a network that is not for segmentation. Raises: ConfigError."""
    row = architecture_of(config)
    if not row.dense:
        what = f"a {row.title} classifies a whole picture, not its pixels"
        advice = "Use a segmentation network: with_segmentation_head(model, ...) makes one"
        raise ConfigError(f"{what}. {advice}")


def resize_logits(logits: Array, *sizes: Grid) -> Array:
    """Logits resized bilinearly to each size in turn (align_corners False).

    Args:
        logits: (B, K, h, w).
        sizes: (H, W) each.

    Returns:
        (B, K, H, W) of the last size.
    """
    xp = array_module(logits)
    x = xp.permute_dims(logits, (0, 2, 3, 1))  # (B, h, w, K)
    for size in sizes:
        x = _resized(x, size)
    return xp.permute_dims(x, (0, 3, 1, 2))  # (B, K, H, W)


def _resized(x: Array, size: Grid) -> Array:
    """x (B, h, w, K) resized bilinearly to (B, H, W, K)."""
    ops = default_ops(x)
    return ops[resize].forward(None, x, ops, tuple(size), keep=False)[0]


def logit_bands(
    logits: Array, size: Grid, final: Grid, pixels: int = 2**20
) -> Iterator[tuple[int, int, Array]]:
    """As ``resize_logits(logits, size, final)``, one band of rows at a time.

    Args:
        logits: (1, K, h, w).
        size: (H, W) of the network's input.
        final: (H', W') of the picture.
        pixels: number of pixels in a band of the result.

    Returns:
        An iterator over (first row, row after the last, logits (1, K, rows, W')).
    """
    xp = array_module(logits)
    x = xp.permute_dims(resize_logits(logits, size), (0, 2, 3, 1))  # (1, H, W, K)
    rows = max(1, pixels // final[1])
    A_h = resize_matrix(final[0], size[0])  # (H', H)
    for top in range(0, final[0], rows):
        bottom = min(top + rows, final[0])
        if size == final:
            part = x[:, top:bottom, :, :]
        else:
            read = np.flatnonzero(A_h[top:bottom].any(axis=0))
            near = slice(int(read[0]), int(read[-1]) + 1)  # the input rows of this band
            band = from_host(A_h[top:bottom, near], like=x)
            wide = x[:, near, :, :]  # (1, r, W, K)
            wide = _resized(wide, (wide.shape[1], final[1]))
            flat = xp.reshape(wide, (1, wide.shape[1], -1))  # (1, r, W' K)
            part = xp.astype(band, x.dtype) @ flat  # (1, rows, W' K)
            part = xp.reshape(part, (1, bottom - top, final[1], x.shape[-1]))
        yield top, bottom, xp.permute_dims(part, (0, 3, 1, 2))


def windows(size: Grid, crop: Grid, stride: Grid) -> Iterator[tuple[slice, slice]]:
    """Positions of windows in an image; the last ones are shifted back to end at the border.

    Args:
        size: (H, W) of the image.
        crop: (h, w) of a window; no larger than the image.
        stride: rows and columns from one window to the next.
    """
    along: list[list[int]] = []
    for side, part, step in zip(size, crop, stride, strict=True):
        count = max(side - part + step - 1, 0) // step + 1
        along.append([min(i * step, side - part) for i in range(count)])
    for top, left in itertools.product(*along):
        yield slice(top, top + crop[0]), slice(left, left + crop[1])


def sliding_logits(
    params: Any,
    images: Array,
    config: Any,
    crop: Size,
    stride: Size,
    *,
    ops: Ops | None = None,
) -> Array:
    """Logits at the size of the images, from windows; overlapping windows are averaged.

    Args:
        params: the weights, or the result of :func:`pvt_ref.prepare` for images of size crop.
        images: (B, in_chans, H, W) normalised floats.
        config: the configuration of the weights.
        crop: (h, w) of a window, or the side of a square; cut to the image's size.
        stride: rows and columns from one window to the next, at most crop.
        ops: as for :func:`pvt_ref.forward`.

    Returns:
        (B, num_classes, H, W). With one window, those of the whole image, resized.

    Raises:
        ShapeError: if crop or stride is not one or two positive whole numbers, or stride exceeds
            crop, which would leave pixels without an answer.
        ConfigError: if the network is not for segmentation.
        PVTError: as :func:`pvt_ref.forward`.
    """
    check_dense(config)
    return slide(lambda part: forward(params, part, config, ops=ops), images, crop, stride)


def slide(logits_of: Callable[[Array], Array], images: Array, crop: Size, stride: Size) -> Array:
    """As :func:`sliding_logits`, for a function from a window to its logits (B, K, h', w')."""
    crop, stride = as_size(crop, least=1), as_size(stride, least=1)
    if any(step > side for step, side in zip(stride, crop, strict=True)):
        what = f"stride is {stride} and crop {crop}"
        raise ShapeError(f"{what}: pixels between two windows would get no logits")
    xp = array_module(images)
    H, W = images.shape[2:]
    h, w = min(crop[0], H), min(crop[1], W)
    total = covered = xp.zeros(0)
    for k, (down, right) in enumerate(windows((H, W), (h, w), stride)):
        logits = logits_of(images[:, :, down, right])
        logits = resize_logits(logits, (h, w))  # (B, K, h, w)
        if k == 0:  # now the device and dtype are known
            total = xp.zeros((*logits.shape[:2], H, W), dtype=logits.dtype)  # (B, K, H, W)
            covered = xp.zeros((1, 1, H, W), dtype=logits.dtype)
        total[:, :, down, right] += logits
        covered[:, :, down, right] += 1
    return total / covered
