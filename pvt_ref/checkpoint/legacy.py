"""Reading PyTorch's format from before version 1.6, which is not a zip.

``torch.save(..., _use_new_zipfile_serialization=False)`` still writes it, and OpenMMLab's
publishing tool does so. Five pickles follow each other: a magic number; the version of the format;
a dict that describes the machine; the saved object; and the list of storage keys. Then comes, for
each key, the number of elements in 8 bytes and the raw numbers, both little-endian.

The format has no checksum. The reader verifies that every part is there once and nothing else.
"""

from typing import Any, BinaryIO

from pvt_ref.checkpoint.pickles import read_pickle
from pvt_ref.checkpoint.stored import STORAGE_DTYPES, Storage, StoredFile, damaged, itemsize
from pvt_ref.errors import CheckpointError, shown

_MAGIC = 0x1950A86A20F9469CFC6C
#: The magic number as pickled by protocol 2 and later, and by earlier protocols.
_MAGIC_BYTES = (b"\x8a\x0a" + _MAGIC.to_bytes(10, "little"), b"L%dL\n" % _MAGIC)
_VERSION = 1001


def is_legacy(head: bytes) -> bool:
    """Whether the first 64 bytes of a file are those of this format."""
    return any(magic in head[:32] for magic in _MAGIC_BYTES)


class LegacyFile(StoredFile):
    """An open file of the older format, seekable; CheckpointError if it is damaged."""

    checksummed = False

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = file.seek(0, 2)
        self._order = "<"
        file.seek(0)
        magic, version, machine = (read_pickle(file).tree for _ in range(3))
        if magic != _MAGIC or version != _VERSION or not isinstance(machine, dict):
            needed = f"version {shown(version)}, where {_VERSION} is needed"
            raise damaged(f"its head is not that of PyTorch's format from before 1.6: {needed}")
        self.tree, self.foreign, storages = read_pickle(file)
        self._find_blocks(read_pickle(file).tree, storages)

    def _read_block(self, storage: Storage) -> bytes:
        first, at = self._blocks[storage.key]
        self._file.seek(at)
        return self._file.read(first.nbytes)

    def _find_blocks(self, keys: Any, storages: dict[str, Storage]) -> None:
        """Finds each block of numbers, from the file's position after the last pickle."""
        at = self._file.tell()
        self._blocks: dict[str, tuple[Storage, int]] = {}
        if not isinstance(keys, list):
            raise damaged("it has no list of storages after the pickle")
        for key in keys:
            storage = storages.get(key) if isinstance(key, str) else None
            if storage is None or key in self._blocks:
                raise damaged(f"its list has {shown(key)} twice, or no tensor refers to it")
            if storage.dtype not in STORAGE_DTYPES.values():
                kind = f"a storage is of the kind {shown(storage.dtype)}, of unknown size: the next"
                raise CheckpointError(f"{kind} cannot be found. Save them with a newer PyTorch")
            self._file.seek(at)
            numel = int.from_bytes(self._file.read(8), "little")
            self._blocks[key] = storage, at + 8
            at += 8 + numel * itemsize(storage.dtype)
            if at > self._size:
                raise damaged(f"not a whole file: {shown(key)} ends at byte {at} of {self._size}")
            if numel != storage.numel:
                needed = f"tensors need {storage.numel}"
                raise damaged(f"storage {shown(key)} has {numel} numbers; {needed}")
        if at != self._size or len(self._blocks) != len(storages):
            counts = f"{len(self._blocks)} of {len(storages)} storages of its tensors end at byte"
            raise damaged(f"not a whole file, or more than one: {counts} {at} of {self._size}")
