"""What the public functions check before they compute: types, dtypes, devices, shapes.

Inside, arrays are trusted: what a caller can get wrong about them is caught here, once, with what
was given, what is needed, the likely cause and the fix in one message. (Configurations, weights,
losses, costs and pictures are checked where they are made.)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pvt_ref.arrays import (
    FLOAT_DTYPES,
    Array,
    array_module,
    describe_type,
    dtype_name,
    is_array,
    is_numpy,
    library_and_dtype,
    same_library,
)
from pvt_ref.config import NUM_STAGES, PVTConfig, check_config, config_to_dict, is_whole
from pvt_ref.errors import (
    ArrayTypeError,
    ConfigError,
    NonFiniteError,
    RangeError,
    ShapeError,
    shown,
)
from pvt_ref.ops import Ops
from pvt_ref.params import PVTParams, check_params_type, named_arrays, param_shapes
from pvt_ref.records import default_ops


def check_params(params: PVTParams, config: PVTConfig) -> None:
    """Refuses weights that are not of one float dtype on one device, made for config.

    Args:
        params: the weights.
        config: the model.

    Raises:
        ArrayTypeError: if config is not a PVTConfig or params not a PVTParams, or the arrays are
            not all float32 or all float64 of one library and device.
        ShapeError: if an array is absent, is not in config's model, or has another shape there.
    """
    check_config(config)
    check_params_type(params)
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
    first = params.pos_embed1
    check_float("pos_embed1", first)
    for key, x in arrays.items():
        if not same_library(x, first) or x.dtype != first.dtype:
            check_float(key, x)
            raise ArrayTypeError(
                f"params mix {library_and_dtype(first)} (pos_embed1) and {library_and_dtype(x)} "
                f"({key}); all must have one dtype and lie on one device. "
                f"from_state_dict(to_state_dict(params), config) makes the dtype one, "
                f"to_device(params, ...) the device"
            )


def check_float(name: str, x: Array) -> None:
    """Refuses an array that is not of floats to compute with.

    Args:
        name: of the array, for the message.
        x: an array of any shape.

    Raises:
        ArrayTypeError: unless x has dtype float32 or float64.
    """
    if dtype_name(x) not in FLOAT_DTYPES:
        raise ArrayTypeError(
            f"{name} has dtype {dtype_name(x)}; it must be float32 or float64. "
            f"x.astype('float32') converts it"
        )


def prepare_images(params: PVTParams, images: Array, config: PVTConfig) -> Array:
    """images checked against params and config, and cast to the dtype of the weights.

    Args:
        params: the weights.
        images: (B, in_chans, H, W) floats.
        config: the model.

    Returns:
        (B, in_chans, H, W) of the weights' dtype; images itself if it has that.

    Raises:
        ArrayTypeError: not an array, integers, objects, or on another device than params; also as
            :func:`check_params`.
        ShapeError: wrong rank, channels or size; an empty batch; weights of another config.
    """
    check_params(params, config)
    if not is_array(images):
        raise ArrayTypeError(
            f"images are {describe_type(images)}. They must be one array (B, {config.in_chans}, H, "
            f"W) of floats: numpy.stack(list_of_images) makes one of several, and "
            f"pvt_ref.load_image(path) reads one from a file"
        )
    weight = params.pos_embed1
    if not same_library(images, weight):
        raise ArrayTypeError(
            f"images are {library_and_dtype(images)} and the weights {library_and_dtype(weight)}; "
            f"both must lie on one device. Move one: pvt_ref.to_device(x, 'cuda') or "
            f"pvt_ref.to_numpy(x)"
        )
    xp = array_module(images)
    name = dtype_name(images)
    if name.startswith(("int", "uint", "bool")):
        raise ArrayTypeError(
            f"images have dtype {name}, which looks like raw pixels; they must be normalised "
            f"floats. Preprocess them first: pvt_ref.load_image(path), or pvt_ref.normalize(pixels)"
        )
    if not name.startswith(("float", "bfloat")):
        raise ArrayTypeError(
            f"images have dtype {name}; they must be float32 or float64, or other floats to be "
            f"cast. x.astype('float32') also mends another byte order"
            + (" (is it a ragged list of arrays?)" if name == "object" else "")
        )
    shape = tuple(images.shape)
    C = config.in_chans
    if len(shape) != 4:
        hint = " A single image needs a batch axis: images[None]." if len(shape) == 3 else ""
        raise ShapeError(
            f"images have rank {len(shape)}, shape {shape}; they must be (B, {C}, H, W).{hint}"
        )
    if shape[1] != C:
        if shape[3] == C:
            raise ShapeError(
                f"looks channels-last: {shape}; images are (B, {C}, H, W). "
                f"images.transpose(0, 3, 1, 2) turns them"
            )
        raise ShapeError(
            f"images have {shape[1]} channels, shape {shape}; the configuration has in_chans={C}, "
            f"so they must be (B, {C}, H, W)"
        )
    if shape[0] == 0:
        raise ShapeError(f"the batch is empty: images have shape {shape}; B must be at least 1")
    config.grids(shape[2], shape[3])  # refuses sizes that would lose pixels
    return xp.astype(images, weight.dtype, copy=False)


def check_has_classifier(config: PVTConfig) -> None:
    """Refuses a model that has no head to make logits with.

    Args:
        config: the model.

    Raises:
        ArrayTypeError: if config is not a PVTConfig.
        ConfigError: if num_classes is 0.
    """
    check_config(config)
    if not config.has_classifier:
        raise ConfigError(
            "this model is a bare backbone (num_classes 0: no cls token, norm or head) and has no "
            "logits. forward_pyramid gives its feature maps; weights with a classifier give both"
        )


def check_cotangent(name: str, dy: Array, shape: tuple[int, ...], like: Array) -> Array:
    """A gradient that has been checked, cast to the dtype of the weights.

    Args:
        name: of the gradient, for the message.
        dy: the gradient, of that shape, float32 or float64.
        shape: what it must have: that of what the forward returned.
        like: an array of the weights, of any shape.

    Returns:
        dy, of the same shape and of like's dtype; dy itself if it has that.

    Raises:
        ArrayTypeError: if dy is not an array, lies on another device than like, or is not float32
            or float64.
        ShapeError: if it has another shape.
    """
    if not is_array(dy):
        raise ArrayTypeError(f"{name} is {describe_type(dy)}. It must be an array {shape}")
    if not same_library(dy, like):
        raise ArrayTypeError(
            f"{name} is {library_and_dtype(dy)} and the weights are {library_and_dtype(like)}; "
            f"both must lie on one device. Move one: pvt_ref.to_device(x, 'cuda') or "
            f"pvt_ref.to_numpy(x)"
        )
    check_float(name, dy)
    if tuple(dy.shape) != shape:
        raise ShapeError(
            f"{name} has shape {tuple(dy.shape)}; the forward returned {shape}, and a gradient has "
            f"the shape of what it belongs to"
        )
    return array_module(dy).astype(dy, like.dtype, copy=False)


def check_pyramid_cotangents(
    dmaps: Sequence[Array | None], shapes: Sequence[tuple[int, ...]], like: Array
) -> list[Array]:
    """Four gradients that have been checked, with zeros in the place of None.

    Args:
        dmaps: dL/dF_1 to dL/dF_4, (B, C_i, H_i, W_i) each, or None.
        shapes: of the four maps.
        like: an array of the weights, of any shape.

    Returns:
        Four arrays of these shapes, of like's library, device and dtype.

    Raises:
        ShapeError: if dmaps is not a sequence of four, or one has another shape.
        ArrayTypeError: as :func:`check_cotangent`.
    """
    if not isinstance(dmaps, Sequence) or len(dmaps) != NUM_STAGES:
        given = f"{len(dmaps)}" if isinstance(dmaps, Sequence) else f"a {type(dmaps).__name__}"
        raise ShapeError(
            f"dmaps must be a list of four arrays, dL/dF_1 to dL/dF_4 (None where the loss does "
            f"not use a map); got {given}"
        )
    xp = array_module(like)
    return [
        xp.zeros(shape, dtype=like.dtype)
        if dmap is None
        else check_cotangent(f"dmaps[{i}]", dmap, shape, like)
        for i, (dmap, shape) in enumerate(zip(dmaps, shapes, strict=True))
    ]


def choose_ops(ops: Ops | None, images: Array) -> Ops:
    """The record named, or the default for images.

    Args:
        ops: a record, or None.
        images: what it will compute on, of any shape; its library decides.

    Returns:
        ops, or for None that of :func:`~pvt_ref.records.default_ops`.

    Raises:
        ArrayTypeError: if ops is something else, or computes on NumPy arrays only and images are of
            another library.
        RangeError: if ops is None and the environment variable PVT_REF_OPS names no record.
    """
    if ops is None:
        return default_ops(images)
    if isinstance(ops, Ops) and ops.numpy_only and is_array(images) and not is_numpy(images):
        raise ArrayTypeError(
            f"ops is the record {ops.name!r}, which computes on NumPy arrays only, and images are "
            f"{library_and_dtype(images)}. Leave ops out, or pass pvt_ref.REFERENCE"
        )
    if not isinstance(ops, Ops):
        raise ArrayTypeError(
            f"ops is a {type(ops).__name__}; it must be a record of operations (pvt_ref.Ops), such "
            f"as pvt_ref.REFERENCE, or None for the default"
        )
    return ops


def check_cache(
    cache: Any, kind: type, maker: str, params: PVTParams, config: PVTConfig, ops: Ops | None
) -> Ops:
    """The record of operations that made cache, once it is sure that it can read it.

    Args:
        cache: what the caller passed as one.
        kind: the type that it must have.
        maker: name of the forward that makes such, for the message.
        params: the weights of the backward.
        config: the model of the backward.
        ops: the record asked for; None takes that of the cache.

    Returns:
        The record in cache.

    Raises:
        ArrayTypeError: if cache is of another type, was made with weights of another dtype, or by
            another record than ops.
        ShapeError: if it was made with another config.
    """
    if not isinstance(cache, kind):
        raise ArrayTypeError(
            f"cache is a {type(cache).__name__}; this backward needs the {kind.__name__} that "
            f"{maker} returned beside its result"
        )
    if cache.config != config:
        made, given = config_to_dict(cache.config), config_to_dict(config)
        fields = ", ".join(name for name in made if made[name] != given[name])
        raise ShapeError(
            f"the cache was made with another config; the two differ in {fields}. Pass the same "
            f"config to {maker} and to its backward"
        )
    if cache.dtype != params.pos_embed1.dtype:
        raise ArrayTypeError(
            f"the cache was made with {cache.dtype} weights, and params are "
            f"{dtype_name(params.pos_embed1)}. Pass the same params to {maker} and to its backward"
        )
    if ops is not None and choose_ops(ops, None) != cache.ops:
        raise ArrayTypeError(
            f"the cache was made with ops {cache.ops.name!r} and cannot be read by {ops.name!r}: "
            f"a cache belongs to the pair that made it. Leave ops out, or pass it to the forward"
        )
    return cache.ops


def check_stages(stages: Iterable[int]) -> set[int]:
    """The stages as a set, each from 1 to 4.

    Args:
        stages: whole numbers.

    Returns:
        Plain integers; empty if stages is.

    Raises:
        RangeError: if stages is not iterable, or holds anything but whole numbers from 1 to 4.
    """
    wanted: list[Any]
    try:
        wanted = list(stages)
    except TypeError:  # not iterable, which arrays without an axis find out only now
        wanted = [None]
    if not all(is_whole(s) and 1 <= s <= 4 for s in wanted):
        raise RangeError(
            f"stages are {shown(stages)}; they must be a list of numbers from 1 to 4, such as "
            f"[1, 4]"
        )
    return {int(s) for s in wanted}


def check_finite(name: str, x: Array, cause: str) -> None:
    """Refuses a host array that holds NaN or infinity.

    Arrays on a device are passed over: looking at them would make the host wait.

    Args:
        name: of the array, for the message.
        x: an array of any shape; only one of NumPy floats is looked at.
        cause: the likely cause and its cure, as sentences for the message.

    Raises:
        NonFiniteError: if a number in it is NaN or infinite; the message has how many, and where
            the first.
    """
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f" or bool(np.isfinite(x).all()):
        return
    bad = ~np.isfinite(x)
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    raise NonFiniteError(
        f"{name} holds {int(bad.sum())} values of {x.size} that are NaN or infinite, the first at "
        f"index {where}. {cause}"
    )
