"""The contenders: the same model with the same weights in several libraries, behind one interface.

Each is built in its own process (see worker.py), since the threads of two libraries in one process
spin against each other and distort both times.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pvt_ref
from pvt_ref import (
    PVTConfig,
    PVTParams,
    PVTv2Config,
    PVTv2Params,
    SegmentorConfig,
    SegmentorParams,
    ViTConfig,
    ViTParams,
)

#: The gradients compared before anything is timed, by the names of the weights.
_PVT = ("patch_embed1.proj.weight", "block1.0.attn.sr.weight", "block4.1.mlp.fc1.weight")
_PVT_V2 = (*_PVT[:2], "block1.0.mlp.dwconv.dwconv.weight")
_VIT = ("patch_embed.proj.weight", "pos_embed", "blocks.1.mlp.fc1.weight")
_FPN = (
    *("backbone.patch_embed1.proj.weight", "backbone.block1.0.attn.sr.weight"),
    *("neck.lateral_convs.1.conv.weight", "decode_head.scale_heads.1.0.bn.weight"),
)
#: They are looked up by the type of a configuration, or of a record of gradients.
COMPARED: dict[type, tuple[str, ...]] = {
    PVTConfig: _PVT, PVTParams: _PVT,
    PVTv2Config: _PVT_V2, PVTv2Params: _PVT_V2,
    ViTConfig: _VIT, ViTParams: _VIT,
    SegmentorConfig: _FPN, SegmentorParams: _FPN,
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A loaded model."""

    versions: str
    prepare: Callable[[np.ndarray], Any]  # an image batch as this library's kind of array
    forward: Callable[[Any], Any]  # logits
    train: Callable[[Any, Any], Any] | None  # images, dL/dlogits: logits, all gradients
    to_numpy: Callable[[Any], dict[str, Any]]  # logits, or the result of train
    synchronize: Callable[[], None] = lambda: None  # waits for the device
    device_mib: Callable[[Callable[[], Any]], float] | None = None  # peak memory of a run there


#: The table of readable operations. Our other contenders use the default, ops=None.
READABLE = pvt_ref.REFERENCE


def our_pass(params: Any, images: Any, dlogits: Any, config: Any, ops: Any = None) -> tuple:
    """pvt_ref's logits, gradients of the weights, and gradient of the images."""
    logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
    return logits, *pvt_ref.backward(params, cache, dlogits, config)


def our_arrays(result: Any) -> dict[str, np.ndarray]:
    """Logits, or the result of :func:`our_pass`, by name."""
    result = pvt_ref.to_numpy(result)
    if not isinstance(result, tuple):
        return {"logits": result}
    logits, grads, dimages = result
    state, keys = pvt_ref.to_state_dict(grads), COMPARED[type(grads)]
    return {"logits": logits, "dimages": dimages} | {key: state[key] for key in keys}


def ours(
    weights: Path, config: Any, size: int, threads: int, device: str, readable: bool
) -> Contender:
    """pvt_ref itself, with as many threads as BLAS, which the environment sets."""
    import scipy

    model = pvt_ref.to_device(pvt_ref.load(weights, config), device)
    ops = READABLE if readable else None
    if device == "cpu":
        versions, more = f"NumPy {np.__version__}, SciPy {scipy.__version__}", {}
    else:
        import cupy

        pool = cupy.get_default_memory_pool()

        def held(run):
            pool.free_all_blocks()
            run()
            return pool.total_bytes() / 2**20

        versions = f"CuPy {cupy.__version__}"
        more = {"synchronize": cupy.cuda.get_current_stream().synchronize, "device_mib": held}
    return Contender(
        versions,
        prepare=lambda images: pvt_ref.to_device(images, device),
        forward=lambda images: pvt_ref.forward(model.params, images, config, ops=ops),
        train=lambda images, dlogits: our_pass(model.params, images, dlogits, config, ops),
        to_numpy=our_arrays,
        **more,
    )


def _torch(module: Any, keys: dict[str, Any], versions: str, device: str) -> Contender:
    """A torch.nn.Module on its device; keys are the compared parameters by our names."""
    import torch

    leaves = list(module.parameters())

    def forward(images):
        with torch.inference_mode():
            return module(images)

    def train(images, dlogits):
        images = images.detach().requires_grad_()
        for leaf in leaves:
            leaf.grad = None
        logits = module(images)
        logits.backward(dlogits)
        return logits, images.grad

    def to_numpy(result):
        if not isinstance(result, tuple):
            return {"logits": result.numpy(force=True)}
        logits, dimages = result
        arrays = {"logits": logits, "dimages": dimages}
        arrays |= {key: p.grad for key, p in keys.items()}
        return {key: x.numpy(force=True) for key, x in arrays.items()}

    def held(run):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_reserved() / 2**20

    more = {}
    if device != "cpu":
        more = {"synchronize": torch.cuda.synchronize, "device_mib": held}
    return Contender(
        versions,
        lambda images: torch.from_numpy(images).to(device),
        forward,
        train,
        to_numpy,
        **more,
    )


def pytorch(
    weights: Path,
    config: Any,
    size: int,
    threads: int,
    device: str,
    fused: bool,
    compiled: bool,
) -> Contender:
    """The network in torch.nn, eager or compiled."""
    import torch
    from safetensors.torch import load_file
    from torch_networks import network

    torch.set_num_threads(threads)
    with torch.device("meta"):
        model = network(config, fused)
    model.load_state_dict(load_file(weights, device=device), assign=True)
    parameters = dict(model.named_parameters())
    torch.compiler.reset()  # PyTorch limits the number of compiled shapes, over all models
    module = torch.compile(model, dynamic=False) if compiled else model
    keys = {key: parameters[key] for key in COMPARED[type(config)]}
    return _torch(module, keys, f"PyTorch {torch.__version__}", device)


def hugging_face(weights: Path, config: Any, size: int, threads: int, device: str) -> Contender:
    """transformers' classifier of that kind, built and corrected as in tests/oracles.py."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import oracles
    import torch
    import transformers
    from safetensors.torch import load_file
    from torch import nn

    torch.set_num_threads(threads)
    state = load_file(weights, device=device)
    if isinstance(config, PVTv2Config):
        model, theirs = oracles.build_v2(config, None), oracles.translate_v2(state, config)
    elif isinstance(config, ViTConfig):
        model, theirs = oracles.build_vit(config), oracles.translate_vit(state, config)
    else:
        model = oracles.build(config, None, pyramid=False)
        theirs = oracles.translate(state, config, (size, size), pyramid=False)
    keys = {}
    for name, x in theirs.items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(x.clone())
        setattr(model.get_submodule(owner), leaf, parameter)
        keys |= {key: parameter for key in COMPARED[type(config)] if state[key] is x}

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(pixel_values=images).logits

    versions = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
    return _torch(Logits(), keys, versions, device)


def exported(weights: Path, size: int) -> Path:
    """The ONNX file of a model for one size, beside its weights; written the first time.

    A separate program writes it, so that the measured process never holds two models.
    """
    file = weights.with_name(f"{weights.stem}-{size}.onnx")
    if not file.exists():
        command = [sys.executable, "-m", "pvt_ref", "export", str(weights), "-o", str(file)]
        command += ["--config", weights.stem, "--size", str(size)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the export to ONNX failed:\n{done.stderr}")
    return file


def _onnx(
    weights: Path, size: int, versions: str, compile: Callable[[Path, tuple[int, ...]], Any]
) -> Contender:
    """A library that runs ONNX files; it has no backward.

    compile makes a function from a file and the shape of the images: both libraries are fastest
    with a graph whose shapes are all known.
    """
    compiled: dict[tuple[int, ...], Callable[[np.ndarray], np.ndarray]] = {}

    def prepare(images):
        if images.shape not in compiled:
            compiled.clear()  # not two at once
            compiled[images.shape] = compile(exported(weights, size), images.shape)
        return images

    return Contender(
        versions,
        prepare,
        forward=lambda images: compiled[images.shape](images),
        train=None,
        to_numpy=lambda logits: {"logits": logits},
    )


def onnx_runtime(weights: Path, config: Any, size: int, threads: int, device: str) -> Contender:
    """The exported network in ONNX Runtime."""
    import onnxruntime

    def compile(file, shape):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_free_dimension_override_by_name("batch", shape[0])
        cpu = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(file, options, providers=cpu)
        return lambda images: session.run(None, {"images": images})[0]

    return _onnx(weights, size, f"ONNX Runtime {onnxruntime.__version__}", compile)


def openvino(weights: Path, config: Any, size: int, threads: int, device: str) -> Contender:
    """The exported network in OpenVINO, in float32 even if the processor has bfloat16."""
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }

    def compile(file, shape):
        graph = core.read_model(file)
        graph.reshape(list(shape))
        model = core.compile_model(graph, "CPU", options)
        return lambda images: model(images)[0]

    return _onnx(weights, size, f"OpenVINO {openvino.__version__.split('-')[0]}", compile)


CONTENDERS: dict[str, Callable[[Path, Any, int, int, str], Contender]] = {
    "pvt_ref": lambda *a: ours(*a, readable=False),
    "pvt_ref, readable layers": lambda *a: ours(*a, readable=True),
    "PyTorch eager": lambda *a: pytorch(*a, fused=False, compiled=False),
    "PyTorch eager, fused attention": lambda *a: pytorch(*a, fused=True, compiled=False),
    "torch.compile": lambda *a: pytorch(*a, fused=False, compiled=True),
    "transformers": hugging_face,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}

#: Modules that a contender needs in addition to pvt_ref's own.
NEEDS = {
    "PyTorch eager": ("torch",),
    "PyTorch eager, fused attention": ("torch",),
    "torch.compile": ("torch",),
    "transformers": ("torch", "transformers"),
    "ONNX Runtime": ("onnx", "onnxruntime"),
    "OpenVINO": ("onnx", "openvino"),
}


def missing(name: str) -> str | None:
    """Why a contender cannot run here: which of its modules are not installed. None: it can."""
    lacking = [module for module in NEEDS.get(name, ()) if not importlib.util.find_spec(module)]
    return f"not installed: {', '.join(lacking)}" if lacking else None
