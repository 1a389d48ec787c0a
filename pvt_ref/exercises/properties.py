"""Laws of single operations: what must hold for every input.

Every function takes a trial and raises LawError; its first line states the law for the reader.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from pvt_ref.testing.closeness import LawError, close
from pvt_ref.testing.laws import Trial
from pvt_ref.tree import map_arrays

_NEAR = 1e-9


def _y(trial: Trial, **changed: Any) -> Any:
    """The output, with some of the inputs replaced by name (two underscores for a dot)."""
    if "x" in changed:  # whatever its name is
        trial = replace(trial, x=changed.pop("x"))
    return trial.given({name.replace("__", "."): a for name, a in changed.items()}).run()[0]


def _alike(y: Any, expected: Any, what: str = "y", floor: float = 1.0) -> None:
    expected = np.asarray(expected)
    close(y, expected, _NEAR, what, floor=floor)


def _gradients(trial: Trial, dy: Any = None) -> dict[str, Any]:
    y, cache = trial.run()
    return trial.back(cache, trial.drawn(7, y) if dy is None else dy)


def _unit(trial: Trial) -> Trial:
    """A norm that only normalises: scale 1, shift 0, eps 0."""
    C = trial.p.weight.shape
    return replace(trial.given({"weight": np.ones(C), "bias": np.zeros(C)}), settings=(0.0,))


# Linear -------------------------------------------------------------------------------------------


def bias_at_zero(trial: Trial) -> None:
    """For an input of zeros, y is the bias."""
    y = _y(trial, x=np.zeros_like(trial.x))
    bias = 0.0 if trial.p.bias is None else trial.p.bias
    _alike(y, np.zeros_like(y) + bias)


# Layer norm ---------------------------------------------------------------------------------------


def tokens_apart(trial: Trial) -> None:
    """No token sees another."""
    y, _ = trial.run()
    for index in np.ndindex(trial.x.shape[:-1]):
        cut = tuple(slice(i, i + 1) for i in index)
        alone = _y(trial, x=trial.x[cut])
        _alike(alone, y[cut], f"y of token {index}, computed alone")


def mean_zero(trial: Trial) -> None:
    """With scale 1 and shift 0 every token has mean 0."""
    y, _ = _unit(trial).run()
    _alike(np.mean(y, axis=-1), np.zeros(y.shape[:-1]), "the mean of y over its channels")


def variance_one(trial: Trial) -> None:
    """With scale 1, shift 0 and eps 0 every token has variance 1: a mean over all C channels."""
    y, _ = _unit(trial).run()
    _alike(np.mean(y * y, axis=-1), np.ones(y.shape[:-1]), "the mean of y^2 over its channels")


def scales_with_eps(trial: Trial) -> None:
    """LN(a x, a^2 eps) = LN(x, eps): eps stands beside the variance, under the root."""
    a = 3.0
    eps = 0.1
    y, _ = replace(trial, settings=(eps,)).run()
    moved, _ = replace(trial.given({"x": a * trial.x}), settings=(a * a * eps,)).run()
    _alike(moved, y, "y of 3 x with 9 eps")


def shift_of_token(trial: Trial) -> None:
    """A number added to all channels of a token changes nothing."""
    y, _ = trial.run()
    shifts = trial.drawn(5, trial.x[..., :1])
    _alike(_y(trial, x=trial.x + shifts), y, "y of the shifted token")


def keeps_digits(trial: Trial) -> None:
    """Far from zero the digits of a token are kept: x - mean first, squares of that afterwards."""
    x = 1e6 + trial.x
    wide = x.astype(np.longdouble)
    c = wide - wide.mean(axis=-1, keepdims=True)
    expected = c / np.sqrt((c * c).mean(axis=-1, keepdims=True))
    y, _ = _unit(trial).given({"x": x}).run()
    close(y, expected.astype(float), 1e-6, "y of tokens near 1e6")


def gradient_mean_zero(trial: Trial) -> None:
    """dx of a token sums to 0, since a shift of the token changes nothing."""
    dx = _gradients(trial)["x"]
    _alike(np.sum(dx, axis=-1), np.zeros(dx.shape[:-1]), "the sum of dx over the channels")


def gradient_across(trial: Trial) -> None:
    """With eps 0, <dx, x_hat> is 0 for every token, since its size changes nothing."""
    x_hat, _ = _unit(trial).run()
    dx = _gradients(replace(trial, settings=(0.0,)))["x"]
    _alike(np.sum(dx * x_hat, axis=-1), np.zeros(dx.shape[:-1]), "<dx, x_hat> of a token")


def gradient_counts_weight(trial: Trial) -> None:
    """With twice the weight dx is twice as large."""
    dx = _gradients(trial)["x"]
    twice = _gradients(trial.given({"weight": 2 * trial.p.weight}))["x"]
    _alike(twice, 2 * dx, "dx with twice the weight")


# GELU, softmax, cross-entropy ---------------------------------------------------------------------


def gelu_mirror(trial: Trial) -> None:
    """GELU(x) - GELU(-x) = x."""
    x = trial.x
    _alike(_y(trial) - _y(trial, x=-x), x, "GELU(x) - GELU(-x)")


def gelu_near_one(trial: Trial) -> None:
    """GELU(1) is 0.84, the probability that a normal number is below 1."""
    one = np.ones_like(trial.x)
    close(_y(trial, x=one), 0.8413447460685429 * one, 1e-2, "GELU(1)")


def gelu_of_one(trial: Trial) -> None:
    """GELU(1) = 0.8413447460685429: the exact function, not an approximation."""
    one = np.ones_like(trial.x)
    close(_y(trial, x=one), 0.8413447460685429 * one, 1e-12, "GELU(1)")


def gelu_slopes(trial: Trial) -> None:
    """The slopes at x and -x sum to 1."""
    one = np.ones_like(trial.x)
    up = _gradients(trial, one)["x"]
    down = _gradients(trial.given({"x": -trial.x}), one)["x"]
    _alike(up + down, one, "GELU'(x) + GELU'(-x)")


def rows_sum_to_one(trial: Trial) -> None:
    """A row sums to 1."""
    y, _ = trial.run()
    _alike(np.sum(y, axis=-1), np.ones(y.shape[:-1]), "the sum of a row of y")


def shift_of_row(trial: Trial) -> None:
    """A number added to a whole row changes nothing."""
    shifts = 10 * trial.drawn(5, trial.x[..., :1])
    _alike(_y(trial, x=trial.x + shifts), _y(trial), "y of the shifted row")


def no_overflow(trial: Trial) -> None:
    """Nothing overflows: adding 1000 to all scores changes nothing."""
    _alike(_y(trial, x=trial.x + 1000.0), _y(trial), "y of x + 1000")


def gradient_rows_zero(trial: Trial) -> None:
    """A row of dx sums to 0, since a shift of the row changes nothing."""
    (dx,) = _gradients(trial).values()
    _alike(np.sum(dx, axis=-1), np.zeros(dx.shape[:-1]), "the sum of a row of dx")


def loss_at_zero(trial: Trial) -> None:
    """For K equal logits the loss is log K, whatever the number of samples."""
    K = trial.x.shape[-1]
    _alike(_y(trial, x=np.zeros_like(trial.x)), math.log(K), "the loss of equal logits")


def loss_is_a_mean(trial: Trial) -> None:
    """Doubling the batch leaves the loss unchanged: it is a mean."""
    twice = np.concatenate([trial.x, trial.x])
    labels = np.concatenate([trial.settings[0]] * 2)
    doubled = replace(trial, x=twice, settings=(labels,))
    _alike(doubled.run()[0], _y(trial), "the loss of the batch twice over")


# Patches ------------------------------------------------------------------------------------------


def one_pixel_one_token(trial: Trial) -> None:
    """A pixel changes exactly one token, that of its own patch, in raster order."""
    P = trial.p.proj.weight.shape[-1]
    H, W = trial.x.shape[1:3]
    y, _ = trial.run()
    for row, col in ((0, W - 1), (H - 1, 0)):
        x = trial.x.copy()
        x[0, row, col, 0] += 0.5
        moved = np.flatnonzero((_y(trial, x=x) != y).any(axis=-1)[0]).tolist()
        own = (row // P) * (W // P) + col // P
        if moved != [own]:
            what = f"the pixel in row {row} and column {col} changes the tokens {moved}"
            raise LawError("values", f"{what}; it must change only token {own}", index=(row, col))


def tokens_are_normed(trial: Trial) -> None:
    """The tokens are normed: three times the projection with nine times eps changes nothing."""
    larger = {"proj.weight": 3 * trial.p.proj.weight, "proj.bias": 3 * trial.p.proj.bias}
    scaled = replace(trial.given(larger), settings=(9 * trial.settings[0],))
    _alike(scaled.run()[0], _y(trial), "y of the larger projection")


def norm_comes_first(trial: Trial) -> None:
    """dproj.bias sums to 0, since the norm subtracts what is added to all channels."""
    g = _gradients(trial)["proj.bias"]
    _alike(np.sum(g), 0.0, "the sum of dproj.bias", float(np.linalg.norm(g)) + 1.0)


def one_token_one_patch(trial: Trial) -> None:
    """The gradient of a token goes only to the pixels of its own patch."""
    P = trial.p.proj.weight.shape[-1]
    y, _ = trial.run()
    dy = np.zeros_like(y)
    dy[0, 0] = trial.drawn(3, dy[0, 0])
    reached = (_gradients(trial, dy)["x"] != 0).any(axis=(0, 3))
    inside = np.zeros_like(reached)
    inside[:P, :P] = True
    if not np.array_equal(reached, inside):
        index = tuple(int(i) for i in np.argwhere(reached != inside)[0])
        what = f"of dy in token 0, the pixel {index} gets {'some' if reached[index] else 'none'}"
        raise LawError("values", f"{what}; pixels of rows and columns 0 to {P - 1} get some, "
                       "the others none", "x", index)  # fmt: skip


# Positions ----------------------------------------------------------------------------------------


def _table_rows(trial: Trial) -> tuple[np.ndarray, int]:
    """The table without a batch axis, and how many rows belong to a cls token."""
    table_grid = trial.settings[1]
    return trial.p[0], trial.p.shape[1] - math.prod(table_grid)


def own_grid(trial: Trial) -> None:
    """On its own grid the table is added as it is."""
    grid, table_grid, cls = trial.settings
    if grid == table_grid:
        rows, extra = _table_rows(trial)
        _alike(_y(trial), trial.x + (rows if cls else rows[extra:]))


def constant_table(trial: Trial) -> None:
    """A constant table stays constant when it is resized."""
    y = _y(trial, table=np.ones_like(trial.p))
    _alike(y - trial.x, np.ones_like(trial.x), "y - x of a table of ones")


def cls_row_stays(trial: Trial) -> None:
    """The cls row is not resized: it is added to the first token."""
    if trial.settings[2]:
        _alike(_y(trial)[:, 0], trial.x[:, 0] + trial.p[0, 0], "y of the cls token")


def rows_stay_rows(trial: Trial) -> None:
    """A table that changes only from row to row gives tokens that change only from row to row."""
    (H, W), (h, w), cls = trial.settings
    extra = trial.p.shape[1] - h * w
    table = np.zeros_like(trial.p)
    table[:, extra:] = np.repeat(np.arange(h), w)[None, :, None]
    added = (_y(trial, table=table) - trial.x)[:, int(cls) :].reshape(-1, H, W, trial.x.shape[-1])
    _alike(added, np.broadcast_to(added[:, :, :1], added.shape), "y - x in a row")


def borders_clamped(trial: Trial) -> None:
    """If the grid is finer than the table, the first and last token get its corners."""
    (H, W), (h, w), cls = trial.settings
    if h <= H and w <= W:
        rows, extra = _table_rows(trial)
        added = (_y(trial) - trial.x)[:, int(cls) :]
        _alike(added[:, 0], np.broadcast_to(rows[extra], added[:, 0].shape), "y - x of token 0")
        _alike(added[:, -1], np.broadcast_to(rows[-1], added[:, 0].shape), "y - x of the last")


def height_and_width_swap(trial: Trial) -> None:
    """Swapping height and width, of table, grid and tokens, swaps them in the result."""
    grid, table_grid, cls = trial.settings

    def swapped(a: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        extra = a.shape[1] - math.prod(size)
        cells = a[:, extra:].reshape(a.shape[0], *size, -1).swapaxes(1, 2)
        return np.concatenate([a[:, :extra], cells.reshape(a.shape[0], -1, a.shape[-1])], axis=1)

    turned = replace(
        trial.given({"x": swapped(trial.x, grid), "table": swapped(trial.p, table_grid)}),
        settings=(grid[::-1], table_grid[::-1], cls),
    )
    _alike(turned.run()[0], swapped(_y(trial), grid), "y of the swapped grids")


def passes_dy(trial: Trial) -> None:
    """dx is dy."""
    dy = trial.drawn(7, trial.x)
    _alike(_gradients(trial, dy)["x"], dy, "dx")


def nothing_lost(trial: Trial) -> None:
    """The gradients of the table's rows sum to those of the tokens, channel by channel."""
    one = replace(trial, x=trial.x[:1])
    dy = trial.drawn(7, one.x)
    g = _gradients(one, dy)["table"]
    _alike(np.sum(g, axis=(0, 1)), np.sum(dy, axis=(0, 1)), "the sum of dtable over its rows")


def cls_gradient_copied(trial: Trial) -> None:
    """The gradient of the cls row is that of the cls token."""
    if trial.settings[2]:
        one = replace(trial, x=trial.x[:1])
        dy = trial.drawn(7, one.x)
        _alike(_gradients(one, dy)["table"][0, 0], dy[0, 0], "dtable of the cls row")


def unused_row_zero(trial: Trial) -> None:
    """A cls row that was not used gets zeros."""
    _, extra = _table_rows(trial)
    if extra and not trial.settings[2]:
        g = _gradients(trial)["table"][0, 0]
        _alike(g, np.zeros_like(g), "dtable of the cls row")


# Attention ----------------------------------------------------------------------------------------


def values_of_one(trial: Trial) -> None:
    """If all values are 1, the result is 1: it is a mean."""
    y = _y(trial, v=np.ones_like(trial.x[2]))
    _alike(y, np.ones_like(y))


def zero_query(trial: Trial) -> None:
    """A query of zeros gets the plain mean of the values."""
    q, _, v = trial.x
    mean = np.mean(v, axis=-2, keepdims=True)
    _alike(_y(trial, q=np.zeros_like(q)), np.broadcast_to(mean, q.shape), "y of q = 0")


def scale_counts(trial: Trial) -> None:
    """The scores are multiplied by scale: twice the scale and half the queries change nothing."""
    doubled = replace(trial, settings=(2 * trial.settings[0],))
    _alike(_y(doubled, q=trial.x[0] / 2), _y(trial), "y of q / 2 with twice the scale")


def keys_change_places(trial: Trial) -> None:
    """Reordering the keys together with their values changes nothing."""
    _, k, v = trial.x
    _alike(_y(trial, k=k[..., ::-1, :], v=v[..., ::-1, :]), _y(trial), "y of reversed keys")


def key_gradients_cancel(trial: Trial) -> None:
    """The gradients of all keys sum to 0, since a vector added to every key changes nothing."""
    dk = _gradients(trial)["k"]
    _alike(np.sum(dk, axis=-2), np.zeros(dk.shape[:-2] + dk.shape[-1:]), "the sum of dk over keys")


# SRA ----------------------------------------------------------------------------------------------


def _settings(trial: Trial, **changed: Any) -> tuple[Any, ...]:
    grid, settings = trial.settings
    return grid, replace(settings, **changed)


def sra_scale(trial: Trial) -> None:
    """The scores are multiplied by settings.scale: twice that is the same as twice the queries."""
    p = trial.p
    twice = {"q.weight": 2 * p.q.weight}
    if p.q.bias is not None:
        twice["q.bias"] = 2 * p.q.bias
    scaled = replace(trial, settings=_settings(trial, scale=2 * trial.settings[1].scale))
    _alike(_y(scaled), trial.given(twice).run()[0], "y with twice the scale")


def values_stand_last(trial: Trial) -> None:
    """The lower half of kv gives the values: without it, y is the bias of proj."""
    C = trial.x.shape[-1]
    without = {"kv.weight": trial.p.kv.weight.copy()}
    without["kv.weight"][C:] = 0
    if trial.p.kv.bias is not None:
        without["kv.bias"] = trial.p.kv.bias.copy()
        without["kv.bias"][C:] = 0
    y = trial.given(without).run()[0]
    _alike(y, np.broadcast_to(trial.p.proj.bias, y.shape), "y without values")


def heads_change_places(trial: Trial) -> None:
    """Reordering heads, rows of q and kv with columns of proj, changes nothing: d rows each."""
    p, C = trial.p, trial.x.shape[-1]
    N = trial.settings[1].num_heads
    rows = np.concatenate([np.arange(C).reshape(N, -1)[j] for j in reversed(range(N))])
    both = np.concatenate([rows, C + rows])
    moved = {"q.weight": p.q.weight[rows], "kv.weight": p.kv.weight[both]}
    if p.q.bias is not None:
        moved |= {"q.bias": p.q.bias[rows], "kv.bias": p.kv.bias[both]}
    moved["proj.weight"] = p.proj.weight[:, rows]
    _alike(trial.given(moved).run()[0], _y(trial), "y of heads in reverse order")


def reduction_is_normed(trial: Trial) -> None:
    """SR ends in a norm: three times the reduction with nine times eps changes nothing."""
    p, eps = trial.p, trial.settings[1].norm_eps
    if p.sr is not None:
        other = trial.given({"sr.weight": trial.drawn(6, p.sr.weight)}).run()[0]
        if not np.any(np.abs(other - trial.run()[0]) > _NEAR):
            raise LawError("values", "sr.weight has no influence on y", "sr.weight")
        larger = {"sr.weight": 3 * p.sr.weight, "sr.bias": 3 * p.sr.bias}
        scaled = replace(trial.given(larger), settings=_settings(trial, norm_eps=9 * eps))
        _alike(scaled.run()[0], _y(trial), "y of the larger reduction")


def blocks_change_places(trial: Trial) -> None:
    """Reordering whole R x R blocks of tokens reorders their outputs."""
    if trial.p.sr is None:
        return
    R = trial.p.sr.weight.shape[-1]
    H, W = trial.settings[0]

    def turned(x: np.ndarray) -> np.ndarray:
        B, n, C = x.shape
        blocks = x.reshape(B, H // R, R, W // R, R, C)[:, ::-1, :, ::-1]
        return blocks.reshape(B, n, C)

    _alike(_y(trial, x=turned(trial.x)), turned(_y(trial)), "y of blocks in reverse order")


# Blocks, stages, the pyramid ----------------------------------------------------------------------


def _without_branches(trial: Trial) -> Trial:
    """A block whose branches give zeros."""
    ends = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    return trial.given({name: np.zeros_like(trial.inputs()[name]) for name in ends})


def skips(trial: Trial) -> None:
    """If both branches give zeros, y is x."""
    _alike(_without_branches(trial).run()[0], trial.x)


def norms_stand_first(trial: Trial) -> None:
    """A number added to all channels of x is added to y, since the branches begin with a norm."""
    shifts = trial.drawn(5, trial.x[..., :1])
    _alike(_y(trial, x=trial.x + shifts) - shifts, _y(trial), "y of the shifted tokens, less it")


def gradient_skips(trial: Trial) -> None:
    """If both branches give zeros, dx is dy."""
    dy = trial.drawn(7, trial.x)
    _alike(_gradients(_without_branches(trial), dy)["x"], dy, "dx")


def coarse_told_by_fine(trial: Trial) -> None:
    """F_1 depends on the image and stage 1 only: the weights of stage 2 do not change it."""
    zero = map_arrays(np.zeros_like, trial.p[1:])
    first = replace(trial, p=(trial.p[0], *zero)).run()[0][0]
    _alike(first, trial.run()[0][0], "F_1, with zeros for the weights of stage 2")


def maps_add_up(trial: Trial) -> None:
    """The gradient from dF_1 and dF_2 together is the sum of those from each alone."""
    y, cache = trial.run()
    dy = trial.drawn(7, y)
    whole = trial.back(cache, dy)["x"]
    parts = []
    for i in range(len(dy)):
        alone = [d if j == i else np.zeros_like(d) for j, d in enumerate(dy)]
        parts.append(trial.back(trial.run()[1], alone)["x"])
        if not np.any(parts[-1]):
            what = f"dF_{i + 1} alone gives the image no gradient"
            raise LawError("values", f"{what}, though the map depends on it", "x")
    _alike(whole, sum(parts), "dx")


# Convolutions, and a head -------------------------------------------------------------------------


def frame_of_zeros(trial: Trial) -> None:
    """Outside the map there are zeros: adding a border of zeros changes nothing."""
    stride, padding = trial.settings
    if stride == 1 and padding:
        x = np.pad(trial.x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        inner = _y(trial, x=x)[:, 1:-1, 1:-1]
        _alike(inner, _y(trial), "the middle of y, of x with zeros around")


def windows_counted(trial: Trial) -> None:
    """Where the forward copies, the backward adds: a pixel gets a gradient from each window."""
    y, cache = trial.given({"weight": np.ones_like(trial.p.weight)}).run()
    ones = trial.given({"weight": np.ones_like(trial.p.weight)})
    dx = ones.back(cache, np.ones_like(y))["x"]
    stride, padding = trial.settings
    C_out, _, k, _ = trial.p.weight.shape
    B, H, W, C = trial.x.shape
    count = np.zeros((H, W))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            top, left = (max(n * stride - padding, 0) for n in (i, j))
            count[top : i * stride - padding + k, left : j * stride - padding + k] += C_out
    _alike(dx, np.broadcast_to(count[:, :, None], (B, H, W, C)), "dx of ones")


def channels_apart(trial: Trial) -> None:
    """No channel sees another."""
    y, _ = trial.run()
    x = trial.x.copy()
    x[..., 0] += trial.drawn(5, x[..., 0])
    _alike(_y(trial, x=x)[..., 1:], y[..., 1:], "y, but for channel 0 of which x was moved")


def levels_are_summed(trial: Trial) -> None:
    """The levels are summed: with the classifier's bias 0, each contributes once."""
    if not trial.settings[1]:
        bias = np.zeros_like(trial.p.conv_seg.bias)
        total = _y(trial, conv_seg__bias=bias)
        alone = []
        for i, heads in enumerate(trial.p.scale_heads):
            own = list(map_arrays(np.zeros_like, trial.p.scale_heads))
            own[i] = heads
            p = replace(trial.p, scale_heads=tuple(own))
            alone.append(_y(replace(trial, p=p), conv_seg__bias=bias))
            if not np.any(alone[-1]):
                raise LawError("values", f"P_{i + 1} alone gives logits of 0: it is not used")
        _alike(total, sum(alone), "the logits, compared with those of each level alone")


def summands_alike(trial: Trial) -> None:
    """A sum passes its gradient to every summand: no level gets zeros."""
    y, cache = trial.run()
    for name, g in trial.back(cache, trial.drawn(7, y)).items():
        if name.startswith("P_") and not np.any(g):
            raise LawError("values", f"the gradient of {name} is zero everywhere", name)
