"""The public functions of networks, one each for all architectures.

Each checks its arguments, chooses the table of operations, and calls the unchecked core of the
configuration's :class:`~pvt_ref.models.architecture.Architecture`.
"""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

import pvt_ref.models  # noqa: F401 (enters the networks)
from pvt_ref.arrays import (
    FLOAT_DTYPES,
    Array,
    array_module,
    dtype_name,
    is_array,
    is_cupy,
    is_numpy,
    library_and_dtype,
    same_library,
)
from pvt_ref.checks import (
    Size,
    as_size,
    check_cotangent,
    check_float,
    check_images,
    check_pyramid_cotangents,
    check_rng,
)
from pvt_ref.draws import Source
from pvt_ref.errors import (
    ArrayTypeError,
    CheckpointError,
    ConfigError,
    RangeError,
    ShapeError,
    key_name,
    shown,
)
from pvt_ref.kernels.cpu.table import blocked_ops
from pvt_ref.kernels.cuda.table import cuda_ops
from pvt_ref.models.architecture import (
    Architecture,
    Leaf,
    architecture_of,
    check_params_type,
    config_to_dict,
    param_shapes,
)
from pvt_ref.ops import REFERENCE, Ops
from pvt_ref.tree import first_array, named_arrays, record


def init_params(config: Any, rng: np.random.Generator, dtype: Any = np.float32) -> Any:
    """Random weights, drawn as the authors do.

    Linear weights, position tables and the cls token are normal with std 0.02 (the released
    truncation at +-2 is a hundred standard deviations away); linear biases 0; norms 1 and 0; the
    patch and spatial-reduction projections uniform in +-1/sqrt(fan_in), as PyTorch's Conv2d. All
    convolutions of a PVT v2 are normal with std sqrt(2/fan_out), biases 0. The source is the
    released code, whai362/PVT, ``_init_weights``; the papers do not say.

    Args:
        config: the model.
        rng: a NumPy generator, which is advanced.
        dtype: float32 or float64. Both draw the same numbers, rounded.

    Returns:
        A record of NumPy arrays; :func:`pvt_ref.to_device` moves them.

    Raises:
        ArrayTypeError: if an argument is of another type, or dtype another.
    """
    build = architecture_of(config).build_params
    check_rng(rng)
    name = shown(dtype)
    if dtype is not None:
        with contextlib.suppress(Exception):  # of several kinds, for what is no dtype of NumPy's
            name = np.dtype(dtype).name
    if name not in FLOAT_DTYPES:
        raise ArrayTypeError(f"dtype is {name}; parameters are float32 or float64")
    return build(config, lambda leaf: draw_leaf(leaf, rng, np.dtype(name)))


def draw_leaf(leaf: Leaf, rng: np.random.Generator, dtype: Any) -> np.ndarray:
    """One array of :func:`init_params`."""
    if leaf.init == "zeros":
        return np.zeros(leaf.shape, dtype)
    if leaf.init == "ones":
        return np.ones(leaf.shape, dtype)
    if leaf.init in ("normal", "fan_out"):
        std = 0.02 if leaf.init == "normal" else math.sqrt(2 / leaf.fan_out)
        return (std * rng.standard_normal(leaf.shape)).astype(dtype)
    bound = 1 / math.sqrt(leaf.fan_in)
    return rng.uniform(-bound, bound, leaf.shape).astype(dtype)


def to_state_dict(params: Any) -> dict[str, Array]:
    """The weights by the authors' key names, in the authors' order and shapes.

    Args:
        params: the weights, NumPy or CuPy.

    Returns:
        Key to array; the arrays are those of params, not copies.

    Raises:
        ArrayTypeError: if params is no record of parameters.
    """
    check_params_type(params)
    return dict(named_arrays(params))


def from_state_dict(state: Mapping[str, Array], config: Any) -> Any:
    """Parameters from arrays by the authors' key names, strictly.

    Args:
        state: key to array (NumPy or CuPy). float16 becomes float32; where float32 and float64
            come together, all become float64. Arrays that need no conversion are not copied.
        config: the model they must fit.

    Returns:
        The weights, all float32 or all float64, each array on the device where it was.

    Raises:
        CheckpointError: if keys are missing, unexpected or mis-shaped; all of them are listed.
        ArrayTypeError: if config is no configuration, state not a mapping, or a value not an array
            of float16, float32 or float64.
    """
    build = architecture_of(config).build_params
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

    return build(config, pick)


def check_keys(state: Mapping[str, Array], config: Any) -> None:
    """Refuses a state whose values are no arrays, or (CheckpointError) do not fit a model."""
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


#: The configuration that living weights were checked with. A record never changes, so once will do.
_checked: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def check_params(params: Any, config: Any) -> None:
    """Refuses weights that are not of one float dtype on one device, made for config.

    Raises:
        ArrayTypeError: if config or params is of another type, or the arrays differ in kind.
        ShapeError: if params belong to another config.
    """
    row = architecture_of(config)
    check_params_type(params)
    with contextlib.suppress(TypeError):  # a record that has no hash is checked each time
        if _checked.get(params) == config:
            return
    if type(params) is not row.params_type:
        raise ArrayTypeError(
            f"params is a {type(params).__name__} and config a {type(config).__name__}; they "
            f"belong to different networks"
        )
    shapes = param_shapes(config)
    arrays = dict(named_arrays(params))
    found = {key: tuple(x.shape) for key, x in arrays.items()}
    if found != shapes:
        different = sorted(k for k in found.keys() | shapes.keys() if found.get(k) != shapes.get(k))
        key = different[0]
        raise ShapeError(
            f"params do not belong to this config: {len(different)} arrays differ, the first is "
            f"{key}, which is {found.get(key, 'absent')} and should be "
            f"{shapes.get(key, 'absent')}. Pass the config that params were made with"
        )
    first_key, first = next(iter(arrays.items()))
    check_float(first_key, first)
    for key, x in arrays.items():
        if not same_library(x, first) or x.dtype != first.dtype:
            check_float(key, x)
            raise ArrayTypeError(
                f"params mix {library_and_dtype(first)} ({first_key}) and {library_and_dtype(x)} "
                f"({key}); all must have one dtype and lie on one device. "
                f"from_state_dict(to_state_dict(params), config) makes the dtype one, "
                f"to_device(params, ...) the device"
            )
    with contextlib.suppress(TypeError):
        _checked[params] = config


@record
class Prepared:
    """Weights that were checked, and what was made of them for images of one size.

    Made by :func:`prepare`; the forward functions take it in the place of params.

    Attributes:
        params: the weights.
        config: their configuration.
        size: (H, W) of the images.
        architecture: of the network.
        constants: what its forward can take over: resized position tables.
    """

    params: Any
    config: Any
    size: tuple[int, int]
    architecture: Architecture
    constants: Any

    def constants_for(self, images: Array) -> Any:
        """The constants, if they are of that size.

        Args:
            images: (B, in_chans, H, W).

        Returns:
            None for images of another size.
        """
        return self.constants if tuple(images.shape[2:]) == self.size else None


def prepare(params: Any, config: Any, size: Size | None = None) -> Prepared:
    """Checks weights and resizes position tables, once for many calls.

    Args:
        params: the weights, arrays of NumPy or CuPy, float32 or float64.
        config: the configuration of the weights.
        size: side, or (H, W), of the images to come; None takes config.img_size. Images of another
            size are computed too, only not faster.

    Returns:
        A record for :func:`forward` and its like, in the place of params. It does not notice if
        the arrays of params are written to afterwards.

    Raises:
        PVTError: as :func:`forward`.
    """
    check_params(params, config)
    return prepare_checked(params, config, size)


def prepare_checked(params: Any, config: Any, size: Any = None) -> Prepared:
    """As :func:`prepare`, for weights that were checked before."""
    row = architecture_of(config)
    height, width = as_size(config.img_size if size is None else size)
    config.grids(height, width)  # refuses sizes that would lose pixels
    constants = row.prepare(params, config, (height, width))
    return Prepared(params, config, (height, width), row, constants)


def _model(params: Any, config: Any) -> Prepared:
    """params as a checked record; of plain ones, without constants."""
    if isinstance(params, Prepared):
        if config is not None and config != params.config:
            raise ShapeError(
                "params were prepared with another config; leave config out, or prepare them anew"
            )
        return params
    check_params(params, config)
    return Prepared(params, config, (0, 0), architecture_of(config), None)


def default_ops(x: Array) -> Ops:
    """The table used when the caller names none, by the kind and dtype of the array x.

    NumPy arrays get :func:`blocked_ops`, CuPy arrays :func:`~pvt_ref.kernels.cuda.table.cuda_ops`,
    all others REFERENCE. The environment variable ``PVT_REF_OPS``, ``reference`` or ``blocked``,
    decides between the readable layers and their twins.

    Raises:
        RangeError: if the variable says something else, and x is an array of float32 or float64
            that has twins.
    """
    if not (is_numpy(x) or is_cupy(x)) or dtype_name(x) not in FLOAT_DTYPES:
        return REFERENCE
    wanted = os.environ.get("PVT_REF_OPS") or "blocked"
    if wanted == "reference":
        return REFERENCE
    if wanted == "blocked":
        return blocked_ops() if is_numpy(x) else cuda_ops()
    raise RangeError(
        f"the environment variable PVT_REF_OPS is {wanted!r}; known are 'reference' (the readable "
        f"layers) and 'blocked' (their faster twins, the default)"
    )


def choose_ops(ops: Ops | None, images: Array, row: Architecture | None = None) -> Ops:
    """The table named, or the default for images.

    Raises:
        ArrayTypeError: if ops is something else, or does not compute on such arrays.
        ConfigError: if ops replaces an operation that the network of row never asks for.
    """
    if ops is None:
        return default_ops(images)
    if not isinstance(ops, Ops):
        raise ArrayTypeError(
            f"ops is a {type(ops).__name__}; it must be a table of operations (pvt_ref.Ops), such "
            f"as pvt_ref.REFERENCE, or None for the default"
        )
    if ops.accepts is not None and is_array(images) and not ops.accepts(images):
        raise ArrayTypeError(
            f"ops is the table {ops.name!r}, which does not compute on {library_and_dtype(images)} "
            f"arrays, and images are such. Leave ops out, or pass pvt_ref.REFERENCE"
        )
    if row is not None and not ops.replaced <= row.operations:
        unknown = ", ".join(sorted(op.name for op in ops.replaced - row.operations))
        raise ConfigError(
            f"ops replaces {unknown}, which a {row.title} never asks for, so it would have no "
            f"effect. Use a table without it"
        )
    return ops


def check_has_classifier(config: Any) -> None:
    """Refuses a model that has no head to make logits with. Raises: ConfigError."""
    architecture_of(config)
    if not config.has_classifier:
        raise ConfigError(
            "this model is a bare backbone (num_classes 0: no cls token, norm or head) and has no "
            "logits. forward_pyramid gives its feature maps; weights with a classifier give both"
        )


@record
class ForwardCache:
    """Made by a forward for its backward, which reads it and never changes it.

    parts are the caches of the network's parts; the other fields say which forward it was, and the
    shapes of what it returned.
    """

    kind: str
    parts: Any
    shapes: tuple[tuple[int, ...], ...]
    params: Any
    config: Any
    ops: Ops


def _run(
    pyramid: bool, params: Any, images: Array, config: Any, rng: Any, ops: Ops | None, keep: bool
) -> tuple[Any, Any]:
    """Checks, and the core's forward or forward_pyramid: its result, and a cache if kept."""
    if rng is not None:
        check_rng(rng, draws=True)
    model = _model(params, config)
    row, config = model.architecture, model.config
    if not pyramid:
        check_has_classifier(config)
    elif row.forward_pyramid is None:
        raise ConfigError(f"a {row.title} has one scale and no pyramid")
    weight = first_array(model.params)
    images = check_images(images, weight, config)
    ops = choose_ops(ops, images, row)
    core: Callable[..., Any] = row.forward_pyramid if pyramid else row.forward  # type: ignore
    constants = None if keep else model.constants_for(images)
    with ops.scope():
        y, parts = core(model.params, images, config, ops, rng, keep, constants)
    if not keep:
        return y, None
    kind = "forward_pyramid_with_cache" if pyramid else "forward_with_cache"
    shapes = tuple(tuple(x.shape) for x in (y if pyramid else [y]))
    return y, ForwardCache(kind, parts, shapes, model.params, config, ops)


def forward(params: Any, images: Array, config: Any = None, *, ops: Ops | None = None) -> Array:
    """Class logits, without keeping anything for a backward.

    For a PVT, the released classifier (paper sections 3.1, 3.2 and 4.1). Memory does not grow with
    depth.

    Args:
        params: the weights, float32 or float64, or what :func:`prepare` made of them.
        images: (B, in_chans, H, W) normalised floats of the same library, H and W multiples of
            ``config.size_multiple``. Another float dtype is cast to the weights'.
        config: the configuration of the weights; None for prepared ones.
        ops: a table of operations; None takes the default.

    Returns:
        logits (B, num_classes) of the weights' dtype.

    Raises:
        ArrayTypeError: if an argument is of another type, images are not floats, or arrays lie on
            different devices or do not suit ops.
        ShapeError: if images are not (B, in_chans, H, W), H or W would lose pixels, the batch is
            empty, or params belong to another config.
        ConfigError: if the model is a bare backbone, which has no logits, or ops replaces an
            operation that the network never asks for.
        RangeError: if ops is None and the environment variable PVT_REF_OPS names no table.
    """
    return _run(False, params, images, config, None, ops, keep=False)[0]


def forward_with_cache(
    params: Any, images: Array, config: Any = None, rng: Source = None, *, ops: Ops | None = None
) -> tuple[Array, ForwardCache]:
    """Class logits, and the cache for :func:`backward`.

    What is computed is what :func:`forward` computes, with dropout and drop path if there is an
    rng: without one nothing is dropped, whatever rates config has. Memory grows with depth.

    Args:
        params: as for :func:`forward`.
        images: as for :func:`forward`.
        config: as for :func:`forward`.
        rng: a NumPy generator, or :class:`~pvt_ref.draws.Draws`, turns dropout and drop path on, at
            the rates of config; None leaves them off, as for validation. The same seed draws the
            same masks on every device and for every dtype.
        ops: as for :func:`forward`.

    Returns:
        logits (B, num_classes) of the weights' dtype, and the cache.

    Raises:
        PVTError: as :func:`forward`; an ArrayTypeError also if rng is something else.
    """
    return _run(False, params, images, config, rng, ops, keep=True)


def forward_pyramid(
    params: Any, images: Array, config: Any = None, *, ops: Ops | None = None
) -> list[Array]:
    """The feature maps for dense prediction, without keeping anything for a backward.

    For a PVT, F_1..F_4 of the released detection and segmentation backbones (paper sections 3.1,
    3.2 and 4.2): without cls token and final norm, so F_4 is not what the classifier computes.

    Args:
        params: as for :func:`forward`; they may lack a classifier.
        images: as for :func:`forward`.
        config: as for :func:`forward`.
        ops: as for :func:`forward`.

    Returns:
        [F_1, F_2, ...], (B, C_i, H_i, W_i) each, of the weights' dtype.

    Raises:
        PVTError: as :func:`forward`; a ConfigError if the network has no pyramid.
    """
    return _run(True, params, images, config, None, ops, keep=False)[0]


def forward_pyramid_with_cache(
    params: Any, images: Array, config: Any = None, rng: Source = None, *, ops: Ops | None = None
) -> tuple[list[Array], ForwardCache]:
    """The feature maps, and the cache for :func:`backward_pyramid`.

    Args:
        params: as for :func:`forward_pyramid`.
        images: as for :func:`forward`.
        config: as for :func:`forward`.
        rng: as for :func:`forward_with_cache`.
        ops: as for :func:`forward`.

    Returns:
        [F_1, F_2, ...], (B, C_i, H_i, W_i) each, of the weights' dtype, and the cache.

    Raises:
        PVTError: as :func:`forward_with_cache` and :func:`forward_pyramid`.
    """
    return _run(True, params, images, config, rng, ops, keep=True)


def backward(
    params: Any, cache: ForwardCache, dlogits: Array, config: Any = None, *, ops: Ops | None = None
) -> tuple[Any, Array]:
    """Gradients of a scalar loss L through :func:`forward_with_cache`.

    Args:
        params: the weights of the forward.
        cache: what the forward returned. It is read, never changed: it may serve several dlogits.
        dlogits: dL/dlogits (B, num_classes), float32 or float64, for instance from
            :func:`pvt_ref.cross_entropy`. It is cast to the weights' dtype.
        config: the configuration of the forward, the very same; None for prepared weights.
        ops: the forward's table (the default); another one cannot read its cache.

    Returns:
        grads, of params' type with dL/dw in the place of w, of its shape and dtype; and dL/dimages
        (B, in_chans, H, W), of the weights' dtype: float16, say, could not hold every gradient.

    Raises:
        ArrayTypeError: if an argument is of another type, dlogits are not floats or lie on another
            device, or the cache is that of another forward, other ops or weights of another dtype.
        ShapeError: if dlogits are not (B, num_classes), or params or cache belong to another
            config.
        ConfigError: if the model is a bare backbone, which has no logits.
    """
    model = _model_of_cache(params, cache, config)
    check_has_classifier(model.config)
    ops = _check_cache(cache, "forward_with_cache", model, ops)
    weight = first_array(model.params)
    dlogits = check_cotangent("dlogits", dlogits, cache.shapes[0], weight)
    with ops.scope():
        return model.architecture.backward(model.params, cache.parts, dlogits, ops)


def backward_pyramid(
    params: Any,
    cache: ForwardCache,
    dmaps: Sequence[Array | None],
    config: Any = None,
    *,
    ops: Ops | None = None,
) -> tuple[Any, Array]:
    """Gradients of a scalar loss L through :func:`forward_pyramid_with_cache`.

    Args:
        params: as for :func:`backward`.
        cache: as for :func:`backward`.
        dmaps: dL/dF_1, dL/dF_2, ..., (B, C_i, H_i, W_i) each, as dlogits for :func:`backward`; None
            for a map that L does not use.
        config: as for :func:`backward`.
        ops: as for :func:`backward`.

    Returns:
        grads and dL/dimages (B, in_chans, H, W), as :func:`backward`; zeros for what the maps do
        not use.

    Raises:
        PVTError: as :func:`backward`; a ShapeError also if dmaps are not as many as the maps.
    """
    model = _model_of_cache(params, cache, config)
    ops = _check_cache(cache, "forward_pyramid_with_cache", model, ops)
    dmaps = check_pyramid_cotangents(dmaps, cache.shapes, first_array(model.params))
    core = model.architecture.backward_pyramid
    assert core is not None  # or there would be no such cache
    with ops.scope():
        return core(model.params, cache.parts, dmaps, ops)


def _model_of_cache(params: Any, cache: Any, config: Any) -> Prepared:
    """params as a checked record; those of the forward itself were checked there."""
    same = isinstance(cache, ForwardCache) and cache.params is params and cache.config is config
    if same:
        return Prepared(params, config, (0, 0), architecture_of(config), None)
    return _model(params, config)


def _check_cache(cache: Any, maker: str, model: Prepared, ops: Ops | None) -> Ops:
    """The table of operations that made cache, once it is sure that it can read it."""
    if not isinstance(cache, ForwardCache) or cache.kind != maker:
        of = isinstance(cache, ForwardCache)
        given = f"that of {cache.kind}" if of else f"a {type(cache).__name__}"
        raise ArrayTypeError(
            f"cache is {given}; this backward needs the ForwardCache that {maker} returned beside "
            f"its result"
        )
    if cache.config != model.config:
        made, given = config_to_dict(cache.config), config_to_dict(model.config)
        fields = ", ".join(name for name in made if made[name] != given.get(name))
        raise ShapeError(
            f"the cache was made with another config; the two differ in {fields}. Pass the same "
            f"config to {maker} and to its backward"
        )
    made_with, weight = first_array(cache.params), first_array(model.params)
    if made_with.dtype != weight.dtype:
        raise ArrayTypeError(
            f"the cache was made with {made_with.dtype} weights, and params are "
            f"{dtype_name(weight)}. Pass the same params to {maker} and to its backward"
        )
    if ops is not None and choose_ops(ops, None) != cache.ops:
        raise ArrayTypeError(
            f"the cache was made with ops {cache.ops.name!r} and cannot be read by {ops.name!r}: "
            f"a cache belongs to the pair that made it. Leave ops out, or pass it to the forward"
        )
    return cache.ops
