"""Writes docs/model_cards.md: what is known of each weights file in the package, from the file.

    python tools/model_cards.py            writes it
    python tools/model_cards.py --check    asks whether it is as it would be written

Everything but the terms of the data stands in the files' own metadata; the terms are those of
pvt_ref/weights/README.md. Nothing is measured here.
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

What the weights files in the package say of themselves: what they know, how they were trained, and
how well they did. A card is made from the file's metadata by `tools/model_cards.py`, and a test
compares them. Every score was measured when the file was trained. The
[results](results/training.md) tell more of the trainings.

A network knows the classes of its card and no other: of a picture of anything else it names the
nearest of them, often with confidence. These are networks to learn from. None was tested for a use
in which a wrong answer does harm.
"""


def terms(name: str) -> tuple[str, str]:
    """The data that a file was learnt from, and its terms, as the folder's README has them."""
    readme = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| `{name}\.safetensors` \| (.+?) \| (.+?) \|$", readme, re.MULTILINE)
    if found is None:
        raise ValueError(f"pvt_ref/weights/README.md has no row of {name}.safetensors")
    return found[1], found[2]


def spelt(value: Any) -> str:
    """A value of the metadata, readable."""
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
    """What a file says of its training; its data and their terms have rows of their own."""
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
        ("load it", f'`pvt_ref.load("{name}")`'),
        ("file", f"{path.stat().st_size:,} bytes, {len(state)} arrays"),
        ("SHA-256 of the file", f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`"),
        ("numbers in it", f"{sum(x.size for x in state.values()):,}"),
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
    return f"## {name}\n\n{info.title}.\n\n| what | as the file says |\n| --- | --- |\n{table}\n"


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
