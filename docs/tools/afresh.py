"""A hook of mkdocs: every build runs the package and the pages' tools as they are now.

``mkdocs serve`` builds again and again in one process, which would keep what it once imported.
"""

import linecache
import sys
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parent


def on_pre_build(config: Any) -> None:
    """Called by mkdocs before each build."""
    for name, module in list(sys.modules.items()):
        folder = Path(getattr(module, "__file__", None) or "").parent
        if name.partition(".")[0] == "pvt_ref" or folder == TOOLS:
            del sys.modules[name]
    linecache.clearcache()
