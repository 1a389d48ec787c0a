"""The state of a training as a file: written whole or not at all, and verified when read."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pvt_ref import errors
from pvt_ref.api import from_state_dict, to_state_dict
from pvt_ref.app import Model
from pvt_ref.arrays import Array, dtype_name, from_host, is_array
from pvt_ref.checkpoint.bounded_json import parse_json
from pvt_ref.checkpoint.safetensors_file import TRAINING_KEY, pack, read_safetensors
from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.data.info import ModelInfo
from pvt_ref.data.samples import Samples
from pvt_ref.errors import CheckpointError, PVTError, TrainingError, reason, shown
from pvt_ref.models.architecture import (
    architecture_of,
    buffer_keys,
    config_to_dict,
    count_keys,
    param_shapes,
)
from pvt_ref.train.adamw import AdamWState
from pvt_ref.train.checks import check_path
from pvt_ref.train.loss_scale import LossScale
from pvt_ref.train.recipe import Recipe
from pvt_ref.train.step import BEST_SO_FAR, TrainState, check_state
from pvt_ref.tree import digest, to_numpy, without_buffers

FORMAT = "pvt_ref training 3"

#: What to do with a file of another format; 0.1.0 carried one generator from step to step.
_OTHER_FORMATS = {
    "pvt_ref training 2": "It is of version 0.1.0, whose random numbers this version does not "
    f"draw. Go on with version 0.1.0, or start anew in another folder; {BEST_SO_FAR}"
}
_TREES = ("params", "m", "v", "average")
_NUMBERS = (
    *("step", "seed", "samples", "epoch_loss", "epoch_hits"),
    *("best_accuracy", "best_epoch", "best_sha256"),
)
#: There only if the loss is scaled.
_SCALE = "loss_scale"
#: Of the recipe, since version 0.2.0.
_LATER_FIELDS = ("cutmix_alpha", "erasing", "layer_decay", "frozen", "schedule")
_ANEW = "or start anew in another folder"


def save_state(path: str | os.PathLike[str], state: TrainState, run: Mapping[str, Any]) -> None:
    """Writes a state and its run. If the process is killed at any moment, the old file stays whole.

    Args:
        path: the file.
        state: what to save; arrays on a device are copied to the host.
        run: plain values by part and name, fit for JSON, that identify the run.

    Raises:
        CheckpointError: if it cannot be written.
        TrainingError: if run holds what JSON does not, or path what no file name does.
        ArrayTypeError, RangeError: if an argument or a field of state is wrong.
    """
    path = check_path("path", path)
    check_state(state)
    optimizer = state.optimizer
    trees = zip(_TREES, (state.params, optimizer.m, optimizer.v, state.average), strict=True)
    tensors = {
        f"{name}.{key}": x
        for name, tree in trees
        for key, x in to_state_dict(to_numpy(tree)).items()
    }
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    record = {"format": FORMAT, "run": _as_run(run), "t": optimizer.t, **numbers}
    if state.loss_scale is not None:
        record[_SCALE] = dataclasses.asdict(state.loss_scale)
    # NumPy's numbers as plain ones, as they will be read
    record = json.loads(json.dumps(record, default=lambda number: number.item()))
    record["sha256"] = digest(tensors, record)
    data = pack(tensors, TRAINING_KEY, record)
    try:
        write_whole(path.resolve(), data)  # through a link, which stays a link
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(
            f"{path}: the training could not be saved ({reason(error)}). The last saved state is "
            f"intact. Are {len(data)} bytes free on the disk, and is the folder writable?"
        ) from error


def _as_run(run: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(run, Mapping) or not all(isinstance(x, Mapping) for x in run.values()):
        raise TrainingError(f"run is {shown(run)}; it must map each part to its values by name")
    try:
        plain = {name: dict(part) for name, part in run.items()}
        return json.loads(json.dumps(plain, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TrainingError(f"run holds what JSON does not ({error})") from error


def load_state(
    path: str | os.PathLike[str], config: Any, run: Mapping[str, Any], like: Array
) -> TrainState:
    """The state in a file of :func:`save_state`.

    Args:
        path: the file.
        config: the model.
        run: must be equal to what was saved, except that it need not say the first weights, and
            that the table of operations may be another.
        like: an array of any shape that says on which device the weights shall lie.

    Returns:
        The state, bit by bit as it was saved.

    Raises:
        MissingFileError: if there is no such file.
        CheckpointError: if it is damaged, of another format, or not a state of config.
        TrainingError: if it belongs to another run; the differences are listed.
        ArrayTypeError: if an argument is of another type.
    """
    return load_state_and_run(path, config, run, like)[0]


def load_state_and_run(
    path: str | os.PathLike[str], config: Any, run: Mapping[str, Any], like: Array
) -> tuple[TrainState, dict[str, Any]]:
    """:func:`load_state`, and the run as it was saved; like may have any shape."""
    path = check_path("path", path)
    architecture_of(config)
    given = _as_run(run)
    if not is_array(like):
        raise errors.ArrayTypeError(f"like is a {type(like).__name__}; it must be an array")
    if not os.path.lexists(path):
        what = f"{path}: there is no saved training to go on with"
        raise errors.MissingFileError(f"{what}. Start one: on the command line without --resume")
    if not os.path.isfile(path):  # reading a pipe could block forever
        raise CheckpointError(f"{path}: not a regular file, so no saved training. Move it away")
    try:
        tensors, metadata = read_safetensors(path)
        record = _record(tensors, metadata)
        saved = _with_later_fields(_as_run(record["run"]))
    except (PVTError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_same_run(path, saved, given)
    try:
        return _state(tensors, record, config, like), saved
    except PVTError as error:
        what = f"{path}: no state that a training leaves, though it matches its SHA-256: {error}"
        why = "It was edited, or written by another program"
        raise CheckpointError(f"{what}. {why}. Put back a copy, {_ANEW}") from error


def _record(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, Any]:
    name = f"its metadata entry {TRAINING_KEY!r}"
    record = parse_json(metadata.get(TRAINING_KEY, "{}"), name)
    if not isinstance(record, dict) or "format" not in record:
        raise CheckpointError("not the saved state of a training. It is damaged, or another kind")
    if record["format"] != FORMAT:
        advice = _OTHER_FORMATS.get(str(record["format"]), "Go on with the version that began it")
        what = f"a training of format {shown(record['format'])}"
        raise CheckpointError(f"{what}; this version reads {FORMAT!r}. {advice}")
    known = {"format", "sha256", "run", "t", *_NUMBERS, *(record.keys() & {_SCALE})}
    if strange := record.keys() ^ known:
        what = f"{shown(min(strange))} is missing or unknown"
        raise CheckpointError(f"not the whole state of a training: {what}")
    expected = record.pop("sha256")
    if digest(tensors, record) != expected:
        what = "the content does not match its SHA-256: at least one bit has changed"
        raise CheckpointError(f"{what}. Copy it again, {_ANEW}")
    return record


def _state(
    tensors: Mapping[str, np.ndarray], record: Mapping[str, Any], config: Any, like: Array
) -> TrainState:
    trees: dict[str, dict[str, Array]] = {name: {} for name in _TREES}
    counts, buffers = count_keys(config), buffer_keys(config)
    weights = (f"params.{key}" for key in param_shapes(config) if key not in counts)
    dtype = next((dtype_name(tensors[key]) for key in weights if key in tensors), "")
    for key, x in tensors.items():
        name, _, rest = key.partition(".")
        if name not in trees:
            raise CheckpointError(f"there is an unknown tensor, {shown(key)}")
        if rest in counts:
            trees[name][rest] = from_host(x, like=like)
            continue
        if dtype_name(x) != dtype or dtype not in ("float32", "float64"):
            what = f"{shown(key)} has dtype {dtype_name(x)}"
            raise CheckpointError(f"{what}; all must be float32, or all float64")
        if not np.isfinite(x).all():
            raise CheckpointError(f"{shown(key)} holds NaN or infinity")
        if name == "v" and (x < 0).any():
            raise CheckpointError(f"{shown(key)} is a mean of squares, and is below 0 somewhere")
        trees[name][rest] = from_host(x, like=like)
    records = {}
    for name, tree in trees.items():
        try:
            if name not in ("m", "v"):
                records[name] = from_state_dict(tree, config)
                continue
            if buffers & tree.keys():
                raise CheckpointError(f"{shown(min(buffers & tree.keys()))} is not trained")
            params = trees["params"]
            kept = {key: params[key] for key in buffers & params.keys()}
            records[name] = without_buffers(from_state_dict(tree | kept, config))
        except PVTError as error:
            raise CheckpointError(f"its {name}: {error}") from error
    params, m, v, average = records.values()
    numbers = {name: record[name] for name in _NUMBERS}
    optimizer = AdamWState(record["t"], m, v)
    if _SCALE in record:
        numbers[_SCALE] = _loss_scale(record[_SCALE])
    state = TrainState(params=params, optimizer=optimizer, average=average, **numbers)
    check_state(state)
    return state


def _loss_scale(values: Any) -> LossScale:
    names = [field.name for field in dataclasses.fields(LossScale)]
    if not isinstance(values, dict) or values.keys() != set(names):
        raise CheckpointError(f"{_SCALE} is {shown(values)}; it must have {', '.join(names)}")
    return LossScale(**values)


def _with_later_fields(run: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A run of before the recipe had some field did what the field's default does: nothing."""
    if "recipe" not in run:
        return run
    known = {f.name: f.default for f in dataclasses.fields(Recipe) if f.name in _LATER_FIELDS}
    return run | _as_run({"recipe": known | run["recipe"]})


def _check_same_run(path: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    parts = (saved.keys() | given.keys()) - {"operations"}  # said by fit, which goes on
    if "first" not in given:  # nothing is said of the first weights, so nothing contradicts
        parts -= {"first"}
    differences = [
        f"\n  - {part}.{name} is {shown(old.get(name))} there and {shown(new.get(name))} here"
        for part in sorted(parts)
        for old, new in [(saved.get(part, {}), given.get(part, {}))]
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if differences:
        what = f"{path} belongs to another run:{''.join(differences)}"
        raise TrainingError(f"{what}\nGo on with the settings it was begun with, {_ANEW}")


def describe_run(
    config: Any, recipe: Recipe, data: Samples, held_out: Samples, first: Any = None
) -> dict[str, Any]:
    """The settings that must match to resume a training: model, recipe, samples, first weights."""
    run = {"model": {"architecture": architecture_of(config).name}}
    run |= {"config": config_to_dict(config), "recipe": recipe.to_dict()}
    run |= {"data": data.describe(), "held_out": held_out.describe()}
    return run if first is None else run | {"first": {"sha256": weights_sha256(first)}}


def weights_sha256(params: Any) -> str:
    """A digest that identifies weights on any device: 64 hexadecimal digits."""
    return digest(to_numpy(to_state_dict(params)), "weights")


def different_fields(model: Model, config: Any, info: ModelInfo) -> str:
    """Names of the fields, beside weights, in which a model differs from what it should be."""
    if type(model.config) is not type(config):
        return "architecture"
    return ", ".join(
        field.name
        for found, wanted in ((model.config, config), (model.info, info))
        for field in dataclasses.fields(found)
        if getattr(found, field.name) != getattr(wanted, field.name)
    )
