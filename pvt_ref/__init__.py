"""The Pyramid Vision Transformer (PVT, ICCV 2021) in NumPy, forward and hand-derived backward.

The names below are the public interface. Parameters are plain records of arrays; functions are
pure; the same code computes on the CPU with NumPy arrays and on CUDA with CuPy arrays.
"""

from pvt_ref.arrays import to_device, to_numpy
from pvt_ref.checkpoint import save
from pvt_ref.config import VARIANTS, PVTConfig
from pvt_ref.cost import VITS, Cost, ViTConfig, count_cost
from pvt_ref.errors import PVTError
from pvt_ref.face import Model, Prediction, with_channels, with_new_head
from pvt_ref.image import load_image, normalize, pad_to_multiple, preprocess
from pvt_ref.info import ModelInfo, Preprocessing
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.model import (
    attention_maps,
    backward,
    backward_pyramid,
    forward,
    forward_pyramid,
    forward_pyramid_with_cache,
    forward_with_cache,
)
from pvt_ref.ops import Operation, Ops
from pvt_ref.params import PVTParams, from_state_dict, init_params, to_state_dict
from pvt_ref.records import REFERENCE, blocked_ops
from pvt_ref.zoo import load

__version__ = "0.1.0"

__all__ = [
    "REFERENCE",
    "VARIANTS",
    "VITS",
    "Cost",
    "Model",
    "ModelInfo",
    "Operation",
    "Ops",
    "PVTConfig",
    "PVTError",
    "PVTParams",
    "Prediction",
    "Preprocessing",
    "ViTConfig",
    "attention_maps",
    "backward",
    "backward_pyramid",
    "blocked_ops",
    "count_cost",
    "cross_entropy",
    "forward",
    "forward_pyramid",
    "forward_pyramid_with_cache",
    "forward_with_cache",
    "from_state_dict",
    "init_params",
    "load",
    "load_image",
    "normalize",
    "pad_to_multiple",
    "preprocess",
    "save",
    "to_device",
    "to_numpy",
    "to_state_dict",
    "with_channels",
    "with_new_head",
]
