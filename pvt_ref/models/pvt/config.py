"""The shape of a PVT: one frozen record, the five published variants, and every rule they obey.

Symbols are those of the paper (Wang et al., ICCV 2021, arXiv 2102.12122, section 3 and Table 1)::

    P_i patch size    C_i channels    R_i spatial-reduction ratio    N_i heads    E_i MLP expansion
    L_i depth         H_i x W_i token grid of stage i                i = 1..4
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from pvt_ref.blocks.sra import SRASettings
from pvt_ref.blocks.transformer import BlockSettings
from pvt_ref.checks import TOO_LARGE, is_moderate, is_real, is_whole
from pvt_ref.errors import ConfigError, RangeError, ShapeError, shown

NUM_STAGES = 4

#: Blocks of one stage. The largest published stage has 60; each costs memory before any weight.
MAX_DEPTH = 1000


@dataclass(frozen=True, slots=True)
class StageConfig:
    """What one stage needs to know, by the names of :class:`PVTConfig`, which makes it."""

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
    blocks: tuple[BlockSettings, ...]  # what each block is told


_COUNT = ("a whole number, 1 or more", lambda v: is_whole(v) and v >= 1, int)
_RATE = ("in [0, 1)", lambda v: is_real(v) and 0 <= v < 1, float)
_EPSILON = ("a finite number, 0 or more", lambda v: is_moderate(v) and v >= 0, float)

#: By field of one value: what it must be, in words and as a test, and the type that it gets.
_RULES: dict[str, tuple[str, Callable[[Any], bool], type]] = {
    **dict.fromkeys(("img_size", "in_chans"), _COUNT),
    "num_classes": ("a whole number, 0 or more", lambda v: is_whole(v) and v >= 0, int),
    **dict.fromkeys(("drop_rate", "attn_drop_rate", "drop_path_rate"), _RATE),
    **dict.fromkeys(("norm_eps", "projection_norm_eps"), _EPSILON),
    "qkv_bias": ("True or False", lambda v: isinstance(v, bool), bool),
    "qk_scale": ("None (for 1/sqrt(d)) or finite", lambda v: v is None or is_moderate(v), float),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PVTConfig:
    """A buildable PVT. Field names are those of the authors' constructor.

    Attributes:
        img_size: side in pixels of the square image that the position tables are made for. For
            images of other sizes they are resized.
        in_chans: channels of the image.
        num_classes: outputs of the classifier. 0 makes a bare backbone for dense prediction:
            no cls token, no final norm, no head.
        patch_sizes: P_i, one per stage. (The released constructor fixes 2 for stages 2 to 4.)
        embed_dims: C_i.
        num_heads: N_i; must divide C_i.
        mlp_ratios: E_i; C_i * E_i must be whole.
        qkv_bias: whether q and kv have biases.
        qk_scale: replaces 1 / sqrt(d) as the factor on the scores; None keeps 1 / sqrt(d).
            Zero is honoured (the released code ignores it).
        drop_rate: dropout after the position embedding, the attention projection and in the MLP.
        attn_drop_rate: dropout on the attention weights.
        drop_path_rate: stochastic depth of the last block; block k of K has
            ``linspace(0, drop_path_rate, K)[k]``.
        depths: L_i, at most 1000.
        sr_ratios: R_i. 1 is plain multi-head attention.
        norm_eps: epsilon in norm1, norm2 and the final norm.
        projection_norm_eps: epsilon in the norms after the patch and the spatial-reduction
            projections. The released code has 1e-5 there and 1e-6 in the others.

    Raises:
        ConfigError: if it cannot be built; the message lists every reason.
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
        problems: dict[str, str] = {}  # by field
        for name in ("patch_sizes", "embed_dims", "num_heads", "depths", "sr_ratios"):
            self._set(name, _positive_per_stage(name, getattr(self, name), problems, whole=True))
        if "depths" not in problems and max(self.depths) > MAX_DEPTH:
            problems["depths"] = f"{shown(self.depths)}; each must be at most {MAX_DEPTH}"
        ratios = _positive_per_stage("mlp_ratios", self.mlp_ratios, problems, whole=False)
        self._set("mlp_ratios", ratios)
        for name, (needed, good, kind) in _RULES.items():
            value = getattr(self, name)
            if not good(value):
                problems[name] = f"{shown(value)}; it must be {needed}"
            elif kind is int and value >= TOO_LARGE:
                problems[name] = "too large; it must be below 2**31"
            elif value is not None:
                self._set(name, kind(value))
        lines = [f"{name} is {problem}" for name, problem in problems.items()]
        lines += self._conflicts(problems.keys())
        if lines:
            raise ConfigError(
                "\n  - ".join(["this PVT cannot be built:", *lines])
                + "\nStart from VARIANTS['pvt_tiny'] and change it with dataclasses.replace."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen: only __post_init__ may normalise

    def _conflicts(self, wrong: AbstractSet[str]) -> list[str]:
        """What is wrong between fields, where none of these is wrong in itself."""
        problems = []
        for i in range(NUM_STAGES):
            if wrong.isdisjoint({"embed_dims", "num_heads"}):
                C, N = self.embed_dims[i], self.num_heads[i]
                if C % N:
                    problems.append(
                        f"stage {i + 1}: num_heads {N} does not divide embed_dims {C}; every head "
                        f"needs the same width"
                    )
            if wrong.isdisjoint({"embed_dims", "mlp_ratios"}):
                C, E = self.embed_dims[i], self.mlp_ratios[i]
                if not float(C * E).is_integer():
                    problems.append(
                        f"stage {i + 1}: embed_dims {C} times mlp_ratios {E} is {C * E}, not a "
                        f"whole number of hidden units"
                    )
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
        return tuple(math.prod(self.patch_sizes[: i + 1]) for i in range(NUM_STAGES))

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
        if not is_whole(i) or not 1 <= i <= NUM_STAGES:
            known = f"1 to {NUM_STAGES}, as in the paper"
            raise RangeError(f"stage {shown(i)} is asked for; stages count from {known}")
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
        if not all(is_whole(side) and abs(side) < TOO_LARGE for side in (height, width)):
            size = f"{shown(height)} x {shown(width)}"
            raise ShapeError(f"image size {size} must be whole numbers of pixels, below 2**31")
        height, width = int(height), int(width)  # a NumPy uint8 would wrap round
        if height < 1 or width < 1 or height % g or width % g:
            near = [max(g, round(side / g) * g) for side in (height, width)]
            padded = [max(g, math.ceil(side / g) * g) for side in (height, width)]
            raise ShapeError(
                f"image size {height}x{width} does not fit: H and W must be multiples of {g}, or "
                f"border pixels would be lost (patch sizes {self.patch_sizes}, spatial-reduction "
                f"ratios {self.sr_ratios}). Resize to {near[0]}x{near[1]}, or pad to "
                f"{padded[0]}x{padded[1]} with pvt_ref.pad_to_multiple(images, {g})"
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
    stages = []
    total, first = sum(config.depths), 0
    for i, C in enumerate(config.embed_dims):
        N, depth = config.num_heads[i], config.depths[i]
        numbers = range(first, first + depth)
        rates = tuple(config.drop_path_rate * k / max(total - 1, 1) for k in numbers)
        attn = SRASettings(
            num_heads=N,
            scale=1 / math.sqrt(C // N) if config.qk_scale is None else config.qk_scale,
            norm_eps=config.projection_norm_eps,
            attn_drop_rate=config.attn_drop_rate,
            drop_rate=config.drop_rate,
        )
        blocks = (
            BlockSettings(config.norm_eps, attn, config.drop_rate, rate, k)
            for rate, k in zip(rates, numbers, strict=True)
        )
        stages.append(
            StageConfig(
                patch_size=config.patch_sizes[i],
                embed_dim=C,
                num_heads=N,
                hidden_dim=int(C * config.mlp_ratios[i]),
                depth=depth,
                sr_ratio=config.sr_ratios[i],
                scale=attn.scale,
                drop_rate=config.drop_rate,
                attn_drop_rate=config.attn_drop_rate,
                drop_path_rates=rates,
                norm_eps=config.norm_eps,
                projection_norm_eps=config.projection_norm_eps,
                blocks=tuple(blocks),
            )
        )
        first += depth
    return tuple(stages)


def _positive_per_stage(name: str, value: Any, problems: dict[str, str], *, whole: bool) -> Any:
    """value as a tuple of four positive numbers, or unchanged with an entry in problems."""
    kind, is_number = ("whole numbers", is_whole) if whole else ("numbers", is_real)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 4:
        problems[name] = f"{shown(value)}; it must be four {kind}, one per stage"
        return value
    if not all(is_number(v) and 0 < v < math.inf for v in value):
        problems[name] = f"{shown(value)}; each must be a positive {kind[:-1]}"
        return value
    if any(v >= TOO_LARGE for v in value):
        problems[name] = "not right: a number is too large; each must be below 2**31"
        return value
    return tuple(int(v) if float(v).is_integer() else float(v) for v in value)


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

#: Fields in which a model may differ from a variant and still be called by its name.
_NOT_STRUCTURE = (
    *("img_size", "in_chans", "num_classes", "norm_eps", "projection_norm_eps"),
    *("drop_rate", "attn_drop_rate", "drop_path_rate"),
)


def describe(config: PVTConfig) -> str:
    """A configuration in a few words: ``pvt_tiny, 1000 classes, 224 px``."""
    name = "custom configuration"
    for candidate, variant in VARIANTS.items():
        same = {field: getattr(config, field) for field in _NOT_STRUCTURE}
        try:
            if replace(variant, **same) == config:
                name = candidate
        except ConfigError:
            continue  # the variant cannot have that image size
    head = f"{config.num_classes} classes" if config.has_classifier else "no classifier"
    channels = "" if config.in_chans == 3 else f", in_chans={config.in_chans}"
    return f"{name}, {head}, {config.img_size} px{channels}"
