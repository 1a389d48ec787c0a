"""The inputs that exercises are marked on: small, the smallest first, drawn from a fixed seed.

Axes have different sizes where equal ones would hide a mistake, and grids are not square.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pvt_ref.blocks.mlp import MLPParams
from pvt_ref.blocks.sra import SRAParams, SRASettings
from pvt_ref.blocks.transformer import BlockParams, BlockSettings
from pvt_ref.exercises.network import StageParams, StageSettings
from pvt_ref.heads.conv_unit import ConvUnitBuffers, ConvUnitParams
from pvt_ref.heads.semantic_fpn import SemanticFPNBuffers, SemanticFPNParams
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams
from pvt_ref.layers.conv import ConvParams
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import PatchEmbedParams


class Case(NamedTuple):
    """Weights, an input, and further arguments; batched: whether the first axis counts samples."""

    p: Any
    x: Any
    settings: tuple[Any, ...] = ()
    batched: bool = True


class _Draw:
    """Numbers of a size at which every part matters."""

    def __init__(self, *key: int) -> None:
        self.rng = np.random.default_rng([18, *key])

    def __call__(self, *shape: int, size: float = 1.0) -> np.ndarray:
        return size * self.rng.standard_normal(shape)

    def linear(self, C_out: int, *rest: int, bias: bool = True) -> LinearParams:
        weight = self(C_out, *rest, size=1 / math.sqrt(math.prod(rest)))
        return LinearParams(weight, self(C_out, size=0.5) if bias else None)

    def norm(self, C: int) -> LayerNormParams:
        return LayerNormParams(1 + self(C, size=0.3), self(C, size=0.3))

    def sra(self, C: int, R: int, bias: bool = True) -> SRAParams:
        q, kv = self.linear(C, C, bias=bias), self.linear(2 * C, C, bias=bias)
        proj = self.linear(C, C)
        if R == 1:
            return SRAParams(q, kv, proj, None, None)
        return SRAParams(q, kv, proj, self.linear(C, C, R, R), self.norm(C))

    def block(self, C: int, R: int, hidden: int) -> BlockParams:
        mlp = MLPParams(self.linear(hidden, C), self.linear(C, hidden))
        return BlockParams(self.norm(C), self.sra(C, R), self.norm(C), mlp)

    def patches(self, C_out: int, C_in: int, P: int) -> PatchEmbedParams:
        return PatchEmbedParams(self.linear(C_out, C_in, P, P), self.norm(C_out))

    def stage(self, C: int, C_in: int, P: int, R: int, rows: int, depth: int) -> StageParams:
        blocks = tuple(self.block(C, R, C + 1) for _ in range(depth))
        return StageParams(self.patches(C, C_in, P), self(1, rows, C, size=0.5), blocks)

    def unit(self, D: int, C: int) -> ConvUnitParams:
        kernel = ConvParams(self(D, C, 3, 3, size=1 / math.sqrt(9 * C)), None)
        return ConvUnitParams(
            kernel, BatchNormParams(1 + self(D, size=0.3), 0.8 + self(D, size=0.3))
        )

    def buffers(self, D: int) -> ConvUnitBuffers:
        variance = 0.5 + np.abs(self(D))
        return ConvUnitBuffers(BatchNormBuffers(self(D, size=0.3), variance, np.array(7)))


def linear() -> Iterator[Case]:
    """One token, several, and a layer without a bias."""
    d = _Draw(1)
    yield Case(d.linear(3, 2), d(1, 1, 2))
    yield Case(d.linear(4, 2), d(2, 3, 2))
    yield Case(d.linear(2, 3, bias=False), d(3, 2, 3))


def layer_norm() -> Iterator[Case]:
    """One token, and several with an eps that counts."""
    d = _Draw(2)
    yield Case(d.norm(3), d(1, 1, 3), (1e-5,))
    yield Case(d.norm(4), d(2, 3, 4, size=0.5), (0.1,))


def gelu() -> Iterator[Case]:
    """A row, and a larger array."""
    d = _Draw(3)
    yield Case(None, d(1, 3))
    yield Case(None, d(2, 3, 4, size=2.0))


def softmax() -> Iterator[Case]:
    """A row, and several."""
    d = _Draw(4)
    yield Case(None, d(1, 3))
    yield Case(None, d(2, 3, 4, size=2.0))


def cross_entropy() -> Iterator[Case]:
    """One sample, and three."""
    d = _Draw(5)
    yield Case(None, d(1, 3), (np.array([1]),), False)
    yield Case(None, d(3, 4, size=2.0), (np.array([3, 0, 2]),), False)


def patch_embed() -> Iterator[Case]:
    """Two patches, several on a grid that is not square, and patches of one cell."""
    d = _Draw(6)
    yield Case(d.patches(3, 1, 2), d(1, 2, 4, 1), (1e-5,))
    yield Case(d.patches(4, 3, 2), d(2, 4, 6, 3), (0.1,))
    yield Case(d.patches(3, 2, 1), d(2, 2, 3, 2), (1e-5,))


def position() -> Iterator[Case]:
    """The table's own grid, finer and coarser ones, with and without a cls row."""
    d = _Draw(7)
    yield Case(d(1, 4, 1), d(1, 4, 1), ((2, 2), (2, 2), False))
    yield Case(d(1, 2, 1), d(1, 6, 1), ((2, 3), (1, 2), False))
    yield Case(d(1, 6, 2), d(2, 8, 2), ((4, 2), (2, 3), False))
    yield Case(d(1, 1 + 6, 2), d(2, 1 + 6, 2), ((2, 3), (2, 3), True))
    yield Case(d(1, 1 + 12, 2), d(2, 1 + 10, 2), ((5, 2), (3, 4), True))
    yield Case(d(1, 1 + 6, 3), d(2, 10, 3), ((2, 5), (3, 2), False))
    yield Case(d(1, 6, 1), d(1, 6, 1), ((2, 3), (3, 2), False))  # same number of rows, other grid


def attention() -> Iterator[Case]:
    """One head, and several heads and samples."""
    d = _Draw(8)
    yield Case(None, (d(1, 1, 2, 2), d(1, 1, 3, 2), d(1, 1, 3, 2)), (0.7,))
    yield Case(None, (d(2, 2, 3, 4), d(2, 2, 5, 4), d(2, 2, 5, 4)), (0.5,))


def _attn(C: int, N: int, eps: float = 1e-5) -> SRASettings:
    return SRASettings(num_heads=N, scale=1 / math.sqrt(C / N), norm_eps=eps)


def sra() -> Iterator[Case]:
    """Without a reduction, then with one."""
    d = _Draw(9)
    yield Case(d.sra(4, 1), d(1, 3, 4), ((1, 3), _attn(4, 2)))
    yield Case(d.sra(6, 1, bias=False), d(2, 1 + 4, 6), ((2, 2), _attn(6, 2)))  # with a cls token
    yield Case(d.sra(4, 2), d(1, 8, 4), ((2, 4), _attn(4, 2, 0.1)))
    yield Case(d.sra(6, 2), d(2, 24, 6), ((4, 6), _attn(6, 2)))


def mlp() -> Iterator[Case]:
    """One token, and several."""
    d = _Draw(10)
    yield Case(MLPParams(d.linear(4, 2), d.linear(2, 4)), d(1, 1, 2))
    yield Case(MLPParams(d.linear(6, 3), d.linear(3, 6)), d(2, 4, 3))


def _of_block(C: int, N: int, eps: float) -> BlockSettings:
    return BlockSettings(norm_eps=eps, attn=_attn(C, N, 1e-3))


def block() -> Iterator[Case]:
    """Without a reduction, then with one."""
    d = _Draw(11)
    yield Case(d.block(4, 1, 5), d(1, 2, 4), ((1, 2), _of_block(4, 2, 1e-2)))
    yield Case(d.block(4, 2, 6), d(2, 8, 4), ((2, 4), _of_block(4, 2, 1e-2)))


def _of_stage(P: int, side: int, C: int, depth: int) -> StageSettings:
    return StageSettings(P, 1e-2, side, (_of_block(C, 2, 1e-3),) * depth)


def stage() -> Iterator[Case]:
    """On the table's own grid, and on another one, with two blocks and a reduction."""
    d = _Draw(12)
    yield Case(d.stage(4, 1, 2, 1, 4, 1), d(1, 4, 4, 1), (_of_stage(2, 2, 4, 1),))
    yield Case(d.stage(4, 3, 2, 2, 1 + 9, 2), d(2, 4, 8, 3), (_of_stage(2, 3, 4, 2),))


def pyramid() -> Iterator[Case]:
    """Two stages, of one image and of two."""
    d = _Draw(13)
    for B, size, C_in in ((1, (4, 4), 1), (2, (4, 8), 2)):
        p = (d.stage(4, C_in, 2, 1, 4, 1), d.stage(4, 4, 2, 1, 1 + 1, 1))
        yield Case(p, d(B, *size, C_in), ((_of_stage(2, 2, 4, 1), _of_stage(2, 1, 4, 1)),))


def conv() -> Iterator[Case]:
    """Stride 1 and 2, as many channels in as out, and windows that leave a row over."""
    d = _Draw(14)
    yield Case(_kernel(d, 2, 1, 3, 3), d(1, 3, 4, 1), (1, 1))
    yield Case(_kernel(d, 3, 2, 3, 3), d(2, 5, 8, 2), (2, 1))
    yield Case(_kernel(d, 3, 3, 3, 3), d(1, 4, 5, 3), (1, 1))
    yield Case(ConvParams(_kernel(d, 2, 2, 2, 2).weight, None), d(2, 5, 4, 2), (2, 0))


def _kernel(d: _Draw, C_out: int, *rest: int) -> ConvParams:
    p = d.linear(C_out, *rest)
    return ConvParams(p.weight, p.bias)


def depthwise_conv() -> Iterator[Case]:
    """A small map, and two larger ones."""
    d = _Draw(15)
    yield Case(_kernel(d, 2, 1, 3, 3), d(1, 2, 3, 2))
    yield Case(_kernel(d, 3, 1, 3, 3), d(2, 4, 5, 3))


def semantic_fpn() -> Iterator[Case]:
    """Maps that halve, maps that do not quite, and the statistics of the batch."""
    d = _Draw(16)
    for B, sizes, in_batch in (
        (1, ((2, 4), (1, 2), (1, 1), (1, 1)), False),
        (2, ((5, 3), (3, 2), (2, 1), (1, 1)), False),
        (2, ((4, 6), (2, 3), (2, 2), (1, 2)), True),
    ):
        C, D, K = 2, 3, 2
        heads, buffers = [], []
        for i in range(4):
            units = max(i, 1)
            widths = [C] + [D] * (units - 1)
            parts = [[d.unit(D, width)] + [None] * (i > 0) for width in widths]
            heads.append(tuple(part for pair in parts for part in pair))
            buffers.append(tuple(None if part is None else d.buffers(D) for part in heads[-1]))
        p = SemanticFPNParams(_kernel(d, K, D, 1, 1), tuple(heads))
        maps = [d(B, *size, C) for size in sizes]
        yield Case(p, maps, (SemanticFPNBuffers(tuple(buffers)), in_batch), not in_batch)
