"""PVT in torch.nn, as it is usually written; this project is timed against it.

The attributes are named like the released weights, so that a state dict loads directly. Attention
is either written out, as in the authors' code, or PyTorch's fused function.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from pvt_ref import PVTConfig


def to_tokens(x: torch.Tensor) -> torch.Tensor:
    """A map (B, C, H, W) as tokens (B, n, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens (B, n, C) as a map (B, C, H, W)."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, *grid)


def at_grid(
    table: torch.Tensor, side: int, grid: tuple[int, int], mode: str = "bilinear"
) -> torch.Tensor:
    """A position table, resized for another grid; rows beyond the square, the cls token's, stay."""
    if grid == (side, side):
        return table
    rows = table.shape[1] - side**2
    square = to_map(table[:, rows:], (side, side))
    square = F.interpolate(square, size=grid, mode=mode, align_corners=False)
    return torch.cat([table[:, :rows], to_tokens(square)], dim=1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fused: bool) -> torch.Tensor:
    """Attention of heads (B, N, n, d) over keys (B, N, m, d); the heads joined, (B, n, N d)."""
    if fused:
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        weights = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
        y = weights @ v
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Spatial-reduction attention, of PVT and PVT v2."""

    def __init__(self, C: int, heads: int, R: int, bias: bool, eps: float, fused: bool) -> None:
        super().__init__()
        self.heads, self.R, self.fused = heads, R, fused
        self.q = nn.Linear(C, C, bias=bias)
        self.kv = nn.Linear(C, 2 * C, bias=bias)
        self.proj = nn.Linear(C, C)
        if R > 1:
            self.sr = nn.Conv2d(C, C, R, R)
            self.norm = nn.LayerNorm(C, eps=eps)

    def reduce(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The tokens from which keys and values are computed."""
        if self.R == 1:
            return x
        return self.norm(to_tokens(self.sr(to_map(x, grid))))

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        B, n, C = x.shape
        q = self.q(x).reshape(B, n, self.heads, -1).permute(0, 2, 1, 3)
        kv = self.kv(self.reduce(x, grid)).reshape(B, -1, 2, self.heads, C // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, self.fused))


class MLP(nn.Module):
    def __init__(self, C: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(C, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, C)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, C: int, attn: nn.Module, mlp: nn.Module, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(C, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(C, eps=eps)
        self.mlp = mlp

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x), grid)


class PatchEmbed(nn.Module):
    """A convolution and a layer norm; PVT v2's patches overlap by their padding."""

    def __init__(
        self, C_in: int, C: int, kernel: int, stride: int, padding: int, eps: float
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(C_in, C, kernel, stride, padding)
        self.norm = nn.LayerNorm(C, eps=eps)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class PVT(nn.Module):
    """The classifier without dropout."""

    def __init__(self, config: PVTConfig, fused: bool) -> None:
        super().__init__()
        strides = [math.prod(config.patch_sizes[: i + 1]) for i in range(4)]
        self.sides = [config.img_size // stride for stride in strides]
        channels = [config.in_chans, *config.embed_dims]
        eps = config.projection_norm_eps
        for i, C in enumerate(config.embed_dims):
            P, heads, R = config.patch_sizes[i], config.num_heads[i], config.sr_ratios[i]
            table = torch.empty(1, self.sides[i] ** 2 + (i == 3), C)
            blocks = nn.ModuleList(
                Block(
                    C,
                    Attention(C, heads, R, config.qkv_bias, eps, fused),
                    MLP(C, int(C * config.mlp_ratios[i])),
                    config.norm_eps,
                )
                for _ in range(config.depths[i])
            )
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(channels[i], C, P, P, 0, eps))
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(table))
            setattr(self, f"block{i + 1}", blocks)
        self.cls_token = nn.Parameter(torch.empty(1, 1, C))
        self.norm = nn.LayerNorm(C, eps=config.norm_eps)
        self.head = nn.Linear(C, config.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B = x.shape[0]
        for i in range(4):
            x, grid = getattr(self, f"patch_embed{i + 1}")(x)
            if i == 3:
                x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)
            x = x + at_grid(getattr(self, f"pos_embed{i + 1}"), self.sides[i], grid)
            for block in getattr(self, f"block{i + 1}"):
                x = block(x, grid)
            if i < 3:
                x = to_map(x, grid).contiguous()
        return self.head(self.norm(x)[:, 0])
