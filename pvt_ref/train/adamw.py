"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101): Adam with weight decay kept apart.

With g the gradient of step t (counted from 1), and everything elementwise::

    m_t = beta_1 m_{t-1} + (1 - beta_1) g                    running mean
    v_t = beta_2 v_{t-1} + (1 - beta_2) g^2                  running mean square
    m^  = m_t / (1 - beta_1^t),  v^ = v_t / (1 - beta_2^t)   bias correction: both began at 0
    w_t = w_{t-1} - lr lambda w_{t-1} - lr m^ / (sqrt(v^) + eps)

The decay lambda w is not part of g: it is not divided by sqrt(v^), so it shrinks all weights alike.
This is the paper's Algorithm 2 but for one thing: there lambda is not multiplied by Adam's own
learning rate, only by its schedule. PyTorch multiplies by both, and so does this file.
"""

import math
from dataclasses import dataclass
from typing import Any

from pvt_ref.arrays import Array, array_module, describe_type, is_array
from pvt_ref.checks import check_flag, check_number, check_type, settle
from pvt_ref.errors import ArrayTypeError
from pvt_ref.train.checks import check_alike, check_record
from pvt_ref.tree import map_arrays, map_named, record, zeros_like


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """The constants of the method. Raises: RangeError if a number is outside its range."""

    beta1: float = 0.9  # how slowly the running mean forgets, in [0, 1)
    beta2: float = 0.999  # how slowly the running mean square forgets, in [0, 1)
    eps: float = 1e-8  # keeps the quotient finite where no gradient has been, above 0
    weight_decay: float = 0.05  # lambda, at least 0. In effect it is lr times this
    decay_positions: bool = False  # True decays position embeddings, as the authors' code does

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            settle(self, name, least=0, below=1)
        settle(self, "eps", above=0)
        settle(self, "weight_decay", least=0)
        check_flag("decay_positions", self.decay_positions)


@record
class AdamWState:
    """What the method remembers from step to step; m and v have the shapes of the weights."""

    t: int  # steps done
    m: Any  # running mean of the gradients
    v: Any  # running mean of their squares


def adamw_init(params: Any) -> AdamWState:
    """The state before the first step. Raises: ArrayTypeError if params is no record of arrays.

    Args:
        params: the weights, NumPy or CuPy.

    Returns:
        t = 0, and m and v full of zeros, of params' shapes and dtypes and on their device.
    """
    check_record("params", params)
    return AdamWState(0, zeros_like(params), zeros_like(params))


def is_decayed(key: str, x: Array, decay_positions: bool = False) -> bool:
    """Whether weight decay applies: to matrices, not to biases, norms and the cls token.
    Raises: ArrayTypeError, RangeError if an argument is of another type.

    Args:
        key: name of a weight, as :func:`pvt_ref.to_state_dict` has it.
        x: the weight, of any shape; only its rank is looked at.
        decay_positions: whether position embeddings are decayed.

    Returns:
        True or False.
    """
    check_type("key", key, str)
    check_flag("decay_positions", decay_positions)
    if not is_array(x):
        raise ArrayTypeError(f"x is {describe_type(x)}. It must be the weight called {key!r}")
    if key.startswith("pos_embed"):
        return decay_positions
    return x.ndim > 1 and key != "cls_token"


def adamw_step(
    params: Any, grads: Any, state: AdamWState, lr: float, settings: AdamW
) -> tuple[Any, AdamWState]:
    """One step, by the equations in the head of this file. What is passed in stays as it was.
    Raises: RangeError if lr or state.t is no number of at least 0; ArrayTypeError or ShapeError if
    two trees differ in type, dtype, device, keys or shapes.

    Args:
        params: the weights, NumPy or CuPy.
        grads: dL/dw in the place of each w, of its shape and dtype.
        state: from :func:`adamw_init` or the step before.
        lr: the learning rate of this step.
        settings: the constants.

    Returns:
        The new weights and the new state, of the same shapes and dtypes, in new memory.
    """
    check_type("state", state, AdamWState, "from adamw_init or the step before")
    check_type("settings", settings, AdamW)
    lr = check_number("lr", lr, least=0)
    check_number("state.t", state.t, least=0, most=2**53, whole=True)
    for name, tree in (("grads", grads), ("state.m", state.m), ("state.v", state.v)):
        check_alike(name, tree, params)
    b1, b2 = settings.beta1, settings.beta2
    t = state.t + 1
    bias_1, bias_2 = 1 - b1**t, 1 - b2**t
    decay, positions = lr * settings.weight_decay, settings.decay_positions
    rates = map_named(lambda key, w: decay * is_decayed(key, w, positions), params)

    def new_w(w: Array, m: Array, v: Array, rate: float) -> Array:
        # lr m^ / (sqrt(v^) + eps), with the two corrections drawn out of the arrays
        root = array_module(v).sqrt(v)
        root *= 1 / math.sqrt(bias_2)
        root += settings.eps
        step = m / root
        step *= -lr / bias_1
        step += w * (1 - rate)
        return step

    m: Any = map_arrays(lambda m, g: b1 * m + (1 - b1) * g, state.m, grads)
    v: Any = map_arrays(lambda v, g: b2 * v + (1 - b2) * (g * g), state.v, grads)
    return map_arrays(new_w, params, m, v, rates), AdamWState(t, m, v)
