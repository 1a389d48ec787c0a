"""The kinds of errors. Every error a caller can cause is one of these.

All derive from :class:`PVTError` and from the built-in ``ValueError`` or ``TypeError``, so both
``except PVTError`` and the usual ``except ValueError`` work. A message can hold untrusted text
(keys, labels, file names): :func:`printable` and :func:`shown` make it safe to print.
"""

import re
import reprlib


def printable(text: str) -> str:
    r"""The text with control characters, which a terminal could obey, escaped as in ``\x1b``."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object, limit: int = 80) -> str:
    """An untrusted value for a message: ``repr(value)`` on one line, cut after limit characters."""
    if isinstance(value, str | bytes):
        return repr(value[:limit]) + ("..." if len(value) > limit else "")
    if isinstance(value, int) and value.bit_length() > 14_000:  # beyond what Python prints
        return f"<{type(value).__name__}>"
    brief = reprlib.Repr()
    brief.maxother = brief.maxstring = limit
    try:
        text = printable(brief.repr(value)).replace("\n", " ")
    except Exception:  # an object whose repr fails
        text = f"<{type(value).__name__}>"
    return text[:limit] + ("..." if len(text) > limit else "")


def key_name(key: object) -> str:
    """An untrusted key for a list: a plain name stays as it is, others go through :func:`shown`."""
    plain = isinstance(key, str) and re.fullmatch(r"[\w.-]{1,120}", key, re.ASCII)
    return str(key) if plain else shown(key, 120)


def reason(error: BaseException) -> str:
    """The text of an operating system error, for a message."""
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


class PVTError(Exception):
    """Base of every error this package raises on purpose. Its message is :func:`printable`."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in args))


class ConfigError(PVTError, ValueError):
    """A configuration that cannot be built, with every reason listed."""


class ShapeError(PVTError, ValueError):
    """An array of the wrong rank or shape, or an image size that would lose pixels."""


class ArrayTypeError(PVTError, TypeError):
    """Not an array, an array of an unsuitable dtype, or arrays on different devices."""


class NonFiniteError(PVTError, ValueError):
    """NaN or infinity in an image or in weights."""


class RangeError(PVTError, ValueError):
    """A number outside its range: a label, a smoothing factor, a stage."""


class DeviceError(PVTError, ValueError):
    """A device that this machine, or this installation, does not have."""


class ImageError(PVTError, ValueError):
    """A picture that cannot be read or prepared."""


class CheckpointError(PVTError, ValueError):
    """A weights file that is damaged, unsafe, unknown, or does not fit the configuration."""


class MissingFileError(PVTError, ValueError, FileNotFoundError):
    """A path without a file."""


class MissingPackageError(PVTError, ValueError, ImportError):
    """An optional package that is not installed."""


class TrainingError(PVTError, ValueError):
    """A training that cannot start or go on: unsuitable data, another run's files, divergence."""


class DownloadError(PVTError, ValueError):
    """Weights that could not be downloaded."""
