"""Who is timed: the same model, with the same weights, behind one interface.

Each is built in a process of its own (see worker.py), since two libraries' threads in one process
spin against each other and falsify both times.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pvt_ref
from pvt_ref import PVTConfig

#: The gradients that are compared before anything is timed, by the names of the weights.
COMPARED = ("patch_embed1.proj.weight", "block1.0.attn.sr.weight", "block4.1.mlp.fc1.weight")


@dataclass(frozen=True)
class Contender:
    """A loaded model."""

    versions: str
    prepare: Callable[[np.ndarray], Any]  # an image batch as its own kind of array
    forward: Callable[[Any], Any]  # logits
    train: Callable[[Any, Any], Any]  # images, dL/dlogits: logits, all gradients
    to_numpy: Callable[[Any], dict[str, np.ndarray]]  # logits, or what train returned


def ours(weights: Path, config: PVTConfig, size: int, threads: int, readable: bool) -> Contender:
    """pvt_ref itself: its readable layers or its kernels."""
    import scipy

    model = pvt_ref.load(weights, config)
    ops = pvt_ref.REFERENCE if readable else pvt_ref.blocked_ops(threads)

    def train(images, dlogits):
        logits, cache = pvt_ref.forward_with_cache(model.params, images, config, ops=ops)
        return logits, *pvt_ref.backward(model.params, cache, dlogits, config)

    def to_numpy(result):
        if not isinstance(result, tuple):
            return {"logits": result}
        logits, grads, dimages = result
        state = pvt_ref.to_state_dict(grads)
        return {"logits": logits, "dimages": dimages} | {key: state[key] for key in COMPARED}

    return Contender(
        f"NumPy {np.__version__}, SciPy {scipy.__version__}",
        prepare=lambda images: images,
        forward=lambda images: pvt_ref.forward(model.params, images, config, ops=ops),
        train=train,
        to_numpy=to_numpy,
    )


def _torch(module: Any, keys: dict[str, Any], versions: str) -> Contender:
    """A torch.nn.Module; keys are the compared parameters by our names."""
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
            return {"logits": result.numpy()}
        logits, dimages = result
        arrays = {"logits": logits.detach().numpy(), "dimages": dimages.numpy()}
        return arrays | {key: p.grad.numpy() for key, p in keys.items()}

    return Contender(versions, torch.from_numpy, forward, train, to_numpy)


def pytorch(
    weights: Path, config: PVTConfig, size: int, threads: int, fused: bool, compiled: bool
) -> Contender:
    """benchmarks/torch_pvt.py, as it is or compiled."""
    import torch
    from safetensors.torch import load_file
    from torch_pvt import PVT

    torch.set_num_threads(threads)
    with torch.device("meta"):
        model = PVT(config, fused)
    model.load_state_dict(load_file(weights), assign=True)
    parameters = dict(model.named_parameters())
    torch.compiler.reset()  # it counts the shapes it has compiled for, over all models
    module = torch.compile(model, dynamic=False) if compiled else model
    return _torch(
        module, {key: parameters[key] for key in COMPARED}, f"PyTorch {torch.__version__}"
    )


def hugging_face(weights: Path, config: PVTConfig, size: int, threads: int) -> Contender:
    """transformers' PvtForImageClassification, mended as in tests/oracles.py."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch
    import transformers
    from oracles import build, translate
    from safetensors.torch import load_file
    from torch import nn

    torch.set_num_threads(threads)
    model = build(config, None, pyramid=False)
    for name, x in translate(load_file(weights), config, (size, size), pyramid=False).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(x.clone()))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(pixel_values=images).logits

    encoder = model.pvt.encoder
    keys = {
        COMPARED[0]: encoder.patch_embeddings[0].projection.weight,
        COMPARED[1]: encoder.block[0][0].attention.self.sequence_reduction.weight,
        COMPARED[2]: encoder.block[3][1].mlp.dense1.weight,
    }
    versions = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
    return _torch(Logits(), keys, versions)


CONTENDERS: dict[str, Callable[[Path, PVTConfig, int, int], Contender]] = {
    "pvt_ref": lambda *a: ours(*a, readable=False),
    "pvt_ref, readable layers": lambda *a: ours(*a, readable=True),
    "PyTorch eager": lambda *a: pytorch(*a, fused=False, compiled=False),
    "PyTorch eager, fused attention": lambda *a: pytorch(*a, fused=True, compiled=False),
    "torch.compile": lambda *a: pytorch(*a, fused=False, compiled=True),
    "transformers": hugging_face,
}
