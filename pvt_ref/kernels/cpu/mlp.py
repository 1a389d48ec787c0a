"""The MLP by tiles of rows, which are expanded, activated and projected back while in cache."""

from functools import partial
from typing import Any

import numpy as np

from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.draws import Rng
from pvt_ref.kernels.cpu.gelu import gelu_rows
from pvt_ref.kernels.cpu.linear import (
    bias_gradient,
    column_sums,
    linear_rows,
    times_weight_rows,
    weight_gradients,
)
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, share_columns
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class HiddenCache:
    """The hidden layer of all rows, (rows, E*C), for the backward."""

    y: np.ndarray  # after GELU: fc2's weight needs it
    slope: np.ndarray  # the derivative of GELU


def empty_hidden(p: MLPParams, rows: int, dtype: np.dtype) -> HiddenCache:
    """Memory for the hidden layer of all rows."""
    shape = (rows, p.fc1.weight.shape[0])
    return HiddenCache(np.empty(shape, dtype), np.empty(shape, dtype))


def mlp_rows(
    p: MLPParams, x: np.ndarray, y: np.ndarray, hidden: HiddenCache | None, scratch: Scratch
) -> None:
    """Writes fc2(GELU(fc1(x))) to y (rows, C), and fills hidden, if it is not None."""
    if hidden is None:
        wide, slope = scratch("mlp.hidden", len(x), p.fc1.weight.shape[0], dtype=x.dtype), None
    else:
        wide, slope = hidden.y, hidden.slope

    def expand(columns: slice, scratch: Scratch) -> None:
        part = wide[:, columns]
        np.matmul(x, p.fc1.weight[columns].T, out=part)
        bias = None if p.fc1.bias is None else p.fc1.bias[columns]
        gelu_rows(part, scratch, None if slope is None else slope[:, columns], bias)

    share_columns(expand, wide.shape[1], scratch)
    linear_rows(p.fc2, wide, y, scratch)


def hidden_backward_rows(
    fc2: LinearParams, slope: np.ndarray, dy: np.ndarray, dhidden: np.ndarray, scratch: Scratch
) -> np.ndarray:
    """Back through fc2 and GELU: writes the gradient before GELU to dhidden (rows, E*C).

    Returns its sums over these rows, computed while the rows are in cache.
    """

    def work(columns: slice, scratch: Scratch) -> np.ndarray:
        part = dhidden[:, columns]
        np.matmul(dy, fc2.weight[:, columns], out=part)
        part *= slope[:, columns]
        return column_sums(part)

    return np.concatenate(share_columns(work, dhidden.shape[1], scratch))


def mlp_backward_rows(
    p: MLPParams,
    slope: np.ndarray,
    dy: np.ndarray,
    dhidden: np.ndarray,
    dx: np.ndarray,
    scratch: Scratch,
) -> np.ndarray:
    """As :func:`hidden_backward_rows`; also writes the gradient of the input to dx (rows, C)."""
    sums = hidden_backward_rows(p.fc2, slope, dy, dhidden, scratch)
    times_weight_rows(p.fc1, dhidden, dx, scratch)
    return sums


@record
class MLPCache:
    """What :func:`mlp_backward` needs: the forward's input x (..., C), and the hidden layer."""

    x: np.ndarray
    hidden: HiddenCache


def mlp_forward(
    p: MLPParams,
    x: np.ndarray,
    ops: Ops,
    drop_rate: float = 0.0,
    rng: Rng = None,
    keep: bool = True,
    *,
    tiling: Tiling,
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.blocks.mlp.mlp_forward`, which is used if there is dropout."""
    if rng is not None and drop_rate > 0.0:
        return mlp.forward(p, x, ops, drop_rate, rng, keep)
    y = np.empty(x.shape, x.dtype)
    wide, C = p.fc1.weight.shape
    hidden = empty_hidden(p, x.size // C, x.dtype) if keep else None
    tiling.by_rows(partial(mlp_rows, p), x, y, hidden, width=wide)
    return y, None if hidden is None else MLPCache(x, hidden)


def mlp_backward(
    p: MLPParams, cache: Any, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, MLPParams]:
    """As :func:`pvt_ref.blocks.mlp.mlp_backward`."""
    if not isinstance(cache, MLPCache):
        return mlp.backward(p, cache, dy, ops)
    dx, hidden = np.empty(dy.shape, dy.dtype), cache.hidden
    dhidden = np.empty_like(hidden.y)
    tiling.by_rows(partial(mlp_backward_rows, p), hidden.slope, dy, dhidden, dx)
    x_rows, dy_rows = (each.reshape(-1, dy.shape[-1]) for each in (cache.x, dy))
    dW1, dW2 = weight_gradients([(dhidden, x_rows, None), (dy_rows, hidden.y, None)], tiling)
    dfc1 = LinearParams(dW1, bias_gradient(p.fc1, dhidden, ops))
    return dx, MLPParams(dfc1, LinearParams(dW2, bias_gradient(p.fc2, dy_rows, ops)))


mlp_kernel = Kernel(mlp, mlp_forward, mlp_backward, (linear, gelu, dropout))
