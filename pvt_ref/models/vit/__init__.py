"""The columnar ViT, to which the paper compares PVT (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

import re
from operator import attrgetter

from pvt_ref.blocks.mha import mha
from pvt_ref.blocks.mlp import mlp
from pvt_ref.blocks.transformer import block, blocks
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import drop_path, dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import linear
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.position import position
from pvt_ref.layers.softmax import softmax
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.models.architecture import Architecture, Place
from pvt_ref.models.vit import model
from pvt_ref.models.vit.config import ALIASES, VARIANTS, ViTConfig, describe
from pvt_ref.models.vit.files import FILES
from pvt_ref.models.vit.params import ViTParams, build_params

_LAYERS = (linear, layer_norm, gelu, softmax, dropout, drop_path, patch_embed, position, sum_rows)


def place(path: str) -> Place | None:
    """Where an operation or a weight of a ViT stands: all but norm and head are its one stage."""
    if found := re.match(r"blocks\.(\d+)(?:\.(.*))?$", path):
        return Place(1, int(found[1]), found[2] or "")
    in_stage = path.split(".")[0] in ("cls_token", "patch_embed", "pos_embed", "blocks")
    return Place(1 if in_stage else 0, None, path)


VIT = Architecture(
    name="vit",
    title="ViT",
    config_type=ViTConfig,
    params_type=ViTParams,
    build_params=build_params,
    prepare=model.prepare,
    forward=model.forward,
    backward=model.backward,
    forward_pyramid=model.forward_pyramid,
    backward_pyramid=model.backward_pyramid,
    map_blocks=attrgetter("depth"),
    operations=frozenset({*_LAYERS, attention, mha, mlp, block, blocks}),
    place=place,
    describe=describe,
    variants=VARIANTS,
    aliases=ALIASES,
    stem="patch_embed.proj.weight",
    files=FILES,
)
