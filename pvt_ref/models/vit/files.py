"""A ViT in the files of other projects: DeiT and timm, Hugging Face, MMSegmentation."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pvt_ref.checks import is_whole
from pvt_ref.errors import CheckpointError, ConfigError, shown
from pvt_ref.models.layouts import (
    WHOLE,
    Files,
    Layout,
    Piece,
    Seen,
    Shape,
    one_side,
    pieces_by,
    renaming,
)
from pvt_ref.models.vit.config import ViTConfig

_BASE = "vit."  # prefix of all keys but the classifier's: transformers' base model
_HF, _MM = "vit.encoder.layer.{b}.", "layers.{b}."

#: Our templates, Hugging Face's on disk, and MMSegmentation's, which has no classifier.
_KEYS = {
    "cls_token": ("vit.embeddings.cls_token", "cls_token"),
    "pos_embed": ("vit.embeddings.position_embeddings", "pos_embed"),
    "patch_embed.proj": ("vit.embeddings.patch_embeddings.projection", "patch_embed.projection"),
    "blocks.{b}.norm1": (_HF + "layernorm_before", _MM + "ln1"),
    # and attention.attention.key and .value: see below
    "blocks.{b}.attn.qkv": (_HF + "attention.attention.query", _MM + "attn.attn.in_proj_{leaf}"),
    "blocks.{b}.attn.proj": (_HF + "attention.output.dense", _MM + "attn.attn.out_proj"),
    "blocks.{b}.norm2": (_HF + "layernorm_after", _MM + "ln2"),
    "blocks.{b}.mlp.fc1": (_HF + "intermediate.dense", _MM + "ffn.layers.0.0"),
    "blocks.{b}.mlp.fc2": (_HF + "output.dense", _MM + "ffn.layers.1"),
    "norm": ("vit.layernorm", "ln1"),
    "head": ("classifier",),
}

_hugging_face_name = renaming({ours: theirs[0] for ours, theirs in _KEYS.items()})
_bare_name = renaming({ours: theirs[0].removeprefix(_BASE) for ours, theirs in _KEYS.items()})
_mmsegmentation_name = renaming({k: theirs[1] for k, theirs in _KEYS.items() if len(theirs) > 1})


def _mmsegmentation(key: str, shape: Shape, config: ViTConfig) -> list[Piece]:
    name = _mmsegmentation_name(key)
    if name is None or (key.endswith("attn.proj.bias") and not config.qkv_bias):
        return []  # its attention has both biases or neither
    return [Piece(key, WHOLE, name, WHOLE, shape)]


_MARKS = ("cls_token", "pos_embed")  # else the blocks belong to another network, such as a Swin
_QKV = ("query", "key", "value")
_CLASSIFIER = ("norm.weight", "norm.bias", "head.weight", "head.bias")
_PORT_ADVICE = "pass eps=1e-6 for DeiT's training setting"

DEIT = Layout(name="DeiT layout", eps=(1e-6,), marks=_MARKS)
DEIT_BARE = Layout(
    name="DeiT layout without classifier",
    eps=(1e-6,),
    marks=_MARKS,
    has_classifier=False,
    unused=_CLASSIFIER,
)
#: For a file without a classifier: SETR's own code has the same names, and no classifier.
DEIT_OR_SETR = dataclasses.replace(
    DEIT_BARE,
    resize_assumed="bicubic resizing of the position table (SETR resizes bilinearly: for a file of "
    "its own code pass config=dataclasses.replace(model.config, position_resize='bilinear'))",
)
HUGGING_FACE = Layout(
    name="Hugging Face ViT layout",
    rename=_hugging_face_name,
    pieces_of=pieces_by(_hugging_face_name, stacked=_QKV),
    eps=(1e-12,),
    marks=_CLASSIFIER[2:],
    has_classifier=True,
    config_beside=True,
    eps_advice=_PORT_ADVICE,
)
HUGGING_FACE_BARE = Layout(
    name="Hugging Face ViT layout without classifier",
    rename=_bare_name,
    pieces_of=pieces_by(_bare_name, stacked=_QKV),
    eps=(1e-12,),
    marks=_MARKS,
    has_classifier=False,
    unused=("layernorm.weight", "layernorm.bias", "pooler.dense.weight", "pooler.dense.bias"),
    config_beside=True,
    eps_advice=_PORT_ADVICE,
)
MMSEGMENTATION = Layout(
    name="MMSegmentation ViT layout",
    rename=_mmsegmentation_name,
    pieces_of=_mmsegmentation,
    eps=(1e-6,),
    marks=_MARKS,
    has_classifier=False,
    unused=("ln1.weight", "ln1.bias"),
)


#: Relatives of a ViT that cannot be read: what they are, how they differ, parts of their keys.
_RELATIVES = (
    (
        "a distilled DeiT",
        "it has a token, a table row and a head more than a ViT, and its logits are the mean of "
        "two heads. That is not read here; the DeiT of the same size without distillation is",
        ("dist_token", "distillation", "head_dist"),
    ),
    (
        "a ViT with global pooling",
        "its head reads the mean of the patches, and not the cls token. That is not read here",
        ("fc_norm.",),
    ),
    (
        "a ViT with LayerScale, such as DeiT III or DINOv2",
        "learned factors scale its branches. That is not read here",
        (".ls1.", ".gamma_1", ".layer_scale1.", ".lambda_1"),
    ),
    (
        "a ViT with further norms, such as CLIP's",
        "they stand before its blocks, or on queries and keys. That is not read here",
        ("norm_pre.", "pre_layrnorm.", ".q_norm."),
    ),
    (
        "a ViT with register tokens",
        "it has more tokens than patches and cls token. That is not read here",
        ("reg_token", "register_tokens"),
    ),
)


def _bare(layout: Layout, state: Mapping[str, Any], wanted: bool) -> tuple[Layout, str]:
    for what, why, marks in _RELATIVES:
        if keys := sorted(key for key in state if any(mark in key for mark in marks)):
            raise CheckpointError(f"{what} ({', '.join(map(shown, keys[:3]))}): {why}")
    if (token := layout.rename("cls_token")) not in state:
        what = f"{layout.name}, but it has no {token}. The likely cause is a ViT that averages its"
        raise CheckpointError(f"{what} patches, which is not read here, or a lost key")
    if layout is DEIT and not {"head.weight", "head.bias"} & state.keys():
        return DEIT_OR_SETR, ""
    if layout is DEIT and wanted:
        return DEIT_BARE, ""
    return (HUGGING_FACE_BARE, _BASE) if layout is HUGGING_FACE and wanted else (layout, "")


def _table_side(rows: int) -> int:
    """The side of a table's grid. A table has one row more than the grid, some relatives' not."""
    side = math.isqrt(rows)
    return side if rows > 1 and side * side == rows else math.isqrt(max(rows - 1, 0))


def _fit(config: ViTConfig, shapes: Mapping[str, Shape], layout: Layout) -> ViTConfig:
    seen = Seen(shapes, layout)
    head = seen.first("head.weight", "head.bias")
    kernel, table = seen.first("patch_embed.proj.weight"), seen.first("pos_embed")
    changes: dict[str, Any] = {}
    if layout.has_classifier is False:
        changes["num_classes"] = 0
    elif head:
        changes["num_classes"] = head[0]
    if len(kernel) == 4:
        changes["in_chans"] = kernel[1]
    if layout is MMSEGMENTATION:
        changes["position_resize"] = "bilinear"
    side = _table_side(table[1]) * config.patch_size if len(table) == 3 else 0
    for img_size in (side, config.img_size):
        try:
            return dataclasses.replace(config, **changes, img_size=img_size)
        except ConfigError:
            continue  # no such image size: the table is wrong
    return config


def _shown(shapes: Mapping[str, Shape], layout: Layout) -> dict[str, Any]:
    seen = Seen(shapes, layout)
    try:
        C, in_chans, P, _ = seen.shape("patch_embed.proj.weight")
        return {
            "img_size": _table_side(seen.shape("pos_embed")[1]) * P,
            "patch_size": P,
            "embed_dim": C,
            "depth": seen.depth("blocks"),
            "mlp_ratio": seen.mlp_ratio("blocks.0"),
            "qkv_bias": seen.has("blocks.0.attn.qkv.bias"),
            "in_chans": in_chans,
            "num_classes": seen.shape("head.weight")[0] if seen.has("head.weight") else 0,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return {}


#: Fields of Hugging Face's ViTConfig that have the same meaning here.
_SAME = {
    **{"image_size": "img_size", "num_channels": "in_chans", "hidden_size": "embed_dim"},
    **{"num_hidden_layers": "depth", "num_attention_heads": "num_heads"},
    **{"hidden_dropout_prob": "drop_rate", "attention_probs_dropout_prob": "attn_drop_rate"},
    **{"layer_norm_eps": "norm_eps", "patch_size": "patch_size", "qkv_bias": "qkv_bias"},
}


def _from_hugging_face(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"hidden_act is {shown(fields['hidden_act'])}; known is 'gelu' only")
    values = {ours: fields[theirs] for theirs, ours in _SAME.items() if theirs in fields}
    for name in ("img_size", "patch_size"):
        if name in values:
            values[name] = one_side(name, values[name], "both are square here")
    if "intermediate_size" in fields:
        hidden, C = fields["intermediate_size"], fields.get("hidden_size", 0)
        if not (is_whole(hidden) and is_whole(C) and C > 0):
            what = f"intermediate_size is {shown(hidden)} and hidden_size {shown(C)}"
            raise CheckpointError(f"{what}; both must be positive whole numbers")
        values["mlp_ratio"] = hidden / C if hidden % C else hidden // C
    return {**values, "qk_scale": None}  # its code has no such setting


def _partial(values: dict[str, Any]) -> ViTConfig:
    filled: dict[str, Any] = {
        **{"patch_size": 1, "num_heads": 1, "mlp_ratio": 1, "num_classes": 0},
        "embed_dim": values.get("num_heads", 1),
        **values,
    }
    if "img_size" not in values:
        filled["img_size"] = filled["patch_size"]
    return ViTConfig(**filled)


FILES = Files(
    readable="DeiT and timm ViT .pth files, Hugging Face ViTForImageClassification and ViTModel, "
    "MMSegmentation ViT backbones",
    layouts=(HUGGING_FACE, HUGGING_FACE_BARE, MMSEGMENTATION, DEIT),
    probes=("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"),
    bare=_bare,
    model_type="vit",
    telling=frozenset(("hidden_size", "num_hidden_layers", "embed_dim", "num_heads")),
    hugging_face=_from_hugging_face,
    partial=_partial,
    fit=_fit,
    shown=_shown,
    widths="embed_dim",
    blocks=lambda config: config.depth,
    hub={
        "deit_ti_16": "facebook/deit-tiny-patch16-224",
        "deit_s_16": "facebook/deit-small-patch16-224",
        "deit_b_16": "facebook/deit-base-patch16-224",
    },
    url="https://dl.fbaipublicfiles.com/deit/{name}.pth",
    file_names={
        "deit_ti_16": "deit_tiny_patch16_224-a1311bcf",
        "deit_s_16": "deit_small_patch16_224-cd65a155",
        "deit_b_16": "deit_base_patch16_224-b5f2ef4d",
    },
)
