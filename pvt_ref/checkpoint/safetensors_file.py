"""Reading and writing .safetensors: a JSON header, then the raw numbers.

The format has no checksum. So this project's own files carry, in their one metadata entry, a JSON
text with the configuration, what else is known of the model, and a SHA-256 over both and over every
tensor's name, dtype, shape and bytes; what fails it is refused. One entry and not three, because
safetensors writes several in random order, and the same model should give the same file.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # also teaches NumPy, and so safetensors, the name bfloat16
import numpy as np
import safetensors
import safetensors.numpy

from pvt_ref.config import PVTConfig, config_to_dict
from pvt_ref.errors import CheckpointError
from pvt_ref.info import ModelInfo

METADATA_KEY = "pvt_ref"
FORMAT = "pvt_ref weights 1"
TRAINING_KEY = "pvt_ref_training"  # of the files of train/

_DAMAGED = (
    "The likely cause is an interrupted or faulty download or copy: fetch the file again, or save "
    "the model again"
)


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of the file, and the metadata.

    Args:
        path: the file.

    Returns:
        Key to array, of any shape and dtype, and the metadata as texts by name; {} if there is
        none.

    Raises:
        CheckpointError: if it is damaged, or holds a dtype that NumPy does not have.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except MemoryError:
        raise
    except Exception as error:  # damage: SafetensorError; shapes and dtypes beyond NumPy: others
        raise CheckpointError(
            f"not a whole .safetensors file, or one with number types that NumPy lacks "
            f"({type(error).__name__}: {error}). {_DAMAGED}"
        ) from error
    return tensors, metadata


def widen(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays, with bfloat16 as float32.

    Args:
        state: key to array, of any shape.

    Returns:
        Key to array of the same shape; what is not bfloat16 is not copied.
    """
    return {
        key: x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x
        for key, x in state.items()
    }


def own_header(
    state: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> tuple[PVTConfig | None, ModelInfo | None]:
    """Configuration and info in a file of this project, once the digest has been verified.

    Args:
        state: all tensors of the file, of any shapes.
        metadata: that of the file.

    Returns:
        (None, None) if the file was written by somebody else; no info if none was saved.

    Raises:
        CheckpointError: if anything in it differs from what was written.
    """
    if TRAINING_KEY in metadata:
        raise CheckpointError(
            "the saved state of a training, which holds more than one set of weights. Go on with "
            "it (--resume), or load the model beside it: best.safetensors"
        )
    if METADATA_KEY not in metadata:
        return None, None
    try:
        record = json.loads(metadata[METADATA_KEY])
        written, expected = record["format"], record["sha256"]
        found = digest(state, _stated(record["config"], record.get("info")))
    except Exception as error:
        raise CheckpointError(
            f"a pvt_ref file whose metadata cannot be read ({type(error).__name__}: {error}). "
            f"{_DAMAGED}"
        ) from error
    if written != FORMAT:
        raise CheckpointError(
            f"a pvt_ref file of format {written!r}; this version reads {FORMAT!r}. It was written "
            f"by a newer version, or is damaged. Update pvt_ref, or save the model again"
        )
    if found != expected or len(metadata) != 1:
        raise CheckpointError(
            f"a pvt_ref file whose content does not match its SHA-256 ({found[:12]}..., written as "
            f"{str(expected)[:12]}...): at least one bit has changed. {_DAMAGED}"
        )
    try:
        config = PVTConfig(**record["config"])
        info = ModelInfo.from_dict(record["info"]) if "info" in record else None
    except Exception as error:  # also TypeError, for fields that this version does not know
        raise CheckpointError(
            f"a pvt_ref file with a configuration or info that this version does not accept: "
            f"{error}. It was probably written by another version: update pvt_ref"
        ) from error
    if sum(config.depths) > len(state):
        raise CheckpointError(
            f"a pvt_ref file whose configuration has {sum(config.depths)} blocks and whose tensors "
            f"are only {len(state)}. It was not written by this project: save the model again"
        )
    return config, info


def check_foreign_metadata(metadata: Mapping[str, str]) -> None:
    """Refuses a file with this project's key names unless it is plainly not its own.

    Otherwise damage to the name of the metadata entry would hide the digest.

    Args:
        metadata: that of the file.

    Raises:
        CheckpointError: if there are entries that other libraries do not write.
    """
    if not all(k == "format" and re.fullmatch("[a-z]{1,8}", v) for k, v in metadata.items()):
        raise CheckpointError(
            f"tensors in this project's layout, but the metadata has entries that it does not "
            f"write ({', '.join(repr(k[:20]) for k in sorted(metadata)[:4])}; known are "
            f"{METADATA_KEY!r}, and 'format' as other libraries write it), so the file cannot be "
            f"verified. {_DAMAGED}. If another program wrote it, save the tensors without metadata"
        )


def to_bytes(
    state: Mapping[str, np.ndarray], config: PVTConfig, info: ModelInfo | None = None
) -> bytes:
    """A file of this project: the same weights, configuration and info give the same bytes.

    Args:
        state: our key to array, of the shapes of config, on the host.
        config: the model.
        info: what else is known of it; None leaves it out.

    Returns:
        The whole file.
    """
    record = {"format": FORMAT, "config": config_to_dict(config)}
    if info is not None:
        record["info"] = info.to_dict()
    record = json.loads(json.dumps(record))  # tuples as lists, as it will be read
    record["sha256"] = digest(state, _stated(record["config"], record.get("info")))
    return pack(state, METADATA_KEY, record)


def pack(state: Mapping[str, np.ndarray], entry: str, record: Mapping[str, Any]) -> bytes:
    """A .safetensors file with one metadata entry, a JSON text.

    Args:
        state: key to array of any shape, on the host.
        entry: name of the metadata entry.
        record: what it says, fit for JSON.

    Returns:
        The whole file.

    Raises:
        TypeError: if record holds what JSON does not.
    """
    # safetensors takes the memory as it lies, and would scramble any other order silently
    contiguous = {key: np.ascontiguousarray(x) for key, x in state.items()}
    return safetensors.numpy.save(contiguous, {entry: json.dumps(record, sort_keys=True)})


def _stated(config: Any, info: Any) -> list[Any]:
    """What the digest of a weights file covers besides the tensors."""
    return [FORMAT, config] if info is None else [FORMAT, config, info]


def digest(state: Mapping[str, np.ndarray], stated: Any) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, and over plain values.

    Args:
        state: key to array of any shape, on the host. The order of keys does not matter, nor the
            byte order.
        stated: plain values, fit for JSON.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: if stated holds what JSON does not.
    """
    sha256 = hashlib.sha256()
    sha256.update(json.dumps(stated, sort_keys=True).encode())
    for key in sorted(state):
        x = state[key]
        sha256.update(json.dumps([key, x.dtype.name, x.shape]).encode())  # also says how many bytes
        little = x.astype(x.dtype.newbyteorder("<"), copy=False)
        sha256.update(np.ascontiguousarray(little).data)
    return sha256.hexdigest()
