"""The thousand classes of ImageNet-1k by name, in the order of the released weights' outputs.

The order is that of the WordNet identifiers, sorted. imagenet_classes.txt has each with its first
word in WordNet 3.0 (Princeton University; https://wordnet.princeton.edu), made unique.
"""

import functools
from importlib import resources
from typing import Any

from pvt_ref.data.info import ModelInfo


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 names in the order of the outputs, ``"tench"`` to ``"toilet tissue"``."""
    names = resources.files("pvt_ref.data").joinpath("imagenet_classes.txt")
    text = names.read_text(encoding="utf-8")
    return tuple(line.split("\t")[1] for line in text.splitlines())


def released_info(config: Any) -> ModelInfo:
    """The info for foreign weights: 1,000 classes are taken to be ImageNet's."""
    if config.num_classes != len(imagenet_classes()):
        return ModelInfo()
    return ModelInfo(title="ImageNet-1k, 1,000 classes", classes=imagenet_classes())
