"""The state of a training as a file: written whole or not at all, and verified when read."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, from_host, to_numpy
from pvt_ref.checkpoint.safetensors_file import TRAINING_KEY, digest, pack, read_safetensors
from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.config import PVTConfig
from pvt_ref.errors import CheckpointError, MissingFileError, TrainingError
from pvt_ref.params import from_state_dict, to_state_dict
from pvt_ref.train.adamw import AdamWState
from pvt_ref.train.data import LabelledImages
from pvt_ref.train.recipe import Recipe
from pvt_ref.train.step import TrainState

FORMAT = "pvt_ref training 1"

_TREES = ("params", "m", "v", "average")
_NUMBERS = ("step", "epoch_loss", "epoch_hits", "best_accuracy", "best_epoch")


def save_state(path: Path, state: TrainState, run: Mapping[str, Any]) -> None:
    """Writes a state, and what run it belongs to.

    Killed at any moment, or on a full disk, the file that was there before stays whole.

    Args:
        path: the file.
        state: what to save; arrays on a device are copied to the host.
        run: plain values by part and name, fit for JSON, that tell one run from another; see
            :func:`describe_run`.

    Raises:
        CheckpointError: if it cannot be written.
        TypeError: if run holds what JSON does not.
    """
    optimizer = state.optimizer
    trees = zip(_TREES, (state.params, optimizer.m, optimizer.v, state.average), strict=True)
    tensors = {
        f"{name}.{key}": x
        for name, tree in trees
        for key, x in to_state_dict(to_numpy(tree)).items()
    }
    tensors["order"] = state.order
    record = {
        "format": FORMAT,
        "run": run,
        "rng": state.rng,
        "t": optimizer.t,
        **{name: getattr(state, name) for name in _NUMBERS},
    }
    record = json.loads(json.dumps(record))  # tuples as lists, as it will be read
    record["sha256"] = digest(tensors, record)
    data = pack(tensors, TRAINING_KEY, record)
    try:
        write_whole(path.resolve(), data)  # through a link, which stays a link
    except OSError as error:
        raise CheckpointError(
            f"{path}: the training could not be saved ({type(error).__name__}: "
            f"{error.strerror or error}). What was saved before is whole, and resuming goes on "
            f"from it. Check that the folder may be written to, and that the disk has {len(data)} "
            f"bytes free"
        ) from error


def load_state(path: Path, config: PVTConfig, run: Mapping[str, Any], like: Array) -> TrainState:
    """The state in a file of :func:`save_state`.

    Args:
        path: the file.
        config: the model.
        run: must be equal to what was saved.
        like: an array of any shape that says on which device the weights shall lie.

    Returns:
        The state, bit by bit as it was saved.

    Raises:
        MissingFileError: if there is no such file.
        CheckpointError: if it is damaged, of another format, or its weights are not of config.
        TrainingError: if it belongs to another run; the differences are listed.
        ArrayTypeError: if config is not a PVTConfig, or like not an array.
    """
    if not path.is_file():
        raise MissingFileError(
            f"{path}: there is no saved training to go on with. Start one: the same without "
            f"resume=True, on the command line without --resume"
        )
    tensors, metadata = read_safetensors(path)
    try:
        record = json.loads(metadata[TRAINING_KEY])
        written, expected = record["format"], record.pop("sha256")
        found = digest(tensors, record)
    except Exception as error:
        raise CheckpointError(
            f"{path}: not the saved state of a training ({type(error).__name__}: {error}). It is "
            f"damaged, or another kind of file"
        ) from error
    if written != FORMAT:
        raise CheckpointError(
            f"{path}: a training of format {written!r}; this version reads {FORMAT!r}. Go on with "
            f"the version that began it"
        )
    if found != expected:
        raise CheckpointError(
            f"{path}: the content does not match its SHA-256: at least one bit has changed since "
            f"it was written. Copy it again, or start anew in another folder"
        )
    _check_same_run(path, record["run"], json.loads(json.dumps(run)))
    trees = [
        from_state_dict(
            {
                key.removeprefix(f"{name}."): from_host(x, like=like)
                for key, x in tensors.items()
                if key.startswith(f"{name}.")
            },
            config,
        )
        for name in _TREES
    ]
    params, m, v, average = trees
    numbers = {name: record[name] for name in _NUMBERS}
    return TrainState(
        params=params,
        optimizer=AdamWState(record["t"], m, v),
        average=average,
        rng=record["rng"],
        order=tensors["order"],
        **numbers,
    )


def _check_same_run(path: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    differences = [
        f"{part}.{name} is {old.get(name)!r} there and {new.get(name)!r} here"
        for part in sorted({*saved, *given})
        for old, new in [(saved.get(part, {}), given.get(part, {}))]
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise TrainingError(
            f"{path} belongs to another run:\n  - "
            + "\n  - ".join(differences)
            + "\nGo on with the settings it was begun with, or start anew in another folder"
        )


def describe_run(
    config: PVTConfig, recipe: Recipe, data: LabelledImages, held_out: LabelledImages
) -> dict[str, Any]:
    """What must stay the same for a training to go on: model, recipe, samples.

    Args:
        config: the model.
        recipe: how it is trained.
        data: what it learns from.
        held_out: what its epochs are compared on.

    Returns:
        Plain values, fit for JSON: config, recipe, and a SHA-256 of either set of samples.
    """
    return {
        "config": dataclasses.asdict(config),
        "recipe": recipe.to_dict(),
        "data": _describe(data),
        "held_out": _describe(held_out),
    }


def _describe(data: LabelledImages) -> dict[str, Any]:
    samples = {"images": data.images, "labels": data.labels.astype(np.int64)}
    preprocessing = dataclasses.asdict(data.preprocessing)
    return {"samples": len(data), "sha256": digest(samples, preprocessing)}
