"""Implementations that nobody here wrote, brought to the same interface: arrays in, arrays out.

``transformers``' PVT equals the authors' code once three things are mended from outside, none of
them arithmetic: its norms after projections get the authors' eps, its position tables are handed
over already resized (it sizes them for patches 4, 2, 2, 2 and resizes them wrongly), and for the
dense pyramid its cls token is taken away.
"""

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from loose import loose
from torch import nn

from pvt_ref import (
    PVTConfig,
    PVTv2Config,
    ViTConfig,
    ViTParams,
    from_state_dict,
    to_state_dict,
)
from pvt_ref.draws import Draws, What, generator_at

torch.set_num_threads(1)  # NumPy's threads and PyTorch's disturb each other


def tensor(x: np.ndarray, grad: bool = False) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(x), requires_grad=grad)


class MaskedDrop(nn.Module):
    """Dropout or drop path with the masks that a NumPy generator draws, in order of use."""

    def __init__(self, rate: float, rng: Any, per_sample: bool) -> None:
        super().__init__()
        self.rate, self.rng, self.per_sample = rate, rng, per_sample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rate == 0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1) if self.per_sample else tuple(x.shape)
        kept = self.rng.random(shape, dtype=np.float32) >= self.rate
        return x * torch.tensor(kept).to(x.dtype) / (1 - self.rate)


@functools.lru_cache(maxsize=4)
def without_weights(config: PVTConfig, pyramid: bool, drops: bool):
    """The network on meta: every weight is handed over at the call."""
    from transformers import PvtConfig, PvtForImageClassification

    settings = PvtConfig(
        image_size=config.img_size,
        num_channels=config.in_chans,
        depths=list(config.depths),
        sequence_reduction_ratios=list(config.sr_ratios),
        hidden_sizes=list(config.embed_dims),
        patch_sizes=list(config.patch_sizes),
        strides=list(config.patch_sizes),
        num_attention_heads=list(config.num_heads),
        mlp_ratios=loose(list(config.mlp_ratios)),
        qkv_bias=config.qkv_bias,
        layer_norm_eps=config.norm_eps,
        num_labels=max(config.num_classes, 1),
    )
    with torch.device("meta"):
        model: Any = PvtForImageClassification(settings)
    encoder = model.pvt.encoder
    for i in range(4):
        encoder.patch_embeddings[i].layer_norm.eps = config.projection_norm_eps
        for block in encoder.block[i]:
            if config.sr_ratios[i] > 1:
                block.attention.self.layer_norm.eps = config.projection_norm_eps
    if pyramid:
        encoder.patch_embeddings[3].cls_token = None
    return model.eval()  # the drops below do not ask whether they train


def build(config: PVTConfig, rng: np.random.Generator | Draws | None, pyramid: bool):
    model = without_weights(config, pyramid, rng is not None)
    encoder = model.pvt.encoder
    if rng is not None:  # every drop is replaced, so those of an earlier call are gone
        rates = enumerate(np.linspace(0, config.drop_path_rate, sum(config.depths)))
        for i in range(4):
            entry = generator_at(rng, What.STAGE_DROPOUT, i + 1)
            encoder.patch_embeddings[i].dropout = MaskedDrop(config.drop_rate, entry, False)
            for block in encoder.block[i]:
                number, rate = next(rates)
                own, attention = generator_at(rng, What.BLOCK, number), block.attention
                attention.self.dropout = MaskedDrop(config.attn_drop_rate, own, False)
                attention.output.dropout = MaskedDrop(config.drop_rate, own, False)
                block.drop_path = MaskedDrop(float(rate), own, True)
                block.mlp.dropout = MaskedDrop(config.drop_rate, own, False)
    return model


def build_v2(config: PVTv2Config, rng: np.random.Generator | Draws | None):
    from transformers import PvtV2Config, PvtV2ForImageClassification

    settings = loose(PvtV2Config)(
        num_channels=config.in_chans,
        depths=list(config.depths),
        sr_ratios=list(config.sr_ratios),
        hidden_sizes=list(config.embed_dims),
        num_attention_heads=list(config.num_heads),
        mlp_ratios=list(config.mlp_ratios),
        qkv_bias=config.qkv_bias,
        linear_attention=config.linear,
        layer_norm_eps=config.norm_eps,
        num_labels=max(config.num_classes, 1),
    )
    with torch.device("meta"):  # every weight is handed over at the call
        model: Any = PvtV2ForImageClassification(settings)
    rates = enumerate(np.linspace(0, config.drop_path_rate, sum(config.depths)))
    for layer in model.pvt_v2.encoder.layers:
        layer.patch_embedding.layer_norm.eps = config.projection_norm_eps
        for block in layer.blocks:
            attention = block.attention
            if hasattr(attention, "layer_norm"):
                attention.layer_norm.eps = config.projection_norm_eps
            number, rate = next(rates)
            if rng is not None:
                own = generator_at(rng, What.BLOCK, number)
                attention.attn_drop = MaskedDrop(config.attn_drop_rate, own, False)
                attention.proj_drop = MaskedDrop(config.drop_rate, own, False)
                block.drop_path = MaskedDrop(float(rate), own, True)
                block.mlp.dropout = MaskedDrop(config.drop_rate, own, False)
    return model.eval()


#: Parts of the authors' names in a block, and Hugging Face's, replaced in this order.
_V2_NAMES = {
    "attn.sr": "attention.spatial_reduction",
    "attn.norm": "attention.layer_norm",
    "attn.": "attention.",
    "norm1": "layer_norm_1",
    "norm2": "layer_norm_2",
    "mlp.fc": "mlp.dense",
    "attention.q.": "attention.query.",
}


def translate_v2(native: dict, config: PVTv2Config) -> dict:
    """Tensors by the authors' names to tensors by Hugging Face's, differentiably."""
    state = {}
    for key, x in native.items():
        first, _, rest = key.partition(".")
        if first == "head":
            state[f"classifier.{rest}"] = x
            continue
        layer = f"pvt_v2.encoder.layers.{int(first[-1]) - 1}"
        if first.startswith("norm"):
            state[f"{layer}.layer_norm.{rest}"] = x
            continue
        if first.startswith("patch_embed"):
            state[f"{layer}.patch_embedding.{rest.replace('norm', 'layer_norm')}"] = x
            continue
        for ours, theirs in _V2_NAMES.items():
            rest = rest.replace(ours, theirs)
        if ".attention.kv." in rest:
            for name, half in zip(("key", "value"), x.chunk(2), strict=True):
                state[f"{layer}.blocks.{rest.replace('kv', name)}"] = half
        else:
            state[f"{layer}.blocks.{rest}"] = x
    if not config.has_classifier:  # it runs, but only the hidden states are looked at
        x = next(iter(native.values()))
        state["classifier.weight"] = torch.zeros(1, config.embed_dims[-1], dtype=x.dtype)
        state["classifier.bias"] = torch.zeros(1, dtype=x.dtype)
    return state


def resized_table(table: torch.Tensor, side: int, grid: tuple[int, int]) -> torch.Tensor:
    C = table.shape[-1]
    square = table.reshape(1, side, side, C).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(1, -1, C)


def translate(native: dict, config: PVTConfig, size: tuple[int, int], pyramid: bool) -> dict:
    """Tensors by the authors' names to tensors by Hugging Face's, differentiably."""
    state = {}
    for i, grid in enumerate(config.grids(*size)):
        theirs, ours = f"pvt.encoder.patch_embeddings.{i}", f"patch_embed{i + 1}"
        for kind in ("weight", "bias"):
            state[f"{theirs}.projection.{kind}"] = native[f"{ours}.proj.{kind}"]
            state[f"{theirs}.layer_norm.{kind}"] = native[f"{ours}.norm.{kind}"]
        table, side = native[f"pos_embed{i + 1}"], config.table_sides[i]
        cls_rows = table.shape[1] - side**2
        resized = resized_table(table[:, cls_rows:], side, grid)
        if i == 3 and not pyramid:
            resized = torch.cat([table[:, :1], resized], dim=1)
        state[f"{theirs}.position_embeddings"] = resized
        for b in range(config.depths[i]):
            theirs, ours = f"pvt.encoder.block.{i}.{b}", f"block{i + 1}.{b}"
            C = config.embed_dims[i]
            for kind in ("weight", "bias"):
                state[f"{theirs}.layer_norm_1.{kind}"] = native[f"{ours}.norm1.{kind}"]
                state[f"{theirs}.layer_norm_2.{kind}"] = native[f"{ours}.norm2.{kind}"]
                state[f"{theirs}.attention.output.dense.{kind}"] = native[
                    f"{ours}.attn.proj.{kind}"
                ]
                state[f"{theirs}.mlp.dense1.{kind}"] = native[f"{ours}.mlp.fc1.{kind}"]
                state[f"{theirs}.mlp.dense2.{kind}"] = native[f"{ours}.mlp.fc2.{kind}"]
                if kind == "weight" or config.qkv_bias:
                    state[f"{theirs}.attention.self.query.{kind}"] = native[f"{ours}.attn.q.{kind}"]
                    kv = native[f"{ours}.attn.kv.{kind}"]
                    state[f"{theirs}.attention.self.key.{kind}"] = kv[:C]
                    state[f"{theirs}.attention.self.value.{kind}"] = kv[C:]
                if config.sr_ratios[i] > 1:
                    sr, norm = native[f"{ours}.attn.sr.{kind}"], native[f"{ours}.attn.norm.{kind}"]
                    state[f"{theirs}.attention.self.sequence_reduction.{kind}"] = sr
                    state[f"{theirs}.attention.self.layer_norm.{kind}"] = norm
    if config.has_classifier and not pyramid:
        state["pvt.encoder.patch_embeddings.3.cls_token"] = native["cls_token"]
        for kind in ("weight", "bias"):
            state[f"pvt.encoder.layer_norm.{kind}"] = native[f"norm.{kind}"]
            state[f"classifier.{kind}"] = native[f"head.{kind}"]
    else:  # they run, but only the hidden states before them are looked at
        C = config.embed_dims[-1]
        unread = torch.zeros(max(config.num_classes, 1), C, dtype=table.dtype)
        for kind in ("weight", "bias"):
            state[f"pvt.encoder.layer_norm.{kind}"] = unread[0]
        state |= {"classifier.weight": unread, "classifier.bias": unread[:, 0]}
    return state


def transformers_forward(
    params: Any,
    images: np.ndarray,
    config: Any,
    rng: np.random.Generator | Draws | None = None,
    pyramid: bool = False,
):
    """Outputs (a list of one, or the four maps) as tensors, and the leaves that made them."""
    v2 = isinstance(config, PVTv2Config)
    model = build_v2(config, rng) if v2 else build(config, rng, pyramid)
    leaves = {key: tensor(x, grad=True) for key, x in to_state_dict(params).items()}
    x = tensor(images, grad=True)
    size = (images.shape[2], images.shape[3])
    state = translate_v2(leaves, config) if v2 else translate(leaves, config, size, pyramid)
    kwargs = {"pixel_values": x, "output_hidden_states": pyramid}
    result = torch.func.functional_call(model, state, kwargs=kwargs)
    if not pyramid:
        return [result.logits], leaves, x
    if v2:
        return list(result.hidden_states), leaves, x
    ends = np.cumsum(config.depths) - 1  # the last block of each stage
    maps = [
        result.hidden_states[end].permute(0, 2, 1).reshape(images.shape[0], C, *grid)
        for end, C, grid in zip(ends, config.embed_dims, config.grids(*size), strict=True)
    ]
    return maps, leaves, x


def build_vit(config: ViTConfig):
    """The ViT of transformers, on meta; eager attention would compute its softmax in float32."""
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification

    settings = loose(TheirConfig)(
        image_size=config.img_size,
        patch_size=config.patch_size,
        num_channels=config.in_chans,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=config.hidden_dim,
        qkv_bias=config.qkv_bias,
        layer_norm_eps=config.norm_eps,
        num_labels=max(config.num_classes, 1),
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = ViTForImageClassification(settings)
    return model.eval()


def translate_vit(native: dict, config: ViTConfig) -> dict:
    """Tensors by DeiT's names to tensors by those that transformers has in memory."""
    theirs = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    for b in range(config.depth):
        ours, layer = f"blocks.{b}", f"vit.layers.{b}"
        theirs[f"{ours}.norm1"] = f"{layer}.layernorm_before"
        theirs[f"{ours}.norm2"] = f"{layer}.layernorm_after"
        theirs[f"{ours}.attn.proj"] = f"{layer}.attention.o_proj"
        theirs |= {f"{ours}.mlp.{fc}": f"{layer}.mlp.{fc}" for fc in ("fc1", "fc2")}
    state = {
        "vit.embeddings.cls_token": native["cls_token"],
        "vit.embeddings.position_embeddings": native["pos_embed"],
    }
    C = config.embed_dim
    for kind in ("weight", "bias"):
        for ours, name in theirs.items():
            if f"{ours}.{kind}" in native:
                state[f"{name}.{kind}"] = native[f"{ours}.{kind}"]
        for b in range(config.depth):
            qkv = native.get(f"blocks.{b}.attn.qkv.{kind}")
            for i, part in enumerate("qkv" if qkv is not None else ""):
                key = f"vit.layers.{b}.attention.{part}_proj.{kind}"
                state[key] = qkv[i * C : (i + 1) * C]
    if not config.has_classifier:  # they run, but only the hidden states before them are looked at
        unread = torch.zeros(1, C, dtype=native["cls_token"].dtype)
        for kind in ("weight", "bias"):
            state[f"vit.layernorm.{kind}"] = unread[0]
        state |= {"classifier.weight": unread, "classifier.bias": unread[:, 0]}
    return state


def transformers_vit_forward(
    params: ViTParams, images: np.ndarray, config: ViTConfig, blocks: list[int] | None = None
):
    """Logits (or the maps after some blocks) as tensors, and the leaves that made them.

    transformers resizes tables bicubically itself. To see them resized bilinearly, they are handed
    over resized.
    """
    model = build_vit(config)
    leaves = {key: tensor(x, grad=True) for key, x in to_state_dict(params).items()}
    x = tensor(images, grad=True)
    B, _, H, W = images.shape
    (grid,), side = config.grids(H, W), config.table_sides[0]
    state = translate_vit(leaves, config)
    kwargs: dict[str, Any] = {"pixel_values": x}
    if config.position_resize == "bicubic":
        kwargs["interpolate_pos_encoding"] = True
    else:
        table = state["vit.embeddings.position_embeddings"]
        resized = torch.cat([table[:, :1], resized_table(table[:, 1:], side, grid)], dim=1)
        state["vit.embeddings.position_embeddings"] = resized
        model.vit.embeddings.image_size = (H, W)
    tokens = []  # after every block
    for layer in model.vit.layers:
        layer.register_forward_hook(lambda module, args, result: tokens.append(result))
    result = torch.func.functional_call(model, state, kwargs=kwargs)
    if blocks is None:
        return [result.logits], leaves, x
    maps = [tokens[k][:, 1:].permute(0, 2, 1).reshape(B, config.embed_dim, *grid) for k in blocks]
    return maps, leaves, x


def transformers_backward(outputs, cotangents, leaves, x, config: Any):
    """Gradients as a record of arrays, and of the images; zeros for what was not used."""
    inputs = [x, *leaves.values()]
    grads = torch.autograd.grad(
        outputs, inputs, [tensor(dy) for dy in cotangents], allow_unused=True
    )
    arrays = [
        torch.zeros_like(leaf).numpy() if g is None else g.numpy()
        for leaf, g in zip(inputs, grads, strict=True)
    ]
    return from_state_dict(dict(zip(leaves, arrays[1:], strict=True)), config), arrays[0]
