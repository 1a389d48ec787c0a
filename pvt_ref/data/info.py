"""What a model's file says besides its weights: class names, preprocessing, training.

Weights alone answer with an index, and only if the pixels are preprocessed as in their training.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pvt_ref.checks import check_type, is_whole
from pvt_ref.data.preprocessing import IMAGENET, Preprocessing, shown_tuple
from pvt_ref.errors import ConfigError, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known of a model besides its weights and configuration. Fit for JSON.

    Attributes:
        title: a sentence on its purpose.
        classes: the names of the outputs, in order. Empty if unknown.
        preprocessing: how its training prepared pixels.
        training: how it was trained: command, seed, data set, accuracy. Numbers, texts, lists.
        colours: of the classes in segmentation pictures, (red, green, blue) from 0 to 255 each, as
        many as classes. Empty for the default colours.

    Raises:
        ConfigError: if a field has the wrong type.
    """

    title: str = ""
    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing = IMAGENET
    training: Mapping[str, Any] = field(default_factory=dict, hash=False)
    colours: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        given = self.classes
        several = isinstance(given, Iterable) and not isinstance(given, str)
        names = tuple(given) if several and not hasattr(given, "shape") else None  # no arrays
        if names is None or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"classes are {shown(given)}; they must be a list of names")
        check_type("title", self.title, str, error=ConfigError)
        check_type("preprocessing", self.preprocessing, Preprocessing, error=ConfigError)
        check_type("training", self.training, Mapping, error=ConfigError)
        object.__setattr__(self, "classes", names)
        object.__setattr__(self, "training", _as_json(self.training))
        object.__setattr__(self, "colours", _colours(self.colours, len(names)))

    def __repr__(self) -> str:
        start = f"ModelInfo(title={shown(self.title)}, classes={shown_tuple(self.classes)}"
        training = shown(self.training, 160)
        return f"{start}, preprocessing={self.preprocessing!r}, training={training})"

    def to_dict(self) -> dict[str, Any]:
        """A copy as plain values by field name, fit for JSON; :meth:`from_dict` reads it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if not self.colours:  # files from before segmentation do not have this field
            del values["colours"]
        return _as_json({**values, "preprocessing": asdict(self.preprocessing)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelInfo":
        """The record from the result of :meth:`to_dict`.

        Args:
            values: by field name.

        Returns:
            An equal record.

        Raises:
            ConfigError: if a field has the wrong type, is missing, or is unknown to this version.
        """
        known = _checked_fields(values, cls, "an info")
        if "preprocessing" not in known:
            raise ConfigError("an info needs the field preprocessing, and it has none")
        parts = _checked_fields(known["preprocessing"], Preprocessing, "a preprocessing")
        known["preprocessing"] = Preprocessing(**parts)
        return cls(**known)


def _colours(values: Any, count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours of count classes, or none. Raises: ConfigError."""
    several = isinstance(values, list | tuple) and len(values) in (0, count)
    if not several or not all(isinstance(c, list | tuple) and len(c) == 3 for c in values):
        needed = f"as many as there are classes ({count}), each (red, green, blue)"
        raise ConfigError(f"colours are {shown(values)}; they must be {needed}")
    for level in (level for colour in values for level in colour):
        if not is_whole(level) or not 0 <= level <= 255:
            raise ConfigError(f"colours hold {shown(level)}; levels are whole numbers, 0 to 255")
    return tuple((int(r), int(g), int(b)) for r, g, b in values)


def _checked_fields(values: Any, record: type, what: str) -> dict[str, Any]:
    """The values by name, if all are names of the record's fields."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} is a {type(values).__name__}; it must be a mapping of fields")
    names = [f.name for f in fields(record)]
    strange = [name for name in values if name not in names]
    if strange:
        why = f"which this version does not know; known are {', '.join(names)}"
        raise ConfigError(f"{what} has the field {shown(strange[0])}, {why}")
    return dict(values)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy as read back from a file; a bad value is refused now rather than when it is saved."""
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"training holds what JSON cannot ({shown(str(error), 200)}); it must hold texts, "
            f"finite numbers, booleans, lists, mappings. float(x) converts NumPy's numbers"
        ) from error


#: For weights of which nothing is known: ImageNet's preprocessing, and no class names.
UNKNOWN = ModelInfo()
