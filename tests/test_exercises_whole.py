"""PyTorch's numbers that the exercises are held against are PyTorch's.

The networks are those of the package transformers, as in oracles.py. Run as a program, with tests/
as the working folder, this writes pvt_ref/exercises/pytorch.json.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from oracles import transformers_forward

from pvt_ref.exercises.whole import LABELS, STORED, digest, drawn, network


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy()


def computed() -> dict:
    """Everything that is stored, by PyTorch in float64."""
    params, config, images = network("pvt")
    (logits,), leaves, x = transformers_forward(params, images, config)
    loss = F.cross_entropy(logits, torch.tensor(LABELS))
    grads = torch.autograd.grad(loss, [*leaves.values(), x])
    named = zip([*leaves, "images"], map(numpy, grads), strict=True)
    gradients = {name: digest(name, g) for name, g in named}

    maps, _, x = transformers_forward(params, images, config, pyramid=True)
    names = [f"F_{i}" for i in range(1, 5)]
    stored = {name: digest(name, numpy(m)) for name, m in zip(names, maps, strict=True)}
    dmaps = [torch.tensor(drawn(f"d{n}", tuple(m.shape))) for n, m in zip(names, maps, strict=True)]
    (dimages,) = torch.autograd.grad(maps, x, dmaps)
    stored["images by the maps"] = digest("images by the maps", numpy(dimages))

    params_v2, config_v2, images = network("pvt_v2")
    (logits_v2,), _, _ = transformers_forward(params_v2, images, config_v2)
    return {
        "pvt": {
            "logits": numpy(logits).tolist(),
            "loss": loss.item(),
            "gradients": gradients,
            "maps": stored,
        },
        "pvt_v2": {"logits": numpy(logits_v2).tolist()},
    }


def flat(tree, path=""):
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from flat(branch, f"{path}/{key}")
    else:
        yield path, np.asarray(tree)


def test_the_stored_numbers_are_pytorchs():
    stored, again = dict(flat(json.loads(STORED.read_text("utf-8")))), dict(flat(computed()))
    assert list(stored) == list(again)
    for path, x in again.items():
        size = np.abs(x).max()
        # a gradient that cancels, that of the keys' bias, is rounding noise in part
        np.testing.assert_allclose(
            stored[path], x, rtol=0, atol=1e-11 * max(size, 1.0), err_msg=path
        )


if __name__ == "__main__":
    STORED.write_text(json.dumps(computed(), indent=1) + "\n", "utf-8")
