"""What every test file shares: Hypothesis profiles, array libraries, and the GPU's absence told."""

import gc
import importlib.util
import os
import sys
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test touches the network
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else two thread pools fight over the cores

import numpy as np
import pytest
from browsing import browser, look, open_page, tabs  # noqa: F401 (fixtures of the checks)
from hypothesis import HealthCheck, Phase, settings

_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=20,
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


# Order --------------------------------------------------------------------------------------------

#: Files in the order of their running: what a fault shows in first and most plainly, then what is
#: built on it. After a failure in one group, no test of a later group begins.
GROUPS = (
    ("test_errors.py", "test_ops.py", "test_layers.py"),
    (
        *("test_properties.py", "test_maps.py", "test_kernels.py", "test_golden.py"),
        *("test_segmentation_layers.py", "test_heads.py", "test_segmentor.py"),
    ),
)

#: Files that take long, or that fail in many places for one fault below.
LAST = (
    *("test_readme.py", "test_course.py", "test_examples.py", "test_training_examples.py"),
    "test_train_camvid.py",
)


def group(nodeid: str) -> int:
    """From 0; what is in no group comes in one after them, and the last files in one more."""
    name = nodeid.partition("::")[0].rpartition("/")[2]
    for number, names in enumerate(GROUPS):
        if name in names:
            return number
    return len(GROUPS) + (name in LAST)


def pytest_addoption(parser):
    parser.addoption("--go-on", action="store_true", help="run all tests, whatever fails first")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: group(item.nodeid))  # stable: within a group, order stays


def pytest_collection_finish():
    """Garbage collections skip what was imported; with PyTorch among it, each took 0.2 s."""
    gc.freeze()


_failed_groups: set[int] = set()


def why_stop(nodeid: str, config) -> str | None:
    """Why a test should not run, which could only repeat what has failed further down."""
    failed = min(_failed_groups, default=len(GROUPS))
    if failed == len(GROUPS) or failed >= group(nodeid) or config.getoption("go_on"):
        return None
    return f"failures in {', '.join(GROUPS[failed])} come first; --go-on runs the rest all the same"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    reason = why_stop(item.nodeid, item.config)
    if reason:
        item.session.shouldfail = reason
    return True if reason else None  # True: it counts as done


class _SeesAllWorkers:
    """In the process that hands out tests, a failure of one worker stops the others too."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        reason = why_stop(report.nodeid, self.config)
        if report.failed:
            _failed_groups.add(group(report.nodeid))
        session = self.config.pluginmanager.get_plugin("dsession")
        if reason and session is not None:
            session.shouldstop = reason


def pytest_configure(config):
    config.pluginmanager.register(_SeesAllWorkers(config))


# The table of operations --------------------------------------------------------------------------

#: Files, and single tests, that compute with the default table: they run with the kernels and with
#: the readable layers. What the others test does not depend on it.
WITH_EVERY_TABLE = (
    *("test_layers.py", "test_properties.py", "test_maps.py", "test_golden.py"),
    *("test_namespaces.py", "test_transformers.py", "test_bad_input.py", "test_training_parts.py"),
    *("test_a_hundred_steps_are_pytorchs", "test_one_batch_is_learnt_by_heart"),
    *("test_a_version_2_computes_on_every_library", "test_its_gradients_are_slopes"),
    *("test_43_a_centred_kernel_makes_an_mlp_without_it", "test_53_every_map_is_normed"),
    "test_52_mean_pooling_ignores_the_order_of_tokens",
    "test_54_linear_attention_has_49_keys_at_any_size",
    "test_55_tokens_of_a_cell_can_change_places",
    "test_56_a_vit_block_is_a_pvt_block_without_reduction",
    "test_57_without_a_table_tokens_can_change_places",
    "test_57_without_a_table_patches_can_change_places",
)


def pytest_generate_tests(metafunc):
    names = {metafunc.definition.path.name, metafunc.function.__name__}
    chosen = any("table" in m.args[0] for m in metafunc.definition.iter_markers("parametrize"))
    if names & set(WITH_EVERY_TABLE) and not chosen and "PVT_REF_OPS" not in os.environ:
        metafunc.parametrize("table", ["blocked", "reference"], indirect=True, scope="function")


@pytest.fixture(autouse=True)
def table(request, monkeypatch):
    """The default table of a test: the kernels, unless the readable layers are asked for."""
    if hasattr(request, "param"):
        monkeypatch.setenv("PVT_REF_OPS", request.param)
    return os.environ.get("PVT_REF_OPS", "blocked")


# What a training draws ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """A training leaves an empty curves.png: drawing it takes longer than a small training does.

    A test of the picture itself asks for ``drawn``.
    """
    metrics = sys.modules.get("pvt_ref.train.metrics")  # where nobody trains, there is none
    if metrics is not None and "drawn" not in request.fixturenames:
        signature = b"\x89PNG"
        monkeypatch.setattr(metrics, "_draw", lambda lines, file, form: file.write(signature))


@pytest.fixture(scope="session")
def nvrtc():
    """The compiler of kernels, which needs no GPU."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # CuPy has many for a library that it does not find
        if os.environ.get("NEED_NVRTC"):
            raise
        pytest.skip(f"no kernel was compiled for a GPU: {type(error).__name__}: {error}"[:160])
    return nvrtc


@pytest.fixture
def drawn():
    """With this, matplotlib draws the curves."""


# Array libraries ----------------------------------------------------------------------------------


class _Missing(types.ModuleType):
    """In the place of a library that is not installed: what asks it for something is skipped."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"{self.__name__} is not installed", allow_module_level=True)


for _name in ("array_api_strict", "onnx", "onnxruntime"):  # as where there is a GPU, perhaps
    if importlib.util.find_spec(_name) is None:
        sys.modules[_name] = _Missing(_name)


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
