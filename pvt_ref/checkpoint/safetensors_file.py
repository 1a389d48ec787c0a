"""Reading and writing .safetensors: a JSON header, then the raw numbers.

The format has no checksum. So this project's own files have one metadata entry (the library writes
several in random order): a JSON text with the configuration, the other facts about the model, and
a SHA-256 of both and of all tensors. A file that does not match it is refused.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pvt_ref.checkpoint.bounded_json import parse_json
from pvt_ref.checkpoint.stored import MAX_RANK, UNEXPECTED, damaged, refuse_damage
from pvt_ref.data.info import ModelInfo
from pvt_ref.errors import CheckpointError, shown
from pvt_ref.models.architecture import architecture_of, architectures, config_to_dict
from pvt_ref.tree import digest

METADATA_KEY = "pvt_ref"
FORMAT = "pvt_ref weights 2"
_FIRST_FORMAT = "pvt_ref weights 1"  # of version 0.1: all files are of a PVT without saying so
TRAINING_KEY = "pvt_ref_training"  # of the files of train/

MAX_HEADER = 4 * 2**20  # bytes; the largest variant's, with its training, has a million
MAX_RECORD = 2**20  # characters of the JSON text in our metadata entry
_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "C64": "<c8", "BOOL": "?"},
    **{f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (8, 4, 2, 1)},
}
_NOT_WHOLE = "not a whole .safetensors file"
#: Advice for weights that are not floats.
QUANTIZED = "Get plain weights from the publisher, or save each v.float(), times its scale if any"
_UPDATE = "It was probably written by another version: update pvt_ref"
#: Place of a tensor: first and last byte after the header, key, dtype and shape.
_Span = tuple[int, int, str, np.dtype, tuple[int, ...]]


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """As :func:`read_tensors`, for a path."""
    with path.open("rb") as file:
        return read_tensors(file)


def read_tensors(file: BinaryIO) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of an open file, and the metadata as texts by name.

    They are read, not mapped: a mapped file kills the process if it is shortened meanwhile.
    """
    import ml_dtypes  # noqa: F401 (teaches NumPy the name bfloat16)

    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise damaged(f"{_NOT_WHOLE}: the header is cut off")
    if length > MAX_HEADER:
        what = f"a .safetensors file whose header has {length} bytes; at most {MAX_HEADER} are read"
        raise CheckpointError(f"{what}. It is damaged, of another kind, or meant to exhaust memory")
    try:
        header = parse_json(file.read(length), "the header", MAX_HEADER)
    except CheckpointError as error:
        raise damaged(f"{_NOT_WHOLE} ({error})") from error
    with refuse_damage(_NOT_WHOLE):
        metadata, spans = _parse_header(header, size - 8 - length)
    tensors = {}
    for start, stop, key, dtype, shape in spans:
        raw = np.empty(stop - start, np.uint8)
        if file.readinto(raw.data) != len(raw):  # type: ignore[attr-defined]
            what = f"it ends before {shown(key)}: it was shortened while it was being read"
            raise damaged(f"{_NOT_WHOLE}: {what}")
        x = raw.view(dtype).reshape(shape)
        tensors[key] = x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
    return {key: tensors[key] for key in header}, metadata


def _parse_header(header: Any, size: int) -> tuple[dict[str, str], list[_Span]]:
    """The metadata, taken from header, and the tensors in file order; they fill all bytes."""
    if not isinstance(header, dict):
        raise TypeError(f"the header is a {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TypeError("its metadata does not map names to texts")
    spans: list[tuple[int, int, str, np.dtype[Any], tuple[int, ...]]] = []
    for key, entry in header.items():
        if entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{shown(key)} has the fields {shown(list(entry))}")
        name, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if name not in _DTYPES:
            what = f"{shown(key)} has the number type {shown(name)}, which is unknown; known are"
            raise CheckpointError(f"{what} {', '.join(_DTYPES)}. {QUANTIZED}")
        counts = (*shape, start, stop)
        if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < 2**63 for n in counts):
            raise ValueError(f"{shown(key)} has the shape {shown(shape)} at {start} to {stop}")
        dtype = np.dtype(_DTYPES[name])
        # as NumPy counts: an array without elements can still be too large for it
        if math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
            raise ValueError(f"{shown(key)} has the shape {shown(shape)}, too large for an array")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{shown(key)}, {shown(shape)}, does not have {stop - start} bytes")
        spans.append((start, stop, key, dtype, tuple(shape)))
    spans.sort(key=lambda span: span[:2])
    ends = [0, *(span[1] for span in spans)]
    if [span[0] for span in spans] != ends[:-1] or ends[-1] != size:
        raise ValueError("its tensors leave gaps, overlap, or do not end where the file ends")
    return metadata, spans


def widen(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays, with bfloat16 as float32."""
    return {k: x.astype(np.float32) if x.dtype.name == "bfloat16" else x for k, x in state.items()}


def own_header(
    state: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> tuple[Any, ModelInfo | None]:
    """Configuration and info of this project's files, digest checked; None for other files."""
    if TRAINING_KEY in metadata:
        what = "the saved state of a training. Continue it (--resume)"
        raise CheckpointError(f"{what}, or load the model beside it: best.safetensors")
    if METADATA_KEY not in metadata:
        return None, None
    try:
        record = parse_json(metadata[METADATA_KEY], "the metadata entry", MAX_RECORD)
        written, expected, fields = record["format"], record["sha256"], record["config"]
        found = digest(state, _sealed(record))
    except UNEXPECTED as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise damaged(f"a pvt_ref file with unreadable metadata ({what})") from error
    if written not in (FORMAT, _FIRST_FORMAT):
        what = f"a pvt_ref file of format {shown(written)}; this version reads {FORMAT!r}"
        raise CheckpointError(f"{what}. It is from a newer version, or damaged: update pvt_ref")
    if found != expected or len(metadata) != 1:
        digests = f"{found[:12]}..., written as {shown(expected, 12)}; at least one bit has changed"
        raise damaged(f"a pvt_ref file whose content does not match its SHA-256 ({digests})")
    name = "pvt" if written == _FIRST_FORMAT else record.get("architecture")
    rows = {row.name: row for row in architectures()}
    if name not in tuple(rows):
        what = f"a pvt_ref file of the architecture {shown(name)}"
        raise CheckpointError(f"{what}; this version knows {', '.join(map(repr, rows))}. {_UPDATE}")
    try:
        config = rows[name].config_type(**fields)
        info = ModelInfo.from_dict(record["info"]) if "info" in record else None
    except UNEXPECTED as error:  # includes TypeError, for fields that this version does not know
        what = "a pvt_ref file with a configuration or info that this version does not accept"
        raise CheckpointError(f"{what}: {str(error)[:500]}. {_UPDATE}") from error
    return config, info


def check_foreign_metadata(metadata: Mapping[str, str]) -> None:
    """Refuses this project's metadata under a damaged name, which would hide the digest.

    A single fault cannot damage both the entry's name and its text.
    """
    begins = ('{"architecture": "', '{"config": {"')
    marks = (METADATA_KEY, "projection_norm_eps")  # other programs are unlikely to write these
    for name, text in metadata.items():
        sealed = text.startswith(begins) or ('"sha256"' in text and '"config"' in text)
        if sealed or any(mark in name or mark in text for mark in marks):
            what = f"{METADATA_KEY!r} is damaged (it is called {shown(name)}), so that the weights"
            raise damaged(f"a pvt_ref file whose metadata entry {what} cannot be verified")


def to_bytes(state: Mapping[str, np.ndarray], config: Any, info: ModelInfo | None = None) -> bytes:
    """A file of this project: the same host arrays, configuration and info give the same bytes."""
    name = architecture_of(config).name
    record = {"architecture": name, "config": config_to_dict(config), "format": FORMAT}
    if info is not None:
        record["info"] = info.to_dict()
    record = json.loads(json.dumps(record))  # tuples become lists, as when it is read
    return pack(state, METADATA_KEY, record | {"sha256": digest(state, _sealed(record))})


def pack(state: Mapping[str, np.ndarray], entry: str, record: Mapping[str, Any]) -> bytes:
    """A .safetensors file of host arrays with one metadata entry, the record as JSON."""
    import safetensors.numpy

    text = json.dumps(record, sort_keys=True)
    parse_json(text, "what is saved beside the weights", MAX_RECORD)
    # safetensors copies memory as it lies, and would silently scramble any other order
    contiguous = {key: np.asarray(x, order="C") for key, x in state.items()}
    return safetensors.numpy.save(contiguous, {entry: text})


def _sealed(record: Mapping[str, Any]) -> Any:
    """The part of a record that the digest covers besides the tensors."""
    if record["format"] == _FIRST_FORMAT:
        return [record[name] for name in ("format", "config", "info") if name in record]
    return {name: record[name] for name in record if name != "sha256"}
