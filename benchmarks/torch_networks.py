"""The network in torch.nn for a configuration."""

from typing import Any

from torch import nn
from torch_pvt import PVT
from torch_pvt_v2 import PVTv2
from torch_segmentor import Segmentor
from torch_vit import ViT

from pvt_ref import PVTConfig, PVTv2Config, SegmentorConfig, ViTConfig

NETWORKS = {PVTConfig: PVT, PVTv2Config: PVTv2, ViTConfig: ViT, SegmentorConfig: Segmentor}


def network(config: Any, fused: bool) -> nn.Module:
    """Has PyTorch's initial weights, and parameters named like ours."""
    return NETWORKS[type(config)](config, fused)
