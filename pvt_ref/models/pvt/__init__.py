"""The Pyramid Vision Transformer, version 1 (Wang et al., ICCV 2021, arXiv 2102.12122)."""

import re

from pvt_ref.blocks.mlp import mlp
from pvt_ref.blocks.sra import sra
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
from pvt_ref.models.pvt import model
from pvt_ref.models.pvt.config import ALIASES, NUM_STAGES, VARIANTS, PVTConfig, describe
from pvt_ref.models.pvt.files import FILES
from pvt_ref.models.pvt.params import PVTParams, build_params

_LAYERS = (linear, layer_norm, gelu, softmax, dropout, drop_path, patch_embed, position, sum_rows)


def place(path: str) -> Place | None:
    """Where an operation or a weight of a PVT, or of a PVT v2, stands: paths begin with keys."""
    if found := re.match(r"block(\d)\.(\d+)(?:\.(.*))?$", path):
        return Place(int(found[1]), int(found[2]), found[3] or "")
    if found := re.match(r"(patch_embed|pos_embed|block|norm)(\d)(?:\.(.*))?$", path):
        return Place(int(found[2]), None, found[1] + (f".{found[3]}" if found[3] else ""))
    return Place(NUM_STAGES if path == "cls_token" else 0, None, path)


PVT = Architecture(
    name="pvt",
    title="PVT",
    config_type=PVTConfig,
    params_type=PVTParams,
    build_params=build_params,
    prepare=model.prepare,
    forward=model.forward,
    backward=model.backward,
    forward_pyramid=model.forward_pyramid,
    backward_pyramid=model.backward_pyramid,
    operations=frozenset({*_LAYERS, attention, sra, mlp, block, blocks}),
    place=place,
    describe=describe,
    stem="patch_embed1.proj.weight",
    variants=VARIANTS,
    aliases=ALIASES,
    files=FILES,
)
