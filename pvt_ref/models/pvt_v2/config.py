"""The shape of a PVT v2 (arXiv 2106.13797): one frozen record, and the seven published variants.

Symbols are those of PVT (:mod:`pvt_ref.models.pvt.config`). In place of P_i there are a kernel size
and a stride, which are the same in all variants.
"""

import functools
import itertools
import math
import operator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pvt_ref.blocks.transformer import BlockSettings
from pvt_ref.errors import ShapeError
from pvt_ref.models import fields
from pvt_ref.models.fields import (
    block_settings,
    check_stage,
    fitting_sizes,
    refuse,
    settle_fields,
    whole_pixels,
    width_conflicts,
)

#: Kernel sizes and strides of the patch embeddings. The padding is half a kernel.
KERNELS, STRIDES = (7, 3, 3, 3), (4, 2, 2, 2)


class PVTv2Stage(NamedTuple):
    """The settings of stage i, besides its weights."""

    stride: int  # of its patch embedding
    padding: int  # likewise
    blocks: tuple[BlockSettings, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PVTv2Config:
    """The configuration of a PVT v2. Field names are those of the authors' constructor.

    Attributes:
        img_size: side in pixels of the pictures that it was trained on; no weight depends on it.
        in_chans: channels of the image.
        num_classes: outputs of the classifier. 0 makes a bare backbone, without a head.
        embed_dims: C_i.
        num_heads: N_i; must divide C_i.
        mlp_ratios: E_i; C_i * E_i must be an integer.
        qkv_bias: whether q and kv have biases.
        qk_scale: replaces 1 / sqrt(d) as the factor on the scores; None keeps 1 / sqrt(d).
            Zero is honoured (the released code ignores it).
        drop_rate: dropout after the attention projection and in the MLP.
        attn_drop_rate: dropout on the attention weights.
        drop_path_rate: stochastic depth of the last block; block l of L has
            ``linspace(0, drop_path_rate, L)[l]``.
        depths: L_i, at most 1000.
        sr_ratios: R_i, which must divide the grid of stage i. 1 is plain multi-head attention. They
            are not used if linear is True.
        linear: whether spatial reduction is linear: keys and values come from 7 x 7 averages, in
            all stages.
        norm_eps: epsilon in norm1 and norm2 of the blocks, and in the norm that ends each stage.
        projection_norm_eps: epsilon in the norms after the patch and the spatial-reduction
            projections. The released code uses 1e-5 in these and 1e-6 in the others.

    Raises:
        ConfigError: if there is no such model; the message lists every reason.
    """

    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    depths: tuple[int, ...] = (2, 2, 2, 2)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    linear: bool = False
    norm_eps: float = 1e-6
    projection_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        problems = settle_fields(self)
        refuse("PVT v2", problems, self._conflicts(problems.keys()), "pvt_v2_b0")

    def _conflicts(self, wrong: AbstractSet[str]) -> list[str]:
        """What is wrong between fields, for fields that are not wrong in themselves."""
        problems = width_conflicts(self, wrong)
        if wrong.isdisjoint({"img_size", "sr_ratios", "linear"}):
            cut = self._first_cut(self.img_size, self.img_size)
            if cut is not None:
                i, (side, _) = cut
                problems.append(
                    f"img_size {self.img_size} makes {side} rows of tokens in stage {i}, no "
                    f"multiple of its sr_ratios {self.sr_ratios[i - 1]}: some would be lost. "
                    f"Multiples of {self.size_multiple} lose none"
                )
        return problems

    def _first_cut(self, height: int, width: int) -> tuple[int, tuple[int, int]] | None:
        """The first stage whose grid R_i does not divide, and that grid."""
        for i, grid in enumerate(self._grids(height, width), start=1):
            R = 1 if self.linear else self.sr_ratios[i - 1]
            if grid[0] % R or grid[1] % R:
                return i, grid
        return None

    def _grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        return tuple((-(-height // s), -(-width // s)) for s in self.strides)  # rounded up

    @property
    def has_classifier(self) -> bool:
        """Whether there is a head."""
        return self.num_classes > 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token side at each stage: (4, 8, 16, 32)."""
        return tuple(itertools.accumulate(STRIDES, operator.mul))

    @property
    def size_multiple(self) -> int:
        """Sides that are multiples of this number lose no token in any stage; 1 if linear.

        Other sizes may fit too: all whose grids the R_i divide.
        """
        if self.linear:
            return 1
        return math.lcm(*(s * R for s, R in zip(self.strides, self.sr_ratios, strict=True)))

    @property
    def channels(self) -> tuple[int, ...]:
        """C_i: channels of the feature maps, whose strides are :attr:`strides`."""
        return self.embed_dims

    def of_stage(self, i: int) -> PVTv2Stage:
        """The settings of stage i, including drop-path rates.

        Args:
            i: 1 to 4, as in the paper.

        Returns:
            The settings of stage i.

        Raises:
            RangeError: if i is anything else.
        """
        check_stage(i)
        return _stages(self)[i - 1]

    def grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Token grids (H_i, W_i) of the four stages for an image of height x width pixels.

        Args:
            height: H, in pixels.
            width: W, in pixels.

        Returns:
            ((H_1, W_1), ..., (H_4, W_4)), H and W over the strides, rounded up.

        Raises:
            ShapeError: if height or width is not a positive integer, or tokens would be lost.
        """
        height, width = whole_pixels(height, width)
        if height < 1 or width < 1:
            raise ShapeError(f"image size {height}x{width} must be positive numbers of pixels")
        cut = self._first_cut(height, width)
        if cut is not None:
            i, (rows, columns) = cut
            g, R = self.size_multiple, self.sr_ratios[i - 1]
            near, padded = fitting_sizes(height, width, g)
            raise ShapeError(
                f"image size {height}x{width} does not fit: its grid in stage {i} is "
                f"{rows}x{columns}, and spatial reduction takes multiples of {R} there, or tokens "
                f"at the border would be lost. Multiples of {g} always fit: resize to "
                f"{near}, or pad to {padded} with "
                f"pvt_ref.pad_to_multiple(images, {g}). Linear attention takes any size"
            )
        return self._grids(height, width)


@functools.lru_cache(maxsize=64)  # called by every forward
def _stages(config: PVTv2Config) -> tuple[PVTv2Stage, ...]:
    stages = zip(STRIDES, KERNELS, block_settings(config), strict=True)
    return tuple(
        PVTv2Stage(s, k // 2, tuple(replace(block, has_relu=config.linear) for block in blocks))
        for s, k, blocks in stages
    )


def _variant(depths: tuple[int, ...], **changes: Any) -> PVTv2Config:
    """A variant as trained on ImageNet: large ones have a higher drop-path rate."""
    rate = 0.1 if sum(depths) <= 16 else 0.3
    return PVTv2Config(depths=depths, drop_path_rate=rate, **changes)


#: The published models (paper Table 1), with the drop-path rates of their training.
VARIANTS: dict[str, PVTv2Config] = {
    "pvt_v2_b0": _variant((2, 2, 2, 2), embed_dims=(32, 64, 160, 256)),
    "pvt_v2_b1": _variant((2, 2, 2, 2)),
    "pvt_v2_b2": _variant((3, 4, 6, 3)),
    "pvt_v2_b2_li": _variant((3, 4, 6, 3), linear=True),
    "pvt_v2_b3": _variant((3, 4, 18, 3)),
    "pvt_v2_b4": _variant((3, 8, 27, 3)),
    "pvt_v2_b5": _variant((3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}


def describe(config: PVTv2Config) -> str:
    """A configuration in a few words: ``pvt_v2_b0, 1000 classes, 224 px``."""
    return fields.describe(config, VARIANTS)
