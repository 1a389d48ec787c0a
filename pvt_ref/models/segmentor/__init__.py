"""Semantic segmentation: a backbone with a head that tells the class of every place."""

import re

from pvt_ref.heads.conv_unit import conv_unit
from pvt_ref.heads.fpn import fpn
from pvt_ref.heads.scale_head import scale_head
from pvt_ref.heads.semantic_fpn import semantic_fpn
from pvt_ref.heads.setr import setr
from pvt_ref.layers.batch_norm import batch_norm
from pvt_ref.layers.conv import conv
from pvt_ref.layers.dropout import dropout_channels
from pvt_ref.layers.relu import relu
from pvt_ref.layers.resize import resize
from pvt_ref.models.architecture import Architecture, Place
from pvt_ref.models.pvt import PVT
from pvt_ref.models.pvt_v2 import PVT_V2
from pvt_ref.models.segmentor import model
from pvt_ref.models.segmentor.config import SegmentorConfig, describe
from pvt_ref.models.segmentor.files import FILES
from pvt_ref.models.segmentor.params import SegmentorParams, build_params
from pvt_ref.models.vit import VIT

_LAYERS = (batch_norm, conv, dropout_channels, relu, resize)
_HEADS = (conv_unit, fpn, scale_head, semantic_fpn, setr)


def place(path: str) -> Place | None:
    """Where an operation or a weight stands: neck and head are stage 0, the rest the backbone's."""
    if found := re.match(r"(?:backbone\.)?(block\d|patch_embed\d|pos_embed\d|norm\d)", path):
        return PVT.place(path[found.start(1) :])
    if re.match(r"(?:backbone\.)?(blocks|patch_embed|pos_embed|cls_token)\b", path):
        return VIT.place(path.removeprefix("backbone."))
    return Place(0, None, path)


SEGMENTOR = Architecture(
    name="segmentor",
    title="segmentation network",
    config_type=SegmentorConfig,
    params_type=SegmentorParams,
    build_params=build_params,
    prepare=model.prepare,
    forward=model.forward,
    backward=model.backward,
    forward_pyramid=model.forward_pyramid,
    backward_pyramid=model.backward_pyramid,
    operations=frozenset({*PVT.operations, *PVT_V2.operations, *VIT.operations, *_LAYERS, *_HEADS}),
    place=place,
    describe=describe,
    dense=True,
    batch_buffers=model.batch_buffers,
    head="decode_head.conv_seg",
    files=FILES,
)
