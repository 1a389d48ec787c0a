"""The segmentation networks of the papers: Semantic FPN on ADE20K's 150 classes."""

import dataclasses
from typing import Any

from pvt_ref.models import pvt, pvt_v2
from pvt_ref.models.segmentor.config import SegmentorConfig


def _on(backbone: Any) -> SegmentorConfig:
    """With that backbone: no classifier, and the drop path of the dense trainings."""
    return SegmentorConfig(
        backbone=dataclasses.replace(backbone, num_classes=0, drop_path_rate=0.1)
    )


def published() -> dict[str, SegmentorConfig]:
    """By name, once their backbones' networks are entered (PVT section 4.3, PVT v2 section 4.4)."""
    return {
        f"fpn_{name}": _on(backbone)
        for row in (pvt.PVT, pvt_v2.PVT_V2)
        for name, backbone in row.variants.items()
    }
