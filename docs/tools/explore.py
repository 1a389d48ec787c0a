"""What the interactive figures show: numbers of the package, put into the page as JSON.

Each function returns HTML: a plain table or picture that says the same without JavaScript, and the
data for a script of the same name in assets/, which adds the controls.
"""

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import pvt_ref
from pvt_ref import REFERENCE, PVTConfig
from pvt_ref.blocks.sra import sra_forward
from pvt_ref.layers.attention import attention
from pvt_ref.layers.linear import linear
from pvt_ref.ops import Call

PHOTO = Path(__file__).parents[2] / "examples" / "chelsea.jpg"

#: The side at which the photo is looked at: twice that of the training, so that patches are small.
SIDE = 64


def widget(name: str, data: Any, fallback: str) -> str:
    """The place of an interactive figure: its fallback, and the data of its script."""
    record = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="explore" id="{name}">{fallback}'
        f'<script type="application/json">{record}</script></div>'
    )


def table_of(heading: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heading)
    body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# The shapes of SRA --------------------------------------------------------------------------------

#: Symbol, formula, shape in letters, what happens,
#: and the arrays that it is drawn beside; in the order of sra_forward.
_SRA_STEPS = (
    (
        "x",
        "LN(input of the block)",
        "B, n, C",
        "The normalised tokens, one row for each cell of the map.",
        "",
    ),
    (
        "q",
        "x W^Q + b",
        "B, n, C",
        "A query for every token.",
        "x",
    ),
    (
        "patches",
        "Reshape(x, R)",
        "B, m, R·R·C",
        "The map cut into patches of R×R tokens, each laid out in one row.",
        "x",
    ),
    (
        "reduced",
        "LN(patches W^S + b)",
        "B, m, C",
        "SR(x): each patch brought back to C channels, and normalised.",
        "patches",
    ),
    (
        "kv",
        "reduced W^KV + b",
        "B, m, 2C",
        "Keys in the first C channels, values in the others; where R = 1, made from x itself.",
        "reduced",
    ),
    (
        "q_heads",
        "split_heads(q)",
        "B, N, n, d",
        "Each head takes d of the C channels.",
        "q",
    ),
    (
        "k",
        "split_heads(kv, first half)",
        "B, N, m, d",
        "m keys: one for each patch.",
        "q_heads",
    ),
    (
        "v",
        "split_heads(kv, second half)",
        "B, N, m, d",
        "As many values.",
        "k",
    ),
    (
        "weights",
        "Softmax(q k^T / √d)",
        "B, N, n, m",
        "Where each query looks. Without reduction it would have n columns, R·R times as many.",
        "q_heads k",
    ),
    (
        "heads",
        "weights v",
        "B, N, n, d",
        "What each query found.",
        "weights v",
    ),
    (
        "merged",
        "merge_heads(heads)",
        "B, n, C",
        "The heads side by side.",
        "heads",
    ),
    (
        "y",
        "merged W^O + b",
        "B, n, C",
        "As many tokens as before.",
        "merged",
    ),
)


def sra_shapes(config: PVTConfig, i: int, size: int = 224) -> dict[str, tuple[int, ...]]:
    """The shapes of every array of one SRA, taken from a run of stage i."""
    stage = config.of_stage(i)
    grid = config.grids(size, size)[i - 1]
    weights = pvt_ref.init_params(config, np.random.default_rng(0)).of_stage(i).blocks[0].attn
    seen: list[tuple[int, ...]] = []  # of the linear layers: in, out, in, out, ...
    shapes: dict[str, tuple[int, ...]] = {}

    def look(call: Call) -> None:
        x, (y, cache) = call.args[1], call.result
        if call.operation == linear:
            seen.extend((x.shape, y.shape))
        else:
            q, k, v = x
            shapes.update(q_heads=q.shape, k=k.shape, v=v.shape, heads=y.shape)
            shapes["weights"] = cache.weights.shape

    ops = REFERENCE.watched(look, only=[linear, attention])
    x = np.zeros((1, grid[0] * grid[1], stage.embed_dim), np.float32)
    y, _ = sra_forward(weights, x, ops, grid, stage.blocks[0].attn)
    shapes.update(x=seen[0], q=seen[1], kv=seen[-3], merged=seen[-2], y=y.shape)
    if stage.sr_ratio > 1:
        shapes.update(patches=seen[2], reduced=seen[3])
    return shapes


def sra_steps(config: PVTConfig) -> str:
    """A step-through of SRA's shapes in the four stages, dense (without cls token)."""
    stages = [sra_shapes(config, i) for i in range(1, 5)]
    steps = [
        {"symbol": symbol, "formula": formula, "letters": letters, "words": words,
         "from": beside.split(), "shapes": [stage.get(symbol) for stage in stages]}
        for symbol, formula, letters, words, beside in _SRA_STEPS
    ]  # fmt: skip
    rows = [
        [f"<code>{s['symbol']}</code> = {s['formula']}", f"({s['letters']})"]
        + [" × ".join(map(str, shape)) if shape else "(R = 1: none)" for shape in s["shapes"]]
        for s in steps
    ]
    table = table_of(["array", "shape", *(f"stage {i}" for i in range(1, 5))], rows)
    data = {"steps": steps, "R": config.sr_ratios, "N": config.num_heads}
    return widget("sra-steps", data, table)


# Cost by image size and R -------------------------------------------------------------------------

SIDES = range(64, 1025, 64)
RATIOS = (8, 4, 2, 1)


def reductions(R: int) -> tuple[int, ...]:
    """R for stage 1, halved from stage to stage, at least 1."""
    return tuple(max(R // 2**i, 1) for i in range(4))


def cost_table(name: str = "pvt_tiny") -> str:
    """Tokens, MACs and memory of every stage, for images of many sizes and for four R."""
    variant = pvt_ref.VARIANTS[name]
    bills: dict[str, Any] = {}
    for R in RATIOS:
        config = dataclasses.replace(variant, sr_ratios=reductions(R))
        for side in SIDES:
            bill = pvt_ref.count_cost(config, side, pyramid=True)
            bills[f"{side},{R}"] = {
                "n": [s.tokens for s in bill.stages],
                "m": [s.keys for s in bill.stages],
                "attention": [
                    item.macs for item in bill.items if item.operation == "attn.weights"
                ],
                "macs": [bill.of_stage(i).macs for i in range(1, 5)],
                "peak": [bill.of_stage(i).peak_bytes for i in range(1, 5)],
            }  # fmt: skip
    data = {
        "name": name, "sides": list(SIDES), "ratios": list(RATIOS), "C": variant.embed_dims,
        "L": variant.depths, "reductions": {R: reductions(R) for R in RATIOS}, "bills": bills,
    }  # fmt: skip
    rows = [
        [f"{side}×{side}"]
        + [f"{sum(bills[f'{side},{R}']['macs']) / 1e9:,.1f}" for R in RATIOS]
        + [f"{max(bills[f'{side},{R}']['peak']) / 1e6:,.0f}" for R in RATIOS]
        for side in (256, 512, 1024)
    ]
    heading = ["image"] + [f"GMACs, R = {R}" for R in RATIOS] + [f"MB, R = {R}" for R in RATIOS]
    return widget("cost-table", data, table_of(heading, rows))


# Attention on a photo -----------------------------------------------------------------------------


def photo_and_attention() -> tuple[np.ndarray, dict[tuple[int, int], np.ndarray], PVTConfig]:
    """The photo as the network gets it, (1, 3, SIDE, SIDE), and its attention_maps."""
    model = pvt_ref.load("cifar10")
    images = model.preprocess([PHOTO], SIDE)
    return images, pvt_ref.attention_maps(model.params, images, model.config), model.config


def pixels(images: np.ndarray) -> np.ndarray:
    """A preprocessed image as (H, W, 3) of uint8."""
    given = pvt_ref.load("cifar10").info.preprocessing
    x = images[0].transpose(1, 2, 0) * given.std + given.mean
    return np.clip(np.round(255 * x), 0, 255).astype(np.uint8)


def attention_explorer(fallback: str) -> str:
    """Click a patch of the photo, see where it looks, at every stage, block and head.

    Args:
        fallback: HTML of a figure that is there without JavaScript.
    """
    images, maps, config = photo_and_attention()
    layers = []
    for (stage, block), weights in maps.items():
        H, W = config.grids(SIDE, SIDE)[stage - 1]
        R = config.sr_ratios[stage - 1]
        cls = weights.shape[2] - H * W  # rows and columns before those of the map
        A = weights[0, :, cls:, cls:]  # (N, n, m)
        top = float(A.max())
        steps = np.round(A / top * 65535).astype("<u2")
        layers.append({
            "stage": stage, "block": block, "grid": [H, W], "keys": [H // R, W // R],
            "heads": A.shape[0], "top": top, "cls": cls,
            "weights": base64.b64encode(steps.tobytes()).decode(),
        })  # fmt: skip
    file = io.BytesIO()
    Image.fromarray(pixels(images)).save(file, "PNG")
    photo = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return widget("attention", {"photo": photo, "side": SIDE, "layers": layers}, fallback)
