"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101): Adam with decoupled weight decay.

With g the gradient of step t (counted from 1), and everything elementwise::

    m_t = beta_1 m_{t-1} + (1 - beta_1) g                    running mean
    v_t = beta_2 v_{t-1} + (1 - beta_2) g^2                  running mean square
    m^  = m_t / (1 - beta_1^t),  v^ = v_t / (1 - beta_2^t)   bias correction: both began at 0
    w_t = w_{t-1} - lr lambda w_{t-1} - lr m^ / (sqrt(v^) + eps)

The decay lambda w is not part of g: it is not divided by sqrt(v^), so it shrinks all weights alike.
This is the paper's Algorithm 2 with one difference: there lambda is multiplied by the schedule but
not by Adam's own learning rate. PyTorch multiplies by both, and so does this file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pvt_ref.arrays import Array, array_module, describe_type, is_array
from pvt_ref.checks import check_flag, check_number, check_type, settle
from pvt_ref.errors import ArrayTypeError, ShapeError, shown
from pvt_ref.train.checks import check_alike, check_record
from pvt_ref.tree import map_arrays, map_named, named_arrays, record, zeros_like


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """The constants of AdamW. Raises: RangeError if a number is outside its range."""

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
    """The optimiser's state between steps; m and v have the shapes of the weights."""

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
    name = key.removeprefix("backbone.")
    if name.startswith("pos_embed"):
        return decay_positions
    return x.ndim > 1 and name != "cls_token"


def adamw_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    lr: float,
    settings: AdamW,
    factors: Mapping[str, float] | None = None,
) -> tuple[Any, AdamWState]:
    """One step, by the equations at the top of this file. The arguments are not changed.
    Raises: RangeError if lr, state.t or a factor is not a number of at least 0; ArrayTypeError or
    ShapeError if two trees differ in type, dtype, device, keys or shapes, or a factor has no
    weight.

    Args:
        params: the weights, NumPy or CuPy.
        grads: dL/dw in the place of each w, of its shape and dtype.
        state: from :func:`adamw_init` or the step before.
        lr: the learning rate of this step.
        settings: the constants.
        factors: of lr, by key, as :func:`pvt_ref.train.learning_rate_factors` gives them; 1 for a
            key that is not there. A weight of factor 0 is frozen: it stays as it is, and so do its
            m and v. Its gradient is not looked at, and need not be finite.

    Returns:
        The new weights and the new state, of the same shapes and dtypes, in new memory. What is
        frozen is the same array.
    """
    check_type("state", state, AdamWState, "from adamw_init or the step before")
    check_type("settings", settings, AdamW)
    lr = check_number("lr", lr, least=0)
    check_number("state.t", state.t, least=0, most=2**53, whole=True)
    for name, tree in (("grads", grads), ("state.m", state.m), ("state.v", state.v)):
        check_alike(name, tree, params)
    shares = _check_factors(factors, params)  # of lr
    b1, b2 = settings.beta1, settings.beta2
    t = state.t + 1
    bias_1, bias_2 = 1 - b1**t, 1 - b2**t
    decay, positions = lr * settings.weight_decay, settings.decay_positions
    rates = map_named(lambda key, w: decay * is_decayed(key, w, positions), params)

    def new_m(m: Array, g: Array, share: float) -> Array:
        return b1 * m + (1 - b1) * g if share else m

    def new_v(v: Array, g: Array, share: float) -> Array:
        return b2 * v + (1 - b2) * (g * g) if share else v

    def new_w(w: Array, m: Array, v: Array, rate: float, share: float) -> Array:
        if not share:  # frozen; adding a step of 0 could turn -0 into 0
            return w
        # lr m^ / (sqrt(v^) + eps), with the two bias corrections taken out of the arrays
        root = array_module(v).sqrt(v)
        root *= 1 / math.sqrt(bias_2)
        root += settings.eps
        step = m / root
        step *= -lr * share / bias_1
        step += w * (1 - rate * share)
        return step

    m: Any = map_arrays(new_m, state.m, grads, shares)
    v: Any = map_arrays(new_v, state.v, grads, shares)
    return map_arrays(new_w, params, m, v, rates, shares), AdamWState(t, m, v)


def _check_factors(factors: Any, params: Any) -> Any:
    """A tree with the factor of each weight in its place."""
    given: Mapping[str, float] = {} if factors is None else factors
    check_type("factors", given, Mapping, "of numbers by key, or None")
    for key in given.keys() - {key for key, _ in named_arrays(params)}:
        raise ShapeError(f"factors has {shown(key)}, which is no key of params")
    checked = {key: check_number(f"factors[{key!r}]", f, least=0) for key, f in given.items()}
    return map_named(lambda key, _: checked.get(key, 1.0), params)
