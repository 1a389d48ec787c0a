"""The columnar ViT, to which the paper compares PVT (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

import re

from pvt_ref.models.architecture import Architecture, Place
from pvt_ref.models.pvt import PVT
from pvt_ref.models.vit.config import VITS, ViTConfig, describe
from pvt_ref.models.vit.model import ViTParams, build_params


def place(path: str) -> Place | None:
    """Where an operation of a ViT stands: all but norm and head are its one stage."""
    if found := re.match(r"blocks\.(\d+)(?:\.(.*))?$", path):
        return Place(1, int(found[1]), found[2] or "")
    in_stage = path.split(".")[0] in ("patch_embed", "pos_embed", "blocks")
    return Place(1 if in_stage else 0, None, path)


VIT = Architecture(
    name="vit",
    title="ViT",
    config_type=ViTConfig,
    params_type=ViTParams,
    build_params=build_params,
    prepare=PVT.prepare,
    forward=PVT.forward,  # its classifier, with one stage
    backward=PVT.backward,
    operations=PVT.operations,
    place=place,
    describe=describe,
    variants=VITS,
    stem="patch_embed.proj.weight",
)
