"""The pictures of the network's build show the package's own arrays, cell by cell."""

import base64
import html
import importlib
import io
import itertools
import re
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from closeness import assert_near
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_hex
from PIL import Image

import pvt_ref
from pvt_ref import REFERENCE
from pvt_ref.blocks.mlp import mlp_forward
from pvt_ref.blocks.sra import sra_forward
from pvt_ref.blocks.transformer import block, block_forward
from pvt_ref.layers.layer_norm import layer_norm_forward
from pvt_ref.layers.linear import linear_forward
from pvt_ref.layers.patch_embed import patch_embed

DOCS = Path(__file__).parents[1] / "docs"
PHOTO = DOCS.parent / "examples" / "chelsea.jpg"


@pytest.fixture(scope="module")
def anatomy():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(DOCS / "tools"))
        yield importlib.import_module("anatomy")
    for name in [path.stem for path in (DOCS / "tools").glob("*.py")]:
        sys.modules.pop(name, None)


def pictures(drawn: str) -> list[np.ndarray]:
    """The pictures of cells in figures, in the order in which they were drawn."""
    found = re.findall(r'href="data:image/png;base64,([^"]+)"', drawn)
    assert found
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found
    ]


def coloured(x: np.ndarray, low: float, high: float, colours: str = "viridis") -> np.ndarray:
    return mpl.colormaps[colours](Normalize(low, high)(x), bytes=True)[..., :3]


def written(drawn: str) -> str:
    """The text of figures, without spaces: symbols are set glyph by glyph."""
    texts = re.findall(r"<text\b.*?</text>", drawn)
    return re.sub(r"\s", "", html.unescape(re.sub(r"<[^>]+>", "", "|".join(texts))))


def spread(x: np.ndarray) -> np.ndarray:
    """How far each token (n, C) is from the mean one."""
    return np.sqrt(np.sum((x - x.mean(axis=0)) ** 2, axis=1))


def test_the_stages_are_the_pyramid_of_the_photo(anatomy):
    model = pvt_ref.load("imagenette")
    images = model.preprocess([PHOTO])
    drawn = anatomy.architecture()
    photo, *maps = pictures(drawn)[::2]
    np.testing.assert_array_equal(photo, model.info.preprocessing.pixels([PHOTO], 128)[0])
    bill = pvt_ref.count_cost(model.config, 128, pyramid=True)
    for F, shown, stage, L in zip(
        model.pyramid(images), maps, bill.stages, model.config.depths, strict=True
    ):
        _, C, H, W = F.shape
        x = spread(F[0].reshape(C, -1).T).reshape(H, W)
        assert shown.shape == (H, W, 3)
        assert_near(
            shown, coloured(x, x.min(), x.max()), 5e-3
        )  # a level of a colour, here or there
        told = rf"stage{stage.stage}\|patchembedding2×2\|L{stage.stage}={L}blocks\|{stage.keys}keys"
        assert re.search(rf"{told}\|F{stage.stage}:{H}×{W}×{C}\|", written(drawn))
        assert f"{H} by {W} cells and {C} channels" in drawn


def test_the_arrays_below_are_to_one_scale_in_all_directions(anatomy):
    model = pvt_ref.load("imagenette")
    grids, C = model.config.grids(128, 128), model.config.embed_dims
    for i in range(5):
        ax = anatomy.stage_figure(i).axes[0]
        left, right, bottom, top = ax.images[1].get_extent()
        H, W = grids[i - 1] if i else (128, 128)
        for face in ax.patches[-2:]:
            back = np.subtract(face.get_xy()[3], face.get_xy()[0])
            length = 2 * np.hypot(*back) / (C[i - 1] if i else 3)
            np.testing.assert_allclose(
                [(right - left) / W, (bottom - top) / H, length], anatomy.CELL, rtol=1e-3
            )


def test_the_frame_on_every_map_is_on_the_same_pixels(anatomy):
    for i, count in enumerate((128, 64, 32, 16, 8)):
        ax = anatomy.stage_figure(i).axes[0]
        (frame,) = [p for p in ax.patches if to_hex(p.get_edgecolor()) == anatomy.MARK]
        left, right, _, top = ax.images[0].get_extent()
        cell = (right - left) / count
        first = np.subtract(frame.get_xy(), (left, top)) / cell
        assert_near(first, np.array([2, 2]) * count / 8, 1e-9)
        assert_near(np.array([frame.get_width(), frame.get_height()]) / cell, [count / 8] * 2, 1e-9)


def test_the_wiring_is_that_of_the_block(anatomy):
    model = pvt_ref.load("imagenette")
    calls = []
    ops = REFERENCE.watched(calls.append, only=[block])
    pvt_ref.forward_pyramid(model.params, model.preprocess([PHOTO]), model.config, ops=ops)
    p, x, _, grid, settings = calls[sum(model.config.depths[:2])].args[:5]
    assert p is model.params.block3[0]
    normed, _ = layer_norm_forward(p.norm1, x, REFERENCE, settings.norm_eps)
    branch, _ = sra_forward(p.attn, normed, REFERENCE, grid, settings.attn)
    middle = x + branch
    normed2, _ = layer_norm_forward(p.norm2, middle, REFERENCE, settings.norm_eps)
    branch2, _ = mlp_forward(p.mlp, normed2, REFERENCE)
    y, _ = block_forward(p, x, REFERENCE, grid, settings)
    lines = [array[0] for array in (x, normed, branch, middle, normed2, branch2, y)]
    found = anatomy.block_lines()
    assert found.grid == grid
    for ours, line in zip(found.lines.values(), lines, strict=True):
        assert_near(ours, line, 1e-6)
    drawn = anatomy.wiring()
    values = [spread(line) for line in lines]
    most = max(value.max() for value in values)
    for shown, value in zip(pictures(drawn), values, strict=True):
        assert_near(shown, coloured(value.reshape(grid), 0, most), 5e-3)
    eye = 4 * grid[1] + 4
    assert anatomy.eye_on(grid) == (4, 4)
    numbers = re.findall(r"256×192\|eye:([\d.]+)", written(drawn))
    assert numbers == [f"{value[eye]:.1f}" for value in values]
    assert "SRA:256queries,64keys,6heads" in written(drawn).replace("|", "")
    assert "MLP:192→768→192," in written(drawn)
    said = re.search(r"numbers are: x (.*), SRA (.*), their sum (.*), MLP (.*), y (.*)\.\"", drawn)
    assert [*said.groups()] == [numbers[k] for k in (0, 2, 3, 5, 6)]


def test_a_skip_goes_from_before_a_norm_to_the_sum(anatomy):
    ax = anatomy.wiring_figure().axes[0]
    dots = [
        line.get_ydata()[0]
        for line in ax.lines
        if line.get_marker() == "o" and line.get_markersize() < 5
    ]
    sums = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "+"]
    skips = [
        sorted(line.get_ydata())
        for line in ax.lines
        if len(set(line.get_xdata())) == 1 < len(line.get_xdata()) and line.get_xdata()[0] < 0.5
    ]
    assert_near(np.ravel(skips), [dots[0], sums[0], dots[3], sums[1]], 1e-9)
    assert dots[2] < sums[0] < dots[3] < dots[5] < sums[1] < dots[6]


def test_the_key_is_made_as_the_package_makes_it(anatomy):
    model = pvt_ref.load("cifar10")
    calls = []
    ops = REFERENCE.watched(calls.append, only=[patch_embed], params=model.params)
    images = model.preprocess([PHOTO], 64)
    pvt_ref.forward_pyramid(model.params, images, model.config, ops=ops)
    (call,) = [call for call in calls if call.path.startswith("block2.0.attn.sr")]
    tokens, reduced = call.args[1][0], call.result[0][0]
    attn = model.params.block2[0].attn
    seen = anatomy.one_patch()
    H, W, C = tokens.shape
    assert (seen.grid, seen.R, seen.place) == ((16, 16), 2, (2, 2)) == ((H, W), 2, (2, 2))
    number = 2 * 8 + 2
    strips = [tokens[4 + s, 4 + t] for s, t in itertools.product(range(2), repeat=2)]
    assert_near(seen.row, np.concatenate(strips), 1e-6)
    normed, _ = layer_norm_forward(attn.norm, seen.projected, REFERENCE, 1e-5)
    for r in (seen.reduced, normed):
        assert_near(r, reduced[number], 1e-5)
    kv, _ = linear_forward(attn.kv, reduced, REFERENCE)
    assert_near(seen.keys, kv[:, :C], 1e-5)
    assert_near(seen.key, kv[number, :C], 1e-5)
    # and drawn: photo, strips, the row, W^S, three columns, the keys
    drawn = pictures(anatomy.to_one_key())
    model_pixels = model.info.preprocessing.pixels([PHOTO], 64)[0]
    np.testing.assert_array_equal(drawn[0], model_pixels)
    most = np.abs(seen.row).max()
    for shown, strip in zip(drawn[1:5], strips, strict=True):
        assert_near(shown[0], coloured(strip, -most, most, "RdBu_r"), 5e-3)
    np.testing.assert_array_equal(drawn[5], np.concatenate(drawn[1:5], axis=1))
    W_S = attn.sr.weight.transpose(0, 2, 3, 1).reshape(C, -1)
    end = np.percentile(np.abs(W_S), 99)
    assert_near(drawn[6], coloured(W_S, -end, end, "RdBu_r"), 5e-3)
    for shown, x in zip(
        drawn[7:10], (seen.projected, reduced[number], kv[number, :C]), strict=True
    ):
        assert_near(shown[:, 0], coloured(x, -abs(x).max(), abs(x).max(), "RdBu_r"), 5e-3)
    far = spread(kv[:, :C]).reshape(8, 8)
    assert_near(drawn[10], coloured(far, far.min(), far.max()), 5e-3)
    assert len(drawn) == 11


def test_a_column_of_w_s_stands_under_its_number(anatomy):
    images = anatomy.key_figure().axes[0].images
    row, matrix, *columns = images[5:10]
    assert row.get_array().shape == (1, 256)
    assert matrix.get_array().shape == (64, 256)
    assert row.get_extent()[:2] == matrix.get_extent()[:2]
    for column in columns:  # its rows stand beside the numbers that they make
        assert column.get_array().shape == (64, 1)
        assert column.get_extent()[2:] == matrix.get_extent()[2:]


def test_the_first_page_shows_what_segment_gives(anatomy):
    model = pvt_ref.load("camvid")
    photo = anatomy.middle(Image.open(DOCS / "images" / "temple.jpg").convert("RGB"))
    (class_map,) = model.segment(photo)
    drawn = anatomy.segmentation()
    first, *maps, last = pictures(drawn)
    np.testing.assert_array_equal(first, np.asarray(photo))
    colours = np.array(model.info.colours)[class_map]
    assert np.abs(last - (0.45 * np.asarray(photo) + 0.55 * colours)).max() <= 0.51
    given = (np.asarray(photo) / 255 - model.info.preprocessing.mean) / model.info.preprocessing.std
    images = given.transpose(2, 0, 1)[None].astype(np.float32)
    for i, (F, shown) in enumerate(zip(model.pyramid(images), maps, strict=True), start=1):
        _, C, H, W = F.shape
        best = F[0][np.argsort(-F[0].var(axis=(1, 2)))[0]]
        assert_near(shown[..., 0], 255 * (best - best.min()) / np.ptp(best), 2e-2)
        assert f"F{i}:{H}×{W}×{C}" in written(drawn)
    legend = re.findall(r"rgb\((.*?)\)\"></span>(\w+) (\d+)%</span>", drawn)
    assert sum(int(share) for _, _, share in legend) > 97
    for colour, name, share in legend:
        k = model.classes.index(name)
        assert colour == "{}, {}, {}".format(*model.info.colours[k])
        assert share == f"{100 * np.mean(class_map == k):.0f}"


FIGURES = ("architecture", "wiring", "to_one_key", "segmentation")


@pytest.mark.parametrize("name", FIGURES)
def test_computed_and_drawn_twice_a_figure_has_the_same_bytes(name, anatomy):
    once = getattr(anatomy, name)()
    for computed in (
        anatomy.stages,
        anatomy.block_lines,
        anatomy.one_patch,
        anatomy.street_network,
    ):
        computed.cache_clear()
    assert getattr(anatomy, name)() == once
    ids = re.findall(r'\bid="([^"]+)"', once)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_needs_no_more_than_a_phone_and_tells_what_is_seen(name, anatomy):
    drawn = getattr(anatomy, name)()
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)" style="min-width:0;', drawn)
    assert len(labels) == drawn.count("<svg") == drawn.count("min-width:0")
    assert all(len(label) > 60 for label in labels)
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize(
    "part", [*(f"stage {i}" for i in range(5)), "wiring", "key", *(f"picture {i}" for i in (0, 1))]
)
def test_no_text_is_cut_or_lies_on_another(part, anatomy):
    kind, _, number = part.partition(" ")
    if kind == "stage":
        figure = anatomy.stage_figure(int(number))
    elif kind == "picture":
        words = [("classes", "read from all four"), ("stage 1", "$F_1$: 128×128×256")][int(number)]
        figure = anatomy.picture_figure(np.zeros((3, 4, 3), np.uint8), *words, False)
    else:
        figure = getattr(anatomy, f"{kind}_figure")()
    renderer = FigureCanvasAgg(figure).get_renderer()
    (ax,) = figure.axes
    texts = [(text.get_text(), text.get_window_extent(renderer)) for text in ax.texts]
    assert len(texts) >= 2
    for words, box in texts:
        inside = figure.bbox.x0, figure.bbox.y0, -figure.bbox.x1, -figure.bbox.y1
        assert np.all(np.less_equal(inside, [box.x0, box.y0, -box.x1, -box.y1])), words
    for (words, one), (others, two) in itertools.combinations(texts, 2):
        assert not one.padded(-1).overlaps(two), f"{words!r} and {others!r}"
    for image, (words, box) in itertools.product(ax.images, texts):
        assert not box.padded(-1).overlaps(image.get_window_extent(renderer)), words


def test_readme_shows_the_stages_as_they_are(anatomy):
    stored = anatomy.README_PICTURE.read_text("utf-8")
    assert "images/stages.svg" in (DOCS.parent / "README.md").read_text("utf-8")
    now = anatomy.readme_picture()
    renew = "python docs/tools/anatomy.py renews it"
    assert written(stored) == written(now), renew
    for old, new in zip(pictures(stored), pictures(now), strict=True):
        assert_near(old.astype(float), new.astype(float), 2e-2, renew)
    names = r"--figure-[\w]+"
    (style,) = re.findall(r"<style>(.*?)</style>", stored)
    day, night = style.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(rf"var\(({names})\)", stored))
    assert used <= set(re.findall(names, day)) == set(re.findall(names, night))
    assert stored.count("<svg") == 6
