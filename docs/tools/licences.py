"""A hook of mkdocs: the licences of what other people wrote go with the pages.

They are the files that come with the packages, as they are installed; what the theme has compiled
into its scripts comes without, and its texts are kept in licences/ beside this file. The page
licences.md lists and links them all.
"""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import material
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

TOOLS = Path(__file__).parent
KEPT = TOOLS / "licences"


def _texts() -> dict[str, Path]:
    """The file of each licence, by its name on the site."""
    texts = {path.stem: path for path in KEPT.glob("*.txt")}
    texts["pvt_ref"] = TOOLS.parents[1] / "LICENSE"
    for package in ("iframe-worker", "katex", "ts-fsrs"):
        texts[package] = TOOLS / "node_modules" / package / "LICENSE"
    for package in ("mkdocs-material", "mkdocstrings-python"):
        (found,) = [
            file
            for file in importlib.metadata.files(package) or ()
            if re.search(r"dist-info/(licenses/)?LICENSE(\.\w+)?$", str(file))
        ]
        texts[package] = Path(str(found.locate()))
    icons = Path(material.__path__[0]) / "templates" / ".icons" / "material"
    texts["material-design-icons"] = icons / "LICENSE"
    return texts


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs when it has found the files of the site."""
    for name, path in sorted(_texts().items()):
        if not path.is_file():
            raise PluginError(f"{path} is missing: the licence of {name}")
        files.append(File.generated(config, f"licences/{name}.txt", abs_src_path=str(path)))
    return files


def on_post_build(config: Any) -> None:
    """Called by mkdocs when all is written: does a script or a style hold more than is listed?"""
    known, used = set(_texts()), set()
    for record in (Path(config["site_dir"]) / "assets").rglob("*.map"):
        sources = json.loads(record.read_text("utf-8"))["sources"]
        for source in sources:
            used.update(re.findall(r"node_modules/((?:@[^/]+/)?[^/]+)/", source))
    if not used:
        raise PluginError(f"the theme's scripts no longer tell what is in them; see {__file__}")
    if missing := sorted(used - known):
        raise PluginError(f"the theme brings {missing}, whose licences are not in {KEPT}")
