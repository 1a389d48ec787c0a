"""What can go wrong, by kind: every error a caller can cause is one of these.

All derive from :class:`PVTError` and from the built-in ``ValueError`` or ``TypeError``, so both
``except PVTError`` and the usual ``except ValueError`` work.
"""


class PVTError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PVTError, ValueError):
    """A configuration that cannot be built, with every reason listed."""


class ShapeError(PVTError, ValueError):
    """An array of the wrong rank or shape, or an image size that would lose pixels."""


class ArrayTypeError(PVTError, TypeError):
    """Not an array, an array of an unsuitable dtype, or arrays of different devices together."""


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
    """A path at which there is no file."""


class TrainingError(PVTError, ValueError):
    """A training that cannot start or go on: unsuitable data, another run's files, divergence."""


class DownloadError(PVTError, ValueError):
    """Weights that had to be fetched and could not be."""
