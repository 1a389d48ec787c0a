"""Reading .pth and .bin files, PyTorch's two formats, without PyTorch and without running them.

Since PyTorch 1.6 such a file is a zip of uncompressed entries under one folder: ``data.pkl``, a
pickle of the saved object in which every tensor is a reference (storage, offset, shape, strides);
``data/0``, ``data/1`` and so on, the raw storages; ``byteorder``; and a few that do not matter
here. :mod:`pvt_ref.checkpoint.legacy` reads older files. Memory use is proportional to the file,
whatever sizes it claims. The zip's checksums are verified for everything that is used.
"""

import io
import zipfile
from typing import BinaryIO, Literal

from pvt_ref.checkpoint import stored
from pvt_ref.checkpoint.legacy import LegacyFile, is_legacy
from pvt_ref.checkpoint.pickles import read_pickle
from pvt_ref.checkpoint.stored import NEEDED, SAFE_LOAD, Storage, StoredFile, damaged
from pvt_ref.errors import CheckpointError, shown


def open_pth(file: BinaryIO) -> StoredFile:
    """The reader of an open PyTorch file; the file must stay open."""
    file.seek(0)
    return LegacyFile(file) if is_legacy(file.read(64)) else PthFile(file)


class PthFile(StoredFile):
    """An open file of PyTorch's zip format, seekable; CheckpointError if it is damaged."""

    def __init__(self, file: BinaryIO):
        self._size = file.seek(0, 2)
        with stored.refuse_damage("not a whole zip archive"):
            self._zip = zipfile.ZipFile(file)
            self._entries = _list_entries(self._zip, self._size)
            # set_crc32_options(False) of PyTorch writes 0 for every entry
            self.checksummed = any(info.CRC for info in self._entries.values())
            for info in () if self.checksummed else self._entries.values():
                info.CRC = None  # type: ignore[assignment]  # zipfile then skips the check
            # PyTorch before 2.1 wrote no byteorder; those files are little-endian
            order = self._read_entry("byteorder") if "byteorder" in self._entries else b"little"
            if order not in (b"little", b"big"):
                raise CheckpointError(f"byteorder is {order[:20]!r}, not b'little' or b'big'")
            self._order: Literal["<", ">"] = "<" if order == b"little" else ">"
            pickled = self._read_entry("data.pkl")
        self.tree, self.foreign, _ = read_pickle(io.BytesIO(pickled))

    def _read_block(self, storage: Storage) -> bytes:
        return self._read_entry(f"data/{storage.key}")

    def _read_entry(self, name: str) -> bytes:
        if name not in self._entries:
            raise damaged(f"the zip archive has no entry {shown(name)}")
        return self._zip.read(self._entries[name])  # verifies size and CRC


def _list_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by name without the common folder, after checks that need no decompression."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    prefixes = {f"{n.partition('/')[0]}/" for n in names if n.endswith("/data.pkl")}
    prefix = min(prefixes, default="")
    if len(prefixes) != 1 or f"{prefix}data.pkl" not in names:
        raise CheckpointError(_other_archive(names))
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removeprefix(prefix)
        if name in entries:
            raise damaged(f"entry {shown(name)} comes twice in the zip archive")
        entries[name] = info
    if "constants.pkl" in entries:
        raise CheckpointError(
            "a TorchScript archive (torch.jit.save): a program with its weights, not run here. "
            "Safe: get the state dict from the publisher. If you trust the source, with PyTorch: "
            "torch.save(torch.jit.load(path, map_location='cpu').state_dict(), new_path)"
        )
    for name, info in entries.items():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            what = f"entry {shown(name)} is compressed, which torch.save never does. Save it again"
            raise CheckpointError(f"{what}, with PyTorch: {SAFE_LOAD}; torch.save(state, new_path)")
    if sum(info.file_size for info in infos) > size:  # also bounds every later read
        raise damaged("the zip's entries claim more bytes than the file has")
    for info in infos:
        archive.open(info).close()  # checks that both copies of the name in the file agree
    return entries


def _other_archive(names: list[str]) -> str:
    """Names the kind of a zip without PyTorch's pickle, and says what to do."""
    if names and all(name.endswith(".npy") for name in names):
        advice = "pvt_ref.from_state_dict(dict(numpy.load(path)), config) takes them"
        return f"a NumPy archive (.npz), not of torch.save. If its arrays are the weights, {advice}"
    if "data.pkl" in names:
        advice = "Unzip them into a folder, and pack that: zip -0 -r model.pth folder"
        return f"the entries of a PyTorch file, zipped without the folder around them. {advice}"
    if any(name.endswith(("model.weights.h5", "keras_metadata.pb")) for name in names):
        return f"a Keras model. {NEEDED}"
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return "an exported program (torch.export). Save torch.save(model.state_dict(), new_path)"
    if inner := [name for name in names if name.endswith((".pth", ".pt", ".bin", ".safetensors"))]:
        return f"a zip archive around other files. Unzip it and load {shown(inner[0])}"
    first = ", ".join(shown(name, 40) for name in names[:3]) or "none"
    what = f"a zip archive, not one that PyTorch wrote: {len(names)} entries and no data.pkl in a"
    return f"{what} folder (first entries: {first}). Is this a folder zipped by hand?"
