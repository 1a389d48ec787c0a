"""Writes a file completely or not at all."""

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

#: More interrupts than anyone sends; a limit, since one more can come after any call.
_OFTEN_ENOUGH = range(10_000)


def write_whole(path: Path, data: bytes) -> None:
    """Writes to a temporary file in the same folder, flushes it to the disk, and renames it.

    An existing file stays intact until then, and its permissions are kept; a link stays a link. If
    the process is killed, a hidden ``.tmp`` file remains. Raises: OSError, also for a read-only
    file or a path that is not a regular file.
    """
    mode = _mode_of_old(path)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short: names have a limit
    try:
        # "x", not tempfile: the file gets the usual permissions and overwrites nothing
        with temporary.open("xb") as file:
            if mode is not None:
                os.chmod(temporary, mode)  # before it holds anything to read
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the content must reach the disk before the name
        os.replace(temporary, path)
    except BaseException:
        interrupt = None
        try:
            for _ in _OFTEN_ENOUGH:
                try:
                    with contextlib.suppress(OSError):
                        temporary.unlink()
                    break
                except BaseException as another:  # an interrupt: try the removal again
                    interrupt = another
        finally:  # for an interrupt just as the loop jumps back
            with contextlib.suppress(OSError):
                temporary.unlink()
        if interrupt is not None:
            raise interrupt from None
        raise
    if os.name == "posix":  # elsewhere a directory cannot be flushed
        with contextlib.suppress(OSError):  # the file is in place; some systems flush no directory
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def _mode_of_old(path: Path) -> int | None:
    """Permissions of the existing file, if there is one that may be replaced."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe, a device or a socket, not a file")
    # root may write everything, but the permissions still say what the owner wants
    if not mode & 0o222 or not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the existing file is read-only")
    return stat.S_IMODE(mode) & 0o777
