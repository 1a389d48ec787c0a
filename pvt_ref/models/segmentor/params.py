"""The parameters of a segmentation network: records whose field names are mmsegmentation's keys."""

from typing import Any

from pvt_ref.heads.fpn import FPNParams, build_fpn
from pvt_ref.heads.semantic_fpn import build_semantic_fpn, build_semantic_fpn_buffers
from pvt_ref.heads.setr import build_setr, build_setr_buffers
from pvt_ref.models.parts import Make
from pvt_ref.models.segmentor.config import SegmentorConfig, SemanticFPNHead
from pvt_ref.tree import record


@record
class SegmentorBuffers:
    """What the batch norms of each part remember; the backbone and the neck have none."""

    decode_head: Any


@record
class SegmentorParams:
    """The weights of a segmentation network, or their gradients.

    Attributes:
        backbone: of the backbone's network, without classifier.
        neck: of the feature pyramid; None where the head reads the maps as they are.
        decode_head: of the head.
        buffers: running statistics, which are not trained; None in gradients.
    """

    backbone: Any
    neck: FPNParams | None
    decode_head: Any
    buffers: SegmentorBuffers | None


def build_params(config: SegmentorConfig, make: Make) -> SegmentorParams:
    """A record of parameters, every array made by ``make(leaf)``; running statistics come last."""
    head, K, prefix = config.head, config.num_classes, "decode_head"
    backbone = config.row.build_params(
        config.backbone, lambda leaf: make(leaf._replace(key=f"backbone.{leaf.key}"))
    )
    if isinstance(head, SemanticFPNHead):
        levels = len(config.channels)
        neck = build_fpn(make, "neck", config.channels, head.neck_channels)
        sizes: Any = (levels, head.neck_channels, head.channels)
        decode_head: Any = build_semantic_fpn(make, prefix, *sizes, K)
        buffers: Any = build_semantic_fpn_buffers(make, prefix, *sizes)
    else:
        neck, C = None, config.channels[-1]
        decode_head = build_setr(make, prefix, head.upsampling, C, head.channels, K)
        buffers = build_setr_buffers(make, prefix, head.upsampling, head.channels)
    return SegmentorParams(backbone, neck, decode_head, SegmentorBuffers(buffers))
