"""Writing a file so that it appears complete or not at all."""

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside the place under another name, flushes to the disk, and renames.

    An older file of that name stays whole until then. Killed in between, a hidden ``.tmp`` file is
    all that is left.

    Args:
        path: the file; its directory exists.
        data: all that it shall hold.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short: names have a limit
    try:
        # "x" and not tempfile: the file gets the usual permissions, and overwrites nothing
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the content before the name
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere a directory cannot be flushed
        with contextlib.suppress(OSError):  # the file is in place; some systems flush no directory
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
