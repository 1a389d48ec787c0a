"""The parameters of a ViT: plain records whose field names are DeiT's and timm's key names."""

from pvt_ref.arrays import Array
from pvt_ref.blocks.mha import MHAParams
from pvt_ref.blocks.mlp import MLPParams
from pvt_ref.blocks.transformer import BlockParams
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import PatchEmbedParams
from pvt_ref.models import parts
from pvt_ref.models.architecture import Leaf
from pvt_ref.models.vit.config import ViTConfig
from pvt_ref.tree import record


@record
class ViTParams:
    """The weights of a ViT, or their gradients, float32 or float64.

    Attributes:
        cls_token: (1, 1, C).
        pos_embed: (1, 1 + n, C) for the n tokens of config.img_size; row 0 is the cls token's.
        patch_embed: projection (C, C_0, P, P) and its bias; there is no norm.
        blocks: L blocks of width C, with attn.qkv (3C, C).
        norm: the final norm, weight and bias (C,) each; None in a backbone.
        head: weight (num_classes, C), bias (num_classes,); None in a backbone.
    """

    cls_token: Array
    pos_embed: Array
    patch_embed: PatchEmbedParams
    blocks: tuple[BlockParams, ...]
    norm: LayerNormParams | None
    head: LinearParams | None


def build_params(config: ViTConfig, make: parts.Make) -> ViTParams:
    """A record of parameters, every array made by ``make(leaf)``, in DeiT's order."""
    C, has_head = config.embed_dim, config.has_classifier
    proj = "patch_embed.proj", C, config.in_chans, config.patch_size
    return ViTParams(
        cls_token=make(Leaf("cls_token", (1, 1, C), "normal")),
        pos_embed=make(Leaf("pos_embed", (1, 1 + config.table_sides[0] ** 2, C), "normal")),
        patch_embed=PatchEmbedParams(parts.projection(make, *proj), norm=None),
        blocks=tuple(_block(config, make, f"blocks.{k}") for k in range(config.depth)),
        norm=parts.norm(make, "norm", C) if has_head else None,
        head=parts.linear(make, "head", config.num_classes, C) if has_head else None,
    )


def _block(config: ViTConfig, make: parts.Make, key: str) -> BlockParams:
    C, hidden = config.embed_dim, config.hidden_dim
    return BlockParams(
        norm1=parts.norm(make, f"{key}.norm1", C),
        attn=MHAParams(
            qkv=parts.linear(make, f"{key}.attn.qkv", 3 * C, C, config.qkv_bias),
            proj=parts.linear(make, f"{key}.attn.proj", C, C),
        ),
        norm2=parts.norm(make, f"{key}.norm2", C),
        mlp=MLPParams(
            fc1=parts.linear(make, f"{key}.mlp.fc1", hidden, C),
            fc2=parts.linear(make, f"{key}.mlp.fc2", C, hidden),
        ),
    )
