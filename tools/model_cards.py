"""Writes docs/model_cards.md from the metadata of the weights files in the package.

    python tools/model_cards.py            writes it
    python tools/model_cards.py --check    checks whether it is up to date

Data and their terms come from pvt_ref/weights/README.md, everything else from the files' own
metadata. Nothing is measured here.
"""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pvt_ref
from pvt_ref.zoo import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "docs" / "model_cards.md"
WEIGHTS = ROOT / "pvt_ref" / "weights"
HEAD = """\
# Cards of the weights

These cards describe the weights files in the package: their classes, training and scores.
`tools/model_cards.py` makes a card from the file's metadata, and a test compares them. Every score
was measured when the file was trained. The [results](results/training.md) describe the trainings
in more detail.

A network knows only the classes of its card. For a picture of anything else it predicts one of
them, often with high confidence. These networks are for learning. None was tested for a use in
which a wrong answer does harm.
"""


def terms(name: str) -> tuple[str, str]:
    """The training data of a file and its terms, from the folder's README."""
    readme = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    found = re.search(
        rf"^\| [^|]*`{name}\.safetensors`[^|]* \| (.+?) \| (.+?) \|$", readme, re.MULTILINE
    )
    if found is None:
        raise ValueError(f"pvt_ref/weights/README.md has no row of {name}.safetensors")
    return found[1], found[2]


def spelt(value: Any) -> str:
    """A value of the metadata as readable text."""
    match value:
        case bool():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{key} {spelt(each)}" for key, each in value.items())
        case list() | tuple():
            return ", ".join(map(spelt, value))
        case _:
            return str(value).replace("|", "/")


def said(training: dict[str, Any]) -> list[tuple[str, str]]:
    """A file's statements about its training; data and terms have their own rows."""
    return [
        (
            key if key == "pvt_ref" else key.replace("_", " "),
            str(value) if key in ("seed", "epoch") else spelt(value),
        )
        for key, value in training.items()
        if key not in ("data", "terms", "recipe")
    ]


def card(name: str) -> str:
    """The card of one file."""
    path = WEIGHTS / f"{name}.safetensors"
    model = pvt_ref.load(name)
    info, state = model.info, pvt_ref.to_state_dict(model.params)
    assert info is not None
    data, allowed = terms(name)
    preprocessing = info.preprocessing
    rows = [
        ("to load it", f'`pvt_ref.load("{name}")`'),
        ("file", f"{path.stat().st_size:,} bytes, {len(state)} arrays"),
        ("SHA-256 of the file", f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`"),
        ("numbers in the arrays", f"{sum(x.size for x in state.values()):,}"),
        ("classes", spelt(info.classes)),
        (
            "preprocessing",
            f"{preprocessing.mode}, mean {spelt(list(preprocessing.mean))}, "
            f"standard deviation {spelt(list(preprocessing.std))}",
        ),
        ("data", data),
        ("terms of the data", allowed),
        *said(dict(info.training)),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"## {name}\n\n{info.title}.\n\n| property | value |\n| --- | --- |\n{table}\n"


def cards() -> str:
    """The whole page."""
    return "\n".join([HEAD, *map(card, SHIPPED)])


def main() -> int:
    """Writes the page, or compares; the exit status is 1 if it differs."""
    if sys.argv[1:] == ["--check"]:
        if CARDS.read_text(encoding="utf-8") == cards():
            return 0
        print(f"{CARDS} is not what the weights say; run python tools/model_cards.py")
        return 1
    CARDS.write_text(cards(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
