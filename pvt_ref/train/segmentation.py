"""What is different where a network learns the class of every pixel: batch, loss, measure."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pvt_ref.api import forward
from pvt_ref.arrays import Array, array_module, from_host
from pvt_ref.data.ahead import in_order
from pvt_ref.data.iou import IGNORED, count_pixels
from pvt_ref.data.pairs import LabelledPairs
from pvt_ref.data.samples import Samples
from pvt_ref.dense import resize_logits
from pvt_ref.layers.cross_entropy import cross_entropy, distribution
from pvt_ref.layers.resize import resize
from pvt_ref.ops import REFERENCE, Ops
from pvt_ref.tree import first_array, to_numpy


def draw_pairs(
    params: Any, data: Samples, chosen: np.ndarray, seed: int, epoch: int
) -> tuple[Array, Array]:
    """A micro-batch: images (B, C, h, w), and labels (B, h, w) int64, changed at random."""
    like = first_array(params)
    pixels = data.drawn_pixels(chosen, seed, epoch)  # (B, C + 1, h, w)
    images = data.preprocessing.normalize(np.ascontiguousarray(pixels[:, :-1]), like)
    return images, from_host(pixels[:, -1].astype(np.int64), like=like)


def pixel_loss(
    logits: Array, labels: Array, recipe: Any, ops: Ops = REFERENCE
) -> tuple[Array, Array, Array]:
    """The loss of logits that are resized to the size of the labels, and its gradient.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) integers; 255 is ignored.
        recipe: a SegmentationRecipe; its class_weights, loss_mean and label_smoothing.
        ops: the table that resizes.

    Returns:
        loss, dL/dlogits (B, K, h, w), and how many pixels were right, of those that count.
    """
    reduction = "mean_of_all" if recipe.loss_mean == "all" else "mean"
    weights = _class_weights(logits, recipe)

    def loss_of(full: Array) -> tuple[Array, Array]:
        return cross_entropy(
            full, labels, recipe.label_smoothing, reduction,
            ignore_index=IGNORED, class_weights=weights,
        )  # fmt: skip

    return _at_full_size(logits, labels, ops, loss_of)


def pixel_targets(
    like: Array, labels: Array, classes: int, recipe: Any
) -> tuple[Array, np.ndarray]:
    """What of :func:`pixel_loss` the host has to look at, for logits that are not there yet.

    Args:
        like: (B, C, h, w), the images, of the device and dtype of the logits to come.
        labels: as there.
        classes: K.
        recipe: as there.

    Returns:
        Distributions (B, K, H, W), smoothed, weighted, and zeros where a pixel does not count; and
        what the sum of the losses is multiplied by, an array without axes on the host.
    """
    xp, (B, H, W) = array_module(like), labels.shape
    shape = (B, classes, H, W)
    unknown = xp.broadcast_to(xp.zeros_like(like[:1, :1, :1, :1]), shape)  # only their shape counts
    weights = _class_weights(like, recipe)
    t, counted = distribution(unknown, labels, recipe.label_smoothing, IGNORED, weights)
    divisor = B * H * W if recipe.loss_mean == "all" else counted
    t = xp.permute_dims(xp.reshape(t, (B, H, W, classes)), (0, 3, 1, 2))  # (B, K, H, W)
    return t, np.array(1 / (divisor or 1), np.float32)


def pixel_loss_of_targets(
    logits: Array, labels: Array, t: Array, share: Array, ops: Ops
) -> tuple[Array, Array, Array]:
    """:func:`pixel_loss` with the same bits, of :func:`pixel_targets`; all on the device."""

    def loss_of(full: Array) -> tuple[Array, Array]:
        loss, dfull = cross_entropy(full, t, reduction="sum")
        return loss * share, dfull * share

    return _at_full_size(logits, labels, ops, loss_of)


def _class_weights(like: Array, recipe: Any) -> Array | None:
    if not recipe.class_weights:
        return None
    weights = from_host(np.array(recipe.class_weights), like=like)
    return array_module(like).astype(weights, like.dtype)  # (K,)


def _at_full_size(
    logits: Array, labels: Array, ops: Ops, loss_of: Callable[[Array], tuple[Array, Array]]
) -> tuple[Array, Array, Array]:
    """Loss, dL/dlogits (B, K, h, w) and hits, of the loss of logits in the labels' size."""
    xp = array_module(logits)
    x = xp.permute_dims(logits, (0, 2, 3, 1))  # (B, h, w, K)
    x, cache = ops[resize].forward(None, x, ops, labels.shape[1:])  # (B, H, W, K)
    full = xp.permute_dims(x, (0, 3, 1, 2))  # (B, K, H, W)
    loss, dfull = loss_of(full)
    hits = xp.sum(xp.argmax(full, axis=1) == labels)
    dx, _ = ops[resize].backward(None, cache, xp.permute_dims(dfull, (0, 2, 3, 1)), ops)
    return loss, xp.permute_dims(dx, (0, 3, 1, 2)), hits


def evaluate_pixels(
    params: Any,
    config: Any,
    data: LabelledPairs,
    ranks: Any = None,
    ops: Ops | None = None,
) -> tuple[float, np.ndarray]:
    """Loss and confusion matrix over whole pictures, at the size of their label maps.

    A picture is stretched to ``data.whole``, and the logits back, as released.

    Args:
        params: the weights, arrays of NumPy or CuPy.
        config: their configuration.
        data: what to look at.
        ranks: :class:`~pvt_ref.train.data_parallel.Ranks` that share the pictures; the result is
            the same for any number of them. None: this process does all.
        ops: a table of operations; None takes the default.

    Returns:
        The mean cross-entropy of the pixels that count, and (K, K) int64: row the true class,
        column the answer.

    Raises:
        PVTError: as :func:`pvt_ref.forward`, or of a picture that cannot be read.
    """
    like, K = first_array(params), config.num_classes
    numbers = range(len(data)) if ranks is None else ranks.share(len(data))
    found: list[tuple[float, np.ndarray]] = []
    for pixels, labels in in_order(data.pair, numbers, 4):
        image = data.preprocessing.normalize(pixels[None], like)  # (1, C, H, W)
        logits = forward(params, image, config, ops=ops)
        full = resize_logits(logits, pixels.shape[1:], labels.shape)  # (1, K, H', W')
        targets = from_host(labels[None].astype(np.int64), like=full)
        loss, _ = cross_entropy(full, targets, reduction="sum", ignore_index=IGNORED)
        answers = to_numpy(array_module(full).argmax(full, axis=1))[0]
        found.append((float(loss), count_pixels(answers, labels, K)))
    if ranks is not None:
        found = [of_picture for of_rank in ranks.gather(found) for of_picture in of_rank]
    counts = np.zeros((K, K), np.int64)
    total = 0.0
    for loss, of_picture in found:  # in order, so that they are rounded alike
        total, counts = total + loss, counts + of_picture
    return total / max(int(counts.sum()), 1), counts
