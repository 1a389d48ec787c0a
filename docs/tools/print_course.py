"""The course on paper: one PDF of the built site's pages, in their order, with page numbers.

    python docs/tools/print_course.py [print/course.pdf]        after make docs; or make print

Needs site/, the package playwright, and Chromium or Chrome (or CHROMIUM=its path). Solutions are
unfolded; the code of figures and tables stays out. Links between pages lead inside the PDF.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urljoin

import course_map

ROOT = Path(__file__).parents[2]

#: What is of no use on paper: marks to link by, scripts, and the code of figures and tables.
_LEFT_OUT = re.compile(
    r'<a class="headerlink".*?</a>|<script\b.*?</script>|<details class="note">.*?</details>',
    re.DOTALL,
)

_STYLE = """<style>
  section.lesson + section.lesson { break-before: page }
  h1, h2, h3 { break-after: avoid }
  .drawn, .katex-display { break-inside: avoid }
</style>"""


def pages(site: Path) -> list[Path]:
    """The pages of the site that are printed, in order."""
    names = ["course/index", *(f"course/{page.name}" for page in course_map.pages()), "exercises"]
    return [site / f"{name}.html" for name in names]


def joined(paths: list[Path]) -> str:
    """One page of HTML with the articles of all, in the place of the first one's article.

    Ids are told apart by their page, and links lead from one article to another; links to pages
    that are not printed are taken away.
    """
    parts = []
    for path in paths:
        article = _LEFT_OUT.sub("", _split(path)[1]).replace("<details", "<details open")
        article = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{path.stem}-", article)
        article = re.sub(
            r' (src|href)="(?!#|[a-z]+:)([^"]*)"',
            lambda found, path=path: _address(found[1], urljoin(path.as_uri(), found[2]), paths),
            article,
        )
        parts.append(f'<section class="lesson" id="{path.stem}">{article}</section>')
    before, _, after = _split(paths[0])
    title = "<title>The Pyramid Vision Transformer: the course</title>"
    before = re.sub(r"<title>.*?</title>", title, before, flags=re.DOTALL)
    return before.replace("</head>", f"{_STYLE}</head>") + "".join(parts) + after


def _split(path: Path) -> tuple[str, str, str]:
    """A page of the site: what is before its article's content, that content, and the rest."""
    text = path.read_text("utf-8")
    start = text.index(">", text.index("<article")) + 1
    end = text.index("</article>")
    return text[:start], text[start:end], text[end:]


def _address(attribute: str, uri: str, paths: list[Path]) -> str:
    """An attribute with an address: inside the PDF if its page is printed, none if it is not."""
    page, _, place = uri.partition("#")
    for path in paths:
        if page == path.as_uri():
            return f' {attribute}="#{path.stem}-{place}"' if place else f' href="#{path.stem}"'
    return "" if attribute == "href" else f' {attribute}="{uri}"'


def main() -> None:
    """Writes the PDF."""
    site = Path(os.environ.get("SITE", ROOT / "site")).resolve()
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "print" / "course.pdf")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser_path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    missing = [path for path in pages(site) if not path.is_file()]
    if missing:
        sys.exit(f"there is no {missing[0]}; build the site first: make docs")
    if browser_path is None:
        sys.exit("no Chromium or Chrome here; install one, or name it: CHROMIUM=its path")
    from playwright.sync_api import sync_playwright

    whole = site / "course" / "whole_course.html"  # beside the pages, whose style sheets it has
    whole.write_text(joined(pages(site)), "utf-8")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=browser_path, args=["--no-sandbox"], timeout=0
            )
            tab = browser.new_page(color_scheme="light", java_script_enabled=False)
            tab.set_default_timeout(0)  # it is a long page
            tab.goto(whole.as_uri())
            target.parent.mkdir(parents=True, exist_ok=True)
            footer = '<div style="font-size: 8px; width: 100%; text-align: center">{}</div>'
            tab.pdf(
                path=target,
                format="A4",
                display_header_footer=True,
                header_template="<span></span>",
                footer_template=footer.format('<span class="pageNumber"></span>'),
                margin={"top": "15mm", "bottom": "18mm", "left": "15mm", "right": "15mm"},
                outline=True,
                tagged=True,
            )
            browser.close()
    finally:
        whole.unlink()
    print(f"written: {target}, {len(pages(site))} pages of the site")


if __name__ == "__main__":
    main()
