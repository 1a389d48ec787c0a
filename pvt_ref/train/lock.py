"""Only one live process may use a run folder: a lock that the kernel drops when the process ends.

The lock is on the file run.lock, not in it: its text (who holds it) is only a hint, and a file left
by a killed process blocks nobody.
"""

import contextlib
import errno
import os
import platform
import re
import stat
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pvt_ref.errors import TrainingError, reason
from pvt_ref.kernels.cpu.threads import at_fork, holding

LOCK = "run.lock"

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


class RunLock:
    """An exclusive lock on a run's folder, an absolute path, among processes and threads.

    :meth:`acquire` and :meth:`release` go into the ``try`` and the ``finally`` of one function; a
    signal handler may interrupt either.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._fd: int | None = None
        self._locked = False

    def acquire(self) -> None:
        """Takes the lock. Raises: TrainingError if another training holds it, or locking fails."""
        while True:
            fd = holding(_opening, self._open)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise self._not_ours()
            self._lock(fd)
            if self._is_at(fd):
                break
            self.release()  # its last owner removed the file before we had it: there is a new one
        self._locked = True
        with contextlib.suppress(OSError):  # on a full disk there is no hint
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, f"process {os.getpid()} on {platform.node()}\n".encode("ascii", "replace"))

    def check(self) -> None:
        """To be called before every write. Raises: TrainingError if the lock was lost."""
        if self._fd is None:
            what = "this process was forked from the one that trains here"
            raise TrainingError(f"{self.path.parent}: {what}, which alone may go on")
        if not self._is_at(self._fd):
            what = f"the folder was moved, or another run has taken it: its own {LOCK} is gone"
            saved = "What was saved before is whole, wherever it is now: resume there"
            raise TrainingError(f"{self.path.parent}: {what}. {saved}")

    def release(self) -> None:
        """Releases the lock, if this process has it. May be interrupted and called again."""
        if self._fd is None:
            _OPEN.discard(self)  # the file could not be opened
            return
        if self._locked and self._is_at(self._fd):
            with contextlib.suppress(OSError):  # first: the name is ours while the lock is
                self.path.unlink()
        with contextlib.suppress(OSError):
            _unlock(self._fd)
        _OPEN.discard(self)
        fd, self._fd, self._locked = self._fd, None, False
        os.close(fd)

    def _open(self) -> int:
        if os.path.islink(self.path):  # where there is no O_NOFOLLOW
            raise self._not_ours()
        # do not follow a link to a foreign file, and do not wait for a pipe
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        _OPEN.add(self)
        try:
            self._fd = os.open(self.path, flags, 0o666)  # programs that are started do not inherit
        except OSError as error:
            raise self._failed(error) from error
        return self._fd

    def _lock(self, fd: int) -> None:
        try:
            _try_lock(fd)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                raise self._failed(error) from error
            holder = None
            with contextlib.suppress(OSError):
                os.lseek(fd, 0, os.SEEK_SET)
                text = os.read(fd, 100).decode("ascii", "replace")
                holder = re.match(r"process \d{1,10} on [\w.-]{1,64}", text)
            hint = f" ({holder[0]})" if holder else ""
            raise TrainingError(
                f"{self.path.parent}: another training runs in this folder{hint}. Wait for its "
                f"end, stop it, or name another. (Leave {LOCK}: an ended process locks nothing)"
            ) from error

    def _is_at(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(fd))
        except OSError:  # there is nothing, or no folder any more
            return False

    def _not_ours(self) -> TrainingError:
        what = f"{self.path} is not a regular file of this folder alone, but a link or similar"
        return TrainingError(f"{what}, so it cannot be locked. Move it away")

    def _failed(self, error: OSError) -> TrainingError:
        what = f"{self.path}: the folder of the run cannot be locked ({reason(error)})"
        where = "that is writable, on a file system with locks, such as a local disk"
        return TrainingError(f"{what}. Choose one {where}")


#: Those whose file is open in this process. A child of fork is not their owner.
_OPEN: set[RunLock] = set()

#: No fork comes between the opening of a file and the note that it must be closed there.
_opening: Any = SimpleNamespace(lock=threading.RLock())


def _disown() -> None:
    for held in list(_OPEN):
        if held._fd is not None:
            with contextlib.suppress(OSError):
                os.close(held._fd)
            held._fd = None
    _OPEN.clear()


at_fork(_opening, _disown)
