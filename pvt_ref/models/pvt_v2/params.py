"""The parameters of a PVT v2: plain records whose field names are the authors' key names."""

from typing import Any, ClassVar, NamedTuple

from pvt_ref.blocks.conv_mlp import ConvMLPParams, DWConvParams
from pvt_ref.blocks.linear_sra import LinearSRAParams
from pvt_ref.blocks.sra import SRAParams
from pvt_ref.blocks.transformer import BlockParams
from pvt_ref.layers.conv import ConvParams
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.models import parts
from pvt_ref.models.architecture import Leaf
from pvt_ref.models.pvt.params import Staged
from pvt_ref.models.pvt_v2.config import KERNELS, PVTv2Config
from pvt_ref.tree import record, short_repr


@record
class OverlapEmbedParams:
    """proj, a kernel (C_i, C_{i-1}, k, k) with a bias, and the norm; or their gradients."""

    proj: ConvParams
    norm: LayerNormParams


class StageParams(NamedTuple):
    """The weights of stage i."""

    patch_embed: OverlapEmbedParams
    blocks: tuple[BlockParams, ...]
    norm: LayerNormParams

    __repr__ = short_repr


@record
class PVTv2Params(Staged):
    """The weights of a model, or their gradients, float32 or float64; C_0 is in_chans.

    Attributes:
        patch_embed1: projection (C_1, C_0, 7, 7), its bias and the norm, (C_1,) each.
        block1: L_1 blocks of width C_1.
        norm1: the norm that ends the stage, weight and bias (C_1,) each; patch_embed2 to norm4
            likewise, with projections (C_i, C_{i-1}, 3, 3).
        head: weight (num_classes, C_4), bias (num_classes,); None in a backbone.
    """

    _stage_type: ClassVar[Any] = StageParams

    patch_embed1: OverlapEmbedParams
    block1: tuple[BlockParams, ...]
    norm1: LayerNormParams
    patch_embed2: OverlapEmbedParams
    block2: tuple[BlockParams, ...]
    norm2: LayerNormParams
    patch_embed3: OverlapEmbedParams
    block3: tuple[BlockParams, ...]
    norm3: LayerNormParams
    patch_embed4: OverlapEmbedParams
    block4: tuple[BlockParams, ...]
    norm4: LayerNormParams
    head: LinearParams | None

    def _stage_fields(self, i: int) -> tuple[str, ...]:
        return f"patch_embed{i}", f"block{i}", f"norm{i}"


def build_params(config: PVTv2Config, make: parts.Make) -> PVTv2Params:
    """A record of parameters, every array made by ``make(leaf)``, in the authors' order."""
    tree: dict[str, Any] = {}
    for i, C_in in enumerate((config.in_chans, *config.embed_dims[:-1])):
        C, key = config.embed_dims[i], f"patch_embed{i + 1}"
        proj = ConvParams(*_kernel(make, f"{key}.proj", C, C_in, KERNELS[i]))
        tree[key] = OverlapEmbedParams(proj, parts.norm(make, f"{key}.norm", C))
        key = f"block{i + 1}"
        tree[key] = tuple(_block(make, f"{key}.{b}", config, i) for b in range(config.depths[i]))
        tree[f"norm{i + 1}"] = parts.norm(make, f"norm{i + 1}", C)
    head = None
    if config.has_classifier:
        head = parts.linear(make, "head", config.num_classes, config.embed_dims[-1])
    return PVTv2Params(**tree, head=head)


def _kernel(
    make: parts.Make, key: str, C_out: int, C_in: int, k: int, groups: int = 1
) -> tuple[Any, Any]:
    """A kernel (C_out, C_in, k, k) and its bias, of a convolution with this many groups."""
    fan_out = k * k * C_out // groups
    return (
        make(Leaf(f"{key}.weight", (C_out, C_in, k, k), "fan_out", fan_out=fan_out)),
        make(Leaf(f"{key}.bias", (C_out,), "zeros")),
    )


def _block(make: parts.Make, key: str, config: PVTv2Config, i: int) -> BlockParams:
    """A block of stage i + 1."""
    C, hidden = config.embed_dims[i], int(config.embed_dims[i] * config.mlp_ratios[i])
    R = 1 if config.linear else config.sr_ratios[i]
    norm1, attn = parts.norm(make, f"{key}.norm1", C), f"{key}.attn"
    q = parts.linear(make, f"{attn}.q", C, C, config.qkv_bias)
    kv = parts.linear(make, f"{attn}.kv", 2 * C, C, config.qkv_bias)
    proj = parts.linear(make, f"{attn}.proj", C, C)
    sr, norm = None, None
    if config.linear or R > 1:
        sr = LinearParams(*_kernel(make, f"{attn}.sr", C, C, R))
        norm = parts.norm(make, f"{attn}.norm", C)
    dwconv = f"{key}.mlp.dwconv.dwconv"
    kind: Any = LinearSRAParams if config.linear else SRAParams
    return BlockParams(
        norm1=norm1,
        attn=kind(q, kv, proj, sr, norm),
        norm2=parts.norm(make, f"{key}.norm2", C),
        mlp=ConvMLPParams(
            fc1=parts.linear(make, f"{key}.mlp.fc1", hidden, C),
            dwconv=DWConvParams(ConvParams(*_kernel(make, dwconv, hidden, 1, 3, groups=hidden))),
            fc2=parts.linear(make, f"{key}.mlp.fc2", C, hidden),
        ),
    )
