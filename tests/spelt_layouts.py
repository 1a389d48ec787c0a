"""How other projects name the weights of PVT v2 and ViT: a second account, spelt out by hand.

Nothing here is taken from :mod:`pvt_ref.models`, so that a wrong name there does not pass unseen.
Each function takes a state by our keys, of arrays of any dtype, and gives theirs.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

State = dict[str, Any]


def same(state: State) -> State:
    """The authors of PVT v2; DeiT, and timm's ViT; a segmentor's backbone by the PVT authors."""
    return dict(state)


def timm_v2_key(key: str) -> str:
    key = key.replace("patch_embed1", "patch_embed")
    key = re.sub(r"patch_embed(\d)", lambda m: f"stages.{int(m[1]) - 1}.downsample", key)
    key = re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    key = re.sub(r"^norm(\d)", lambda m: f"stages.{int(m[1]) - 1}.norm", key)
    return key.replace("dwconv.dwconv", "dwconv")


def timm_v2(state: State) -> State:
    return {timm_v2_key(key): x for key, x in state.items()}


def mmdetection_v2(state: State) -> State:
    """PyramidVisionTransformerV2. Its attention has both biases, or none."""
    out = {}
    for key, x in state.items():
        first, _, rest = key.partition(".")
        j = int(first[-1]) - 1
        if first.startswith("patch_embed"):
            out[f"layers.{j}.0.{rest.replace('proj', 'projection')}"] = x
        elif first.startswith("norm"):
            out[f"layers.{j}.2.{rest}"] = x
        else:
            b, _, part = rest.partition(".")
            theirs, leaf = f"layers.{j}.1.{b}", part.rpartition(".")[2]
            if part.startswith("attn.q."):
                kv = state[key.replace("attn.q.", "attn.kv.")]
                out[f"{theirs}.attn.attn.in_proj_{leaf}"] = np.concatenate((x, kv))
            elif part.startswith("attn.proj."):
                out[f"{theirs}.attn.attn.out_proj.{leaf}"] = x
            elif part.startswith("mlp."):
                n = {"fc1": 0, "dwconv": 1, "fc2": 4}[part.split(".")[1]]
                wide = leaf == "weight" and n != 1
                out[f"{theirs}.ffn.layers.{n}.{leaf}"] = x[:, :, None, None] if wide else x
            elif not part.startswith("attn.kv."):
                out[f"{theirs}.{part}"] = x
    if not any(key.endswith("in_proj_bias") for key in out):
        out = {key: x for key, x in out.items() if not key.endswith("out_proj.bias")}
    return out


def hugging_face_v2(state: State, base: str = "pvt_v2.") -> State:
    """PvtV2ForImageClassification; with base "" PvtV2Model."""
    parts = {"norm1": "layer_norm_1", "norm2": "layer_norm_2"}
    parts |= {"attn.q": "attention.query", "attn.proj": "attention.proj"}
    parts |= {"attn.sr": "attention.spatial_reduction", "attn.norm": "attention.layer_norm"}
    parts |= {"mlp.fc1": "mlp.dense1", "mlp.fc2": "mlp.dense2"}
    parts |= {"mlp.dwconv.dwconv": "mlp.dwconv.dwconv"}
    out = {}
    for key, x in state.items():
        stem, _, leaf = key.rpartition(".")
        first, _, rest = stem.partition(".")
        if first == "head":
            out[f"classifier.{leaf}"] = x
            continue
        stage = f"{base}encoder.layers.{int(first[-1]) - 1}"
        if first.startswith("patch_embed"):
            part = {"proj": "proj", "norm": "layer_norm"}[rest]
            out[f"{stage}.patch_embedding.{part}.{leaf}"] = x
        elif first.startswith("norm"):
            out[f"{stage}.layer_norm.{leaf}"] = x
        else:
            b, _, part = rest.partition(".")
            if part == "attn.kv":
                half = len(x) // 2
                out[f"{stage}.blocks.{b}.attention.key.{leaf}"] = x[:half]
                out[f"{stage}.blocks.{b}.attention.value.{leaf}"] = x[half:]
            else:
                out[f"{stage}.blocks.{b}.{parts[part]}.{leaf}"] = x
    return out


def hugging_face_v2_bare(state: State) -> State:
    return hugging_face_v2(state, "")


def hugging_face_vit(state: State, base: str = "vit.") -> State:
    """ViTForImageClassification; with base "" ViTModel."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    parts |= {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense"}
    parts |= {"mlp.fc2": "output.dense"}
    out = {}
    for key, x in state.items():
        stem, _, leaf = key.rpartition(".")
        if key in names:
            out[base + names[key]] = x
        elif stem == "head":
            out[f"classifier.{leaf}"] = x
        elif stem == "norm":
            out[f"{base}layernorm.{leaf}"] = x
        elif stem == "patch_embed.proj":
            out[f"{base}embeddings.patch_embeddings.projection.{leaf}"] = x
        else:
            _, b, part = stem.split(".", 2)
            if part == "attn.qkv":
                for i, name in enumerate(("query", "key", "value")):
                    rows = x[i * len(x) // 3 : (i + 1) * len(x) // 3]
                    out[f"{base}encoder.layer.{b}.attention.attention.{name}.{leaf}"] = rows
            else:
                out[f"{base}encoder.layer.{b}.{parts[part]}.{leaf}"] = x
    return out


def hugging_face_vit_bare(state: State) -> State:
    return hugging_face_vit(state, "")


def mmsegmentation_vit(state: State) -> State:
    """VisionTransformer, SETR's backbone. Its attention has both biases, or none."""
    parts = {"norm1": "ln1", "norm2": "ln2", "attn.proj": "attn.attn.out_proj"}
    parts |= {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    out = {}
    for key, x in state.items():
        stem, _, leaf = key.rpartition(".")
        if stem == "patch_embed.proj":
            out[f"patch_embed.projection.{leaf}"] = x
        elif key.startswith("blocks."):
            _, b, part = stem.split(".", 2)
            theirs = f"attn.attn.in_proj_{leaf}" if part == "attn.qkv" else f"{parts[part]}.{leaf}"
            out[f"layers.{b}.{theirs}"] = x
        else:
            out[key] = x
    if not any(key.endswith("in_proj_bias") for key in out):
        out = {key: x for key, x in out.items() if not key.endswith("out_proj.bias")}
    return out


Spelt = Callable[[State], State]


def config_json(config: Any) -> dict[str, Any]:
    """config.json as transformers writes it, of a PVTv2Config or a ViTConfig."""
    labels = {str(k): f"class {k}" for k in range(config.num_classes or 2)}
    fields = {
        "attention_probs_dropout_prob": config.attn_drop_rate,
        "dtype": "float32",
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.drop_rate,
        "id2label": labels,
        "initializer_range": 0.02,
        "label2id": {name: int(k) for k, name in labels.items()},
        "layer_norm_eps": config.norm_eps,
        "num_channels": config.in_chans,
        "qkv_bias": config.qkv_bias,
        "transformers_version": "5.23.0",
    }
    if hasattr(config, "depths"):
        return fields | {
            "architectures": ["PvtV2ForImageClassification"],
            "depths": list(config.depths),
            "drop_path_rate": config.drop_path_rate,
            "hidden_sizes": list(config.embed_dims),
            "image_size": [config.img_size, config.img_size],
            "linear_attention": config.linear,
            "mlp_ratios": list(config.mlp_ratios),
            "model_type": "pvt_v2",
            "num_attention_heads": list(config.num_heads),
            "num_encoder_blocks": 4,
            "patch_sizes": [7, 3, 3, 3],
            "sr_ratios": list(config.sr_ratios),
            "strides": [4, 2, 2, 2],
        }
    return fields | {
        "architectures": ["ViTForImageClassification"],
        "encoder_stride": 16,
        "hidden_size": config.embed_dim,
        "image_size": config.img_size,
        "intermediate_size": config.hidden_dim,
        "model_type": "vit",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.depth,
        "patch_size": config.patch_size,
        "pooler_act": "tanh",
        "pooler_output_size": config.embed_dim,
    }
