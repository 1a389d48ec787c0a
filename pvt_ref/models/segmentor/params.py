"""The parameters of a segmentation network: records whose field names are mmsegmentation's keys."""

from typing import Any

from pvt_ref.heads.fpn import FPNParams
from pvt_ref.models import head_parts, parts
from pvt_ref.models.architecture import Leaf
from pvt_ref.models.segmentor.config import SegmentorConfig, SemanticFPNHead
from pvt_ref.tree import record


@record
class SegmentorBuffers:
    """The state of the batch norms; backbone and neck have none."""

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


def build_params(config: SegmentorConfig, make: parts.Make) -> SegmentorParams:
    """A record of parameters, every array made by ``make(leaf)``; running statistics last."""

    def below(prefix: str) -> parts.Make:
        def make_below(leaf: Leaf) -> Any:
            return make(leaf._replace(key=f"{prefix}.{leaf.key}"))

        return make_below

    head, in_head, K = config.head, below("decode_head"), config.num_classes
    backbone = config.row.build_params(config.backbone, below("backbone"))
    neck: FPNParams | None = None
    if isinstance(head, SemanticFPNHead):
        levels = len(config.channels)
        neck = head_parts.build_fpn(below("neck"), config.channels, head.neck_channels)
        decode_head: Any = head_parts.build_semantic_fpn(
            in_head, head.neck_channels, head.channels, K, levels
        )
        buffers: Any = head_parts.build_semantic_fpn_buffers(in_head, head.channels, levels)
    else:
        convs, kernel = (1, 1) if head.upsampling == "naive" else (4, 3)
        sizes = config.channels[-1], head.channels, K, convs, kernel
        decode_head = head_parts.build_setr(in_head, *sizes)
        buffers = head_parts.build_setr_buffers(in_head, head.channels, convs)
    return SegmentorParams(backbone, neck, decode_head, SegmentorBuffers(buffers))
