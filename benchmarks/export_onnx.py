"""Writes the network of torch_networks.py as an ONNX file, for ONNX Runtime and OpenVINO.

    python benchmarks/export_onnx.py WEIGHTS MODEL SIZE BATCH FILE

A program of its own, so that PyTorch's threads and memory are not in the process that is timed. The
batch is fixed: a graph of known shapes is the fastest that either library can make.
"""

import sys

import torch
from safetensors.torch import load_file
from torch_networks import network

from pvt_ref import VARIANTS


def main() -> None:
    weights, name, size, batch, file = sys.argv[1:]
    model = network(VARIANTS[name], fused=False).eval()
    model.load_state_dict(load_file(weights))
    images = torch.zeros(int(batch), 3, int(size), int(size))
    names = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(model, (images,), file, dynamo=True, **names)


if __name__ == "__main__":
    main()
