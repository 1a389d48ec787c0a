"""A hook of mkdocs: the search finds a page that explains before one that lists.

Material multiplies a page's score by ``search.boost`` of its front matter. It is set here, by
folder, so that no page has to say it.
"""

from typing import Any

#: By the beginning of a page's path; the first that fits. What fits none keeps 1.
BOOSTS = (
    ("course/index.md", 1.0),
    ("course/", 3.0),
    ("how_to/", 2.5),
    ("api/", 0.4),
    ("results/", 0.5),
)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> None:
    """Called by mkdocs with every page."""
    for beginning, boost in BOOSTS:
        if page.file.src_uri.startswith(beginning):
            page.meta.setdefault("search", {}).setdefault("boost", boost)
            return
