"""Arrays of other libraries by DLPack: shared, not copied, or refused with the reason."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from recording_cupy import RecordingCuPy

import pvt_ref
from pvt_ref import from_dlpack
from pvt_ref.errors import ArrayTypeError, DeviceError


class Exporter:
    """An array of a library that nobody here knows, on a device of some kind."""

    def __init__(self, kind=1, number=0):
        self.x, self.device = np.arange(6.0).reshape(2, 3), (kind, number)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        return self.x.__dlpack__()


def test_a_tensor_and_numpys_view_of_it_share_memory():
    tensor = torch.arange(6.0).reshape(2, 3)
    x = from_dlpack(tensor)
    assert type(x) is np.ndarray
    assert x.shape == (2, 3)
    tensor[0, 1] = 7
    assert x[0, 1] == 7
    strided = from_dlpack(tensor.T)
    np.testing.assert_array_equal(strided, x.T)
    back = torch.from_dlpack(np.add(x, 1))
    assert torch.equal(back, tensor + 1)


def test_any_library_that_exports_is_welcome():
    exporter = Exporter()
    x = from_dlpack(exporter)
    exporter.x[1, 2] = -1
    assert x[1, 2] == -1
    assert from_dlpack(x) is x  # NumPy's own
    assert from_dlpack(Exporter(kind=3))[0, 1] == 1  # on the host, pinned for a device


def test_a_model_computes_on_it():
    widths: Any = {"embed_dims": (4, 4, 4, 4), "num_heads": (1, 1, 1, 1)}
    config = pvt_ref.PVTConfig(img_size=32, num_classes=3, **widths)
    params = pvt_ref.init_params(config, np.random.default_rng(0))
    tensor = torch.randn(1, 3, 32, 32)
    logits = pvt_ref.forward(params, from_dlpack(tensor), config)
    np.testing.assert_array_equal(logits, pvt_ref.forward(params, tensor.numpy(), config))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.ones(2, requires_grad=True), r"array of torch .*share x.detach\(\)"),
        (torch.ones(2, dtype=torch.bfloat16), "bfloat16 to float32 first"),
        (Exporter(kind=8), "a device of DLPack's type 8"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "masked array"),
        ([1.0], "expected an object with DLPack export, got a list"),
        (None, "got a NoneType"),
    ],
)
def test_what_cannot_be_shared_is_refused(given, words):
    with pytest.raises(ArrayTypeError, match=words):
        from_dlpack(given)


def test_without_cupy_what_lies_on_cuda_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match="pip install cupy"):
        from_dlpack(Exporter(kind=2))


def test_what_lies_on_cuda_becomes_cupys_on_its_device(monkeypatch):
    fake = RecordingCuPy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    x = from_dlpack(Exporter(kind=2, number=1))
    assert isinstance(x, fake.ndarray)
    assert x.device.id == 1
    assert from_dlpack(x) is x
    np.testing.assert_array_equal(x.get(), np.arange(6.0).reshape(2, 3))


@pytest.mark.gpu
def test_on_a_gpu_tensors_are_shared_in_their_own_stream(cupy):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA build of PyTorch is installed")
    tensor = torch.arange(1e6, device="cuda")
    x = from_dlpack(tensor)
    assert x.data.ptr == tensor.data_ptr()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        for _ in range(100):  # each waits for the one before, in one stream
            tensor += 1
            x += 1
    stream.synchronize()
    assert float(tensor[0]) == 200
    back = torch.from_dlpack(x)
    assert back.data_ptr() == tensor.data_ptr()
