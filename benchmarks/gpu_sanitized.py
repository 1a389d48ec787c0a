"""Every kernel for CUDA on small networks, for compute-sanitizer to look at.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/gpu_sanitized.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/gpu_sanitized.py

CuPy's memory pool is off: each array is an allocation of its own, so that one element too far is
seen. The results are compared with the readable layers in float64, and gpu.py runs both commands.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_worker import ALLOWED
from in_turn import is_real

import pvt_ref
from pvt_ref import PVTConfig, PVTv2Config, SegmentorConfig, ViTConfig
from pvt_ref.arrays import import_cupy, is_cupy
from pvt_ref.kernels.cuda.launch import Cuda, on_gpu
from pvt_ref.kernels.cuda.table import table_with
from pvt_ref.models.architecture import architecture_of
from pvt_ref.models.segmentor.config import SemanticFPNHead
from pvt_ref.ops import Ops
from pvt_ref.train import AdamW, adamw_init
from pvt_ref.train.on_device import update
from pvt_ref.tree import map_arrays, named_arrays, without_buffers

_STAGES: dict[str, Any] = {"img_size": 32, "embed_dims": (8, 8, 12, 16), "num_heads": (1, 2, 3, 4)}
_STAGES |= {"mlp_ratios": (2, 2, 2, 2), "depths": (2, 1, 1, 1)}

#: Networks, the sides of their images, and the precision of products; the last resizes its tables.
CASES = (
    (PVTConfig(**_STAGES, num_classes=5), 32, "float32"),
    (PVTv2Config(**_STAGES, num_classes=5, linear=True), 32, "float32"),
    (ViTConfig(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5), 32, "tf32"),
    (PVTConfig(**_STAGES, num_classes=5), 32, "bfloat16"),
    (
        SegmentorConfig(
            backbone=PVTConfig(**_STAGES, num_classes=0),
            head=SemanticFPNHead(neck_channels=8, channels=8, drop_rate=0.0),
            num_classes=5,
        ),
        64,
        "float32",
    ),
)


def look(table: Callable[[str], Ops], move: Callable[[Any], Any] = lambda tree: tree) -> list[str]:
    """Forward, backward and a step of AdamW of each case; what is wrong with their numbers.

    Args:
        table: makes that of a precision.
        move: brings a tree of arrays to the device.
    """
    wrong = []
    for config, side, precision in CASES:
        params, images, dlogits = _inputs(config, side)
        ops = table(precision)
        found = pvt_ref.to_numpy(_pass(move(params), move(images), move(dlogits), config, ops))
        p, x, dy = map_arrays(_wide, (params, images, dlogits))
        expected = _pass(p, x, dy, config)
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            error = np.linalg.norm(x - y) / np.linalg.norm(y)
            if not error < ALLOWED[precision]:
                what = ("the logits", "all gradients")[i]
                wrong.append(f"{type(config).__name__} in {precision}: {what} off by {error:.1e}")
    return wrong


def _wide(x: Any) -> Any:
    return x.astype(np.float64) if is_real(x) else x


def _inputs(config: Any, side: int) -> tuple[Any, Any, Any]:
    """Weights, images and dL/dlogits; no bias is 0 and no norm 1."""
    rng = np.random.default_rng(3)

    def noisy(x: Any) -> Any:
        return (x + 0.1 * rng.random(x.shape)).astype(np.float32) if is_real(x) else x

    params = map_arrays(noisy, pvt_ref.init_params(config, rng))
    places = 2 * (side // 4,) if architecture_of(config).dense else ()
    images = rng.standard_normal((2, 3, side, side), np.float32)
    return params, images, rng.standard_normal((2, config.num_classes, *places), np.float32)


def _pass(params: Any, images: Any, dlogits: Any, config: Any, ops: Any = pvt_ref.REFERENCE) -> Any:
    """Logits, and all gradients one behind the other; by kernels also a step, which is dropped."""
    norms = architecture_of(config).batch_buffers is not None
    logits, cache = pvt_ref.forward_with_cache(
        params, images, config, ops=ops, batch_statistics=norms
    )
    grads, dimages = pvt_ref.backward(params, cache, dlogits, config)
    if isinstance(ops.settings, Cuda):
        trained = without_buffers(params)
        state, rule = adamw_init(trained), AdamW()
        update(trained, grads, state, 1e-3, rule, None, 1.0, 2.0, ops.settings)
    host = pvt_ref.to_numpy((grads, dimages))
    return logits, np.concatenate([x.reshape(-1) for _, x in named_arrays(host)])


def main() -> int:
    cupy, started = import_cupy(), set[str]()
    cupy.cuda.set_allocator(None)

    def noted(function: Any, *given: Any, **more: Any) -> None:
        started.add(function.name)
        on_gpu(function, *given, **more)

    def table(precision: str) -> Ops:
        products = "own" if precision in ("float32", "tf32") else "cublaslt"
        return table_with(Cuda(noted, products=products, precision=precision), is_cupy)

    wrong = look(table, pvt_ref.to_device)
    print("\n".join([*wrong, f"{len(started)} kernels were run; {len(wrong)} results are wrong"]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
