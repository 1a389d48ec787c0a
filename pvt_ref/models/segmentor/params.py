"""The parameters of a segmentation network: records whose field names are mmsegmentation's keys.

The arrays of a network are made once, with all that a unit has: kernel, norm, running statistics.
The latter then move into a record of their own, since they are not trained.
"""

from collections.abc import Sequence
from typing import Any

from pvt_ref.heads.conv_unit import ConvUnitBuffers, ConvUnitParams
from pvt_ref.heads.fpn import FPNConvParams, FPNParams
from pvt_ref.heads.semantic_fpn import SemanticFPNBuffers, SemanticFPNParams
from pvt_ref.heads.setr import SETRBuffers, SETRParams
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams
from pvt_ref.layers.conv import ConvParams
from pvt_ref.models import parts
from pvt_ref.models.architecture import Leaf
from pvt_ref.models.segmentor.config import SegmentorConfig, SemanticFPNHead
from pvt_ref.tree import record

#: A unit with its running statistics, or None where a map is enlarged.
_Unit = tuple[ConvUnitParams, ConvUnitBuffers] | None


@record
class SegmentorBuffers:
    """What the batch norms remember; backbone and neck have none."""

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
    """A record of parameters, every array made by ``make(leaf)``, in mmsegmentation's order."""
    backbone = config.row.build_params(
        config.backbone, lambda leaf: make(leaf._replace(key=f"backbone.{leaf.key}"))
    )
    head, neck, key = config.head, None, "decode_head"
    if isinstance(head, SemanticFPNHead):
        neck = _fpn(make, config.channels, head.neck_channels)
        seg = _classifier(make, f"{key}.conv_seg", config.num_classes, head.channels)
        levels = [
            _scale_head(make, f"{key}.scale_heads.{i}", head, max(i, 1), i > 0)
            for i in range(len(config.channels))
        ]
        params: Any = SemanticFPNParams(seg, tuple(_weights(units) for units in levels))
        buffers: Any = SemanticFPNBuffers(tuple(_statistics(units) for units in levels))
    else:
        C, D, naive = config.channels[-1], head.channels, head.upsampling == "naive"
        seg = _classifier(make, f"{key}.conv_seg", config.num_classes, D)
        norm = parts.norm(make, f"{key}.norm", C)
        count, k = (1, 1) if naive else (4, 3)
        pairs = [
            [_unit(make, f"{key}.up_convs.{j}.0", D, D if j else C, k), None] for j in range(count)
        ]
        params = SETRParams(seg, norm, tuple(_weights(pair) for pair in pairs))
        buffers = SETRBuffers(tuple(_statistics(pair) for pair in pairs))
    return SegmentorParams(backbone, neck, params, SegmentorBuffers(buffers))


def _kernel(make: parts.Make, key: str, C_out: int, C_in: int, k: int, bias: bool) -> ConvParams:
    """A convolution of a neck or a head: Kaiming normal of the fan out, for ReLU."""
    weight = make(Leaf(f"{key}.weight", (C_out, C_in, k, k), "fan_out", fan_out=k * k * C_out))
    return ConvParams(weight, make(Leaf(f"{key}.bias", (C_out,), "zeros")) if bias else None)


def _classifier(make: parts.Make, key: str, K: int, D: int) -> ConvParams:
    """The last convolution, which begins close to 0."""
    weight = make(Leaf(f"{key}.weight", (K, D, 1, 1), "normal", std=0.01))
    return ConvParams(weight, make(Leaf(f"{key}.bias", (K,), "zeros")))


def _fpn(make: parts.Make, channels: Sequence[int], C: int) -> FPNParams:
    lateral, smooth = "neck.lateral_convs", "neck.fpn_convs"
    return FPNParams(
        tuple(
            FPNConvParams(_kernel(make, f"{lateral}.{i}.conv", C, C_i, 1, bias=True))
            for i, C_i in enumerate(channels)
        ),
        tuple(
            FPNConvParams(_kernel(make, f"{smooth}.{i}.conv", C, C, 3, bias=True))
            for i in range(len(channels))
        ),
    )


def _scale_head(
    make: parts.Make, key: str, head: SemanticFPNHead, units: int, enlarges: bool
) -> list[_Unit]:
    """So many units, with an enlargement behind each, which has a place and no weights."""
    made: list[_Unit] = []
    for _ in range(units):
        C_in = head.channels if made else head.neck_channels
        made.append(_unit(make, f"{key}.{len(made)}", head.channels, C_in, 3))
        made += [None] * enlarges
    return made


def _unit(make: parts.Make, key: str, C_out: int, C_in: int, k: int) -> _Unit:
    conv = _kernel(make, f"{key}.conv", C_out, C_in, k, bias=False)
    bn = BatchNormParams(
        make(Leaf(f"{key}.bn.weight", (C_out,), "ones")),
        make(Leaf(f"{key}.bn.bias", (C_out,), "zeros")),
    )
    statistics = BatchNormBuffers(
        make(Leaf(f"{key}.bn.running_mean", (C_out,), "zeros")),
        make(Leaf(f"{key}.bn.running_var", (C_out,), "ones")),
        make(Leaf(f"{key}.bn.num_batches_tracked", (), "count")),
    )
    return ConvUnitParams(conv, bn), ConvUnitBuffers(statistics)


def _weights(units: Sequence[_Unit]) -> tuple[ConvUnitParams | None, ...]:
    return tuple(unit and unit[0] for unit in units)


def _statistics(units: Sequence[_Unit]) -> tuple[ConvUnitBuffers | None, ...]:
    return tuple(unit and unit[1] for unit in units)
