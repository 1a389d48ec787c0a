"""What is said of a model beside its weights: by an argument, or by the files that lie there.

Hugging Face's ``save_pretrained`` writes config.json (sizes, heads, eps, labels) and
preprocessor_config.json (mean and std) into the folder of the weights.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvt_ref.checkpoint.bounded_json import parse_json
from pvt_ref.checks import TOO_LARGE, is_whole
from pvt_ref.data.info import Preprocessing
from pvt_ref.errors import (
    ArrayTypeError,
    CheckpointError,
    ConfigError,
    MissingFileError,
    PVTError,
    shown,
)
from pvt_ref.models.pvt.config import NUM_STAGES, VARIANTS, PVTConfig

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"

#: Bytes of a JSON file beside weights that are read: 20,000 class names, twice, and some more.
MAX_JSON = 2 * 2**20

#: Fields that the shapes of a file show, and a variant's name leaves open.
SHOWN_BY_SHAPES = ("img_size", "in_chans", "num_classes")

_DEFAULT = PVTConfig()
_FIELDS = tuple(field.name for field in dataclasses.fields(PVTConfig))

#: Fields of a preprocessor_config.json that change pictures, and are not followed here.
_NOT_FOLLOWED = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct")

#: Fields of Hugging Face's PvtConfig that mean the same here.
_SAME = {
    "num_channels": "in_chans",
    "hidden_sizes": "embed_dims",
    "num_attention_heads": "num_heads",
    "patch_sizes": "patch_sizes",
    "mlp_ratios": "mlp_ratios",
    "depths": "depths",
    "sequence_reduction_ratios": "sr_ratios",
    "qkv_bias": "qkv_bias",
    "hidden_dropout_prob": "drop_rate",
    "attention_probs_dropout_prob": "attn_drop_rate",
    "drop_path_rate": "drop_path_rate",
}


@dataclass(frozen=True, slots=True)
class Stated:
    """A configuration, and how much of it was really said.

    Attributes:
        config: the model.
        origin: who says it, for messages.
        left_open: fields of config that are not said: what stands there means nothing.
        says_eps: whether its eps were chosen by somebody.
        classes: names of the outputs; empty if they are not said.
        num_labels: how many outputs there are; None if that is not said.
        task: what the outputs mean, and who says so, if they are not one class per picture; else
            empty.
    """

    config: PVTConfig
    origin: str
    left_open: tuple[str, ...] = ()
    says_eps: bool = False
    classes: tuple[str, ...] = ()
    num_labels: int | None = None
    task: str = ""


def from_argument(config: Any) -> Stated | None:
    """What the argument ``config`` of load says.

    Args:
        config: a PVTConfig, the name of a variant, the path of a JSON file or of a folder with a
            config.json, or None.

    Returns:
        What it says. A PVTConfig is taken to have chosen its eps if they are not the defaults.

    Raises:
        ArrayTypeError: if config is none of these.
        MissingFileError: if there is no such file.
        CheckpointError: if the file cannot be read or is no configuration.
        ConfigError: if it says a PVT that cannot be built.
    """
    if config is None:
        return None
    if isinstance(config, PVTConfig):
        return Stated(config, "config", says_eps=_eps(config) != _eps(_DEFAULT))
    if isinstance(config, str) and config in VARIANTS:
        return Stated(VARIANTS[config], config, SHOWN_BY_SHAPES)
    if not isinstance(config, str | os.PathLike) or not isinstance(os.fspath(config), str):
        raise ArrayTypeError(
            f"config is a {type(config).__name__}; it must be a PVTConfig, a variant's name "
            f"({', '.join(VARIANTS)}), or the path of a JSON file such as config.json"
        )
    text = os.fspath(config)
    path = Path(text) / CONFIG_FILE if os.path.isdir(text) else Path(text)
    if "\0" in text or not os.path.exists(path):
        raise MissingFileError(
            f"config is {shown(text, 200)}: neither a variant ({', '.join(VARIANTS)}) nor a file"
        )
    return read_config(path, str(path))


def read_config(path: Path, origin: str) -> Stated:
    """A configuration in a JSON file: Hugging Face's, or this project's own fields.

    Args:
        path: the file.
        origin: its name in messages.

    Returns:
        What it says.

    Raises:
        CheckpointError: if it cannot be read, or is of another kind of model.
        ConfigError: if it says a PVT that cannot be built.
    """
    fields = read_json(path, origin)
    try:
        if "model_type" in fields or "hidden_sizes" in fields:
            return _hugging_face(fields, origin)
        known = set(_FIELDS)
        if not fields or not fields.keys() <= known:
            raise CheckpointError(
                f"it is neither Hugging Face's config.json (which has a model_type) nor a "
                f"configuration of this project; unknown fields are "
                f"{shown(sorted(fields.keys() - known))}, known ones {', '.join(sorted(known))}"
            )
        says_eps = bool(fields.keys() & {"norm_eps", "projection_norm_eps"})
        return Stated(_partial(fields), origin, _unsaid(fields), says_eps)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {str(error)[:2000]}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def describes_pvt(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is about a PVT or claims to be about a model, rather than a training.

    Args:
        fields: what it holds.
    """
    structure = {"model_type", "embed_dims", "hidden_sizes", "depths", "num_heads"}
    structure |= {"num_attention_heads", "sr_ratios", "sequence_reduction_ratios", "patch_sizes"}
    return bool(fields) and (fields.keys() <= set(_FIELDS) or bool(fields.keys() & structure))


def _unsaid(values: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in _FIELDS if name not in values)


def _partial(values: dict[str, Any]) -> PVTConfig:
    """A configuration with some fields, and in the others what fits any of these."""
    ones = (1,) * NUM_STAGES
    filled: dict[str, Any] = {
        "num_heads": ones,
        "embed_dims": values.get("num_heads", ones),
        "mlp_ratios": ones,
        "patch_sizes": ones,
        "sr_ratios": ones,
        "num_classes": 0,
        **values,
    }
    if "img_size" not in values:
        sizes = [filled["patch_sizes"], filled["sr_ratios"]]
        factors = [n for size in sizes if isinstance(size, list) for n in size[:NUM_STAGES]]
        multiple = math.prod(n for n in factors if is_whole(n) and 0 < n < TOO_LARGE)
        filled["img_size"] = multiple if multiple < TOO_LARGE else _DEFAULT.img_size
    return PVTConfig(**filled)


def _hugging_face(fields: Mapping[str, Any], origin: str) -> Stated:
    kind = fields.get("model_type", "pvt")
    if kind != "pvt":
        raise CheckpointError(f"it is of another model: model_type is {shown(kind)}, not 'pvt'")
    if fields.get("num_encoder_blocks", NUM_STAGES) != NUM_STAGES:
        raise CheckpointError(
            f"num_encoder_blocks is {shown(fields['num_encoder_blocks'])}; a PVT here has four"
        )
    if fields.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"hidden_act is {shown(fields['hidden_act'])}; this project computes 'gelu' only"
        )
    patches = fields.get("patch_sizes", list(_DEFAULT.patch_sizes))
    if fields.get("strides", patches) != patches:  # its kernels have the strides' size
        raise CheckpointError(
            f"patch_sizes {shown(patches)} and strides {shown(fields['strides'])} differ: its "
            f"patches overlap, and those of this project do not"
        )
    values = {ours: fields[theirs] for theirs, ours in _SAME.items() if theirs in fields}
    if "image_size" in fields:
        side = fields["image_size"]
        if isinstance(side, list):
            if len(side) != 2 or side[0] != side[1]:
                raise CheckpointError(f"image_size is {shown(side)}; tables here are square")
            side = side[0]
        values["img_size"] = side
    says_eps = "layer_norm_eps" in fields
    if says_eps:
        values |= dict.fromkeys(("norm_eps", "projection_norm_eps"), fields["layer_norm_eps"])
    config = _partial(values)
    left_open = _unsaid({**values, "qk_scale": None})  # its code has no such thing
    labels = _labels(fields.get("id2label"))
    count = fields.get("num_labels") if labels is None else len(labels)
    if count is not None and not is_whole(count):
        raise CheckpointError(f"num_labels is {shown(count)}; it must be a whole number")
    named = labels is not None and not all(re.fullmatch(r"LABEL_\d+", name) for name in labels)
    classes = tuple(labels) if labels and named else ()  # others are placeholders
    task = fields.get("problem_type") or "single_label_classification"
    other = "" if task == "single_label_classification" else f"{shown(task)} in {origin}"
    return Stated(config, origin, left_open, says_eps, classes, count, other)


def _labels(id2label: Any) -> list[str] | None:
    if id2label is None:
        return None
    numbers = [str(k) for k in range(len(id2label))] if isinstance(id2label, dict) else None
    if numbers is None or id2label.keys() != set(numbers):
        raise CheckpointError("id2label does not map the numbers from 0 to names")
    names = [id2label[k] for k in numbers]
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError("id2label holds something else than names")
    return names


def read_json(path: Path, origin: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        origin: its name in messages.

    Returns:
        Its values by name.

    Raises:
        CheckpointError: if it cannot be read, is too long, or is no JSON object.
    """
    try:
        if not path.is_file():  # reading a pipe could wait for ever
            raise CheckpointError(f"{origin}: not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(
            f"{origin}: cannot be read ({type(error).__name__}: {error.strerror or error})"
        ) from error
    values = parse_json(data, origin, MAX_JSON)
    if not isinstance(values, dict):
        raise CheckpointError(f"{origin}: it holds a {type(values).__name__}, not an object")
    return values


def read_preprocessing(path: Path, config: PVTConfig) -> tuple[Preprocessing | None, str]:
    """Mean and std of a preprocessor_config.json, as far as they can be had here.

    Args:
        path: the file.
        config: of the model, for channels and size.

    Returns:
        The preprocessing, or None, and a sentence on it for ``source``.
    """
    try:
        fields = read_json(path, PREPROCESSOR_FILE)
        preprocessing = _preprocessing(fields, config.in_chans)
    except (PVTError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).removeprefix(f"{PREPROCESSOR_FILE}: ").split())[:200]
        return None, f"{PREPROCESSOR_FILE} is not used: {reason}"
    said = f"mean and std from {PREPROCESSOR_FILE}"
    other = [name for name in _NOT_FOLLOWED if fields.get(name) is not None]
    if other:
        said += f" (but not {', '.join(other)}: pictures are resized and cut as the authors do)"
    cut = fields.get("crop_size") is not None and fields.get("do_center_crop", True)
    size = fields["crop_size"] if cut else fields.get("size")
    sides = list(size.values()) if isinstance(size, dict) else [size]
    if size is not None and any(side != config.img_size for side in sides):
        said += f", whose size {shown(size)} is not that of the tables: pass size="
    return preprocessing, said


def _preprocessing(fields: Mapping[str, Any], channels: int) -> Preprocessing:
    """``(x * factor - mean) / std`` of bytes x as ``(x / 255 - mean') / std'``."""
    factor = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor <= 0:
        raise CheckpointError(f"rescale_factor is {shown(factor)}; it must be a number above 0")
    mean, std = [0.0] * channels, [1.0] * channels
    if fields.get("do_normalize", True):
        for name in ("image_mean", "image_std"):
            if fields.get(name) is None:
                raise CheckpointError(f"it has no {name}")
        mean, std = (
            value if isinstance(value, list) else [value] * channels
            for value in (fields["image_mean"], fields["image_std"])
        )
    for numbers in (mean, std):
        if not all(isinstance(x, int | float) for x in numbers):
            raise CheckpointError(f"image_mean or image_std is {shown(numbers)}, and not numbers")
    if len(mean) != channels:
        raise CheckpointError(f"it has {len(mean)} means, and the model {channels} channels")
    mode = {1: "L", 3: "RGB"}.get(channels, "bands")
    scale = 255 * factor
    if math.isclose(scale, 1, rel_tol=1e-6):
        scale = 1
    return Preprocessing(mode, tuple(m / scale for m in mean), tuple(s / scale for s in std))


def _eps(config: PVTConfig) -> tuple[float, float]:
    return config.norm_eps, config.projection_norm_eps
