"""A PVT with Semantic FPN in torch.nn, as it is usually written; names as in released weights."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torch_pvt import PVT, at_grid, to_map

from pvt_ref.models.segmentor.config import SegmentorConfig


class Backbone(PVT):
    """The four maps, (B, C_i, H_i, W_i), from the classifier's stages without a cls token."""

    def __init__(self, config, fused: bool) -> None:
        super().__init__(dataclasses.replace(config, num_classes=1), fused)
        del self.cls_token, self.norm, self.head
        self.pos_embed4 = nn.Parameter(torch.empty(1, self.sides[3] ** 2, config.embed_dims[3]))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for i in range(4):
            x, grid = getattr(self, f"patch_embed{i + 1}")(x)
            x = x + at_grid(getattr(self, f"pos_embed{i + 1}"), self.sides[i], grid)
            for block in getattr(self, f"block{i + 1}"):
                x = block(x, grid)
            x = to_map(x, grid).contiguous()
            maps.append(x)
        return maps


class Conv(nn.Module):
    """A convolution in its own module, as MMSegmentation names it."""

    def __init__(self, C_in: int, C: int, k: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C_in, C, k, padding=k // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, C_in: int, C: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C_in, C, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class Neck(nn.Module):
    """A feature pyramid network."""

    def __init__(self, channels: tuple[int, ...], C: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(Conv(C_i, C, 1) for C_i in channels)
        self.fpn_convs = nn.ModuleList(Conv(C, C, 3) for _ in channels)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in (3, 2, 1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[2:])
        return [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]


class Head(nn.Module):
    """Resizes every level to the finest, and sums them."""

    def __init__(self, C_in: int, C: int, classes: int) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for i in range(4):
            parts: list[nn.Module] = []
            for k in range(max(1, i)):
                parts.append(Unit(C if k else C_in, C))
                if i:
                    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
                    parts.append(up)
            self.scale_heads.append(nn.Sequential(*parts))
        self.conv_seg = nn.Conv2d(C, classes, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        total = self.scale_heads[0](maps[0])
        for head, x in zip(self.scale_heads[1:], maps[1:], strict=True):
            x, size = head(x), total.shape[2:]
            if x.shape[2:] != size:
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            total = total + x
        return self.conv_seg(total)


class Segmentor(nn.Module):
    """The network at inference: running statistics, no dropout."""

    def __init__(self, config: SegmentorConfig, fused: bool) -> None:
        super().__init__()
        head = config.head
        self.backbone = Backbone(config.backbone, fused)
        self.neck = Neck(config.channels, head.neck_channels)
        self.decode_head = Head(head.neck_channels, head.channels, config.num_classes)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode_head(self.neck(self.backbone(x)))
