"""From a weights file to a model, and back. Both functions import what they need when called."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from pvt_ref.api import to_state_dict
from pvt_ref.app import Model
from pvt_ref.checks import check_finite
from pvt_ref.data.info import UNKNOWN
from pvt_ref.errors import ArrayTypeError, CheckpointError, reason, shown
from pvt_ref.tree import to_numpy

FilePath = str | os.PathLike[str]
Eps = float | tuple[float, float]


def load(
    path: FilePath, config: Any = None, *, entry: str | None = None, eps: Eps | None = None
) -> Model:
    """A model from a weights file; its kind and configuration are recognised from the content.

    Reads the authors' .pth files (without PyTorch, and without running anything in them), training
    checkpoints with the weights in any entry, Hugging Face PvtForImageClassification and PvtModel
    (.safetensors or .bin, one file or several), PVT backbones of MMDetection and of the authors'
    own detectors, the same for PVT v2 and also timm's layout, and files of :func:`save`; likewise
    ViTs of DeiT, timm, Hugging Face and MMSegmentation. Files without a head give bare backbones.
    What the weights do not show comes from Hugging Face's config.json and preprocessor_config.json
    in the same folder or from an argument, or is assumed; ``source`` says which.

    Args:
        path: the file, a folder made by ``save_pretrained``, or the index.json of several files.
        config: the model in it: a configuration of any network; a variant's name, such as
            ``"pvt_small"``, which leaves class count, channels and image size to the file; or the
            path of a JSON file with Hugging Face's or this project's configuration. Needed if
            there is no config.json and no variant has these shapes, because shapes do not show the
            number of heads. For a file of :func:`save`, only eps and drop rates may differ.
        entry: the model to take if there are several, by the name of its dict, its prefix or
            both: ``"model_ema"``, ``"teacher.backbone"``. None takes the only one, or the one at
            the top, under ``model`` or under ``state_dict``.
        eps: epsilon of the layer norms, which weights do not show: one number, or
            ``(norm_eps, projection_norm_eps)``. None takes the value in a JSON file; else that of
            config, if it is not the default; else the saved value, for files of :func:`save`, or
            that of the code that made the file: ``(1e-6, 1e-5)`` for the authors' files, 1e-6 for
            Hugging Face (whose published weights were trained with the former) and MMDetection. A
            ViT has one epsilon: 1e-6, or 1e-12 for Hugging Face.

    Returns:
        The model, on the host, float32 or float64 as stored (float16 and bfloat16 become float32).

    Raises:
        MissingFileError: if there is no such file.
        CheckpointError: if the file is damaged, unsafe or of an unknown kind, contradicts config or
            config.json, holds several models, or does not fit; then all wrong keys are listed.
        ArrayTypeError, ConfigError: if an argument has the wrong type, or no model can have it.
    """
    from pvt_ref.checkpoint.reading import read_model

    return read_model(path, config, entry, eps)


def save(path: FilePath, model: Model, dtype: str | None = None) -> None:
    """Writes a model to a .safetensors file, with its configuration and a SHA-256 of both.

    The file is written completely or not at all. An existing file of that name stays intact until
    then, and its permissions are kept; a read-only file is not replaced. The same model gives the
    same bytes. Arrays on a device are copied to the host.

    Args:
        path: ends in ``.safetensors``; its directory must exist.
        model: what to save, including its ``info``. Its ``source`` is not kept.
        dtype: ``"float16"`` stores the weights in half the space, rounded to 11 bits (to multiples
            of 6e-8 below 6e-5); loading makes them float32 again. None stores them as they are.

    Raises:
        CheckpointError: if the suffix is wrong, a weight is too large for float16, info is too long
            to be read again (over a million characters), or the file cannot be written.
        NonFiniteError: if a weight is NaN or infinite.
        ArrayTypeError: if model is not a Model, or dtype is another value.
    """
    from pvt_ref.checkpoint.safetensors_file import to_bytes
    from pvt_ref.checkpoint.whole_file import write_whole

    path = as_path(path)
    if not isinstance(model, Model):
        raise ArrayTypeError(f"model is a {type(model).__name__}, not a Model: save(path, model)")
    where = cut_path(path)
    if path.suffix != ".safetensors":
        other = cut_path(path.with_suffix(".safetensors")) if path.name else "a name that ends so"
        what = "a .pth file is a program and cannot hold a digest"
        raise CheckpointError(f"{where}: models are saved as .safetensors: {what}. Use {other}")
    if dtype is not None and not (isinstance(dtype, str) and dtype == "float16"):
        raise ArrayTypeError(f"dtype is {shown(dtype)}; it must be None or 'float16'")
    largest = float(np.finfo(np.float16).max)
    state = to_state_dict(to_numpy(model.params))
    for key, x in state.items():  # a Model does not check arrays on a device
        check_finite(key, x, "The training that made them diverged; such a file would be refused")
        if dtype is not None and x.dtype.kind == "f":
            if not np.abs(x).max(initial=0.0) <= largest:
                what = f"{key} holds numbers beyond {largest:g}, the largest of float16"
                raise CheckpointError(f"{where}: {what}. Leave dtype out")
            state[key] = x.astype(np.float16)
    info = None if model.info == UNKNOWN else model.info
    try:
        write_whole(path, to_bytes(state, model.config, info))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{where}: could not be saved ({reason(error)}). An existing file of this name is "
            f"unchanged. Check that the directory exists, that it is writable, and that "
            f"the disk has {sum(x.nbytes for x in state.values())} bytes free"
        ) from error


def as_path(path: Any) -> Path:
    """The argument path as a Path. Raises: ArrayTypeError or CheckpointError if it is not one."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArrayTypeError(f"path is a {type(path).__name__}; it must be a str or Path")
    if not os.fspath(path):
        raise CheckpointError("the path is empty; it must name a weights file")
    if "\0" in os.fspath(path):
        raise CheckpointError(f"path {shown(os.fspath(path), 200)} holds a NUL character")
    return Path(path)


def cut_path(path: str | Path) -> str:
    """A path or address for a message, cut if it is longer than anyone would type."""
    text = str(path)
    return text if len(text) <= 400 else f"{text[:400]}..."
