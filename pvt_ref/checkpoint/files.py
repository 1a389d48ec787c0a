"""From a weights file to a model, and back."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pvt_ref.arrays import dtype_name, to_numpy
from pvt_ref.boundary import check_finite
from pvt_ref.checkpoint.key_maps import AUTHORS, AUTHORS_DENSE, OWN, to_native
from pvt_ref.checkpoint.pth import PthFile
from pvt_ref.checkpoint.recognise import (
    LAYOUTS_READ,
    check_state,
    describe,
    find_layout,
    find_state,
    recognise_config,
)
from pvt_ref.checkpoint.safetensors_file import (
    check_foreign_metadata,
    own_header,
    read_safetensors,
    to_bytes,
    widen,
)
from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.config import PVTConfig, check_config, config_to_dict
from pvt_ref.errors import (
    ArrayTypeError,
    CheckpointError,
    ConfigError,
    MissingFileError,
    PVTError,
    shown,
)
from pvt_ref.face import Model
from pvt_ref.imagenet import released_info
from pvt_ref.info import UNKNOWN
from pvt_ref.params import from_state_dict, to_state_dict

_SUFFIX = ".safetensors"
_HALVES = {"float16", "bfloat16"}
_LFS = b"version https://git-lfs"

Eps = float | tuple[float, float]


def load(
    path: str | os.PathLike[str], config: PVTConfig | None = None, eps: Eps | None = None
) -> Model:
    """A model from a weights file, whose kind and configuration are recognised by content.

    Reads the authors' .pth files (without PyTorch, and without running anything in them), training
    checkpoints with the weights under ``model`` or ``state_dict``, Hugging Face
    PvtForImageClassification (.safetensors, or .bin in the same zip format as .pth), PVT backbones
    of MMDetection and of the authors' own detectors, and files of :func:`save`.

    Args:
        path: the file.
        config: the model in it. Needed unless the file is one of :func:`save` or the shapes are
            those of a published variant up to class count and image size: the number of heads
            leaves no trace in any shape. If given, it is taken as it is, eps fields included; for
            a file of :func:`save`, only eps and drop rates may differ from what it says.
        eps: epsilon of the layer norms, which weights do not tell: one number, or
            ``(norm_eps, projection_norm_eps)``. None takes what the code that made the file uses:
            ``(1e-6, 1e-5)`` for the authors' files, 1e-6 everywhere for Hugging Face and
            MMDetection, and what was saved for files of :func:`save`. (Hugging Face's published
            weights were trained by the authors, with their two numbers.)

    Returns:
        The model, on the host, float32 or float64 as stored (float16 and bfloat16 become float32);
        bare backbones have num_classes 0. Its ``source`` says what was recognised.

    Raises:
        MissingFileError: if there is no such file.
        CheckpointError: if it is damaged, unsafe, of an unknown kind, or does not fit; all keys
            that are missing, unexpected or mis-shaped are listed together.
        ArrayTypeError: if path or config is of another type.
        ConfigError: if eps is not one or two numbers that can be one.
    """
    path = _as_path(path)
    if config is not None:
        check_config(config)
    norm_eps = None if eps is None else _parse_eps(eps)
    try:
        if not path.exists():
            raise MissingFileError(_missing(path))
        if not (path.is_file() or path.is_dir()):  # reading a pipe could wait for ever
            raise CheckpointError("not a regular file; copy the weights into one")
        with path.open("rb") as file:
            return _load(file, path, config, norm_eps)
    except MissingFileError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except (PVTError, OSError) as error:
        raise CheckpointError(f"{path}: {_with_kind(error)}") from error


def _load(
    file: BinaryIO, path: Path, config: PVTConfig | None, eps: tuple[float, float] | None
) -> Model:
    read: Callable[[dict[str, Any]], dict[str, np.ndarray]]
    state: dict[str, Any]
    metadata, stored, info, entry = {}, None, None, ""
    if _recognise_format(file) == "pth":
        pth = PthFile(file)
        state, entry = find_state(pth.tree)
        read = pth.read  # only what will be used
    else:
        state, metadata = read_safetensors(path)
        stored, info = own_header(state, metadata)
        read = widen
    layout, prefix = (OWN, "") if stored else find_layout(state)
    if layout in (AUTHORS, AUTHORS_DENSE):
        check_foreign_metadata(metadata)
    state = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
    if config and stored:
        _check_same_model(config, stored)
    used = config or stored or recognise_config(state, layout, prefix)
    check_state(state, layout, used, prefix)
    by_default = not (eps or config or stored)
    if by_default:
        eps = layout.eps
    if eps:
        used = dataclasses.replace(used, norm_eps=eps[0], projection_norm_eps=eps[1])
    params = from_state_dict(to_native(read(state), layout, used), used)
    where = ".".join(name for name in (entry, prefix.removesuffix(".")) if name)
    under = f" (under {where!r})" if where else ""
    halves = " and ".join(sorted({dtype_name(x) for x in state.values()} & _HALVES))
    made = f", {halves} made float32" if halves and params.pos_embed1.itemsize == 4 else ""
    source = f"{layout.name}{under}, {describe(used)}{made}; {_describe_eps(used, by_default)}"
    if info is None:
        info = UNKNOWN if stored else released_info(used)
    return Model(params, used, source, info)


def _check_same_model(config: PVTConfig, stored: PVTConfig) -> None:
    """Raises unless config is what a file of save says, up to fields that no weight depends on."""
    free = ("norm_eps", "projection_norm_eps", "drop_rate", "attn_drop_rate", "drop_path_rate")
    given, written = config_to_dict(config), config_to_dict(stored)
    wrong = [
        f"{name} is {written[name]} in the file and {given[name]} in config"
        for name in written
        if name not in free and written[name] != given[name]
    ]
    if wrong:
        raise CheckpointError(
            f"a pvt_ref file of another model than config: {'; '.join(wrong)}. Leave config out: "
            f"the file brings its own"
        )


def _describe_eps(config: PVTConfig, by_default: bool) -> str:
    a, b = config.norm_eps, config.projection_norm_eps
    if a != b:
        return f"eps {a:g}, and {b:g} in the projection norms"
    # a port's number, though its weights may be the authors'
    hint = " (pass eps=(1e-6, 1e-5) for the authors' training setting)" if by_default else ""
    return f"eps {a:g} in every norm{hint}"


def _recognise_format(file: BinaryIO) -> str:
    """``"pth"`` or ``"safetensors"``, by the first bytes."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        return "pth"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    download = "Download it again, and look at its size and at the first bytes"
    if not size:
        raise CheckpointError(f"the file is empty. The download or copy was cut off. {download}")
    if head.startswith(_LFS):
        raise CheckpointError(
            "not the weights, but a Git LFS pointer to them: the repository was cloned without "
            "LFS. Run 'git lfs install' and 'git lfs pull' there"
        )
    if head[:1] == b"\x80" and head[1:2] in b"\x00\x01\x02\x03\x04\x05":
        raise CheckpointError(
            "a bare pickle, as torch.save wrote it before PyTorch 1.6 (or with "
            "_use_new_zipfile_serialization=False); needed is the zip format. If you trust the "
            "file, save it again with a current PyTorch: torch.save(torch.load(path, "
            "weights_only=True, map_location='cpu'), new_path)"
        )
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"an HTML or XML page, not weights: the link led to a web page, such as a login or an "
            f"error. {download}"
        )
    raise CheckpointError(
        f"neither a zip archive (.pth, .bin) nor .safetensors: it has {size} bytes and begins with "
        f"{head[:8]!r}. It is damaged or of another kind. {download}. This project reads "
        f"{LAYOUTS_READ}"
    )


def _parse_eps(eps: Any) -> tuple[float, float]:
    pair: tuple[Any, ...] = (eps, eps)
    if isinstance(eps, Sequence) and not isinstance(eps, str):
        pair = tuple(eps)
    if len(pair) != 2:
        raise ConfigError(
            f"eps is {eps!r}; it must be one number, or (norm_eps, projection_norm_eps)"
        )
    checked = PVTConfig(norm_eps=pair[0], projection_norm_eps=pair[1])  # refuses what is no eps
    return checked.norm_eps, checked.projection_norm_eps


def _as_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArrayTypeError(
            f"path is a {type(path).__name__}; it must be a str or pathlib.Path, the first "
            f"argument of load(path) and of save(path, model)"
        )
    if "\0" in os.fspath(path):
        raise CheckpointError(f"path {os.fspath(path)!r} holds a NUL character; remove it")
    return Path(path)


def _missing(path: Path) -> str:
    near = [p.name for p in _siblings(path.parent)]
    there = f"weights files there: {', '.join(near[:5])}" if near else "no weights files there"
    if not path.parent.is_dir():
        there = f"nor is there a directory {path.parent}"
    return (
        f"{path}: there is no such file ({there}). Check the spelling, and the directory it is "
        f"relative to, which is {Path.cwd()}"
    )


def _siblings(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(p for p in directory.iterdir() if p.suffix in (_SUFFIX, ".pth", ".bin"))
    return []


def _with_kind(error: Exception) -> str:
    if isinstance(error, IsADirectoryError):
        return (
            "a directory; needed is the weights file in it, such as model.safetensors or "
            "pytorch_model.bin"
        )
    if isinstance(error, OSError):
        return f"cannot be read: {type(error).__name__}: {error.strerror or error}"
    return str(error)


def save(path: str | os.PathLike[str], model: Model, dtype: str | None = None) -> None:
    """Writes a model to a .safetensors file, with its configuration and a SHA-256 of both.

    The file appears complete or not at all: it is written beside its place under another name,
    flushed to the disk, and renamed. An older file of that name stays whole until then. The same
    model gives the same bytes. Arrays on a device are copied to the host.

    Args:
        path: ends in ``.safetensors``; its directory exists.
        model: what to save, its ``info`` included. Its ``source`` is not kept.
        dtype: ``"float16"`` stores the weights in half the space, rounded to 11 bits (to multiples
            of 6e-8 below 6e-5); loading makes them float32 again. None stores them as they are.

    Raises:
        CheckpointError: if the suffix is another, a weight is beyond float16, or the file cannot
            be written.
        NonFiniteError: if a weight is NaN or infinite.
        ArrayTypeError: if model is not a Model, or dtype is another.
    """
    path = _as_path(path)
    if not isinstance(model, Model):
        raise ArrayTypeError(
            f"model is a {type(model).__name__}; it must be a Model: save(path, "
            f"Model(params, config)). The path comes first"
        )
    if path.suffix != _SUFFIX:
        raise CheckpointError(
            f"{path}: models are saved as {_SUFFIX} files only, because a .pth file is a program "
            f"and has no place for a digest. Use {path.with_suffix(_SUFFIX) if path.name else ''}"
        )
    state = to_state_dict(to_numpy(model.params))
    for key, x in state.items():  # a Model does not look at arrays on a device
        check_finite(key, x, "The training that made them diverged; such a file would be refused")
    if dtype is not None:
        state = _narrow(path, state, dtype)
    data = to_bytes(state, model.config, None if model.info == UNKNOWN else model.info)
    try:
        write_whole(Path(os.path.realpath(path)), data)  # through a link, which stays a link
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be saved ({type(error).__name__}: {error.strerror or error}). A "
            f"file of this name, if there was one, is whole. Check that the directory exists, that "
            f"it may be written to, and that the disk has {len(data)} bytes free"
        ) from error


def _narrow(path: Path, state: dict[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    """Every array as float16, once it is sure that none overflows."""
    if not isinstance(dtype, str) or dtype != "float16":
        raise ArrayTypeError(
            f"dtype is {shown(dtype)}; files hold the weights as they are (None) or as 'float16'"
        )
    largest = float(np.finfo(np.float16).max)
    for key, x in state.items():
        if not np.abs(x).max(initial=0.0) <= largest:
            raise CheckpointError(
                f"{path}: {key} holds numbers beyond {largest:g}, the largest of float16. Leave "
                f"dtype out"
            )
    return {key: x.astype(np.float16) for key, x in state.items()}
