"""Segmentation networks small enough to compute many times over: every backbone, every head."""

import dataclasses
import math
import zlib
from typing import Any

import numpy as np

import pvt_ref
from pvt_ref import PVTConfig, PVTv2Config, ViTConfig
from pvt_ref.models.architecture import count_keys, param_shapes
from pvt_ref.models.segmentor.config import SegmentorConfig, SemanticFPNHead, SETRHead

PVT = PVTConfig(
    img_size=32,
    num_classes=0,
    embed_dims=(4, 8, 12, 8),
    num_heads=(1, 2, 3, 2),
    mlp_ratios=(2, 1, 2, 2),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 1, 1),
    drop_path_rate=0.3,
)
PVT_V2 = PVTv2Config(
    img_size=32,
    num_classes=0,
    embed_dims=(4, 8, 12, 8),
    num_heads=(1, 2, 3, 2),
    mlp_ratios=(2, 1, 2, 2),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 1, 1),
    drop_path_rate=0.3,
)
VIT = ViTConfig(
    img_size=32,
    patch_size=8,
    num_classes=0,
    embed_dim=12,
    depth=2,
    num_heads=3,
    mlp_ratio=2,
    position_resize="bilinear",
    drop_path_rate=0.3,
)

_FPN = SemanticFPNHead(neck_channels=6, channels=5)
SEGMENTORS = {
    "pvt": SegmentorConfig(backbone=PVT, head=_FPN, num_classes=4),
    "pvt_v2": SegmentorConfig(backbone=PVT_V2, head=_FPN, num_classes=4),
    "linear": SegmentorConfig(
        backbone=dataclasses.replace(PVT_V2, linear=True), head=_FPN, num_classes=4
    ),
    "naive": SegmentorConfig(backbone=VIT, head=SETRHead(channels=7), num_classes=4),
    "pup": SegmentorConfig(
        backbone=VIT, head=SETRHead(upsampling="pup", channels=6), num_classes=4
    ),
}


def value(key: str, shape: tuple[int, ...], seed: int, dtype: Any = np.float64) -> np.ndarray:
    """A number for each place of an array of that name, of a size at which it matters."""
    x = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape)
    last = key.rpartition(".")[2]
    if last == "num_batches_tracked":
        return np.array(7 + seed, np.int64)
    if last == "running_var":
        x = 0.5 + np.abs(x)
    elif last == "weight" and len(shape) == 1:
        x = 1 + 0.3 * x
    elif len(shape) == 1 or "pos_embed" in key or "cls_token" in key:
        x = 0.3 * x
    else:
        x = x / math.sqrt(math.prod(shape[1:]))
    return np.asarray(x, dtype)


def state_of(config: Any, seed: int = 0, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """A state dict whose every array differs from every other one."""
    return {key: value(key, shape, seed, dtype) for key, shape in param_shapes(config).items()}


def params_of(config: Any, seed: int = 0, dtype: Any = np.float64) -> Any:
    """The same as a record of parameters."""
    return pvt_ref.from_state_dict(state_of(config, seed, dtype), config)


def is_count(key: str, config: Any) -> bool:
    """Whether an array counts batches, and keeps its integers whatever the weights' dtype."""
    return key in count_keys(config)
