"""The public functions of networks, one each for all architectures.

Each checks its arguments, chooses the table of operations, and calls the unchecked core of the
configuration's :class:`~pvt_ref.models.architecture.Architecture`.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

import pvt_ref.models  # noqa: F401 (registers the networks)
from pvt_ref.arrays import (
    FLOAT_DTYPES,
    Array,
    array_module,
    dtype_name,
    from_host,
    is_array,
    is_cupy,
    is_numpy,
    library_and_dtype,
    quietly,
    same_library,
)
from pvt_ref.checks import (
    Size,
    as_size,
    check_blocks,
    check_cotangent,
    check_flag,
    check_float,
    check_images,
    check_pyramid_cotangents,
    check_rng,
    check_type,
)
from pvt_ref.draws import Generator, Source
from pvt_ref.errors import (
    ArrayTypeError,
    CheckpointError,
    ConfigError,
    RangeError,
    ShapeError,
    key_name,
    shown,
)
from pvt_ref.layers.batch_norm import moved
from pvt_ref.models.architecture import (
    Architecture,
    Leaf,
    architecture_of,
    check_params_type,
    config_to_dict,
    count_keys,
    param_shapes,
)
from pvt_ref.ops import REFERENCE, Ops
from pvt_ref.tree import first_array, map_arrays, named_arrays, record


def init_params(config: Any, rng: Generator, dtype: Any = np.float32) -> Any:
    """Random weights, drawn as the authors do.

    Linear weights, position tables and the cls token are normal with std 0.02 (the released code
    truncates at +-2, a hundred standard deviations away); linear biases are 0; norms have weight 1
    and bias 0; the patch and spatial-reduction projections are uniform in +-1/sqrt(fan_in), as in
    PyTorch's Conv2d. All convolutions of a PVT v2 are normal with std sqrt(2/fan_out), biases 0.
    The source is the released code, whai362/PVT, ``_init_weights``; the papers do not say.
    Raises: ArrayTypeError if an argument has the wrong type, or dtype is another one.

    Args:
        config: the model.
        rng: a NumPy generator, which is advanced.
        dtype: float32 or float64. Both draw the same numbers, rounded.

    Returns:
        A record of NumPy arrays; :func:`pvt_ref.to_device` moves them.
    """
    build = architecture_of(config).build_params
    check_rng(rng)
    name = shown(dtype)
    if dtype is not None:
        with contextlib.suppress(Exception):  # NumPy raises several kinds if it is no dtype
            name = np.dtype(dtype).name
    if name not in FLOAT_DTYPES:
        raise ArrayTypeError(f"dtype is {name}; parameters are float32 or float64")
    return build(config, lambda leaf: draw_leaf(leaf, rng, np.dtype(name)))


def draw_leaf(leaf: Leaf, rng: Generator, dtype: Any) -> np.ndarray:
    """One array of :func:`init_params`."""
    if leaf.init in ("zeros", "ones"):
        return np.full(leaf.shape, 0 if leaf.init == "zeros" else 1, dtype)
    if leaf.init == "count":
        return np.zeros(leaf.shape, np.int64)
    if leaf.init in ("normal", "fan_out"):
        std = leaf.std if leaf.init == "normal" else math.sqrt(2 / leaf.fan_out)
        return (std * rng.standard_normal(leaf.shape)).astype(dtype)
    bound = 1 / math.sqrt(leaf.fan_in)
    return rng.uniform(-bound, bound, leaf.shape).astype(dtype)


def to_state_dict(params: Any) -> dict[str, Array]:
    """The weights as a state dict, with the authors' keys, order and shapes.

    Raises: ArrayTypeError if params is not a record of parameters.

    Args:
        params: the weights, NumPy or CuPy.

    Returns:
        A dict from key to array; the arrays are those of params, not copies.
    """
    check_params_type(params)
    return dict(named_arrays(params))


def from_state_dict(state: Mapping[str, Array], config: Any) -> Any:
    """Parameters from a state dict with the authors' keys, strictly.

    Args:
        state: key to array (NumPy or CuPy). float16 becomes float32; if float32 and float64 are
            mixed, all become float64. Arrays that need no conversion are not copied.
        config: the model they must fit.

    Returns:
        The weights, all float32 or all float64, each array on the device where it was.

    Raises:
        CheckpointError: if keys are missing, unexpected or mis-shaped; all of them are listed.
        ArrayTypeError: if config is not a configuration, state not a mapping, or a value not an
            array of float16, float32 or float64.
    """
    build = architecture_of(config).build_params
    if not isinstance(state, Mapping):
        needed = "it must map key names to arrays; pvt_ref.load(path) reads a file"
        raise ArrayTypeError(f"state is a {type(state).__name__}; {needed}")
    check_keys(state, config)
    counts = count_keys(config)
    _check_counts({key: state[key] for key in counts})
    dtype = _common_dtype({key: x for key, x in state.items() if key not in counts})

    def pick(leaf: Leaf) -> Array:
        x = state[leaf.key]
        xp = array_module(x)
        wanted = "int64" if leaf.key in counts else dtype
        return x if dtype_name(x) == wanted else xp.astype(x, getattr(xp, wanted))

    return quietly(build, config, pick)  # casting a signalling NaN warns; Model refuses any NaN


def check_keys(state: Mapping[str, Array], config: Any) -> None:
    """Refuses a state whose values are not arrays, or (CheckpointError) do not fit a model."""
    shapes = param_shapes(config)
    for key, x in state.items():
        if not is_array(x):
            raise ArrayTypeError(
                f"state[{shown(key)}] is a {type(x).__module__}.{type(x).__name__}; it must be a "
                f"NumPy or CuPy array. (From a PyTorch tensor: tensor.detach().cpu().numpy())"
            )
    found = {key: tuple(x.shape) for key, x in state.items()}
    problems = [f"missing: {k} {shape}" for k, shape in shapes.items() if k not in found]
    problems += [f"unexpected: {key_name(k)} {s}" for k, s in found.items() if k not in shapes]
    problems += [
        f"mis-shaped: {k} is {found[k]}, the configuration needs {shape}"
        for k, shape in shapes.items()
        if found.get(k, shape) != shape
    ]
    if problems:
        raise CheckpointError(
            f"these weights do not fit the configuration ({len(problems)} differences; it has "
            f"{len(shapes)} keys):\n  - " + "\n  - ".join(problems) + "\nThe likely cause is a "
            "configuration of another network, variant, class count or image size; "
            "dataclasses.replace(config, ...) changes one"
        )


def _check_counts(counts: Mapping[str, Array]) -> None:
    """Refuses counts of batches that are not integers."""
    for key, x in counts.items():
        if not dtype_name(x).startswith(("int", "uint")):
            what = f"{key} has dtype {dtype_name(x)}; it counts batches, and must be integer"
            raise ArrayTypeError(f"{what}. Leave it as the file has it")


def _common_dtype(state: Mapping[str, Array]) -> str:
    """float64 if any array is, else float32."""
    names = {key: dtype_name(x) for key, x in state.items()}
    wrong = {k: name for k, name in names.items() if name not in ("float16", *FLOAT_DTYPES)}
    if wrong:
        key, name = next(iter(wrong.items()))
        what = f"{len(wrong)} of {len(names)} arrays are not float16, float32 or float64"
        advice = "Convert them: x.astype('float32')"
        raise ArrayTypeError(f"{what}; the first is {key} with dtype {name}. {advice}")
    return "float64" if "float64" in names.values() else "float32"


#: The configuration that live weights were checked with. Records never change: once is enough.
_checked: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def check_params(params: Any, config: Any) -> None:
    """Refuses weights that do not fit config, mix dtypes or lie on several devices."""
    row = architecture_of(config)
    check_params_type(params)
    with contextlib.suppress(TypeError):  # a record without a hash is checked each time
        if _checked.get(params) == config:
            return
    if type(params) is not row.params_type:
        both = f"params is a {type(params).__name__} and config a {type(config).__name__}"
        raise ArrayTypeError(f"{both}; they belong to different networks")
    shapes = param_shapes(config)
    arrays = dict(named_arrays(params))
    found = {key: tuple(x.shape) for key, x in arrays.items()}
    if found != shapes:
        different = sorted(k for k in found.keys() | shapes.keys() if found.get(k) != shapes.get(k))
        key = different[0]
        raise ShapeError(
            f"params do not belong to this config: {len(different)} arrays differ. The first is "
            f"{key}, which is {found.get(key, 'absent')} and should be {shapes.get(key, 'absent')}."
            f" Pass the config that params were made with"
        )
    first_key, first = next(iter(arrays.items()))
    check_float(first_key, first)
    counts = count_keys(config)
    _check_counts({key: arrays[key] for key in counts})
    for key, x in arrays.items():
        if not same_library(x, first) or (x.dtype != first.dtype and key not in counts):
            check_float(key, x)
            raise ArrayTypeError(
                f"params mix {library_and_dtype(first)} ({first_key}) and {library_and_dtype(x)} "
                f"({key}); all must have one dtype and be on one device. "
                f"from_state_dict(to_state_dict(params), config) makes them one dtype, "
                f"to_device(params, ...) moves them to one device"
            )
    with contextlib.suppress(TypeError):
        _checked[params] = config


@record
class Prepared:
    """Checked weights, with position tables resized for images of one size.

    Made by :func:`prepare`; the forward functions take it in place of params.
    """

    params: Any  # the weights
    config: Any  # their configuration
    size: tuple[int, int]  # (H, W) of the images
    architecture: Architecture  # of the network
    constants: Any  # computed once for its forward: resized position tables

    def constants_for(self, images: Array) -> Any:
        """The constants, if they were made for the size of the images.

        Args:
            images: (B, in_chans, H, W).

        Returns:
            None for images of another size.
        """
        return self.constants if tuple(images.shape[2:]) == self.size else None


def prepare(params: Any, config: Any, size: Size | None = None) -> Prepared:
    """Checks weights and resizes position tables, once for many calls.

    Raises: PVTError as :func:`forward`.

    Args:
        params: the weights, arrays of NumPy or CuPy, float32 or float64.
        config: the configuration of the weights.
        size: side, or (H, W), of the images to come; None takes config.img_size. Images of other
            sizes work too, but no faster.

    Returns:
        A record to pass to :func:`forward` and its like in place of params. It does not notice
        later writes to the arrays of params.
    """
    check_params(params, config)
    return prepare_checked(params, config, size)


def prepare_checked(params: Any, config: Any, size: Any = None) -> Prepared:
    """As :func:`prepare`, for weights that are already checked."""
    row = architecture_of(config)
    size = as_size(config.img_size if size is None else size)
    config.grids(*size)  # refuses sizes that would lose pixels
    return Prepared(params, config, size, row, row.prepare(params, config, size))


def _model(params: Any, config: Any, cache: Any = None) -> Prepared:
    """params as a checked record; plain ones get no constants."""
    if isinstance(params, Prepared):
        if config is not None and config != params.config:
            advice = "leave config out, or prepare them again"
            raise ShapeError(f"params were prepared with another config; {advice}")
        return params
    known = isinstance(cache, ForwardCache) and cache.params is params and cache.config is config
    if not known:  # with a cache, the forward has checked them
        check_params(params, config)
    return Prepared(params, config, (0, 0), architecture_of(config), None)


def default_ops(x: Array) -> Ops:
    """The table used when the caller names none, chosen by the kind and dtype of the array x.

    NumPy arrays get :func:`~pvt_ref.kernels.cpu.table.blocked_ops`, CuPy arrays
    :func:`~pvt_ref.kernels.cuda.table.cuda_ops`, all others REFERENCE. The environment variable
    ``PVT_REF_OPS`` chooses the readable layers (``reference``) or their twins (``blocked``); with
    ``kernels``, CuPy arrays get :func:`~pvt_ref.kernels.cuda.table.cuda_kernels`.
    Raises: RangeError if it has another value.
    """
    if not (is_numpy(x) or is_cupy(x)) or dtype_name(x) not in FLOAT_DTYPES:
        return REFERENCE
    wanted = os.environ.get("PVT_REF_OPS") or "blocked"
    if wanted == "reference":
        return REFERENCE
    if wanted in ("blocked", "kernels") and is_numpy(x):  # imported only when they are used
        from pvt_ref.kernels.cpu.table import blocked_ops

        return blocked_ops()
    if wanted in ("blocked", "kernels"):
        from pvt_ref.kernels.cuda.table import cuda_kernels, cuda_ops

        return cuda_kernels() if wanted == "kernels" else cuda_ops()
    known = "'reference' (the readable layers), 'blocked' (their faster twins, the default) or "
    known += "'kernels' (on CUDA, kernels that have run on no GPU yet)"
    raise RangeError(f"the environment variable PVT_REF_OPS is {wanted!r}; use one of {known}")


def choose_ops(ops: Ops | None, images: Array, row: Architecture | None = None) -> Ops:
    """The given table, or the default for images; refuses one that cannot compute this."""
    if ops is None:
        return default_ops(images)
    advice = "a table of operations such as pvt_ref.REFERENCE, or None for the default"
    check_type("ops", ops, Ops, advice)
    if ops.accepts is not None and is_array(images) and not ops.accepts(images):
        arrays = f"{library_and_dtype(images)} arrays such as images"
        what = f"ops is the table {ops.name!r}, which does not compute on {arrays}"
        raise ArrayTypeError(f"{what}. Leave ops out, or pass pvt_ref.REFERENCE")
    if row is not None and not ops.replaced <= row.operations:
        unknown = ", ".join(sorted(op.name for op in ops.replaced - row.operations))
        never = f"which a {row.title} never asks for, so it would have no effect"
        raise ConfigError(f"ops replaces {unknown}, {never}. Use a table without it")
    return ops


def check_has_classifier(config: Any) -> None:
    """Refuses a model without a head for logits. Raises: ConfigError."""
    architecture_of(config)
    if not config.has_classifier:
        what = "this model is a bare backbone (num_classes 0: no head)"
        advice = "forward_pyramid gives its feature maps; weights with a classifier give both"
        raise ConfigError(f"{what} and has no logits. {advice}")


@record
class ForwardCache:
    """Made by a forward for its backward, which reads it and never changes it."""

    kind: str  # the forward's name
    parts: Any  # the caches of the network's parts
    shapes: tuple[tuple[int, ...], ...]  # of what the forward returned
    params: Any
    config: Any
    ops: Ops


def _run(
    pyramid: bool,
    params: Any,
    images: Array,
    config: Any,
    rng: Any,
    ops: Ops | None,
    keep: bool,
    blocks: Iterable[int] | None = None,
    batch_statistics: bool = False,
) -> tuple[Any, Any]:
    """Checks, then calls the core's forward or forward_pyramid: the result, and a cache if kept."""
    if rng is not None:
        check_rng(rng, draws=True)
    model = _model(params, config)
    row, config = model.architecture, model.config
    if not pyramid:
        check_has_classifier(config)
    elif row.forward_pyramid is None:
        raise ConfigError(f"a {row.title} has no pyramid: no maps for dense prediction")
    more = []
    if blocks is not None:
        if row.map_blocks is None:
            raise ConfigError(
                f"blocks are {shown(blocks)}, but a {row.title} gives one map for each stage. "
                f"Leave blocks out"
            )
        more = [check_blocks(blocks, row.map_blocks(config))]
    check_flag("batch_statistics", batch_statistics)
    if batch_statistics:
        if row.batch_buffers is None:
            raise ConfigError(f"batch_statistics is True, but a {row.title} has no batch norm")
        more = [True]
    weight = first_array(model.params)
    images = check_images(images, weight, config)
    ops = choose_ops(ops, images, row)
    core: Callable[..., Any] = row.forward_pyramid if pyramid else row.forward  # type: ignore
    constants = None if keep else model.constants_for(images)
    with ops.scope():
        y, parts = core(model.params, images, config, ops, rng, keep, constants, *more)
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
        params: the weights, float32 or float64, or the result of :func:`prepare`.
        images: (B, in_chans, H, W) normalised floats of the same library, H and W multiples of
        ``config.size_multiple``. Another float dtype is cast to the weights'.
        config: the configuration of the weights; None for prepared ones.
        ops: a table of operations; None takes the default.

    Returns:
        logits (B, num_classes) of the weights' dtype. A segmentation network gives them for every
        position of a map smaller than the image, (B, num_classes, h, w).

    Raises:
        ArrayTypeError: if an argument has the wrong type, images are not floats, or arrays are on
            different devices or do not suit ops.
        ShapeError: if images are not (B, in_chans, H, W), H or W would lose pixels, the batch is
            empty, or params belong to another config.
        ConfigError: if the model is a bare backbone, which has no logits, or ops replaces an
            operation that the network never asks for.
        RangeError: if ops is None and the environment variable PVT_REF_OPS names no table.
    """
    return _run(False, params, images, config, None, ops, keep=False)[0]


def forward_with_cache(
    params: Any,
    images: Array,
    config: Any = None,
    rng: Source = None,
    *,
    ops: Ops | None = None,
    batch_statistics: bool = False,
) -> tuple[Array, ForwardCache]:
    """Class logits, and the cache for :func:`backward`.

    Computes the same as :func:`forward`, with dropout and drop path if there is an rng. Without
    one nothing is dropped, whatever the rates of config. Memory grows with depth.
    Raises: PVTError as :func:`forward`; an ArrayTypeError also if rng has the wrong type.

    Args:
        params: as for :func:`forward`.
        images: as for :func:`forward`.
        config: as for :func:`forward`.
        rng: a NumPy generator, or :class:`~pvt_ref.draws.Draws`, turns dropout and drop path on, at
            the rates of config; None leaves them off, as for validation. The same seed draws the
            same masks on every device and for every dtype.
        ops: as for :func:`forward`.
        batch_statistics: for a network with batch norms, whether these use mean and variance of
            this batch, as in training; :func:`updated` then gives the new running statistics.

    Returns:
        logits of the weights' dtype, (B, num_classes) or, for a segmentation network, (B,
        num_classes, h, w); and the cache.
    """
    return _run(
        False, params, images, config, rng, ops, keep=True, batch_statistics=batch_statistics
    )


def batch_buffers(cache: ForwardCache) -> Any:
    """The batch's statistics in batch norms, as a record like params.buffers; None without any."""
    of_batch = architecture_of(cache.config).batch_buffers
    return None if of_batch is None else of_batch(cache.parts)


def with_buffers(params: Any, seen: Any) -> Any:
    """params after a batch with those statistics: means move towards them, counts add up."""
    if seen is None:
        return params
    like = first_array(params.buffers)
    there = map_arrays(lambda x: from_host(x, like=like) if is_numpy(x) else x, seen)
    return replace(params, buffers=moved(params.buffers, there))


def updated(params: Any, cache: ForwardCache) -> Any:
    """The running statistics after a forward with ``batch_statistics=True``.

    Args:
        params: the weights of the forward.
        cache: what it returned.

    Returns:
        The buffers for ``dataclasses.replace(params, buffers=...)``. After a forward with the
        running statistics they are ``params.buffers``; without batch norms, None.

    Raises:
        ArrayTypeError: if params are not parameters, or cache is from another forward or network.
    """
    check_params_type(params)
    _check_maker(cache, "forward_with_cache")
    model = _model(params, cache.config, cache)
    _check_cache(cache, "forward_with_cache", model)
    if model.architecture.batch_buffers is None:
        return None
    return with_buffers(params, batch_buffers(cache)).buffers


def forward_pyramid(
    params: Any,
    images: Array,
    config: Any = None,
    *,
    ops: Ops | None = None,
    blocks: Iterable[int] | None = None,
) -> list[Array]:
    """The feature maps for dense prediction, without keeping anything for a backward.

    For a PVT, these are F_1..F_4 of the released detection and segmentation backbones (paper
    sections 3.1, 3.2 and 4.2). They lack cls token and final norm, so F_4 is not the classifier's.
    A columnar ViT gives one map, the patch tokens after its last block. Raises: PVTError as
    :func:`forward`; a ConfigError if the network has no pyramid, or if blocks are given and it
    gives one map for each stage; a RangeError if there are no such blocks.

    Args:
        params: as for :func:`forward`; they may lack a classifier.
        images: as for :func:`forward`.
        config: as for :func:`forward`.
        ops: as for :func:`forward`.
        blocks: for a ViT, the blocks after which a map is taken, in rising order, counted from 0 as
            in the keys of the weights. None takes the last. Later blocks are not computed.

    Returns:
        [F_1, F_2, ...], (B, C_i, H_i, W_i) each, of the weights' dtype.
    """
    return _run(True, params, images, config, None, ops, keep=False, blocks=blocks)[0]


def forward_pyramid_with_cache(
    params: Any,
    images: Array,
    config: Any = None,
    rng: Source = None,
    *,
    ops: Ops | None = None,
    blocks: Iterable[int] | None = None,
) -> tuple[list[Array], ForwardCache]:
    """The feature maps, and the cache for :func:`backward_pyramid`.

    Raises: PVTError as :func:`forward_with_cache` and :func:`forward_pyramid`.

    Args:
        params: as for :func:`forward_pyramid`.
        images: as for :func:`forward`.
        config: as for :func:`forward`.
        rng: as for :func:`forward_with_cache`.
        ops: as for :func:`forward`.
        blocks: as for :func:`forward_pyramid`.

    Returns:
        [F_1, F_2, ...], (B, C_i, H_i, W_i) each, of the weights' dtype, and the cache.
    """
    return _run(True, params, images, config, rng, ops, keep=True, blocks=blocks)


def backward(
    params: Any, cache: ForwardCache, dlogits: Array, config: Any = None, *, ops: Ops | None = None
) -> tuple[Any, Array]:
    """Gradients of a scalar loss L through :func:`forward_with_cache`.

    Args:
        params: the weights of the forward.
        cache: what the forward returned. It is not changed, so it may serve several dlogits.
        dlogits: dL/dlogits (B, num_classes), float32 or float64, for instance from
            :func:`pvt_ref.cross_entropy`. It is cast to the weights' dtype.
        config: the same configuration as in the forward; None for prepared weights.
        ops: the forward's table (the default); another table cannot read its cache.

    Returns:
        grads, of params' type with dL/dw in place of w, of its shape and dtype; and dL/dimages
        (B, in_chans, H, W), of the weights' dtype: float16 images could not hold every gradient.

    Raises:
        ArrayTypeError: if an argument has the wrong type, dlogits are not floats or are on another
            device, or the cache is from another forward, other ops or weights of another dtype.
        ShapeError: if dlogits are not (B, num_classes), or params or cache belong to another
            config.
        ConfigError: if the model is a bare backbone, which has no logits.
    """
    return _run_backward(False, params, cache, dlogits, config, ops)


def backward_pyramid(
    params: Any,
    cache: ForwardCache,
    dmaps: Sequence[Array | None],
    config: Any = None,
    *,
    ops: Ops | None = None,
) -> tuple[Any, Array]:
    """Gradients of a scalar loss L through :func:`forward_pyramid_with_cache`.

    Raises: PVTError as :func:`backward`; a ShapeError also if dmaps has not one entry for each map.

    Args:
        params: as for :func:`backward`.
        cache: as for :func:`backward`.
        dmaps: dL/dF_1, dL/dF_2, ..., (B, C_i, H_i, W_i) each, as dlogits for :func:`backward`; None
            for a map that L does not use.
        config: as for :func:`backward`.
        ops: as for :func:`backward`.

    Returns:
        grads and dL/dimages (B, in_chans, H, W), as :func:`backward`; zeros for weights that the
        maps do not use.
    """
    return _run_backward(True, params, cache, dmaps, config, ops)


def _run_backward(
    pyramid: bool, params: Any, cache: Any, dy: Any, config: Any, ops: Ops | None
) -> tuple[Any, Array]:
    """Checks, then calls the core's backward or backward_pyramid."""
    model = _model(params, config, cache)
    if not pyramid:
        check_has_classifier(model.config)
    _check_cache(cache, "forward_pyramid_with_cache" if pyramid else "forward_with_cache", model)
    if ops is not None and choose_ops(ops, None) != cache.ops:
        what = f"the cache was made with ops {cache.ops.name!r} and cannot be read by {ops.name!r}"
        why = "only the table that made a cache can read it"
        raise ArrayTypeError(f"{what}: {why}. Leave ops out, or pass it to the forward")
    table, weight = cache.ops, first_array(model.params)
    if pyramid:
        dy = check_pyramid_cotangents(dy, cache.shapes, weight)
    else:
        dy = check_cotangent("dlogits", dy, cache.shapes[0], weight)
    row = model.architecture
    core: Callable[..., Any] = row.backward_pyramid if pyramid else row.backward  # type: ignore
    with table.scope():
        return core(model.params, cache.parts, dy, table)


def _check_cache(cache: Any, maker: str, model: Prepared) -> None:
    """Refuses a cache from another forward, configuration or dtype of weights."""
    _check_maker(cache, maker)
    advice = f"to {maker} and to its backward"
    if cache.config != model.config:
        made, given = config_to_dict(cache.config), config_to_dict(model.config)
        fields = ", ".join(name for name in made if made[name] != given.get(name))
        what = f"the cache was made with another config; the two differ in {fields}"
        raise ShapeError(f"{what}. Pass the same config {advice}")
    made_with, weight = first_array(cache.params), first_array(model.params)
    if made_with.dtype != weight.dtype:
        what = f"the cache was made with {made_with.dtype} weights, but params are"
        raise ArrayTypeError(f"{what} {dtype_name(weight)}. Pass the same params {advice}")


def _check_maker(cache: Any, maker: str) -> None:
    """Refuses anything but a cache from that forward."""
    if not isinstance(cache, ForwardCache) or cache.kind != maker:
        of = isinstance(cache, ForwardCache)
        given = f"that of {cache.kind}" if of else f"a {type(cache).__name__}"
        needed = f"the ForwardCache that {maker} returned beside its result"
        raise ArrayTypeError(f"cache is {given}; this backward needs {needed}")
