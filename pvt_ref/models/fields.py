"""Shared by the networks' configurations: checks of fields, and the settings of blocks."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from pvt_ref.blocks.sra import SRASettings
from pvt_ref.blocks.transformer import BlockSettings
from pvt_ref.checks import TOO_LARGE, is_moderate, is_real, is_whole
from pvt_ref.errors import ConfigError, RangeError, ShapeError, shown

NUM_STAGES = 4

#: Blocks of one stage. The largest published stage has 60; each costs memory before any weight.
MAX_DEPTH = 1000

#: Fields in which a model may differ from a variant and keep its name.
_NOT_STRUCTURE = (
    *("img_size", "in_chans", "num_classes", "norm_eps", "projection_norm_eps"),
    *("drop_rate", "attn_drop_rate", "drop_path_rate"),
)

#: How a position table is resized to another grid.
RESIZES = ("bicubic", "bilinear")


def _plain(v: Any) -> int | float:
    return int(v) if float(v).is_integer() else float(v)


_COUNT = ("a whole number, 1 or more", lambda v: is_whole(v) and v >= 1, int)
_RATE = ("in [0, 1)", lambda v: is_real(v) and 0 <= v < 1, float)
_FLAG = ("True or False", lambda v: isinstance(v, bool), bool)
_EPSILON = ("a finite number, 0 or more", lambda v: is_moderate(v) and v >= 0, float)

#: By field of one value: what it must be, in words and as a test, and what makes it plain.
_RULES: dict[str, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    **dict.fromkeys(("img_size", "in_chans", "patch_size", "embed_dim"), _COUNT),
    **dict.fromkeys(("depth", "num_heads"), _COUNT),
    "num_classes": ("a whole number, 0 or more", lambda v: is_whole(v) and v >= 0, int),
    "mlp_ratio": ("a positive number below 2**31", lambda v: is_moderate(v) and v > 0, _plain),
    **dict.fromkeys(("drop_rate", "attn_drop_rate", "drop_path_rate"), _RATE),
    **dict.fromkeys(("norm_eps", "projection_norm_eps"), _EPSILON),
    **dict.fromkeys(("qkv_bias", "linear"), _FLAG),
    "qk_scale": ("None (for 1/sqrt(d)) or finite", lambda v: v is None or is_moderate(v), float),
    "position_resize": (" or ".join(RESIZES), lambda v: isinstance(v, str) and v in RESIZES, str),
}


def settle_fields(config: Any) -> dict[str, str]:
    """Converts the fields of a frozen configuration to plain values; returns the faults, by field.

    A field whose default is a tuple has one number per stage.
    """
    problems: dict[str, str] = {}
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(field.default, tuple):
            whole = name != "mlp_ratios"
            _set(config, name, _positive_per_stage(name, value, problems, whole=whole))
            continue
        needed, good, plain = _RULES[name]
        if not good(value):
            problems[name] = f"{shown(value)}; it must be {needed}"
        elif plain is int and value >= TOO_LARGE:
            problems[name] = "too large; it must be below 2**31"
        elif value is not None:
            _set(config, name, plain(value))
    name, each = ("depths", "each") if hasattr(config, "depths") else ("depth", "it")
    depths = getattr(config, name)
    if name not in problems and max(depths if each == "each" else [depths]) > MAX_DEPTH:
        problems[name] = f"{shown(depths)}; {each} must be at most {MAX_DEPTH}"
    return problems


def _set(config: Any, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # frozen: only __post_init__ may normalise


def _positive_per_stage(name: str, value: Any, problems: dict[str, str], *, whole: bool) -> Any:
    """value as a tuple of four positive numbers, or unchanged with an entry in problems."""
    kind, is_number = ("whole numbers", is_whole) if whole else ("numbers", is_real)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str | bytes)
        or len(value) != NUM_STAGES
    ):
        problems[name] = f"{shown(value)}; it must be four {kind}, one per stage"
        return value
    if not all(is_number(v) and 0 < v < math.inf for v in value):
        problems[name] = f"{shown(value)}; each must be a positive {kind[:-1]}"
        return value
    if any(v >= TOO_LARGE for v in value):
        problems[name] = "not right: a number is too large; each must be below 2**31"
        return value
    return tuple(map(_plain, value))


def width_conflicts(config: Any, wrong: AbstractSet[str]) -> list[str]:
    """Widths that heads do not divide or ratios make fractional, if each field alone is valid."""
    problems: list[str] = []
    for i in range(NUM_STAGES):
        if wrong.isdisjoint({"embed_dims", "num_heads"}):
            C, N = config.embed_dims[i], config.num_heads[i]
            if C % N:
                problems.append(
                    f"stage {i + 1}: num_heads {N} does not divide embed_dims {C}; every head "
                    f"needs the same width"
                )
        if wrong.isdisjoint({"embed_dims", "mlp_ratios"}):
            C, E = config.embed_dims[i], config.mlp_ratios[i]
            if not float(C * E).is_integer():
                problems.append(
                    f"stage {i + 1}: embed_dims {C} times mlp_ratios {E} is {C * E}, not a "
                    f"whole number of hidden units"
                )
    return problems


def refuse(title: str, problems: Mapping[str, str], conflicts: Sequence[str], example: str) -> None:
    """Raises a ConfigError with every reason, if there is one."""
    lines = [*(f"{name} is {problem}" for name, problem in problems.items()), *conflicts]
    if lines:
        raise ConfigError(
            f"this {title} cannot be built:\n  - "
            + "\n  - ".join(lines)
            + f"\nStart from VARIANTS[{example!r}] and change it with dataclasses.replace."
        )


def check_stage(i: object) -> None:
    """Refuses what is no number of a stage. Raises: RangeError."""
    if not is_whole(i) or not 1 <= i <= NUM_STAGES:  # type: ignore[operator]
        known = f"1 to {NUM_STAGES}, as in the paper"
        raise RangeError(f"stage {shown(i)} is asked for; stages count from {known}")


def whole_pixels(height: Any, width: Any) -> tuple[int, int]:
    """An image size as plain integers, which may still be negative. Raises: ShapeError."""
    if not all(is_whole(side) and abs(side) < TOO_LARGE for side in (height, width)):
        size = f"{shown(height)} x {shown(width)}"
        raise ShapeError(f"image size {size} must be whole numbers of pixels, below 2**31")
    return int(height), int(width)  # a NumPy uint8 would wrap round


def fitting_sizes(height: int, width: int, multiple: int) -> tuple[str, str]:
    """The nearest image size with sides of this multiple, and the smallest to pad to, as texts."""
    near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
    padded = [max(multiple, math.ceil(side / multiple) * multiple) for side in (height, width)]
    return f"{near[0]}x{near[1]}", f"{padded[0]}x{padded[1]}"


def block_settings(config: Any) -> list[tuple[BlockSettings, ...]]:
    """The settings of each block of each stage, besides its weights.

    The drop-path rates rise linearly from the first block to the last (arXiv 1603.09382, section
    3).
    """
    stages: list[tuple[BlockSettings, ...]] = []
    total, first = sum(config.depths), 0
    for C, N, depth in zip(config.embed_dims, config.num_heads, config.depths, strict=True):
        attn = SRASettings(
            num_heads=N,
            scale=1 / math.sqrt(C // N) if config.qk_scale is None else config.qk_scale,
            norm_eps=config.projection_norm_eps,
            attn_drop_rate=config.attn_drop_rate,
            drop_rate=config.drop_rate,
        )
        numbers = range(first, first + depth)
        rates = (config.drop_path_rate * k / max(total - 1, 1) for k in numbers)
        blocks = (
            BlockSettings(config.norm_eps, attn, config.drop_rate, rate, k)
            for rate, k in zip(rates, numbers, strict=True)
        )
        stages.append(tuple(blocks))
        first += depth
    return stages


def describe(config: Any, variants: Mapping[str, Any]) -> str:
    """A configuration in a few words: ``pvt_tiny, 1000 classes, 224 px``."""
    name = "custom configuration"
    for candidate, variant in variants.items():
        same = {field: getattr(config, field) for field in _NOT_STRUCTURE}
        try:
            if dataclasses.replace(variant, **same) == config:
                name = candidate
        except ConfigError:
            continue  # the variant cannot have that image size
    head = f"{config.num_classes} classes" if config.has_classifier else "no classifier"
    channels = "" if config.in_chans == 3 else f", in_chans={config.in_chans}"
    return f"{name}, {head}, {config.img_size} px{channels}"
