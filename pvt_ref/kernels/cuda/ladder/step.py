"""A step of a ladder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One version of a kernel.

    Attributes:
        title: what is new about it, in a few words.
        file: its .cu file, relative to ``kernels/cuda/``.
        run: computes the operation with it; takes the operation's arguments, then the settings.
    """

    title: str
    file: str
    run: Callable[..., Any]
