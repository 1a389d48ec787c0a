"""The parameters of layers and blocks for ``build_params``: each array is ``make(leaf)``."""

from collections.abc import Callable
from typing import Any

from pvt_ref.blocks.mlp import MLPParams
from pvt_ref.blocks.sra import SRAParams
from pvt_ref.blocks.transformer import BlockParams
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.models.architecture import Leaf

Make = Callable[[Leaf], Any]


def linear(make: Make, key: str, C_out: int, C_in: int, bias: bool = True) -> LinearParams:
    """A weight (C_out, C_in), and a bias if wanted."""
    return LinearParams(
        make(Leaf(f"{key}.weight", (C_out, C_in), "normal")),
        make(Leaf(f"{key}.bias", (C_out,), "zeros")) if bias else None,
    )


def projection(make: Make, key: str, C_out: int, C_in: int, P: int) -> LinearParams:
    """A kernel (C_out, C_in, P, P) and a bias."""
    fan_in = C_in * P * P
    return LinearParams(
        make(Leaf(f"{key}.weight", (C_out, C_in, P, P), "uniform", fan_in)),
        make(Leaf(f"{key}.bias", (C_out,), "uniform", fan_in)),
    )


def norm(make: Make, key: str, C: int) -> LayerNormParams:
    """Of C channels."""
    return LayerNormParams(
        make(Leaf(f"{key}.weight", (C,), "ones")), make(Leaf(f"{key}.bias", (C,), "zeros"))
    )


def block(make: Make, key: str, C: int, hidden: int, R: int, qkv_bias: bool = True) -> BlockParams:
    """A block of C channels and so many hidden units; R = 1 has no spatial reduction."""
    return BlockParams(
        norm1=norm(make, f"{key}.norm1", C),
        attn=SRAParams(
            q=linear(make, f"{key}.attn.q", C, C, qkv_bias),
            kv=linear(make, f"{key}.attn.kv", 2 * C, C, qkv_bias),
            proj=linear(make, f"{key}.attn.proj", C, C),
            sr=projection(make, f"{key}.attn.sr", C, C, R) if R > 1 else None,
            norm=norm(make, f"{key}.attn.norm", C) if R > 1 else None,
        ),
        norm2=norm(make, f"{key}.norm2", C),
        mlp=MLPParams(
            fc1=linear(make, f"{key}.mlp.fc1", hidden, C),
            fc2=linear(make, f"{key}.mlp.fc2", C, hidden),
        ),
    )
