"""All weights of a model in one frozen record, whose field names are the checkpoint's key segments.

So ``params.block1[0].attn.q.weight`` is the array that the authors' files call
``block1.0.attn.q.weight``, and flattening the record is the whole key map. Fields stand in the
authors' order. What a model lacks is None: sr and norm where R = 1, q and kv biases without
qkv_bias, and cls_token, norm and head in a bare backbone.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from pvt_ref.arrays import (
    FLOAT_DTYPES,
    Array,
    array_module,
    dtype_name,
    is_array,
    map_arrays,
    named_arrays,
    short_repr,
)
from pvt_ref.block import BlockParams
from pvt_ref.config import NUM_STAGES, PVTConfig, StageConfig, check_config
from pvt_ref.errors import ArrayTypeError, CheckpointError, key_name, shown
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.mlp import MLPParams
from pvt_ref.layers.patch_embed import PatchEmbedParams
from pvt_ref.layers.sra import SRAParams


class StageParams(NamedTuple):
    """The weights of stage i, a view into :class:`PVTParams`.

    Attributes:
        patch_embed: projection (C_i, C_{i-1}, P_i, P_i) and norm (C_i,).
        pos_embed: (1, n_i, C_i); with a cls row, (1, 1 + n_i, C_i).
        blocks: of each of the L_i blocks.
    """

    patch_embed: PatchEmbedParams
    pos_embed: Array
    blocks: tuple[BlockParams, ...]

    __repr__ = short_repr


@dataclass(frozen=True, slots=True, eq=False)
class PVTParams:
    """The weights of a model, or their gradients, float32 or float64.

    n_i is the number of tokens of stage i for an image of config.img_size, and C_0 is in_chans.

    Attributes:
        pos_embed1: (1, n_1, C_1).
        pos_embed2: (1, n_2, C_2).
        pos_embed3: (1, n_3, C_3).
        pos_embed4: (1, 1 + n_4, C_4), row 0 is the cls token's; (1, n_4, C_4) in a backbone.
        cls_token: (1, 1, C_4); None in a backbone.
        patch_embed1: projection (C_1, C_0, P_1, P_1), its bias and the norm, (C_1,) each.
        block1: L_1 blocks of width C_1.
        patch_embed2: projection (C_2, C_1, P_2, P_2), its bias and the norm, (C_2,) each.
        block2: L_2 blocks of width C_2.
        patch_embed3: projection (C_3, C_2, P_3, P_3), its bias and the norm, (C_3,) each.
        block3: L_3 blocks of width C_3.
        patch_embed4: projection (C_4, C_3, P_4, P_4), its bias and the norm, (C_4,) each.
        block4: L_4 blocks of width C_4.
        norm: the final norm, weight and bias (C_4,) each; None in a backbone.
        head: weight (num_classes, C_4), bias (num_classes,); None in a backbone.
    """

    pos_embed1: Array
    pos_embed2: Array
    pos_embed3: Array
    pos_embed4: Array
    cls_token: Array | None
    patch_embed1: PatchEmbedParams
    block1: tuple[BlockParams, ...]
    patch_embed2: PatchEmbedParams
    block2: tuple[BlockParams, ...]
    patch_embed3: PatchEmbedParams
    block3: tuple[BlockParams, ...]
    patch_embed4: PatchEmbedParams
    block4: tuple[BlockParams, ...]
    norm: LayerNormParams | None
    head: LinearParams | None

    __repr__ = short_repr

    def stage(self, i: int) -> StageParams:
        """The weights of one stage.

        Args:
            i: 0 to 3.

        Returns:
            The same arrays, not copies.

        Raises:
            AttributeError: if there is no stage i.
        """
        return StageParams(
            getattr(self, f"patch_embed{i + 1}"),
            getattr(self, f"pos_embed{i + 1}"),
            getattr(self, f"block{i + 1}"),
        )


class Leaf(NamedTuple):
    """What one array of the parameters has to be.

    Attributes:
        key: its name in the authors' files.
        shape: its shape.
        init: how it is drawn; see :func:`init_params`.
        fan_in: numbers that one output is made of, C_in P P, where init is ``"uniform"``.
    """

    key: str
    shape: tuple[int, ...]
    init: Literal["zeros", "ones", "normal", "uniform"]
    fan_in: int = 0  # of "uniform"


def build_params(config: PVTConfig, make: Callable[[Leaf], Array]) -> PVTParams:
    """A parameter tree for config, every array made by ``make(leaf)``, in the authors' order.

    This is the one place that says which arrays a model has and what their shapes are.

    Args:
        config: the model.
        make: gets a :class:`Leaf` and returns what shall stand there, an array of leaf.shape.

    Returns:
        What make returned, in the places and, as arrays, of the shapes of :class:`PVTParams`; None
        where the model has no array.
    """

    def linear(key: str, C_out: int, C_in: int, bias: bool = True) -> LinearParams:
        return LinearParams(
            make(Leaf(f"{key}.weight", (C_out, C_in), "normal")),
            make(Leaf(f"{key}.bias", (C_out,), "zeros")) if bias else None,
        )

    def projection(key: str, C_out: int, C_in: int, P: int) -> LinearParams:
        fan_in = C_in * P * P
        return LinearParams(
            make(Leaf(f"{key}.weight", (C_out, C_in, P, P), "uniform", fan_in)),
            make(Leaf(f"{key}.bias", (C_out,), "uniform", fan_in)),
        )

    def norm(key: str, C: int) -> LayerNormParams:
        return LayerNormParams(
            make(Leaf(f"{key}.weight", (C,), "ones")), make(Leaf(f"{key}.bias", (C,), "zeros"))
        )

    def block(key: str, s: StageConfig) -> BlockParams:
        C, R = s.embed_dim, s.sr_ratio
        return BlockParams(
            norm1=norm(f"{key}.norm1", C),
            attn=SRAParams(
                q=linear(f"{key}.attn.q", C, C, config.qkv_bias),
                kv=linear(f"{key}.attn.kv", 2 * C, C, config.qkv_bias),
                proj=linear(f"{key}.attn.proj", C, C),
                sr=projection(f"{key}.attn.sr", C, C, R) if R > 1 else None,
                norm=norm(f"{key}.attn.norm", C) if R > 1 else None,
            ),
            norm2=norm(f"{key}.norm2", C),
            mlp=MLPParams(
                fc1=linear(f"{key}.mlp.fc1", s.hidden_dim, C),
                fc2=linear(f"{key}.mlp.fc2", C, s.hidden_dim),
            ),
        )

    has_cls = config.has_classifier
    C_4 = config.embed_dims[-1]
    tree: dict[str, Any] = {}
    for i in range(NUM_STAGES):
        rows = config.table_sides[i] ** 2 + (has_cls and i == NUM_STAGES - 1)
        shape = (1, rows, config.embed_dims[i])
        tree[f"pos_embed{i + 1}"] = make(Leaf(f"pos_embed{i + 1}", shape, "normal"))
    tree["cls_token"] = make(Leaf("cls_token", (1, 1, C_4), "normal")) if has_cls else None
    for i, C_in in enumerate((config.in_chans, *config.embed_dims[:-1])):
        key, C, P = f"patch_embed{i + 1}", config.embed_dims[i], config.patch_sizes[i]
        tree[key] = PatchEmbedParams(projection(f"{key}.proj", C, C_in, P), norm(f"{key}.norm", C))
        key, stage = f"block{i + 1}", config.stage(i)  # once: it is as long as the stage
        tree[key] = tuple(block(f"{key}.{b}", stage) for b in range(stage.depth))
    tree["norm"] = norm("norm", C_4) if has_cls else None
    tree["head"] = linear("head", config.num_classes, C_4) if has_cls else None
    return PVTParams(**tree)


@functools.lru_cache(maxsize=32)  # every forward asks
def param_shapes(config: PVTConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape by key, in the authors' order; read-only.

    Args:
        config: the model.

    Returns:
        ``{"pos_embed1": (1, n_1, C_1), ...}``; what the model lacks is not in it.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(leaf: Leaf) -> None:
        shapes[leaf.key] = leaf.shape

    build_params(config, record)
    return MappingProxyType(shapes)


def init_params(config: PVTConfig, rng: np.random.Generator, dtype: Any = np.float32) -> PVTParams:
    """Random weights, drawn as the authors do.

    Linear weights, position tables and the cls token are normal with std 0.02 (the released
    truncation at +-2 is a hundred standard deviations away); linear biases 0; norms 1 and 0; the
    patch and spatial-reduction projections uniform in +-1/sqrt(fan_in), as PyTorch's Conv2d. The
    source is the released code, whai362/PVT, ``_init_weights``; the paper does not say.

    Args:
        config: the model.
        rng: a NumPy generator, which is advanced.
        dtype: float32 or float64. Both draw the same numbers, rounded.

    Returns:
        NumPy arrays of the shapes in :class:`PVTParams`; :func:`pvt_ref.to_device` moves them.

    Raises:
        ArrayTypeError: if config is not a PVTConfig or rng not a NumPy generator, or for another
            dtype.
    """
    check_config(config)
    check_rng(rng)
    name = shown(dtype)
    if dtype is not None:
        with contextlib.suppress(Exception):  # of several kinds, for what is no dtype of NumPy's
            name = np.dtype(dtype).name
    if name not in FLOAT_DTYPES:
        raise ArrayTypeError(f"dtype is {name}; parameters are float32 or float64")
    dtype = np.dtype(name)

    def draw(leaf: Leaf) -> np.ndarray:
        if leaf.init == "zeros":
            return np.zeros(leaf.shape, dtype)
        if leaf.init == "ones":
            return np.ones(leaf.shape, dtype)
        if leaf.init == "normal":
            return (0.02 * rng.standard_normal(leaf.shape)).astype(dtype)
        bound = 1 / math.sqrt(leaf.fan_in)
        return rng.uniform(-bound, bound, leaf.shape).astype(dtype)

    return build_params(config, draw)


def check_rng(rng: object) -> None:
    """Refuses what is not a NumPy generator.

    Args:
        rng: anything.

    Raises:
        ArrayTypeError: unless rng is a numpy.random.Generator.
    """
    if not isinstance(rng, np.random.Generator):
        raise ArrayTypeError(
            f"rng is {type(rng).__name__}; it must be a NumPy generator, such as "
            f"numpy.random.default_rng(0). (Masks and weights are drawn on the host, so that a "
            f"seed means the same on every device.)"
        )


def check_params_type(params: object) -> None:
    """Refuses what is not a record of weights.

    Args:
        params: anything.

    Raises:
        ArrayTypeError: unless params is a PVTParams.
    """
    if not isinstance(params, PVTParams):
        raise ArrayTypeError(
            f"params is a {type(params).__name__}; it must be a PVTParams, from init_params, "
            f"from_state_dict or load(path).params"
        )


def map_named(f: Callable[[str, Array], Any], tree: Any, prefix: str = "") -> Any:
    """A copy of a parameter record with ``f(key, array)`` in the place of all arrays.

    Args:
        f: gets the key of :func:`named_arrays` and the array.
        tree: a record of parameters or gradients.
        prefix: of all keys, without a dot at its end.

    Returns:
        A record of tree's type.
    """
    results = iter([f(key, x) for key, x in named_arrays(tree, prefix)])
    return map_arrays(lambda _: next(results), tree)  # both go through the record in field order


def to_state_dict(params: PVTParams) -> dict[str, Array]:
    """The weights by the authors' key names, in the authors' order and shapes.

    Args:
        params: the weights, NumPy or CuPy.

    Returns:
        Key to array, of the shapes of :func:`param_shapes`. The arrays are those of params, not
        copies.

    Raises:
        ArrayTypeError: if params is not a PVTParams.
    """
    check_params_type(params)
    return dict(named_arrays(params))


def from_state_dict(state: Mapping[str, Array], config: PVTConfig) -> PVTParams:
    """Parameters from arrays by the authors' key names, strictly.

    Args:
        state: key to array (NumPy or CuPy). float16 becomes float32; where float32 and float64
            come together, all become float64. Arrays that need no conversion are not copied.
        config: the model they must fit.

    Returns:
        The weights, of the shapes of :func:`param_shapes`, all float32 or all float64, each array
        on the device where it was.

    Raises:
        CheckpointError: if keys are missing, unexpected or mis-shaped; all of them are listed.
        ArrayTypeError: if config is not a PVTConfig, state not a mapping, or a value not an array
            of float16, float32 or float64.
    """
    check_config(config)
    if not isinstance(state, Mapping):
        raise ArrayTypeError(
            f"state is a {type(state).__name__}; it must map key names to arrays. For a file, use "
            f"pvt_ref.load(path)"
        )
    check_keys(state, config)
    dtype = _common_dtype(state)

    def pick(leaf: Leaf) -> Array:
        x = state[leaf.key]
        xp = array_module(x)
        return x if dtype_name(x) == dtype else xp.astype(x, getattr(xp, dtype))

    return build_params(config, pick)


def check_keys(state: Mapping[str, Array], config: PVTConfig) -> None:
    """Refuses a state that does not fit a model.

    Args:
        state: key to array, of any shapes.
        config: the model.

    Raises:
        ArrayTypeError: if a value is not an array.
        CheckpointError: with every missing, unexpected and mis-shaped key of state.
    """
    shapes = param_shapes(config)
    for key, x in state.items():
        if not is_array(x):
            raise ArrayTypeError(
                f"state[{shown(key)}] is a {type(x).__module__}.{type(x).__name__}; it must be a "
                f"NumPy or CuPy array. (From a PyTorch tensor: tensor.detach().cpu().numpy())"
            )
    problems = [f"missing: {key} {shape}" for key, shape in shapes.items() if key not in state]
    problems += [
        f"unexpected: {key_name(key)} {tuple(state[key].shape)}"
        for key in state
        if key not in shapes
    ]
    problems += [
        f"mis-shaped: {key} is {tuple(state[key].shape)}, the configuration needs {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if problems:
        raise CheckpointError(
            f"these weights do not fit the configuration ({len(problems)} of {len(shapes)} keys):"
            "\n  - " + "\n  - ".join(problems) + "\nThe likely cause is a configuration of another "
            "variant, class count or image size; dataclasses.replace(config, ...) changes one"
        )


def _common_dtype(state: Mapping[str, Array]) -> str:
    """float64 if any array is, else float32."""
    names = {key: dtype_name(x) for key, x in state.items()}
    wrong = {k: name for k, name in names.items() if name not in ("float16", *FLOAT_DTYPES)}
    if wrong:
        key, name = next(iter(wrong.items()))
        raise ArrayTypeError(
            f"{len(wrong)} of {len(names)} arrays are not float16, float32 or float64; the first "
            f"is {key} with dtype {name}. Convert them, for example with x.astype('float32')"
        )
    return "float64" if "float64" in names.values() else "float32"


def zeros_like_params(params: Any) -> Any:
    """A record of the same type with zeros: the gradient of weights that a pass did not use.

    Args:
        params: a record of parameters, a tuple of such, an array, or None.

    Returns:
        The same structure, with zeros of each array's shape, dtype and device.
    """
    return map_arrays(lambda x: array_module(x).zeros_like(x), params)
