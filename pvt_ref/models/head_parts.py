"""The parameters and the running statistics of heads for ``build_params``, by ``make(leaf)``.

Keys begin with the head's own fields: whoever puts a head behind a backbone puts its name in front.
They are MMSegmentation's, in the order of its files, except that there the running statistics of a
unit follow its weights, and here they are a record of their own.

Initial values are those of the authors' runs: convolutions by fan-out, the classifier with a
standard deviation of 0.01, biases 0. MMSegmentation 0.13 declares Xavier for the neck, and never
draws it.
"""

from typing import Any

from pvt_ref.heads.conv_unit import ConvUnitBuffers, ConvUnitParams
from pvt_ref.heads.fpn import FPNConvParams, FPNParams
from pvt_ref.heads.mla import (
    MLAHeadBuffers,
    MLAHeadParams,
    MLANeckBuffers,
    MLANeckParams,
    MLAUnitsBuffers,
    MLAUnitsParams,
)
from pvt_ref.heads.scale_head import ScaleHeadBuffers, ScaleHeadParams
from pvt_ref.heads.semantic_fpn import SemanticFPNBuffers, SemanticFPNParams
from pvt_ref.heads.setr import SETRBuffers, SETRParams
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams
from pvt_ref.layers.conv import ConvParams
from pvt_ref.models import parts
from pvt_ref.models.architecture import Leaf


def build_fpn(make: parts.Make, in_channels: tuple[int, ...], channels: int) -> FPNParams:
    """For maps of so many channels each, to maps of one width."""
    lateral = [
        FPNConvParams(_conv(make, f"lateral_convs.{i}.conv", channels, C_i, 1))
        for i, C_i in enumerate(in_channels)
    ]
    own = [
        FPNConvParams(_conv(make, f"fpn_convs.{i}.conv", channels, channels, 3))
        for i in range(len(in_channels))
    ]
    return FPNParams(tuple(lateral), tuple(own))


def build_semantic_fpn(
    make: parts.Make, channels: int, head_channels: int, classes: int, levels: int = 4
) -> SemanticFPNParams:
    """For so many maps of one width, each half as large as the one before it."""
    return SemanticFPNParams(
        _classifier(make, head_channels, classes),
        tuple(
            _in_turn(make, f"scale_heads.{i}", channels, head_channels, 3, max(1, i), i > 0)
            for i in range(levels)
        ),
    )


def build_semantic_fpn_buffers(
    make: parts.Make, head_channels: int, levels: int = 4
) -> SemanticFPNBuffers:
    """As :func:`build_semantic_fpn`."""
    return SemanticFPNBuffers(
        tuple(
            _buffers_in_turn(make, f"scale_heads.{i}", head_channels, max(1, i), i > 0)
            for i in range(levels)
        )
    )


def build_setr(
    make: parts.Make, in_channels: int, channels: int, classes: int, convs: int, kernel: int
) -> SETRParams:
    """Of so many units: SETR-Naive has 1 of kernel 1, PUP has 4 of kernel 3."""
    widths = (in_channels, *(channels,) * (convs - 1))
    return SETRParams(
        _classifier(make, channels, classes),
        parts.norm(make, "norm", in_channels),
        tuple(
            _in_turn(make, f"up_convs.{j}", C_j, channels, kernel, 1, enlarges=True)
            for j, C_j in enumerate(widths)
        ),
    )


def build_setr_buffers(make: parts.Make, channels: int, convs: int) -> SETRBuffers:
    """As :func:`build_setr`."""
    return SETRBuffers(
        tuple(_buffers_in_turn(make, f"up_convs.{j}", channels, 1, True) for j in range(convs))
    )


def build_mla_neck(
    make: parts.Make, in_channels: int, channels: int, levels: int = 4
) -> MLANeckParams:
    """For the maps of so many blocks."""
    each = range(levels)
    return MLANeckParams(
        tuple(parts.norm(make, f"norm.{j}", in_channels) for j in each),
        MLAUnitsParams(
            tuple(_unit(make, f"mla.channel_proj.{j}", in_channels, channels, 1) for j in each),
            tuple(_unit(make, f"mla.feat_extract.{j}", channels, channels, 3) for j in each),
        ),
    )


def build_mla_neck_buffers(make: parts.Make, channels: int, levels: int = 4) -> MLANeckBuffers:
    """As :func:`build_mla_neck`."""
    projections, extractions = (
        tuple(_unit_buffers(make, f"mla.{kind}.{j}", channels) for j in range(levels))
        for kind in ("channel_proj", "feat_extract")
    )
    return MLANeckBuffers(MLAUnitsBuffers(projections, extractions))


def build_mla_head(
    make: parts.Make, in_channels: int, channels: int, classes: int, levels: int = 4
) -> MLAHeadParams:
    """For the maps of the neck."""
    conv_seg = _classifier(make, levels * channels, classes)
    up_convs = []
    for j in range(levels):
        first = _unit(make, f"up_convs.{j}.0", in_channels, channels, 3)
        second = _unit(make, f"up_convs.{j}.1", channels, channels, 3)
        up_convs.append((first, second, None))
    return MLAHeadParams(conv_seg, tuple(up_convs))


def build_mla_head_buffers(make: parts.Make, channels: int, levels: int = 4) -> MLAHeadBuffers:
    """As :func:`build_mla_head`."""
    up_convs = [
        (*(_unit_buffers(make, f"up_convs.{j}.{k}", channels) for k in (0, 1)), None)
        for j in range(levels)
    ]
    return MLAHeadBuffers(tuple(up_convs))


def _conv(
    make: parts.Make, key: str, C_out: int, C_in: int, k: int, bias: bool = True
) -> ConvParams:
    """A kernel (C_out, C_in, k, k), and a bias if wanted."""
    return ConvParams(
        make(Leaf(f"{key}.weight", (C_out, C_in, k, k), "fan_out", fan_out=k * k * C_out)),
        make(Leaf(f"{key}.bias", (C_out,), "zeros")) if bias else None,
    )


def _classifier(make: parts.Make, channels: int, classes: int) -> ConvParams:
    """A kernel (K, D, 1, 1) and a bias."""
    shape = (classes, channels, 1, 1)
    return ConvParams(
        make(Leaf("conv_seg.weight", shape, "normal", std=0.01)),
        make(Leaf("conv_seg.bias", (classes,), "zeros")),
    )


def _unit(make: parts.Make, key: str, C_in: int, C_out: int, k: int) -> ConvUnitParams:
    conv = _conv(make, f"{key}.conv", C_out, C_in, k, bias=False)
    weight = make(Leaf(f"{key}.bn.weight", (C_out,), "ones"))
    return ConvUnitParams(
        conv, BatchNormParams(weight, make(Leaf(f"{key}.bn.bias", (C_out,), "zeros")))
    )


def _unit_buffers(make: parts.Make, key: str, C: int) -> ConvUnitBuffers:
    return ConvUnitBuffers(
        BatchNormBuffers(
            make(Leaf(f"{key}.bn.running_mean", (C,), "zeros")),
            make(Leaf(f"{key}.bn.running_var", (C,), "ones")),
            make(Leaf(f"{key}.bn.num_batches_tracked", (), "count")),
        )
    )


def _in_turn(
    make: parts.Make, key: str, C_in: int, C_out: int, k: int, units: int, enlarges: bool
) -> ScaleHeadParams:
    """So many units, each with an enlargement behind it if wanted, which has a number too."""
    steps: list[Any] = []
    for _ in range(units):
        steps.append(_unit(make, f"{key}.{len(steps)}", C_in, C_out, k))
        steps += [None] * enlarges
        C_in = C_out
    return tuple(steps)


def _buffers_in_turn(
    make: parts.Make, key: str, C: int, units: int, enlarges: bool
) -> ScaleHeadBuffers:
    """As :func:`_in_turn`."""
    steps: list[Any] = []
    for _ in range(units):
        steps.append(_unit_buffers(make, f"{key}.{len(steps)}", C))
        steps += [None] * enlarges
    return tuple(steps)
