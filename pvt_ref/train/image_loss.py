"""The loss of a network that tells one class of each image."""

from pvt_ref.arrays import Array, array_module
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.train.recipe import Recipe


def image_loss(logits: Array, targets: Array, recipe: Recipe) -> tuple[Array, Array, Array]:
    """Loss of logits (B, K), its gradient, and how many are right (mixed: about the larger one)."""
    xp = array_module(logits)
    loss, dlogits = cross_entropy(logits, targets, recipe.label_smoothing)
    if targets.ndim == 2:  # mixed: the class with the larger share
        targets = xp.argmax(targets, axis=1)
    return loss, dlogits, xp.sum(xp.argmax(logits, axis=1) == targets)
