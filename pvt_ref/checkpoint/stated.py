"""Facts about a model from outside its weights: an argument, or Hugging Face's JSON files."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvt_ref import errors
from pvt_ref.checkpoint.bounded_json import parse_json
from pvt_ref.checks import is_real, is_whole
from pvt_ref.data.info import Preprocessing
from pvt_ref.errors import CheckpointError, ConfigError, reason, shown
from pvt_ref.models.architecture import Architecture, architectures, known_variants

MAX_JSON = 2 * 2**20  # bytes: enough for 20,000 class names, twice
PREPROCESSOR_FILE = "preprocessor_config.json"
#: Fields that change pictures but are ignored here.
_NOT_FOLLOWED = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct")
#: Fields that a variant's name leaves open, and the shapes or layout of a file show.
_SHOWN_BY_FILE = ("img_size", "in_chans", "num_classes", "position_resize")


@dataclass(frozen=True, slots=True)
class Stated:
    """A configuration, and which of its fields were given."""

    config: Any
    origin: str  # where it is from, for messages
    left_open: tuple[str, ...] = ()  # fields that were not given: their values are arbitrary
    says_eps: bool = False  # whether its eps were given
    classes: tuple[str, ...] = ()  # names of the outputs, if given
    num_labels: int | None = None  # number of outputs, if given
    task: str = ""  # meaning of the outputs and its origin, if not one class per picture


def shown_by_file(config: Any) -> dict[str, Any]:
    """The fields of a configuration that a file shows but a variant's name does not fix."""
    return {name: getattr(config, name) for name in _SHOWN_BY_FILE if hasattr(config, name)}


def eps_of(config: Any) -> dict[str, float]:
    """The epsilons of a configuration by field."""
    names = (field.name for field in dataclasses.fields(config))
    return {name: getattr(config, name) for name in names if name.endswith("norm_eps")}


def from_argument(config: Any, row: Architecture | None = None) -> Stated | None:
    """The argument ``config`` of load; a JSON file that does not say is about row's network."""
    if config is None:
        return None
    kinds, variants = [row.config_type for row in architectures()], known_variants()
    names = ", ".join(variants)
    if type(config) in kinds:
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        says_eps = any(eps != defaults[name] for name, eps in eps_of(config).items())
        return Stated(config, "config", says_eps=says_eps)
    if isinstance(config, str) and config in variants:
        return Stated(variants[config], config, tuple(shown_by_file(variants[config])))
    if not isinstance(config, str | os.PathLike) or not isinstance(os.fspath(config), str):
        types = " or ".join(kind.__name__ for kind in kinds)
        what = f"config is a {type(config).__name__}; it must be a {types}, a variant's name"
        raise errors.ArrayTypeError(f"{what} ({names}), or the path of a file such as config.json")
    text = os.fspath(config)
    path = Path(text) / "config.json" if os.path.isdir(text) else Path(text)
    if "\0" in text or not os.path.exists(path):
        what = f"config is {shown(text, 200)}: neither a variant ({names}) nor a file"
        raise errors.MissingFileError(what)
    return read_config(path, str(path), row)


def _fields(row: Architecture) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(row.config_type)}


def read_config(path: Path, origin: str, row: Architecture | None = None) -> Stated:
    """A configuration in a JSON file, called origin: Hugging Face's, or a network's own fields."""
    fields = read_json(path, origin)
    if row is None:  # the most likely network: the first that matches, or the first of all
        rows, kind = list(architectures()), fields.get("model_type")
        by_kind = [row for row in rows if row.files and row.files.model_type == kind]
        by_fields = [row for row in rows if fields.keys() <= _fields(row).keys()]
        row = [*by_kind, *by_fields, *rows][0]
    known, files = _fields(row), row.files
    values, outputs = fields, ((), None, "")
    try:
        if files and fields.keys() & {"model_type", "hidden_sizes", "hidden_size"}:  # of the Hub
            kind = fields.get("model_type", files.model_type)
            if kind != files.model_type:
                what = f"it is of another model: model_type is {shown(kind)}"
                raise CheckpointError(f"{what}, not {files.model_type!r}")
            values, outputs = files.hugging_face(fields), _outputs(fields, origin)
        elif not fields or not fields.keys() <= known.keys():
            for other in architectures():
                if fields and fields.keys() <= _fields(other).keys():
                    what = f"it has the fields of a {other.title}, but the weights are of a"
                    advice = "Pass the file that belongs to these weights"
                    raise CheckpointError(f"{what} {row.title}. {advice}")
            what = "it is neither Hugging Face's config.json (which has a model_type) nor this"
            unknown = f"unknown fields are {shown(sorted(fields.keys() - known.keys()))}"
            raise CheckpointError(f"{what} project's: {unknown}, known ones {', '.join(known)}")
        config = files.partial(values) if files else row.config_type(**values)
    except (ConfigError, CheckpointError, TypeError) as error:  # a TypeError: a field is missing
        kind = ConfigError if isinstance(error, ConfigError) else CheckpointError
        raise kind(f"{origin}: {str(error)[:2000]}") from error
    says_eps = any(name.endswith("norm_eps") for name in values)
    left_open = tuple(name for name in known if name not in values)
    return Stated(config, origin, left_open, says_eps, *outputs)


def describes_model(fields: Mapping[str, Any], row: Architecture) -> bool:
    """Whether a config.json is about a model of row's network or claims to be about any model."""
    telling = {"model_type"} | (row.files.telling if row.files else set())
    return bool(fields) and (fields.keys() <= _fields(row).keys() or not telling.isdisjoint(fields))


def _outputs(fields: Mapping[str, Any], origin: str) -> tuple[tuple[str, ...], int | None, str]:
    """Stated's fields about outputs: class names, their number, and the task if unusual."""
    labels, count, names = fields.get("id2label"), fields.get("num_labels"), ()
    if labels is not None:
        known = isinstance(labels, dict) and labels.keys() == set(map(str, range(len(labels))))
        if not known or not all(isinstance(name, str) for name in labels.values()):
            raise CheckpointError("id2label does not map the numbers from 0 to names")
        count, names = len(labels), tuple(labels[str(k)] for k in range(len(labels)))
    if count is not None and not is_whole(count):
        raise CheckpointError(f"num_labels is {shown(count)}; it must be a whole number")
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        names = ()  # placeholders
    usual = "single_label_classification"
    task = fields.get("problem_type") or usual
    return names, count, "" if task == usual else f"{shown(task)} in {origin}"


def read_json(path: Path, origin: str) -> dict[str, Any]:
    """The object in a JSON file, called origin in messages. Raises: CheckpointError."""
    try:
        if not path.is_file():  # reading a pipe could wait for ever
            raise CheckpointError(f"{origin}: not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{origin}: cannot be read ({reason(error)})") from error
    values = parse_json(data, origin, MAX_JSON)
    if not isinstance(values, dict):
        raise CheckpointError(f"{origin}: it holds a {type(values).__name__}, not an object")
    return values


def read_preprocessing(path: Path, config: Any) -> tuple[Preprocessing | None, str]:
    """Mean and std of a preprocessor_config.json, or None, and a sentence about the result."""
    try:
        fields = read_json(path, PREPROCESSOR_FILE)
        preprocessing = _preprocessing(fields, config.in_chans)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # and every PVTError
        why = " ".join(str(error).removeprefix(f"{PREPROCESSOR_FILE}: ").split())[:200]
        return None, f"{PREPROCESSOR_FILE} is not used: {why}"
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
    if not is_real(factor) or factor <= 0:
        raise CheckpointError(f"rescale_factor is {shown(factor)}; it must be a number above 0")
    given: dict[str, Any] = {"image_mean": 0.0, "image_std": 1.0}
    if fields.get("do_normalize", True):
        given = {name: fields.get(name) for name in given}
    for name, value in given.items():
        if value is None:
            raise CheckpointError(f"it has no {name}")
    mean, std = (x if isinstance(x, list) else [x] * channels for x in given.values())
    for numbers in (mean, std):
        if not all(isinstance(x, int | float) for x in numbers):
            raise CheckpointError(f"image_mean or image_std is {shown(numbers)}, not numbers")
    if len(mean) != channels:
        raise CheckpointError(f"it has {len(mean)} means, but the model {channels} channels")
    mode = {1: "L", 3: "RGB"}.get(channels, "bands")
    scale = 1 if math.isclose(255 * factor, 1, rel_tol=1e-6) else 255 * factor
    return Preprocessing(mode, tuple(m / scale for m in mean), tuple(s / scale for s in std))
