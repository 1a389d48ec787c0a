"""Reads and checks CIFAR-10 in its authors' binary version, and downloads it if asked to.

    python examples/cifar10_data.py DIR          fetches the archive into DIR and unpacks it there

The data set is by Krizhevsky, Nair and Hinton: https://www.cs.toronto.edu/~kriz/cifar.html. A
record is one byte, the label, and 3,072 bytes: red, green and blue planes of 32x32 pixels.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
import tarfile
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError

import numpy as np

from pvt_ref import Preprocessing, PVTError
from pvt_ref.errors import TrainingError, printable
from pvt_ref.train import LabelledImages

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PREPROCESSING = Preprocessing("RGB", (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"  # in the archive
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # from the data set's page
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
_RECORD = 1 + 3 * 32 * 32
_RECORDS = 10_000  # in each file

HOW_TO_GET_IT = (
    f"The binary version (162 MB) is at {URL}. Either 'python examples/cifar10_data.py DIR' "
    f"fetches it, or unpack it yourself: tar -xzf cifar-10-binary.tar.gz -C DIR"
)


def read_cifar10(folder: str | Path, names: tuple[str, ...]) -> LabelledImages:
    """The records of some files, in order.

    Args:
        folder: contains the .bin files, or cifar-10-batches-bin with them.
        names: TRAIN_FILES or TEST_FILES.

    Raises:
        TrainingError: if a file is missing, cut off, or has another layout.
    """
    place = Path(folder)
    if os.path.isdir(place / FOLDER):
        place = place / FOLDER
    missing = [name for name in names if not os.path.isfile(place / name)]
    if missing:
        raise TrainingError(f"{place}: there is no {', '.join(missing)}. {HOW_TO_GET_IT}")
    records = np.concatenate([_read_file(place / name) for name in names])  # (N, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return LabelledImages(images, records[:, 0].astype(np.int64), PREPROCESSING)


def _read_file(path: Path) -> np.ndarray:
    """(10000, 3073) uint8."""
    size, expected = os.path.getsize(path), _RECORD * _RECORDS
    if size != expected:
        raise TrainingError(
            f"{path} has {size:,} bytes; it must have {expected:,} ({_RECORDS:,} records of "
            f"{_RECORD:,} bytes). It was cut off, or is the Python or Matlab version. "
            f"{HOW_TO_GET_IT}"
        )
    try:
        records = np.frombuffer(path.read_bytes(), dtype=np.uint8).reshape(_RECORDS, _RECORD)
    except (OSError, ValueError) as error:  # ValueError: it was shortened meanwhile
        raise TrainingError(f"{path} cannot be read: {error}. {HOW_TO_GET_IT}") from error
    highest = int(records[:, 0].max())
    if highest >= len(CLASSES):
        raise TrainingError(
            f"{path}: a label is {highest}; CIFAR-10 has labels 0 to 9. Is it a file of "
            f"CIFAR-100, or damaged? {HOW_TO_GET_IT}"
        )
    return records


def fetch_cifar10(folder: str | Path, url: str = URL, md5: str = MD5) -> Path:
    """Downloads the archive unless it exists, compares its checksum, and unpacks it.

    A partial or altered download is removed.

    Args:
        folder: gets the archive and cifar-10-batches-bin; made if it does not exist.
        url: the archive's address.
        md5: the archive's checksum.

    Returns:
        The folder with the .bin files.

    Raises:
        TrainingError: if it cannot be fetched, or has another checksum.
    """
    place = Path(folder)
    archive, partial = place / "cifar-10-binary.tar.gz", place / ".cifar-10-binary.part"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            found = _download(url, partial)
            if found != md5:
                raise TrainingError(
                    f"the file from {url} has the MD5 {found}, and should have {md5}: the download "
                    f"was cut off or altered. Try again, or fetch it by hand. {HOW_TO_GET_IT}"
                )
            partial.rename(archive)
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, _md5).hexdigest()
        if found != md5:
            raise TrainingError(
                f"{archive} has the MD5 {found}, and should have {md5}: it was cut off or "
                f"altered. Delete it and try again. {HOW_TO_GET_IT}"
            )
        _unpack(archive, place / FOLDER)
    except (OSError, EOFError, ValueError, zlib.error, HTTPException, tarfile.TarError) as error:
        if isinstance(error, PVTError):
            raise
        if isinstance(error, HTTPError):
            error.close()  # it keeps the connection open
        raise TrainingError(f"{url} could not be fetched: {error}. {HOW_TO_GET_IT}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return place / FOLDER


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks one folder's files; extractall has filters only from Python 3.11.4 on."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            source = tar.extractfile(member) if path.parent.name == FOLDER else None
            if source is not None:  # skips folders
                with source, (folder / path.name).open("wb") as target:
                    shutil.copyfileobj(source, target)


def _md5() -> Any:
    """MD5, which the data set's page gives; it detects accidents and is not used for security."""
    return hashlib.md5(usedforsecurity=False)


def _download(url: str, path: Path) -> str:
    """Downloads url to path, with a progress bar, and returns its MD5."""
    from rich.progress import Progress  # only here: reading needs no bar

    md5 = _md5()
    with urllib.request.urlopen(url, timeout=60) as answer, path.open("wb") as file:
        length = answer.headers.get("Content-Length")
        with Progress() as progress:
            task = progress.add_task("CIFAR-10", total=int(length) if length else None)
            while block := answer.read(2**18):
                file.write(block)
                md5.update(block)
                progress.advance(task, len(block))
    return md5.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetches CIFAR-10, binary version (162 MB).")
    parser.add_argument("folder", metavar="DIR", help="target folder")
    try:
        print(printable(str(fetch_cifar10(parser.parse_args().folder))))
    except PVTError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
