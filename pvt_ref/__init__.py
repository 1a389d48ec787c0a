"""The Pyramid Vision Transformer (PVT, ICCV 2021) in NumPy, forward and hand-derived backward.

The names below are the public interface. Parameters are plain records of arrays; functions are
pure; the same code computes on the CPU with NumPy arrays and on CUDA with CuPy arrays.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pvt_ref.api import (
    Prepared,
    backward,
    backward_pyramid,
    forward,
    forward_pyramid,
    forward_pyramid_with_cache,
    forward_with_cache,
    from_state_dict,
    init_params,
    prepare,
    to_state_dict,
    updated,
)
from pvt_ref.arrays import from_dlpack
from pvt_ref.errors import PVTError
from pvt_ref.models import VARIANTS
from pvt_ref.models.pvt.config import PVTConfig
from pvt_ref.models.pvt.params import PVTParams
from pvt_ref.models.pvt_v2.config import PVTv2Config
from pvt_ref.models.pvt_v2.params import PVTv2Params
from pvt_ref.models.segmentor.config import SegmentorConfig, SemanticFPNHead, SETRHead
from pvt_ref.models.segmentor.params import SegmentorParams
from pvt_ref.models.vit.config import VITS, ViTConfig
from pvt_ref.models.vit.params import ViTParams
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import to_device, to_numpy

if TYPE_CHECKING:
    from pvt_ref.app import (
        Model,
        Prediction,
        with_channels,
        with_image_size,
        with_new_head,
        with_segmentation_head,
    )
    from pvt_ref.checkpoint import save
    from pvt_ref.data.info import ModelInfo
    from pvt_ref.data.preprocessing import (
        Preprocessing,
        load_image,
        normalize,
        pad_to_multiple,
        preprocess,
    )
    from pvt_ref.export.onnx_file import OnnxFile, export_onnx
    from pvt_ref.kernels.cpu.table import blocked_ops
    from pvt_ref.kernels.cuda.capture import capture
    from pvt_ref.layers.cross_entropy import cross_entropy
    from pvt_ref.report.attention import attention_maps
    from pvt_ref.report.cost import Cost, count_cost
    from pvt_ref.zoo import load

__version__ = "0.2.0"

#: Modules of the names that are imported on first use, so that `import pvt_ref` stays fast.
_LATER = {
    "app": (
        *("Model", "Prediction", "with_channels", "with_image_size", "with_new_head"),
        "with_segmentation_head",
    ),
    "checkpoint": ("save",),
    "data.info": ("ModelInfo",),
    "data.preprocessing": (
        *("Preprocessing", "load_image", "normalize", "pad_to_multiple", "preprocess"),
    ),
    "export.onnx_file": ("OnnxFile", "export_onnx"),
    "kernels.cpu.table": ("blocked_ops",),
    "kernels.cuda.capture": ("capture",),
    "layers.cross_entropy": ("cross_entropy",),
    "report.attention": ("attention_maps",),
    "report.cost": ("Cost", "count_cost"),
    "zoo": ("load",),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            value = getattr(importlib.import_module(f"pvt_ref.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'pvt_ref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "REFERENCE", "VARIANTS", "VITS", "Cost", "Model", "ModelInfo", "OnnxFile", "Operation", "Ops",
    "PVTConfig", "PVTError", "PVTParams", "PVTv2Config", "PVTv2Params", "Prediction",
    "Prepared", "Preprocessing", "SETRHead", "SegmentorConfig", "SegmentorParams",
    "SemanticFPNHead", "ViTConfig", "ViTParams", "attention_maps", "backward",
    "backward_pyramid", "blocked_ops", "capture", "count_cost", "cross_entropy", "export_onnx",
    "forward", "forward_pyramid", "forward_pyramid_with_cache", "forward_with_cache",
    "from_dlpack", "from_state_dict", "init_params", "load", "load_image", "normalize",
    "pad_to_multiple", "prepare", "preprocess", "save", "to_device", "to_numpy",
    "to_state_dict", "updated", "with_channels", "with_image_size", "with_new_head",
    "with_segmentation_head",
]  # fmt: skip
