"""A run folder belongs to one living process: a lock that the kernel drops, however that one ends.

The lock is on the file run.lock, not in it: what the file says (who holds it) is only a hint, and a
file that a killed process left behind holds nobody up.
"""

import contextlib
import errno
import os
import platform
import re
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from pvt_ref.errors import TrainingError

LOCK = "run.lock"

#: Descriptors of the locks that this process holds. A child of fork is not their owner.
_HELD: set[int] = set()
_FORKING = threading.RLock()  # no fork between the opening of a file and its entry into _HELD

if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> None:
        os.lseek(fd, 2**30, os.SEEK_SET)  # beyond the hint, which others may read
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

    def _unlock(fd: int) -> None:
        os.lseek(fd, 2**30, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    # flock and not lockf: that would be lost as soon as any thread closes a copy of the file, and
    # would let two threads of a process in. But a forked child shares it, so it is closed there.
    def _try_lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing would not do while a child holds a copy

    def _disown() -> None:
        for fd in _HELD:
            with contextlib.suppress(OSError):
                os.close(fd)
        _HELD.clear()
        _FORKING.release()

    os.register_at_fork(
        before=_FORKING.acquire, after_in_parent=_FORKING.release, after_in_child=_disown
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder of a run, which no other process or thread then gets.

    Args:
        folder: of the run; it exists.

    Raises:
        TrainingError: if another training holds it, or it cannot be locked.
    """
    path = folder / LOCK
    fd = _acquire(path)
    try:
        yield
    finally:
        if fd in _HELD:  # not in a child that was forked meanwhile: the lock is its parent's
            with _FORKING:
                _HELD.discard(fd)
                with contextlib.suppress(OSError):  # first: the name is ours while the lock is
                    path.unlink()
                with contextlib.suppress(OSError):
                    _unlock(fd)
                os.close(fd)


def _acquire(path: Path) -> int:
    while True:
        with _FORKING:
            fd = _open(path)
            try:
                _lock(path, fd)
                current = _is_at(path, fd)
            except BaseException:
                os.close(fd)
                raise
            if current:
                _HELD.add(fd)
                break
            os.close(fd)  # its last owner removed it before we had the lock: there is a new one
    with contextlib.suppress(OSError):  # on a full disk there is no hint
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, f"process {os.getpid()} on {platform.node()}\n".encode("ascii", "replace"))
    return fd


def _open(path: Path) -> int:
    # a pipe of that name must not be waited for
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(path, flags, 0o666)  # not inherited by the programs that are started
    except OSError as error:
        raise _failed(path, error) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise TrainingError(f"{path} is not a regular file, so it cannot be locked. Move it away")
    return fd


def _lock(path: Path, fd: int) -> None:
    try:
        _try_lock(fd)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise _failed(path, error) from error
        raise TrainingError(
            f"{path.parent}: another training runs in this folder{_holder(fd)}. Two would destroy "
            f"each other's files. Wait for its end, stop it, or name another folder. (There is no "
            f"need to delete {LOCK}: a process that has ended, or was killed, locks nothing)"
        ) from error


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _holder(fd: int) -> str:
    with contextlib.suppress(OSError):
        os.lseek(fd, 0, os.SEEK_SET)
        text = os.read(fd, 100).decode("ascii", "replace")
        if hint := re.match(r"process \d{1,10} on [\w.-]{1,64}", text):
            return f" ({hint[0]})"
    return ""


def _failed(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{path}: the folder of the run cannot be locked ({type(error).__name__}: "
        f"{error.strerror or error}), so nothing would keep a second training out of it. Name a "
        f"folder that may be written to, on a file system with locks, such as a local disk"
    )
