"""A hook of mkdocs: what the pages need of npm's packages is copied into the site.

Nothing of them is committed, and no page asks another host for them.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

MODULES = Path(__file__).parent / "node_modules"

#: From a package, to a folder of the site's assets.
_WANTED = (
    ("katex/dist/katex.min.css", "katex"),
    ("katex/dist/fonts/*.woff2", "katex/fonts"),
    ("iframe-worker/shim/index.js", "iframe-worker"),
    ("ts-fsrs/dist/index.umd.js", "ts-fsrs"),
    # its plain build, and the one WebAssembly that this build asks for; try_it.py's page fetches it
    ("onnxruntime-web/dist/ort.wasm.bundle.min.mjs", "onnxruntime"),
    ("onnxruntime-web/dist/ort-wasm-simd-threaded.wasm", "onnxruntime"),
)


def on_post_build(config: Any) -> None:
    """Called by mkdocs when all pages are written."""
    for pattern, folder in _WANTED:
        found = sorted(MODULES.glob(pattern))
        if not found:
            raise PluginError(
                f"{MODULES / pattern} is missing: 'make docs' fetches it; by hand: "
                f"npm ci --prefix {MODULES.parent}"
            )
        target = Path(config["site_dir"]) / "assets" / folder
        target.mkdir(parents=True, exist_ok=True)
        for file in found:
            shutil.copy(file, target)
    # the fonts that are copied are the only ones that a browser of today asks for
    sheet = Path(config["site_dir"]) / "assets" / "katex" / "katex.min.css"
    only_woff2 = re.sub(
        r',url\([^)]*\.(woff|ttf)\) format\("[^"]*"\)', "", sheet.read_text("utf-8")
    )
    sheet.write_text(only_woff2, encoding="utf-8")
    (script,) = (Path(config["site_dir"]) / "assets" / "onnxruntime").glob("*.mjs")
    unmapped = re.sub(r"\n//# sourceMappingURL=\S+", "", script.read_text("utf-8"))
    script.write_text(unmapped, encoding="utf-8")  # the map is not there
