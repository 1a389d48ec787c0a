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

import course_map
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("SITE", ROOT / "site")).resolve()

#: Addresses made absolute, solutions unfolded, and what is of no use on paper taken away.
_ARTICLE = """
    () => {
      const article = document.querySelector("article");
      for (const e of article.querySelectorAll("details.note, .headerlink, script, nav, form"))
        e.remove();
      for (const e of article.querySelectorAll("details")) e.open = true;
      for (const e of article.querySelectorAll("img")) e.src = e.src;
      for (const e of article.querySelectorAll("a[href]")) e.href = e.href;
      return article.innerHTML;
    }
"""

_STYLE = """
    section.lesson + section.lesson { break-before: page }
    h1, h2, h3 { break-after: avoid }
    .drawn, table, .katex-display { break-inside: avoid }
"""


def pages() -> list[Path]:
    """The pages of the site that are printed, in order."""
    names = ["course/index", *(f"course/{page.name}" for page in course_map.pages()), "exercises"]
    return [SITE / f"{name}.html" for name in names]


def joined(articles: dict[Path, str]) -> str:
    """The articles as one: ids are told apart by their page, and links lead from one to another."""
    parts = []
    for path, article in articles.items():
        own = path.stem
        article = re.sub(r'(\sid="|href="#|url\(#|url\(&quot;#)', rf"\g<1>{own}-", article)
        for other in articles:
            uri = re.escape(other.as_uri())
            article = re.sub(rf'href="{uri}#([^"]*)"', rf'href="#{other.stem}-\g<1>"', article)
            article = re.sub(rf'href="{uri}"', f'href="#{other.stem}"', article)
        article = re.sub(r' href="file:[^"]*"', "", article)  # a page that is not printed
        parts.append(f'<section class="lesson" id="{own}">{article}</section>')
    return "".join(parts)


def main() -> None:
    """Writes the PDF."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "print" / "course.pdf")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser_path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    missing = [path for path in pages() if not path.is_file()]
    if missing:
        sys.exit(f"there is no {missing[0]}; build the site first: make docs")
    if browser_path is None:
        sys.exit("no Chromium or Chrome here; install one, or name it: CHROMIUM=its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(color_scheme="light")
        articles = {}
        for path in pages():
            tab.goto(path.as_uri())
            articles[path] = tab.evaluate(_ARTICLE)
        tab.goto(pages()[0].as_uri())
        put = "html => { document.querySelector('article').innerHTML = html; }"
        tab.evaluate(put, joined(articles))
        tab.evaluate("document.title = 'The Pyramid Vision Transformer: the course'")
        tab.add_style_tag(content=_STYLE)
        tab.evaluate("document.fonts.ready.then(() => true)")
        target.parent.mkdir(parents=True, exist_ok=True)
        number = '<div style="font-size: 8px; width: 100%; text-align: center">{}</div>'
        tab.pdf(
            path=target,
            format="A4",
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=number.format('<span class="pageNumber"></span>'),
            margin={"top": "15mm", "bottom": "18mm", "left": "15mm", "right": "15mm"},
            outline=True,
            tagged=True,
        )
        browser.close()
    print(f"written: {target}, {len(articles)} pages of the site")


if __name__ == "__main__":
    main()
