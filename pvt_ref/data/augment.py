"""Random changes of a batch that keep its labels: crop, flip, cutout, erasing.

Mixup and CutMix change the targets as well. :mod:`pvt_ref.data.photo_augment` has the changes of
photos before normalisation.

Every function takes and returns a batch (B, C, H, W) of NumPy or CuPy arrays. A training gives
every sample a generator of its own (:class:`~pvt_ref.draws.SampleDraws`), so a sample's changes do
not depend on its batch. All raise ShapeError for a wrong shape, ArrayTypeError if an array or the
generator is not one, and RangeError for a number out of its range.
"""

from typing import TypeAlias

import numpy as np

from pvt_ref.arrays import Array, array_module, from_host
from pvt_ref.checks import batch_shape, check_interval, check_number, check_rng
from pvt_ref.draws import Generator, SampleDraws
from pvt_ref.errors import ArrayTypeError, ShapeError

#: The source of a batch's random numbers.
Source: TypeAlias = "Generator | SampleDraws"


def random_crop(images: Array, padding: int, rng: Source) -> Array:
    """Each image shifted by up to padding pixels along both axes; new pixels are 0.

    Args:
        images: (B, C, H, W) floats, normalised, so that 0 is the mean colour.
        padding: at least 0, in pixels. 0 draws nothing.
        rng: source of the shifts.

    Returns:
        (B, C, H, W) of images' dtype; images itself if padding is 0.
    """
    padding = check_number("padding", padding, least=0, whole=True)
    B, C, H, W = _shape(images, rng)
    if padding == 0:
        return images
    xp = array_module(images)
    down = rng.integers(0, 2 * padding + 1, B)
    right = rng.integers(0, 2 * padding + 1, B)
    padded = xp.zeros((B, C, H + 2 * padding, W + 2 * padding), dtype=images.dtype)
    padded[:, :, padding : padding + H, padding : padding + W] = images
    # piece[b, c, i, j] = padded[b, c, down[b] + i, right[b] + j]
    b = from_host(np.arange(B)[:, None, None, None], like=images)
    c = from_host(np.arange(C)[:, None, None], like=images)
    i = from_host((down[:, None] + np.arange(H))[:, None, :, None], like=images)  # (B, 1, H, 1)
    j = from_host((right[:, None] + np.arange(W))[:, None, None, :], like=images)  # (B, 1, 1, W)
    return padded[b, c, i, j]  # (B, C, H, W)


def random_flip(images: Array, rng: Source) -> Array:
    """Each image (B, C, H, W) mirrored, left to right, with probability one half.

    Args:
        images: (B, C, H, W), of any dtype.
        rng: source of the choice, one draw per image.

    Returns:
        (B, C, H, W) of images' dtype, new memory.
    """
    B = _shape(images, rng)[0]
    xp = array_module(images)
    turned = from_host(rng.random(B) < 0.5, like=images)[:, None, None, None]
    return xp.where(turned, xp.flip(images, axis=-1), images)


def cutout(images: Array, side: int, rng: Source) -> Array:
    """A square of each image set to 0, its centre anywhere (DeVries and Taylor, arXiv 1708.04552).

    At the border, part of the square lies outside.

    Args:
        images: (B, C, H, W) floats, normalised.
        side: of the square, in pixels. 0 draws nothing.
        rng: source of the centres.

    Returns:
        (B, C, H, W) of images' dtype; images itself if side is 0.
    """
    side = check_number("side", side, least=0, whole=True)
    B, _, H, W = _shape(images, rng)
    if side == 0:
        return images
    top = rng.integers(0, H, B)[:, None] - side // 2
    left = rng.integers(0, W, B)[:, None] - side // 2
    return _blanked(images, top, left, top + side, left + side)


def random_erasing(
    images: Array,
    probability: float,
    rng: Source,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Array:
    """A rectangle of some of the images set to 0 (Zhong et al. 2017, arXiv 1708.04896).

    Its share of the area is uniform, its height / width log-uniform among those that fit, and it
    lies inside. (The paper repeats both draws until they fit. Here every image takes five draws.)

    Args:
        images: (B, C, H, W) floats, normalised, so that 0 is the mean colour.
        probability: that an image is changed, from 0 to 1. 0 draws nothing.
        rng: source of the choice, the areas, the ratios and the places.
        area: least and largest share of the image, above 0 and at most 1; rounded to whole pixels,
            at least one.
        ratio: least and largest height / width, from 0.01 to 100; exceeded if the image is so
            elongated that no such rectangle fits.

    Returns:
        (B, C, H, W) of images' dtype; images itself if probability is 0.
    """
    probability = check_number("probability", probability, least=0, most=1)
    area = check_interval("area", area, above=0, most=1)
    ratio = check_interval("ratio", ratio, least=0.01, most=100)
    B, _, H, W = _shape(images, rng)
    if probability == 0:
        return images
    chosen = rng.random(B) < probability
    pixels = H * W * (area[0] + (area[1] - area[0]) * rng.random(B))
    # height = sqrt(pixels shape) <= H and width = sqrt(pixels / shape) <= W
    fitting = pixels / W**2, H**2 / pixels
    low, high = (np.log(np.clip(bound, *fitting)) for bound in ratio)
    shape = np.exp(low + (high - low) * rng.random(B))
    height = np.clip(np.rint(np.sqrt(pixels * shape)), 1, H)
    width = np.clip(np.rint(np.sqrt(pixels / shape)), 1, W)
    top = np.floor((H - height + 1) * rng.random(B))[:, None]
    left = np.floor((W - width + 1) * rng.random(B))[:, None]
    height = np.where(chosen, height, 0)
    return _blanked(images, top, left, top + height[:, None], left + width[:, None])


def _blanked(
    images: Array, top: np.ndarray, left: np.ndarray, bottom: np.ndarray, right: np.ndarray
) -> Array:
    """A rectangle of each image set to 0; the borders are (B, 1) and may lie outside."""
    xp = array_module(images)
    rows, columns = np.arange(images.shape[2]), np.arange(images.shape[3])
    in_rows = (top <= rows) & (rows < bottom)  # (B, H)
    in_columns = (left <= columns) & (columns < right)  # (B, W)
    kept = ~(in_rows[:, :, None] & in_columns[:, None, :])  # (B, H, W)
    return images * xp.astype(from_host(kept[:, None], like=images), images.dtype)


def mixup(images: Array, targets: Array, alpha: float, rng: Generator) -> tuple[Array, Array]:
    """Each sample and its target blended with another of the batch.

    Zhang et al. 2018 (arXiv 1710.09412), with one lambda ~ Beta(alpha, alpha) per batch::

        x = lambda x_b + (1 - lambda) x_partner(b)
        t = lambda t_b + (1 - lambda) t_partner(b)

    Args:
        images: (B, C, H, W) floats.
        targets: (B, K) floats, a distribution a row.
        alpha: at least 0. 0 draws nothing and blends nothing; 1 makes lambda uniform.
        rng: source of lambda and of the partners.

    Returns:
        images (B, C, H, W) and targets (B, K), of the dtypes that they had.

    Raises:
        ShapeError: if images are not (B, C, H, W), or targets are not for B of them.
    """
    alpha = check_number("alpha", alpha, least=0)
    B, _, _, _ = _pairs_shape(images, targets, rng)
    if alpha == 0:
        return images, targets
    lam = float(rng.beta(alpha, alpha))
    partner = from_host(rng.permutation(B), like=images)
    xp = array_module(images)

    def blend(x: Array) -> Array:
        return lam * x + (1 - lam) * xp.take(x, partner, axis=0)

    return blend(images), blend(targets)


def cutmix(images: Array, targets: Array, alpha: float, rng: Generator) -> tuple[Array, Array]:
    """A rectangle of each sample replaced by the same place of another, and its target blended.

    Yun et al. 2019 (arXiv 1905.04899), with one lambda ~ Beta(alpha, alpha) and one rectangle per
    batch. Its sides are sqrt(1 - lambda) of the image's and its centre is uniform; at the border,
    it is clipped. The targets are weighted by the pixels that remain of each::

        t = kept t_b + (1 - kept) t_partner(b),    kept = 1 - pixels replaced / (H W)

    Args:
        images: (B, C, H, W) floats.
        targets: (B, K) floats, a distribution a row.
        alpha: at least 0. 0 draws nothing and replaces nothing; 1 makes lambda uniform.
        rng: source of lambda, the partners, and the centre.

    Returns:
        images (B, C, H, W) and targets (B, K), of the dtypes that they had.

    Raises:
        ShapeError: if images are not (B, C, H, W), or targets are not for B of them.
    """
    alpha = check_number("alpha", alpha, least=0)
    B, _, H, W = _pairs_shape(images, targets, rng)
    if alpha == 0:
        return images, targets
    side = (1 - rng.beta(alpha, alpha)) ** 0.5  # of the rectangle, as a share of the image's
    partner = from_host(rng.permutation(B), like=images)
    height, width = round(H * side), round(W * side)
    top = int(rng.integers(0, H)) - height // 2
    left = int(rng.integers(0, W)) - width // 2
    replaced = np.zeros((H, W), bool)
    replaced[max(top, 0) : top + height, max(left, 0) : left + width] = True
    kept = 1 - float(np.mean(replaced))
    xp = array_module(images)
    mixed = xp.where(from_host(replaced, like=images), xp.take(images, partner, axis=0), images)
    return mixed, kept * targets + (1 - kept) * xp.take(targets, partner, axis=0)


def one_hot(labels: np.ndarray, classes: int, like: Array) -> Array:
    """Labels as distributions.

    Args:
        labels: (B,) integers in [0, K), on the host. Labels outside get a row of zeros.
        classes: K.
        like: an array of any shape with the wanted library, device and dtype.

    Returns:
        (B, K) of like's library, device and dtype: 1 at the label, else 0.

    Raises:
        RangeError: if classes is not a whole number, at least 1.
        ArrayTypeError: if labels are not a NumPy array of integers, or like is not an array.
        ShapeError: if labels are not (B,).
    """
    classes = check_number("classes", classes, least=1, whole=True)
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
        kind = getattr(labels, "dtype", type(labels).__name__)
        raise ArrayTypeError(f"labels are {kind}; they must be a NumPy array of integers")
    if labels.ndim != 1:
        raise ShapeError(f"labels have shape {labels.shape}; they must be (B,), one an image")
    host = labels[:, None] == np.arange(classes)
    return array_module(like).astype(from_host(host, like=like), like.dtype)


def _shape(images: Array, rng: Source) -> tuple[int, int, int, int]:
    """B, C, H, W, after checking images and the source of random numbers."""
    if not isinstance(rng, SampleDraws):
        check_rng(rng)
    array_module(images)  # refuses what is not an array
    B, C, H, W = batch_shape(images)
    if isinstance(rng, SampleDraws) and len(rng) != B:
        raise ShapeError(f"there are {B} images but the generators of {len(rng)} samples")
    return B, C, H, W


def _pairs_shape(images: Array, targets: Array, rng: Generator) -> tuple[int, int, int, int]:
    """B, C, H, W, after checking images, targets and the one generator for all."""
    check_rng(rng)  # pairs are drawn from the batch
    B, C, H, W = _shape(images, rng)
    shape = tuple(getattr(targets, "shape", ()))
    if not shape or shape[0] != B:
        hint = "pvt_ref.train.one_hot(labels, K, like=images) makes them from labels"
        raise ShapeError(f"targets have shape {shape}; they must be ({B}, K) distributions. {hint}")
    return B, C, H, W
