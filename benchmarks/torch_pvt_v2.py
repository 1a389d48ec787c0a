"""PVT v2 in torch.nn, as it is usually written; this project is timed against it.

As in torch_pvt.py, whose parts it takes, attributes are named like the released weights.
"""

import torch
from torch import nn
from torch_pvt import MLP, Attention, Block, PatchEmbed, to_map, to_tokens

from pvt_ref import PVTv2Config
from pvt_ref.models.pvt_v2.config import KERNELS, STRIDES


class LinearAttention(Attention):
    """Keys and values come from 7 x 7 averages of the map, whatever its size."""

    def __init__(self, C: int, heads: int, bias: bool, eps: float, fused: bool) -> None:
        super().__init__(C, heads, 1, bias, eps, fused)
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.sr = nn.Conv2d(C, C, 1)
        self.norm = nn.LayerNorm(C, eps=eps)
        self.act = nn.GELU()

    def reduce(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.act(self.norm(to_tokens(self.sr(self.pool(to_map(x, grid))))))


class DWConv(nn.Module):
    """An extra level, because the released weights have it in their names."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return to_tokens(self.dwconv(to_map(x, grid)))


class ConvMLP(MLP):
    def __init__(self, C: int, hidden: int, relu: bool) -> None:
        super().__init__(C, hidden)
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.dwconv = DWConv(hidden)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.fc2(self.act(self.dwconv(self.relu(self.fc1(x)), grid)))


class PVTv2(nn.Module):
    """The classifier without dropout."""

    def __init__(self, config: PVTv2Config, fused: bool) -> None:
        super().__init__()
        channels = [config.in_chans, *config.embed_dims]
        eps = config.projection_norm_eps
        for i, C in enumerate(config.embed_dims):
            k, heads = KERNELS[i], config.num_heads[i]
            settings = config.qkv_bias, eps, fused
            blocks = nn.ModuleList(
                Block(
                    C,
                    LinearAttention(C, heads, *settings)
                    if config.linear
                    else Attention(C, heads, config.sr_ratios[i], *settings),
                    ConvMLP(C, int(C * config.mlp_ratios[i]), config.linear),
                    config.norm_eps,
                )
                for _ in range(config.depths[i])
            )
            embed = PatchEmbed(channels[i], C, k, STRIDES[i], k // 2, eps)
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"block{i + 1}", blocks)
            setattr(self, f"norm{i + 1}", nn.LayerNorm(C, eps=config.norm_eps))
        self.head = nn.Linear(C, config.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(4):
            x, grid = getattr(self, f"patch_embed{i + 1}")(x)
            for block in getattr(self, f"block{i + 1}"):
                x = block(x, grid)
            x = getattr(self, f"norm{i + 1}")(x)
            if i < 3:
                x = to_map(x, grid).contiguous()
        return self.head(x.mean(dim=1))
