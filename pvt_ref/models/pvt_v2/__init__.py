"""The Pyramid Vision Transformer, version 2 (Wang et al. 2022, arXiv 2106.13797)."""

from pvt_ref.blocks.conv_mlp import conv_mlp
from pvt_ref.blocks.linear_sra import linear_sra
from pvt_ref.blocks.sra import sra
from pvt_ref.blocks.transformer import block, blocks
from pvt_ref.layers.attention import attention
from pvt_ref.layers.conv import conv
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.dropout import drop_path, dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import linear
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.pool import pool
from pvt_ref.layers.relu import relu
from pvt_ref.layers.softmax import softmax
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.models.architecture import Architecture
from pvt_ref.models.pvt import place
from pvt_ref.models.pvt_v2 import model
from pvt_ref.models.pvt_v2.config import VARIANTS, PVTv2Config, describe
from pvt_ref.models.pvt_v2.files import FILES
from pvt_ref.models.pvt_v2.params import PVTv2Params, build_params

_LAYERS = (
    *(linear, layer_norm, gelu, relu, softmax, dropout, drop_path, sum_rows),
    *(patch_embed, conv, depthwise_conv, pool, attention),
)

PVT_V2 = Architecture(
    name="pvt_v2",
    title="PVT v2",
    config_type=PVTv2Config,
    params_type=PVTv2Params,
    build_params=build_params,
    prepare=model.prepare,
    forward=model.forward,
    backward=model.backward,
    forward_pyramid=model.forward_pyramid,
    backward_pyramid=model.backward_pyramid,
    operations=frozenset({*_LAYERS, sra, linear_sra, conv_mlp, block, blocks}),
    place=place,
    describe=describe,
    stem="patch_embed1.proj.weight",
    variants=VARIANTS,
    files=FILES,
)
