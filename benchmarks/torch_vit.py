"""A columnar ViT in torch.nn, as it is usually written; this project is timed against it.

As in torch_pvt.py, whose parts it takes, attributes are named like the released weights, DeiT's.
"""

import torch
from torch import nn
from torch_pvt import MLP, Block, at_grid, attend, to_tokens

from pvt_ref import ViTConfig


class Attention(nn.Module):
    def __init__(self, C: int, heads: int, bias: bool, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(C, 3 * C, bias=bias)
        self.proj = nn.Linear(C, C)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        B, n, C = x.shape
        qkv = self.qkv(x).reshape(B, n, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, self.fused))


class PatchEmbed(nn.Module):
    def __init__(self, C_in: int, C: int, P: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(C_in, C, P, P)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x = self.proj(x)
        return to_tokens(x), (x.shape[2], x.shape[3])


class ViT(nn.Module):
    """The classifier without dropout."""

    def __init__(self, config: ViTConfig, fused: bool) -> None:
        super().__init__()
        C, eps = config.embed_dim, config.norm_eps
        self.side, self.mode = config.table_sides[0], config.position_resize
        self.patch_embed = PatchEmbed(config.in_chans, C, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, C))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.side**2, C))
        self.blocks = nn.ModuleList(
            Block(
                C,
                Attention(C, config.num_heads, config.qkv_bias, fused),
                MLP(C, config.hidden_dim),
                eps,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(C, eps=eps)
        self.head = nn.Linear(C, config.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, grid = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + at_grid(self.pos_embed, self.side, grid, self.mode)
        for block in self.blocks:
            x = block(x, grid)
        return self.head(self.norm(x)[:, 0])
