"""The page on which the networks run, in headless Chromium: its numbers are the package's.

    make check-site        builds the site, then runs this beside check_site.py

The page is served on a local port, as browsers want it, and may ask nothing else. The photo that
comes with it, and a drawn one of an awkward size, go through both networks in the page. What was
computed there is compared with what the package makes of the same decoded pixels.
"""

import base64
import functools
import http.server
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from browsing import SITE, new_tab, served, violations
from check_site import _PALE
from PIL import Image

import pvt_ref
from pvt_ref.dense import resize_logits

#: Between the page and the package: what the page itself promises.
NEAR = 1e-4

#: What is fetched only when somebody asks for it.
LARGE = ("/assets/onnxruntime/", "/assets/networks/")

#: Milliseconds for a run: a second or two on a free core.
PATIENCE = 120_000


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=str(SITE))
    with served(handler) as address:
        yield f"{address}/"


def opened(browser, address, noise, **options):
    """A tab with the page, and what it asked for, as it is asked; noise gets what is wrong."""
    asked, tab = {}, new_tab(browser, noise, 1440, "light", home=address, **options)
    tab.on("response", lambda r: asked.update({r.url: int(r.headers.get("content-length", 0))}))
    tab.goto(address + "try.html")
    tab.wait_for_load_state("networkidle")
    return tab, asked


#: An array of the page as base64 of its bytes.
_BYTES = """
    x => {
      const bytes = new Uint8Array(x.buffer, x.byteOffset, x.byteLength);
      let text = "";
      for (let i = 0; i < bytes.length; i += 32768)
        text += String.fromCharCode(...bytes.subarray(i, i + 32768));
      return btoa(text);
    }
"""


def answers_of(tab) -> SimpleNamespace:
    """What the page computed: the photo, what the networks saw of it, and all their outputs."""
    read = f"""() => {{
        const bytes = {_BYTES}, answers = document.getElementById("try").answers;
        const picture = x => [x.height, x.width, bytes(x.data)];
        const outputs = all => Object.entries(all).map(([k, x]) => [k, x.dims, bytes(x.data)]);
        return {{
          pictures: [answers.picture, ...answers.pixels].map(picture),
          classified: outputs(answers.classified), segmented: outputs(answers.segmented),
        }};
    }}"""
    found = tab.evaluate(read)
    pictures = [
        np.frombuffer(base64.b64decode(data), np.uint8).reshape(H, W, 3)
        for H, W, data in found["pictures"]
    ]
    outputs = {
        network: {
            name: np.frombuffer(base64.b64decode(data), np.float32).reshape(shape)
            for name, shape, data in found[network]
        }
        for network in ("classified", "segmented")
    }
    return SimpleNamespace(photo=pictures[0], seen=pictures[1], street=pictures[2], **outputs)


def cells(tab, where: str) -> list[list[str]]:
    """What a table says, row by row."""
    rows = tab.locator(f"{where} tbody tr").all()
    return [row.locator("td").all_inner_texts() for row in rows]


#: Whether a run has ended, for better or worse.
_ENDED = (
    "() => /All figures below|as they were/.test(document.querySelector('#try .words').textContent)"
)


@pytest.fixture(scope="module")
def ran(browser, address):
    """The page after a press of its button: the tab, its answers, and what was asked when."""
    noise = []
    tab, asked = opened(browser, address, noise)
    before = dict(asked)
    button = tab.get_by_role("button", name="Run on the temple")
    button.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function(_ENDED, timeout=PATIENCE)
    assert button.evaluate("e => e === document.activeElement")
    yield SimpleNamespace(tab=tab, answers=answers_of(tab), before=before, asked=asked)
    assert noise == []
    tab.context.close()


@pytest.fixture(scope="module")
def models():
    return pvt_ref.load("imagenette"), pvt_ref.load("camvid")


def check_answers(answers, models) -> None:
    """The page resized as the package does, to the bit, and computed what it computes."""
    import try_it  # of docs/tools, which check_site put on the path

    classifier, streets = models
    photo = Image.fromarray(answers.photo)
    side = classifier.config.img_size
    (seen,) = classifier.info.preprocessing.pixels([photo], side)
    np.testing.assert_array_equal(answers.seen, seen)
    np.testing.assert_array_equal(answers.street, np.asarray(try_it.middle(photo)))
    images = classifier.preprocess([photo])
    expected = {"logits": classifier(images)}
    for i, feature_map in enumerate(classifier.pyramid(images), start=1):
        expected[f"F{i}"] = feature_map
    maps = pvt_ref.attention_maps(classifier.params, images, classifier.config)
    expected |= {f"A{stage}.{block}": A for (stage, block), A in maps.items()}
    assert set(answers.classified) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(answers.classified[name], x, rtol=0, atol=NEAR, err_msg=name)
        assert np.ptp(x) > 100 * NEAR, name
    pixels = streets.info.preprocessing.normalize(
        np.ascontiguousarray(answers.street[None].transpose(0, 3, 1, 2)), images
    )
    logits = resize_logits(streets(pixels), try_it.STREET)
    np.testing.assert_allclose(answers.segmented["logits"], logits, rtol=0, atol=NEAR)
    (class_map,) = streets.segment(Image.fromarray(answers.street))
    second, first = np.sort(logits[0], axis=0)[-2:]
    clear = first - second > 2 * NEAR
    found = answers.segmented["logits"][0].argmax(axis=0)
    np.testing.assert_array_equal(found[clear], class_map[clear])
    assert clear.mean() > 0.99


def test_nothing_large_is_fetched_before_somebody_asks_and_all_is_the_site_s_own(ran, address):
    assert not [url for url in ran.before if any(part in url for part in LARGE)]
    large = {url: n for url, n in ran.asked.items() if any(part in url for part in LARGE)}
    assert len(large) == 4
    assert all(url.startswith(address) for url in ran.asked)
    megabytes = sum(large.values()) / 1e6
    assert f"downloads about {megabytes:.0f} MB" in ran.tab.locator("article").inner_text()


def test_the_page_computes_what_the_package_does(ran, models):
    check_answers(ran.answers, models)


def test_the_figures_show_these_numbers(ran, models):
    tab, answers = ran.tab, ran.answers
    classifier, streets = models
    for made in tab.locator(".explore .made").all():
        assert not made.is_visible()
    logits = answers.classified["logits"][0].astype(float)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    rows = cells(tab, "#try-classes .panel")
    order = np.argsort(-p)
    assert rows == [[classifier.classes[k], f"{p[k]:.4f}"] for k in order]
    assert f"ten classes: {rows[0][0]}." in tab.locator("#try .words").inner_text()

    pictures = tab.locator("#try-maps canvas").all()
    sizes = [tuple(e.evaluate("e => [e.height, e.width]")) for e in pictures]
    assert sizes == [(128, 128), (64, 64), (32, 32), (16, 16), (8, 8)]

    panel = tab.locator("#try-attention .panel")
    assert len(panel.locator(".layer option").all()) == 10
    for place, (stage, block, head) in {
        0: (1, 0, 0),
        3: (2, 1, 2),
        7: (3, 3, -1),
        9: (4, 1, 5),
    }.items():
        A = answers.classified[f"A{stage}.{block}"][0].astype(float)
        A = A.mean(axis=0) if head < 0 else A[head]
        panel.locator(".layer").select_option(str(place))
        assert (
            panel.locator(".layer option:checked").inner_text() == f"stage {stage}, block {block}"
        )
        panel.locator(".head").select_option(str(head))
        side, cls = 128 // 2**stage, int(stage == 4)
        row, column = side // 3, side - 1
        panel.locator(".row").fill(str(row))
        panel.locator(".column").fill(str(column))
        looked = A[cls + row * side + column]
        words = panel.locator(".words").inner_text()
        found = re.search(r"key row (\d+), column (\d+) of 8×8, with weight ([\d.]+)\.", words)
        assert 8 * int(found[1]) + int(found[2]) == looked[cls:].argmax()
        assert found[3] == f"{looked[cls:].max():.4f}"
        if cls:
            assert abs(float(re.search(r"token gets ([\d.]+)\.", words)[1]) - looked[0]) < NEAR

    shown = answers.segmented["logits"][0].argmax(axis=0)
    counts = np.bincount(shown.ravel(), minlength=11)
    order = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
    rows = cells(tab, "#try-segmentation .panel")
    assert [name for name, _ in rows] == [streets.classes[k] for k in order]
    for (_, share), k in zip(rows, order, strict=True):
        assert abs(float(share.rstrip("%")) - 100 * counts[k] / shown.size) < 0.051


def test_a_map_is_shown_by_the_channels_that_vary_most(ran):
    import try_it

    read = """e => [...e.getContext("2d").getImageData(0, 0, e.width, e.height).data]"""
    for i, canvas in enumerate(ran.tab.locator("#try-maps canvas").all()[1:], start=1):
        colours, best = try_it.most_varying(ran.answers.classified[f"F{i}"][0].astype(float))
        found = np.array(canvas.evaluate(read)).reshape(*colours.shape[:2], 4)[..., :3]
        np.testing.assert_allclose(found, 255 * colours, atol=0.6)
        label = canvas.get_attribute("aria-label")
        assert label.endswith(f"{', '.join(map(str, best))} vary most")


def test_the_figures_made_with_the_page_tell_the_same_story(ran, browser, address):
    noise = []
    tab, _ = opened(browser, address, noise, java_script_enabled=False)
    for name, slack in (("classes", 0.02), ("segmentation", 1.0)):  # another decoder of JPEG
        static, live = (
            {label: float(x.rstrip("%")) for label, x in cells(page, f"#try-{name} {part}")}
            for page, part in ((tab, ".made"), (ran.tab, ".panel"))
        )
        assert list(static)[:3] == list(live)[:3]
        assert all(abs(static[k] - live.get(k, 0)) < slack for k in static)
    for figure in tab.locator(".explore .made").all():
        assert figure.is_visible()
    assert tab.locator("#try").inner_text().strip() == ""  # no control that would do nothing
    tab.context.close()
    assert noise == []


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_the_run_is_accessible_and_fits_a_phone(ran, scheme):
    tab = ran.tab
    tab.evaluate("x => document.body.setAttribute('data-md-color-scheme', x)", scheme)
    for width in (320, 1440):
        tab.set_viewport_size({"width": width, "height": 900})
        fits = "width => document.documentElement.scrollWidth <= width"
        tab.wait_for_function(fits, arg=width)  # once the drawer has moved away
        assert violations(tab) == []
    controls = ".explore select, .explore button, .explore input"
    assert tab.evaluate(f"[...document.querySelectorAll('{controls}')].every(x => x.tabIndex >= 0)")


def test_the_run_prints(ran):
    ran.tab.emulate_media(media="print", color_scheme="dark")
    assert ran.tab.evaluate(_PALE) == []
    ran.tab.emulate_media(media="screen", color_scheme="light")


def test_forced_colours_keep_the_colours_of_classes(ran):
    ran.tab.emulate_media(forced_colors="active")
    swatch = ran.tab.locator("#try-segmentation .panel .swatch").first
    colour = swatch.evaluate("e => getComputedStyle(e).backgroundColor")
    assert colour == swatch.get_attribute("style").removeprefix("background: ")
    ran.tab.emulate_media(forced_colors="none")


def test_a_reader_s_own_picture_is_dropped_and_what_is_none_is_refused(ran, models):
    """Tall, small and half transparent; it is enlarged, and its middle begins at half a pixel."""
    tab = ran.tab
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (233, 91, 4), np.uint8)
    pixels[..., 3] = np.where(np.arange(91) < 40, 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    drop = """([name, data]) => {
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), given = new DataTransfer();
        given.items.add(new File([bytes], name));
        const event = new DragEvent("drop", {dataTransfer: given, bubbles: true, cancelable: true});
        document.querySelector("#try .panel").dispatchEvent(event);
    }"""
    tab.evaluate(drop, ["notes.txt", base64.b64encode(b"no picture").decode()])
    words = tab.locator("#try .words")
    tab.wait_for_function(_ENDED, timeout=PATIENCE)
    assert words.inner_text().startswith("notes.txt: this browser cannot open it as a picture")
    tab.evaluate(drop, ["<b>drawn</b>.png", base64.b64encode(file.getvalue()).decode()])
    tab.wait_for_function(
        "() => document.getElementById('try').answers.picture.width === 91", timeout=PATIENCE
    )
    assert "ran on <b>drawn</b>.png in" in words.inner_text()
    answers = answers_of(tab)
    white = np.where(pixels[..., 3:] == 0, 255, pixels[..., :3])
    np.testing.assert_array_equal(answers.photo, white)
    check_answers(answers, models)


def test_a_network_that_is_not_there_is_told_and_the_figures_stay(browser, address):
    noise = []
    tab, _ = opened(browser, address, noise)
    tab.context.route("**/camvid.onnx", lambda route: route.fulfill(status=404))
    tab.locator("#try button").click()
    tab.wait_for_function(_ENDED, timeout=PATIENCE)
    words = tab.locator("#try .words").inner_text()
    assert "the temple: assets/networks/camvid.onnx could not be fetched (status 404)" in words
    assert tab.locator("#try-classes .made").is_visible()
    assert [text for text in noise if "404" not in text] == []
    tab.context.close()


def test_opened_as_a_file_it_says_why_it_does_not_run(browser):
    tab = browser.new_page()
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((SITE / "try.html").as_uri())
    assert "browsers let such a page read no other file" in tab.locator("#try .words").inner_text()
    assert tab.locator("#try button").is_disabled()
    assert tab.locator("#try input").is_disabled()
    assert tab.locator("#try-classes .made").is_visible()
    assert not [url for url in asked if any(part in url for part in LARGE)]
    tab.close()
