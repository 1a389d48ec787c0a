"""A PVT v2 in the files of other projects: six layouts, and Hugging Face's config.json.

Depth-wise convolutions tell them apart from a PVT's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pvt_ref.checks import TOO_LARGE, is_whole
from pvt_ref.errors import CheckpointError, ConfigError, shown
from pvt_ref.models.fields import NUM_STAGES
from pvt_ref.models.layouts import Files, Layout, Seen, Shape, one_side, pieces_by, renaming
from pvt_ref.models.pvt.files import mmdetection_pieces
from pvt_ref.models.pvt_v2.config import KERNELS, STRIDES, VARIANTS, PVTv2Config

_BASE = "pvt_v2."  # prefix of all keys but the classifier's: transformers' base model
_HF, _TIMM, _MM = "pvt_v2.encoder.layers.{j}.", "stages.{j}.", "layers.{j}."
_HF_B, _TIMM_B, _MM_B = _HF + "blocks.{b}.", _TIMM + "blocks.{b}.", _MM + "1.{b}."

#: Our templates; Hugging Face's, timm's and MMDetection's, which has no classifier.
_KEYS = {
    "patch_embed{i}.proj": (
        _HF + "patch_embedding.proj",
        *(_TIMM + "downsample.proj", _MM + "0.projection"),
    ),
    "patch_embed{i}.norm": (
        _HF + "patch_embedding.layer_norm",
        *(_TIMM + "downsample.norm", _MM + "0.norm"),
    ),
    "block{i}.{b}.norm1": (_HF_B + "layer_norm_1", _TIMM_B + "norm1", _MM_B + "norm1"),
    "block{i}.{b}.attn.q": (
        _HF_B + "attention.query",
        *(_TIMM_B + "attn.q", _MM_B + "attn.attn.in_proj_{leaf}"),
    ),
    "block{i}.{b}.attn.kv": (
        _HF_B + "attention.key",  # and attention.value: see below
        *(_TIMM_B + "attn.kv", _MM_B + "attn.attn.in_proj_{leaf}"),
    ),
    "block{i}.{b}.attn.proj": (
        _HF_B + "attention.proj",
        *(_TIMM_B + "attn.proj", _MM_B + "attn.attn.out_proj"),
    ),
    "block{i}.{b}.attn.sr": (
        _HF_B + "attention.spatial_reduction",
        *(_TIMM_B + "attn.sr", _MM_B + "attn.sr"),
    ),
    "block{i}.{b}.attn.norm": (
        _HF_B + "attention.layer_norm",
        *(_TIMM_B + "attn.norm", _MM_B + "attn.norm"),
    ),
    "block{i}.{b}.norm2": (_HF_B + "layer_norm_2", _TIMM_B + "norm2", _MM_B + "norm2"),
    "block{i}.{b}.mlp.fc1": (_HF_B + "mlp.dense1", _TIMM_B + "mlp.fc1", _MM_B + "ffn.layers.0"),
    "block{i}.{b}.mlp.dwconv.dwconv": (
        _HF_B + "mlp.dwconv.dwconv",
        *(_TIMM_B + "mlp.dwconv", _MM_B + "ffn.layers.1"),
    ),
    "block{i}.{b}.mlp.fc2": (_HF_B + "mlp.dense2", _TIMM_B + "mlp.fc2", _MM_B + "ffn.layers.4"),
    "norm{i}": (_HF + "layer_norm", _TIMM + "norm", _MM + "2"),
    "head": ("classifier", "head"),
}

_hugging_face_name = renaming({ours: theirs[0] for ours, theirs in _KEYS.items()})
_bare_name = renaming({ours: theirs[0].removeprefix(_BASE) for ours, theirs in _KEYS.items()})
_mmdetection_name = renaming({k: theirs[2] for k, theirs in _KEYS.items() if len(theirs) > 2})
_timm_stage = renaming({ours: theirs[1] for ours, theirs in _KEYS.items()})


def _timm_name(key: str) -> str | None:
    name = _timm_stage(key)
    return name and name.replace("stages.0.downsample", "patch_embed")


_DWCONV = tuple(f"block{i}.0.mlp.dwconv.dwconv.weight" for i in range(1, NUM_STAGES + 1))
_HEAD = ("head.weight", "head.bias")
_PORT: Any = {
    "eps": (1e-6, 1e-6),
    "eps_advice": "pass eps=(1e-6, 1e-5) for the authors' training setting",
}

AUTHORS = Layout(name="authors' layout", marks=_DWCONV, eps=(1e-6, 1e-5))
TIMM = Layout(
    name="timm layout",
    rename=_timm_name,
    pieces_of=pieces_by(_timm_name),
    marks=_DWCONV,
    eps=(1e-6, 1e-5),
)
HUGGING_FACE = Layout(
    name="Hugging Face layout",
    rename=_hugging_face_name,
    pieces_of=pieces_by(_hugging_face_name, stacked=("key", "value")),
    marks=_HEAD,
    has_classifier=True,
    config_beside=True,
    **_PORT,
)
HUGGING_FACE_BARE = Layout(
    name="Hugging Face layout without classifier",
    rename=_bare_name,
    pieces_of=pieces_by(_bare_name, stacked=("key", "value")),
    marks=_DWCONV,
    has_classifier=False,
    config_beside=True,
    **_PORT,
)
MMDETECTION = Layout(
    name="MMDetection layout",
    rename=_mmdetection_name,
    pieces_of=mmdetection_pieces(_mmdetection_name),
    marks=_DWCONV,
    has_classifier=False,
    **_PORT,
)


def _bare(layout: Layout, state: Mapping[str, Any], wanted: bool) -> tuple[Layout, str]:
    if not wanted:
        return layout, ""
    if layout is HUGGING_FACE:
        return HUGGING_FACE_BARE, _BASE
    name = f"{layout.name} without its classifier"
    has_head = any(layout.rename(key) in state for key in _HEAD)
    return (dataclasses.replace(layout, name=name, unused=_HEAD), "") if has_head else (layout, "")


def _fit(config: PVTv2Config, shapes: Mapping[str, Shape], layout: Layout) -> PVTv2Config:
    seen = Seen(shapes, layout)
    head, kernel = seen.first(*_HEAD), seen.first("patch_embed1.proj.weight")
    has_head = head and layout.has_classifier is not False and not layout.unused
    in_chans = kernel[1] if len(kernel) == 4 else config.in_chans
    num_classes = head[0] if has_head else 0
    try:
        return dataclasses.replace(config, num_classes=num_classes, in_chans=in_chans)
    except ConfigError:
        return config  # no model can have these channels


def _shown(shapes: Mapping[str, Shape], layout: Layout) -> dict[str, Any]:
    seen, stages = Seen(shapes, layout), range(1, NUM_STAGES + 1)
    reductions = [f"block{i}.0.attn.sr.weight" for i in stages]
    try:
        R = tuple(seen.shape(key)[2] if seen.has(key) else 0 for key in reductions)
        linear = R == (1,) * NUM_STAGES
        ratios = PVTv2Config().sr_ratios if linear else tuple(r or 1 for r in R)
        return {
            "in_chans": seen.shape("patch_embed1.proj.weight")[1],
            "num_classes": seen.shape("head.weight")[0] if seen.has("head.weight") else 0,
            "embed_dims": tuple(seen.shape(f"patch_embed{i}.proj.weight")[0] for i in stages),
            "mlp_ratios": tuple(seen.mlp_ratio(f"block{i}.0") for i in stages),
            "qkv_bias": seen.has("block1.0.attn.q.bias"),
            "depths": tuple(seen.depth(f"block{i}") for i in stages),
            "sr_ratios": ratios,
            "linear": linear,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return {}


#: Fields of Hugging Face's PvtV2Config that have the same meaning here.
_SAME = {
    **{"num_channels": "in_chans", "hidden_sizes": "embed_dims"},
    **{"num_attention_heads": "num_heads", "linear_attention": "linear"},
    **{"hidden_dropout_prob": "drop_rate", "attention_probs_dropout_prob": "attn_drop_rate"},
    **{name: name for name in ("sr_ratios", "mlp_ratios", "depths", "qkv_bias")},
    "drop_path_rate": "drop_path_rate",
}

_STRUCTURE = ("hidden_sizes", "num_attention_heads", "linear_attention", "linear")
_TELLING = frozenset((*_STRUCTURE, "embed_dims", "depths", "num_heads", "sr_ratios"))


def _from_hugging_face(fields: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {
        "num_encoder_blocks": NUM_STAGES,
        "hidden_act": "gelu",
        "patch_sizes": list(KERNELS),
        "strides": list(STRIDES),
    }
    for name, known in fixed.items():
        if fields.get(name, known) != known:
            raise CheckpointError(f"{name} is {shown(fields[name])}; known is {known!r} only")
    values = {ours: fields[theirs] for theirs, ours in _SAME.items() if theirs in fields}
    if "image_size" in fields:
        why = "it must be one side, of a square"
        values["img_size"] = one_side("image_size", fields["image_size"], why)
    if "layer_norm_eps" in fields:
        values |= dict.fromkeys(("norm_eps", "projection_norm_eps"), fields["layer_norm_eps"])
    return {**values, "qk_scale": None}  # its code has no such setting


def _partial(values: dict[str, Any]) -> PVTv2Config:
    ones = (1,) * NUM_STAGES
    filled: dict[str, Any] = {
        **dict.fromkeys(("num_heads", "mlp_ratios", "sr_ratios"), ones),
        "embed_dims": values.get("num_heads", ones),
        "num_classes": 0,
        **values,
    }
    if "img_size" not in values:  # the usual one, or one that the ratios divide
        R = filled["sr_ratios"]
        if isinstance(R, list) and all(is_whole(r) and 0 < r < TOO_LARGE for r in R):
            multiple = 32 * max(R)
            filled["img_size"] = -(-PVTv2Config().img_size // multiple) * multiple
    return PVTv2Config(**filled)


FILES = Files(
    readable="PVT v2 of the authors, timm, Hugging Face (PvtV2ForImageClassification, PvtV2Model) "
    "and MMDetection",
    layouts=(HUGGING_FACE, HUGGING_FACE_BARE, MMDETECTION, TIMM, AUTHORS),
    probes=("patch_embed1.proj.weight", "block1.0.norm1.weight"),
    bare=_bare,
    model_type="pvt_v2",
    telling=_TELLING,
    hugging_face=_from_hugging_face,
    partial=_partial,
    fit=_fit,
    shown=_shown,
    widths="embed_dims",
    blocks=lambda config: sum(config.depths),
    hub={name: f"OpenGVLab/{name.replace('_li', '_linear')}" for name in VARIANTS},
    url="https://github.com/whai362/PVT/releases/download/v2/{name}.pth",
)
