"""The questions that come back: what docs/questions/ holds, a file a page of the course."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "questions"


@dataclass(frozen=True)
class Question:
    """One question; text and answer are Markdown, and check is Python that holds the answer."""

    id: str
    text: str
    answer: str
    check: str = ""


def read(page: str) -> list[Question]:
    """The questions of a page of the course, by the name of its file without an ending."""
    path = FOLDER / f"{page}.toml"
    if not path.is_file():
        return []
    return [Question(**each) for each in tomllib.loads(path.read_text("utf-8"))["question"]]


def titles(nav: list[Any]) -> dict[str, str]:
    """The pages of the course in the order of the site's navigation: name and title."""
    found: dict[str, str] = {}
    for entry in nav:
        for title, target in entry.items() if isinstance(entry, dict) else ():
            if isinstance(target, list):
                found |= titles(target)
            elif match := re.fullmatch(r"course/(\w+)\.md", target):
                found[match[1]] = title
    return found
