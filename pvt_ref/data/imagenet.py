"""The thousand classes of ImageNet-1k by name, in the order of the released weights' outputs.

The order is that of the WordNet identifiers, sorted. imagenet_classes.txt has one a line with its
first word in WordNet 3.0 (Princeton University; https://wordnet.princeton.edu), made unique where
two share it.
"""

import functools
from importlib import resources

from pvt_ref.data.info import ModelInfo
from pvt_ref.models.pvt.config import PVTConfig


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 names, from ``"tench"`` to ``"toilet tissue"``.

    Returns:
        The names, in the order of the outputs.
    """
    text = resources.files("pvt_ref").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(line.split("\t")[1] for line in text.splitlines())


def released_info(config: PVTConfig) -> ModelInfo:
    """What is known of foreign weights: with 1,000 classes they are taken to be ImageNet's.

    Args:
        config: of the weights.

    Returns:
        Title, class names and ImageNet's preprocessing; without the names for another class count.
    """
    if config.num_classes != len(imagenet_classes()):
        return ModelInfo()
    return ModelInfo(title="ImageNet-1k, 1,000 classes", classes=imagenet_classes())
