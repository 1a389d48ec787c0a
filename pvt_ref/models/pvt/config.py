"""The shape of a PVT: one frozen record, the five published variants, and every rule they obey.

Symbols are those of the paper (Wang et al., ICCV 2021, arXiv 2102.12122, section 3 and Table 1)::

    P_i patch size    C_i channels    R_i spatial-reduction ratio    N_i heads    E_i MLP expansion
    L_i depth         H_i x W_i token grid of stage i                i = 1..4
"""

import functools
import itertools
import math
import operator
import warnings
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from pvt_ref.blocks.transformer import BlockSettings
from pvt_ref.checks import is_whole
from pvt_ref.errors import RangeError, ShapeError, shown
from pvt_ref.models import fields
from pvt_ref.models.fields import (
    NUM_STAGES,
    block_settings,
    check_stage,
    fitting_sizes,
    refuse,
    settle_fields,
    whole_pixels,
    width_conflicts,
)


@dataclass(frozen=True, slots=True)
class StageConfig:
    """The settings of one stage, by the names of :class:`PVTConfig`, which makes it."""

    patch_size: int
    embed_dim: int
    num_heads: int
    hidden_dim: int  # E_i C_i
    depth: int
    sr_ratio: int
    scale: float  # 1 / sqrt(C_i / N_i), or qk_scale
    drop_rate: float
    attn_drop_rate: float
    drop_path_rates: tuple[float, ...]
    norm_eps: float
    projection_norm_eps: float
    blocks: tuple[BlockSettings, ...]  # the settings of each block


@dataclass(frozen=True, slots=True, kw_only=True)
class PVTConfig:
    """The configuration of a PVT. Field names are those of the authors' constructor.

    Attributes:
        img_size: side in pixels of the square image that the position tables are made for. They are
            resized for images of other sizes.
        in_chans: channels of the image.
        num_classes: outputs of the classifier. 0 makes a bare backbone for dense prediction:
            no cls token, no final norm, no head.
        patch_sizes: P_i, one per stage. (The released constructor fixes 2 for stages 2 to 4.)
        embed_dims: C_i.
        num_heads: N_i; must divide C_i.
        mlp_ratios: E_i; C_i * E_i must be an integer.
        qkv_bias: whether q and kv have biases.
        qk_scale: replaces 1 / sqrt(d) as the factor on the scores; None keeps 1 / sqrt(d).
            Zero is honoured (the released code ignores it).
        drop_rate: dropout after the position embedding, the attention projection and in the MLP.
        attn_drop_rate: dropout on the attention weights.
        drop_path_rate: stochastic depth of the last block; block l of L has
            ``linspace(0, drop_path_rate, L)[l]``.
        depths: L_i, at most 1000.
        sr_ratios: R_i. 1 is plain multi-head attention.
        norm_eps: epsilon in norm1, norm2 and the final norm.
        projection_norm_eps: epsilon in the norms after the patch and the spatial-reduction
            projections. The released code uses 1e-5 in these and 1e-6 in the others.

    Raises:
        ConfigError: if there is no such model; the message lists every reason.
    """

    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    patch_sizes: tuple[int, ...] = (4, 2, 2, 2)
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
    norm_eps: float = 1e-6
    projection_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        problems = settle_fields(self)
        refuse("PVT", problems, self._conflicts(problems.keys()), "pvt_tiny")

    def _conflicts(self, wrong: AbstractSet[str]) -> list[str]:
        """What is wrong between fields, for fields that are not wrong in themselves."""
        problems = width_conflicts(self, wrong)
        fine = wrong.isdisjoint({"num_classes", "sr_ratios"})
        if fine and self.num_classes and self.sr_ratios[-1] > 1:
            problems.append(
                f"sr_ratios[3] is {self.sr_ratios[-1]} in a classifier: stage 4 also holds the "
                f"cls token, which has no place in the map that spatial reduction cuts into "
                f"blocks. Use 1, or num_classes=0 for a backbone without cls token"
            )
        fine = wrong.isdisjoint({"img_size", "patch_sizes", "sr_ratios"})
        if fine and self.img_size % self.size_multiple:
            problems.append(
                f"img_size {self.img_size} is not a multiple of {self.size_multiple}, the smallest "
                f"size at which patch_sizes {self.patch_sizes} and sr_ratios {self.sr_ratios} lose "
                f"no pixel"
            )
        return problems

    @property
    def has_classifier(self) -> bool:
        """Whether there are a cls token, a final norm and a head."""
        return self.num_classes > 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token side at each stage: P_1, P_1 P_2, ... (4, 8, 16, 32 as published)."""
        return tuple(itertools.accumulate(self.patch_sizes, operator.mul))

    @property
    def size_multiple(self) -> int:
        """Smallest number of which H and W must be multiples for no pixel to be lost."""
        return math.lcm(*(s * R for s, R in zip(self.strides, self.sr_ratios, strict=True)))

    @property
    def channels(self) -> tuple[int, ...]:
        """C_i: channels of the feature maps, whose strides are :attr:`strides`."""
        return self.embed_dims

    def of_stage(self, i: int) -> StageConfig:
        """Everything stage i needs, drop-path rates included.

        The rates rise in a line from the first block to the last (arXiv 1603.09382, section 3).

        Args:
            i: 1 to 4, as in the paper.

        Returns:
            The settings of stage i.

        Raises:
            RangeError: if i is anything else.
        """
        check_stage(i)
        return _stages(self)[i - 1]

    def stage(self, i: int) -> StageConfig:
        """The old name of :meth:`of_stage`, which counts from 0. It warns, and will go.

        Args:
            i: 0 to 3.

        Returns:
            The settings of stage i + 1.

        Raises:
            RangeError: if i is anything else.
        """
        warn_of_stage("config")
        last = NUM_STAGES - 1
        if not is_whole(i) or not 0 <= i <= last:
            raise RangeError(f"stage {shown(i)} is asked for; stages count from 0 to {last}")
        return _stages(self)[i]

    def grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Token grids (H_i, W_i) of the four stages for an image of height x width pixels.

        Args:
            height: H, in pixels.
            width: W, in pixels.

        Returns:
            ((H_1, W_1), ..., (H_4, W_4)).

        Raises:
            ShapeError: if these are no whole numbers, or border pixels would be lost.
        """
        g = self.size_multiple
        height, width = whole_pixels(height, width)
        if height < 1 or width < 1 or height % g or width % g:
            near, padded = fitting_sizes(height, width, g)
            raise ShapeError(
                f"image size {height}x{width} does not fit: H and W must be multiples of {g}, or "
                f"border pixels would be lost (patch sizes {self.patch_sizes}, spatial-reduction "
                f"ratios {self.sr_ratios}). Resize to {near}, or pad to "
                f"{padded} with pvt_ref.pad_to_multiple(images, {g})"
            )
        return tuple((height // s, width // s) for s in self.strides)

    @property
    def table_sides(self) -> tuple[int, ...]:
        """Side of the square grid that each stage's position table belongs to."""
        return tuple(self.img_size // s for s in self.strides)


def warn_of_stage(owner: str) -> None:
    """What the old method says, to its caller."""
    warnings.warn(
        f"{owner}.stage(i) counts stages from 0; {owner}.of_stage(i) counts them from 1, as the "
        f"paper does",
        FutureWarning,
        stacklevel=3,
    )


@functools.lru_cache(maxsize=64)  # every forward asks
def _stages(config: PVTConfig) -> tuple[StageConfig, ...]:
    """The settings of the four stages."""
    return tuple(
        StageConfig(
            patch_size=config.patch_sizes[i],
            embed_dim=C,
            num_heads=config.num_heads[i],
            hidden_dim=int(C * config.mlp_ratios[i]),
            depth=config.depths[i],
            sr_ratio=config.sr_ratios[i],
            scale=blocks[0].attn.scale,
            drop_rate=config.drop_rate,
            attn_drop_rate=config.attn_drop_rate,
            drop_path_rates=tuple(block.drop_path_rate for block in blocks),
            norm_eps=config.norm_eps,
            projection_norm_eps=config.projection_norm_eps,
            blocks=blocks,
        )
        for i, (C, blocks) in enumerate(zip(config.embed_dims, block_settings(config), strict=True))
    )


#: The published models (paper Table 1, with the released code's depths; see docs/decisions.md).
VARIANTS: dict[str, PVTConfig] = {
    "pvt_tiny": PVTConfig(depths=(2, 2, 2, 2)),
    "pvt_small": PVTConfig(depths=(3, 4, 6, 3)),
    "pvt_medium": PVTConfig(depths=(3, 4, 18, 3)),
    "pvt_large": PVTConfig(depths=(3, 8, 27, 3)),
    "pvt_huge_v2": PVTConfig(
        depths=(3, 10, 60, 3), embed_dims=(128, 256, 512, 768), num_heads=(2, 4, 8, 12)
    ),
}

#: The last one goes by the name that its own authors gave it; it is no PVT v2.
ALIASES = {"pvt_v1_huge": "pvt_huge_v2"}


def describe(config: PVTConfig) -> str:
    """A configuration in a few words: ``pvt_tiny, 1000 classes, 224 px``."""
    return fields.describe(config, VARIANTS)
