"""PVT in torch.nn, as it is usually written: what this project is timed against.

The attributes are named like the released weights, so that a state dict loads as it is. Attention
is either spelled out, as the authors' code does, or PyTorch's fused function.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from pvt_ref import PVTConfig


class Attention(nn.Module):
    def __init__(self, C: int, heads: int, R: int, bias: bool, eps: float, fused: bool) -> None:
        super().__init__()
        self.heads, self.R, self.fused = heads, R, fused
        self.scale = (C // heads) ** -0.5
        self.q = nn.Linear(C, C, bias=bias)
        self.kv = nn.Linear(C, 2 * C, bias=bias)
        self.proj = nn.Linear(C, C)
        if R > 1:
            self.sr = nn.Conv2d(C, C, R, R)
            self.norm = nn.LayerNorm(C, eps=eps)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        B, n, C = x.shape
        q = self.q(x).reshape(B, n, self.heads, -1).permute(0, 2, 1, 3)
        if self.R > 1:
            x = x.permute(0, 2, 1).reshape(B, C, *grid)
            x = self.norm(self.sr(x).reshape(B, C, -1).permute(0, 2, 1))
        k, v = self.kv(x).reshape(B, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
            y = weights @ v
        return self.proj(y.transpose(1, 2).reshape(B, n, C))


class MLP(nn.Module):
    def __init__(self, C: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(C, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: PVTConfig, i: int, fused: bool) -> None:
        super().__init__()
        C = config.embed_dims[i]
        self.norm1 = nn.LayerNorm(C, eps=config.norm_eps)
        self.attn = Attention(
            C,
            config.num_heads[i],
            config.sr_ratios[i],
            config.qkv_bias,
            config.projection_norm_eps,
            fused,
        )
        self.norm2 = nn.LayerNorm(C, eps=config.norm_eps)
        self.mlp = MLP(C, int(C * config.mlp_ratios[i]))

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, C_in: int, C: int, P: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(C_in, C, P, P)
        self.norm = nn.LayerNorm(C, eps=eps)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class PVT(nn.Module):
    """The classifier without dropout."""

    def __init__(self, config: PVTConfig, fused: bool) -> None:
        super().__init__()
        strides = [math.prod(config.patch_sizes[: i + 1]) for i in range(4)]
        self.sides = [config.img_size // stride for stride in strides]
        channels = [config.in_chans, *config.embed_dims]
        for i in range(4):
            eps, C = config.projection_norm_eps, config.embed_dims[i]
            embed = PatchEmbed(channels[i], C, config.patch_sizes[i], eps)
            table = torch.empty(1, self.sides[i] ** 2 + (i == 3), C)
            blocks = nn.ModuleList(Block(config, i, fused) for _ in range(config.depths[i]))
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(table))
            setattr(self, f"block{i + 1}", blocks)
        self.cls_token = nn.Parameter(torch.empty(1, 1, C))
        self.norm = nn.LayerNorm(C, eps=config.norm_eps)
        self.head = nn.Linear(C, config.num_classes)

    def positions(self, i: int, grid: tuple[int, int]) -> torch.Tensor:
        """The table of a stage, resized if the grid is not its own."""
        table, side = getattr(self, f"pos_embed{i + 1}"), self.sides[i]
        if grid == (side, side):
            return table
        cls_rows = table.shape[1] - side**2
        square = table[:, cls_rows:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
        return torch.cat([table[:, :cls_rows], square.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B = x.shape[0]
        for i in range(4):
            x, grid = getattr(self, f"patch_embed{i + 1}")(x)
            if i == 3:
                x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)
            x = x + self.positions(i, grid)
            for block in getattr(self, f"block{i + 1}"):
                x = block(x, grid)
            if i < 3:
                x = x.reshape(B, *grid, -1).permute(0, 3, 1, 2).contiguous()
        return self.head(self.norm(x)[:, 0])
