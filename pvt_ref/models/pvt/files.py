"""A PVT in the files of other projects: four layouts, and Hugging Face's config.json."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from pvt_ref.checks import TOO_LARGE, is_whole
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
    same_key,
)
from pvt_ref.models.pvt.config import NUM_STAGES, VARIANTS, PVTConfig

_BASE = "pvt."  # prefix of all keys but the classifier's: transformers' base model
_HF, _HF_PATCH = "pvt.encoder.block.{j}.{b}.", "pvt.encoder.patch_embeddings.{j}."
_MM = "layers.{j}.1.{c}."  # element 0 of this list is the position table

#: Our templates, Hugging Face's and MMDetection's, which has no classifier.
_KEYS = {
    "patch_embed{i}.proj": (_HF_PATCH + "projection", "layers.{j}.0.projection"),
    "patch_embed{i}.norm": (_HF_PATCH + "layer_norm", "layers.{j}.0.norm"),
    "pos_embed{i}": (_HF_PATCH + "position_embeddings", "layers.{j}.1.0.pos_embed"),
    "cls_token": ("pvt.encoder.patch_embeddings.3.cls_token",),
    "block{i}.{b}.norm1": (_HF + "layer_norm_1", _MM + "norm1"),
    "block{i}.{b}.attn.q": (_HF + "attention.self.query", _MM + "attn.attn.in_proj_{leaf}"),
    # and attention.self.value: see below
    "block{i}.{b}.attn.kv": (_HF + "attention.self.key", _MM + "attn.attn.in_proj_{leaf}"),
    "block{i}.{b}.attn.proj": (_HF + "attention.output.dense", _MM + "attn.attn.out_proj"),
    "block{i}.{b}.attn.sr": (_HF + "attention.self.sequence_reduction", _MM + "attn.sr"),
    "block{i}.{b}.attn.norm": (_HF + "attention.self.layer_norm", _MM + "attn.norm"),
    "block{i}.{b}.norm2": (_HF + "layer_norm_2", _MM + "norm2"),
    "block{i}.{b}.mlp.fc1": (_HF + "mlp.dense1", _MM + "ffn.layers.0"),
    "block{i}.{b}.mlp.fc2": (_HF + "mlp.dense2", _MM + "ffn.layers.3"),
    "norm": ("pvt.encoder.layer_norm",),
    "head": ("classifier",),
}

_LAST_TABLE = f"pos_embed{NUM_STAGES}"
_hf_name = renaming({ours: theirs[0] for ours, theirs in _KEYS.items()})
_hf_bare_name = renaming({ours: theirs[0].removeprefix(_BASE) for ours, theirs in _KEYS.items()})
_mm_name = renaming({ours: theirs[1] for ours, theirs in _KEYS.items() if len(theirs) > 1})


def _pieces(rename: Callable[[str], str | None], keeps_cls_row: bool = True) -> Any:
    """The ``pieces_of`` of a layout; backbones keep a cls row in the last table, but skip it."""
    plain = pieces_by(rename, stacked=("key", "value"))

    def pieces_of(key: str, shape: Shape, config: PVTConfig) -> list[Piece]:
        pieces = plain(key, shape, config)
        if keeps_cls_row and key == _LAST_TABLE:
            _, n, C = shape
            rows = (slice(None), slice(1, None))
            return [x._replace(foreign_region=rows, foreign_shape=(1, n + 1, C)) for x in pieces]
        return pieces

    return pieces_of


def mmdetection_pieces(rename: Callable[[str], str | None]) -> Any:
    """The ``pieces_of`` of MMDetection's backbones, of either version of PVT."""

    def pieces_of(key: str, shape: Shape, config: Any) -> list[Piece]:
        name = rename(key)
        if name is None or (key.endswith("attn.proj.bias") and not config.qkv_bias):
            return []
        if ".attn.q." in key or ".attn.kv." in key:  # joined: (3C, ...), q above k above v
            C = config.embed_dims[int(key[len("block")]) - 1]
            rows = slice(0, C) if ".attn.q." in key else slice(C, 3 * C)
            return [Piece(key, WHOLE, name, (rows,), (3 * C, *shape[1:]))]
        if ".mlp.fc" in key and key.endswith(".weight"):  # linear, stored as a 1x1 convolution
            shape = (*shape, 1, 1)
        return [Piece(key, WHOLE, name, WHOLE, shape)]

    return pieces_of


_CLS = ("cls_token", "norm.weight", "norm.bias")
_TRAINED = "pass eps=(1e-6, 1e-5) for the authors' training setting"
_PORT: Any = {"eps": (1e-6, 1e-6), "eps_advice": _TRAINED}

AUTHORS = Layout(name="authors' layout", eps=(1e-6, 1e-5))
AUTHORS_DENSE = Layout(
    name="authors' dense-prediction layout",
    pieces_of=_pieces(same_key),
    eps=AUTHORS.eps,
    has_classifier=False,
    unused=(*_CLS, "head.weight", "head.bias"),
)
HUGGING_FACE = Layout(
    name="Hugging Face layout",
    rename=_hf_name,
    pieces_of=_pieces(_hf_name, keeps_cls_row=False),
    marks=("head.weight", "head.bias"),
    has_classifier=True,
    config_beside=True,
    **_PORT,
)
HUGGING_FACE_BARE = Layout(
    name="Hugging Face layout without classifier",
    rename=_hf_bare_name,
    pieces_of=_pieces(_hf_bare_name),  # a PvtModel keeps the cls token
    has_classifier=False,
    unused=tuple(_hf_bare_name(key) or "" for key in _CLS),
    config_beside=True,
    **_PORT,
)
MMDETECTION = Layout(
    name="MMDetection layout",
    rename=_mm_name,
    pieces_of=mmdetection_pieces(_mm_name),
    has_classifier=False,
    **_PORT,
)


def _bare(layout: Layout, state: Mapping[str, Any], wanted: bool) -> tuple[Layout, str]:
    if layout is AUTHORS:
        rows = getattr(state.get(_LAST_TABLE), "shape", ())
        has_cls_row = len(rows) == 3 and math.isqrt(rows[1]) ** 2 != rows[1]
        has_head = "head.weight" in state or "head.bias" in state
        if has_cls_row and (wanted or not has_head):
            return AUTHORS_DENSE, ""
    return (HUGGING_FACE_BARE, _BASE) if layout is HUGGING_FACE and wanted else (layout, "")


def _fit(config: PVTConfig, shapes: Mapping[str, Shape], layout: Layout) -> PVTConfig:
    seen = Seen(shapes, layout)
    head = seen.first("head.weight", "head.bias")
    num_classes = head[0] if head else config.num_classes
    if layout.has_classifier is False or not (head or seen.first("cls_token", "norm.weight")):
        num_classes = 0
    kernel, table = seen.first("patch_embed1.proj.weight"), seen.first("pos_embed1")
    in_chans = kernel[1] if len(kernel) == 4 else config.in_chans
    side = math.isqrt(table[1]) * config.patch_sizes[0] if len(table) == 3 else config.img_size
    changes = {"num_classes": num_classes, "in_chans": in_chans}
    for img_size in (side, config.img_size):
        try:
            return dataclasses.replace(config, **changes, img_size=img_size)
        except ConfigError:
            continue  # no such image size: the table is wrong
    return config


def _shown(shapes: Mapping[str, Shape], layout: Layout) -> dict[str, Any]:
    seen, stages = Seen(shapes, layout), range(1, NUM_STAGES + 1)
    reductions = [f"block{i}.0.attn.sr.weight" for i in stages]
    try:
        P = [seen.shape(f"patch_embed{i}.proj.weight")[2] for i in stages]
        return {
            "img_size": math.isqrt(seen.shape("pos_embed1")[1]) * P[0],
            "in_chans": seen.shape("patch_embed1.proj.weight")[1],
            "num_classes": seen.shape("head.weight")[0] if seen.has("head.weight") else 0,
            "patch_sizes": tuple(P),
            "embed_dims": tuple(seen.shape(f"pos_embed{i}")[2] for i in stages),
            "mlp_ratios": tuple(seen.mlp_ratio(f"block{i}.0") for i in stages),
            "qkv_bias": seen.has("block1.0.attn.q.bias"),
            "depths": tuple(seen.depth(f"block{i}") for i in stages),
            "sr_ratios": tuple(seen.shape(key)[2] if seen.has(key) else 1 for key in reductions),
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return {}


_DEFAULT = PVTConfig()
#: Fields of Hugging Face's PvtConfig that have the same meaning here.
_SAME = {
    **{"num_channels": "in_chans", "hidden_sizes": "embed_dims"},
    **{"num_attention_heads": "num_heads", "sequence_reduction_ratios": "sr_ratios"},
    **{"hidden_dropout_prob": "drop_rate", "attention_probs_dropout_prob": "attn_drop_rate"},
    **{name: name for name in ("patch_sizes", "mlp_ratios", "depths", "qkv_bias")},
    "drop_path_rate": "drop_path_rate",
}

_STRUCTURE = ("hidden_sizes", "num_attention_heads", "sequence_reduction_ratios", "patch_sizes")
_TELLING = frozenset((*_STRUCTURE, "embed_dims", "depths", "num_heads", "sr_ratios"))


def _from_hugging_face(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("num_encoder_blocks", NUM_STAGES) != NUM_STAGES:
        raise CheckpointError(f"num_encoder_blocks is {shown(fields['num_encoder_blocks'])}, not 4")
    if fields.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"hidden_act is {shown(fields['hidden_act'])}; known is 'gelu' only")
    patches = fields.get("patch_sizes", list(_DEFAULT.patch_sizes))
    if fields.get("strides", patches) != patches:  # its kernels have the strides' size
        what = f"patch_sizes {shown(patches)} and strides {shown(fields['strides'])} differ"
        raise CheckpointError(f"{what}: its patches overlap, and those of this project do not")
    values = {ours: fields[theirs] for theirs, ours in _SAME.items() if theirs in fields}
    if "image_size" in fields:
        why = "tables here are square"
        values["img_size"] = one_side("image_size", fields["image_size"], why)
    if "layer_norm_eps" in fields:
        values |= dict.fromkeys(("norm_eps", "projection_norm_eps"), fields["layer_norm_eps"])
    return {**values, "qk_scale": None}  # its code has no such setting


def _partial(values: dict[str, Any]) -> PVTConfig:
    ones = (1,) * NUM_STAGES
    filled: dict[str, Any] = {
        **dict.fromkeys(("num_heads", "mlp_ratios", "patch_sizes", "sr_ratios"), ones),
        "embed_dims": values.get("num_heads", ones),
        "num_classes": 0,
        **values,
    }
    if "img_size" not in values:
        sizes = [filled["patch_sizes"], filled["sr_ratios"]]
        factors = [n for size in sizes if isinstance(size, list) for n in size[:NUM_STAGES]]
        multiple = math.prod(n for n in factors if is_whole(n) and 0 < n < TOO_LARGE)
        filled["img_size"] = multiple if multiple < TOO_LARGE else _DEFAULT.img_size
    return PVTConfig(**filled)


FILES = Files(
    readable="the authors' .pth files, training checkpoints, Hugging Face "
    "PvtForImageClassification and PvtModel, MMDetection PVT backbones",
    layouts=(HUGGING_FACE, HUGGING_FACE_BARE, MMDETECTION, AUTHORS),
    probes=("patch_embed1.proj.weight", "pos_embed1", "block1.0.norm1.weight"),
    bare=_bare,
    model_type="pvt",
    telling=_TELLING,
    hugging_face=_from_hugging_face,
    partial=_partial,
    fit=_fit,
    shown=_shown,
    widths="embed_dims",
    blocks=lambda config: sum(config.depths),
    hub={name: f"Zetatech/{name.replace('_', '-')}-224" for name in list(VARIANTS)[:4]},
    url="https://github.com/whai362/PVT/releases/download/v2/{name}.pth",
)
