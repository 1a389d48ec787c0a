"""A browser for the checks of the built site: one a process, which all of them share."""

import contextlib
import http.server
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("SITE", ROOT / "site")).resolve()
_AXE = ROOT / "docs" / "tools" / "node_modules" / "axe-core" / "axe.min.js"

_QUIET = (
    "--no-sandbox",  # containers run as root
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


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
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_QUIET))
        yield browser
        browser.close()


@contextlib.contextmanager
def served(handler):
    """The address of a server on a free port of this machine, without a slash at its end."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def new_tab(browser, noise, width, scheme, home="file:", **options):
    """An empty tab that notes in a list what its pages ask of elsewhere than home, and print."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, **options
    )
    tab = context.new_page()

    def judge(route):
        url = route.request.url
        if url.startswith((home, "data:", "blob:")):
            route.continue_()
        else:
            noise.append(f"asked for {url}")
            route.abort()

    context.route("**/*", judge)
    tab.on("console", lambda m: m.type in ("error", "warning") and noise.append(m.text))
    tab.on("pageerror", lambda error: noise.append(str(error)))
    return tab


@pytest.fixture
def open_page(browser):
    """A function that opens a page in a tab of its own; afterwards the page must be quiet."""
    opened, noise = [], []

    def open_page(page, width=1440, scheme="light", **options):
        opened.append(new_tab(browser, noise, width, scheme, **options))
        opened[-1].goto((SITE / page).as_uri())
        return opened[-1]

    yield open_page
    for tab in opened:
        tab.context.close()
    assert noise == []


def violations(tab, include="document", least_serious="serious"):
    """What axe finds on the page: rule, element and reason of each violation."""
    # Text that is just fading in or out has too little contrast, and how long it does so depends
    # on how busy the machine is.
    still = "*, ::before, ::after { transition: none !important; animation: none !important; }"
    tab.add_style_tag(content=still)
    tab.add_script_tag(path=_AXE)
    found = tab.evaluate(f"axe.run({include}, {{preload: false, resultTypes: ['violations']}})")
    impacts = ("minor", "moderate", "serious", "critical")
    return [
        (v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"][:300])
        for v in found["violations"]
        if impacts.index(v["impact"]) >= impacts.index(least_serious)
    ]


@pytest.fixture(scope="session")
def tabs():
    return {}


@pytest.fixture
def look(browser, tabs):
    """As open_page, in a tab that many tests share: to start one takes longer than most pages."""
    used = []

    def look(page, width, scheme, java_script_enabled=True):
        key = width, scheme, java_script_enabled
        if key not in tabs:
            noise = []
            scripts: dict[str, Any] = {"java_script_enabled": java_script_enabled}
            tabs[key] = new_tab(browser, noise, width, scheme, **scripts), noise
        tab, noise = tabs[key]
        used.append(noise)
        tab.emulate_media(media="null", color_scheme=scheme)
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto((SITE / page).as_uri())
        return tab

    yield look
    told = [line for noise in used for line in noise]
    for noise in used:
        noise.clear()
    assert told == []
