"""The weights of a columnar ViT: those of one PVT stage with R = 1, and of its classifier."""

from pvt_ref.arrays import Array
from pvt_ref.blocks.transformer import BlockParams
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import PatchEmbedParams
from pvt_ref.models import parts
from pvt_ref.models.architecture import Leaf
from pvt_ref.models.pvt.params import Staged
from pvt_ref.models.vit.config import ViTConfig
from pvt_ref.tree import record


@record
class ViTParams(Staged):
    """The weights of a ViT, or their gradients."""

    cls_token: Array  # (1, 1, C)
    pos_embed: Array  # (1, 1 + n, C), row 0 the cls token's
    patch_embed: PatchEmbedParams  # a projection (C, C_0, P, P), and no norm
    blocks: tuple[BlockParams, ...]
    norm: LayerNormParams
    head: LinearParams  # (num_classes, C)

    def _stage_fields(self, i: int) -> tuple[str, ...]:
        return "patch_embed", "pos_embed", "blocks"


def build_params(config: ViTConfig, make: parts.Make) -> ViTParams:
    """A record of parameters, every array made by ``make(leaf)``."""
    C, hidden = config.embed_dim, config.mlp_ratio * config.embed_dim
    proj = "patch_embed.proj", C, config.in_chans, config.patch_size
    return ViTParams(
        cls_token=make(Leaf("cls_token", (1, 1, C), "normal")),
        pos_embed=make(Leaf("pos_embed", (1, 1 + config.table_sides[0] ** 2, C), "normal")),
        patch_embed=PatchEmbedParams(parts.projection(make, *proj), norm=None),
        blocks=tuple(parts.block(make, f"blocks.{k}", C, hidden, 1) for k in range(config.depth)),
        norm=parts.norm(make, "norm", C),
        head=parts.linear(make, "head", config.num_classes, C),
    )
