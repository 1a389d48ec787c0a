"""Ctrl-C in a training: noted at once, handled where nothing is left half done."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP (of a closed terminal) are noted instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt, but only inside :meth:`allow`. An ignored signal stays
    ignored, as nohup needs. Outside the main thread, which alone can set handlers, nothing is
    changed; nor in a process that another thread forks meanwhile.

    :meth:`install` and :meth:`restore` go into the ``try`` and the ``finally`` of one function.
    (The ``__exit__`` of a context manager could itself be interrupted before it does anything.)
    """

    def __init__(self) -> None:
        self.received: list[int] = []  # numbers of the signals
        self._before: dict[int, Any] = {}
        self._allowed = self._urgent = False
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return bool(self.received)

    def install(self) -> None:
        """Starts to note signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # it is POSIX's
        for number in (signal.SIGINT, signal.SIGTERM, *hangup):  # Ctrl-C first: none falls between
            handler = signal.getsignal(number)
            # None is a handler from outside Python, which could not be put back
            if handler not in (None, signal.SIG_IGN):
                self._before[number] = handler  # first: what is replaced can be put back
                signal.signal(number, self._note)

    def restore(self) -> None:
        """Puts back every handler that :meth:`install` replaced. May be called again."""
        for number, handler in reversed(self._before.items()):  # Ctrl-C last
            signal.signal(number, handler)

    def allow(self, work: Callable[..., T], *args: Any) -> T:
        """work(*args), which leaves nothing half done; a second Ctrl-C interrupts it."""
        self._allowed = True
        try:
            if self._urgent:
                raise KeyboardInterrupt
            return work(*args)
        finally:
            self._allowed = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # forked amid a training, which is its parent's
            self.restore()
            signal.raise_signal(number)
            return
        self._urgent |= bool(self.received) and number == signal.SIGINT
        self.received.append(number)
        if self._urgent and self._allowed:
            raise KeyboardInterrupt
