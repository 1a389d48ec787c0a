"""Writing a file so that it appears complete or not at all."""

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

#: More interrupts than anybody sends; made here, since one more can come after any call.
_OFTEN_ENOUGH = range(10_000)


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside the place under another name, flushes to the disk, and renames.

    An older file stays whole until then, and leaves its permissions; a link stays a link. Killed in
    between, a hidden ``.tmp`` file is left. Raises: OSError, also for what is read-only or no file.
    """
    mode = _mode_of_old(path)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short: names have a limit
    try:
        # "x" and not tempfile: the file gets the usual permissions, and overwrites nothing
        with temporary.open("xb") as file:
            if mode is not None:
                os.chmod(temporary, mode)  # before there is anything to read
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the content before the name
        os.replace(temporary, path)
    except BaseException:
        interrupt = None
        try:
            for _ in _OFTEN_ENOUGH:
                try:
                    with contextlib.suppress(OSError):
                        temporary.unlink()
                    break
                except BaseException as another:  # an interrupt: what it broke off is done again
                    interrupt = another
        finally:  # for one that came just where the loop jumps back
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
    """Permissions of the file that is there, if there is one that may be replaced."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "there is a pipe, a device or a socket, and no file")
    # root may write everything: the permissions still say what somebody wants
    if not mode & 0o222 or not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file that is there is read-only")
    return stat.S_IMODE(mode) & 0o777
