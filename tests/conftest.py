"""What every test file shares: Hypothesis profiles, array libraries, and the GPU's absence told."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test touches the network
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else two thread pools fight over the cores

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=40,
    print_blob=True,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "nightly",
    deadline=None,
    max_examples=1000,
    print_blob=True,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(  # shrinking a mutant's counterexample helps nobody
    "mutation",
    parent=settings.get_profile("ci"),
    max_examples=15,
    phases=(Phase.explicit, Phase.generate),
    database=None,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def why_no_gpu() -> str | None:
    """The reason why CuPy cannot compute here, or None if it can."""
    from pvt_ref.arrays import import_cupy
    from pvt_ref.errors import DeviceError

    try:
        import_cupy()
    except DeviceError as error:
        return str(error).split(". ")[0]
    return None


@pytest.fixture(scope="session")
def cupy():
    reason = why_no_gpu()
    if reason is not None:
        pytest.skip(f"no GPU test ran: {reason}")
    import cupy

    return cupy


class ReadOnlyNumPy:
    """NumPy whose arrays refuse to be written to, so that a hidden in-place write fails."""

    name = "read-only numpy"

    @staticmethod
    def asarray(x):
        x = np.array(x)
        x.flags.writeable = False
        return x


class StrictArrays:
    """Nothing but what the array API standard promises: no NumPy habit slips through."""

    name = "array-api-strict"

    @staticmethod
    def asarray(x):
        import array_api_strict

        return array_api_strict.asarray(np.ascontiguousarray(x))


class CuPyArrays:
    name = "cupy"

    def __init__(self, cupy):
        self.asarray = cupy.asarray


@pytest.fixture(
    params=["read-only numpy", "array-api-strict", pytest.param("cupy", marks=pytest.mark.gpu)]
)
def library(request):
    """Array libraries that the layers must run on; ``library.asarray`` makes their arrays."""
    if request.param == "cupy":
        return CuPyArrays(request.getfixturevalue("cupy"))
    return {"read-only numpy": ReadOnlyNumPy, "array-api-strict": StrictArrays}[request.param]
