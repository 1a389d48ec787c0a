"""Some thousands of damaged files; fuzz_checkpoints.py makes as many as one likes."""

import time

import fuzz_checkpoints
import numpy as np
import pytest

from pvt_ref import Model, init_params


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_damaged_files_are_refused_or_load_exactly(kind):
    lines = []
    outcomes, failures = fuzz_checkpoints.run((kind,), 0, 0, 1000, lines.append)
    assert not failures, "\n".join(lines)
    assert sum(outcomes.values()) == 1000
    assert outcomes[kind, "refused"] > 500  # the damage is real
    assert outcomes[kind, "the same"] > 0  # and not every damage matters


@pytest.mark.parametrize("kind", ["legacy", "resealed", "lies"])
def test_what_no_checksum_can_tell_is_refused_or_gives_some_model(kind):
    lines = []
    outcomes, failures = fuzz_checkpoints.run((kind,), 0, 0, 500, lines.append)
    assert not failures, "\n".join(lines)
    assert sum(outcomes.values()) == 500
    assert outcomes[kind, "refused"] > 200
    assert outcomes[kind, "another model"] > 0


def other_numbers(path, config):
    params = init_params(fuzz_checkpoints.CONFIG, np.random.default_rng(1))
    return Model(params, fuzz_checkpoints.CONFIG)


def foreign_exception(path, config):
    raise KeyError(path)


def huge_allocation(path, config):
    return bytearray(2**40)


def endless_loop(path, config):
    if hasattr(fuzz_checkpoints.signal, "setitimer"):
        while True:
            time.sleep(0)
    raise fuzz_checkpoints.Hang("not done")


@pytest.mark.parametrize(
    ("loader", "problem"),
    [
        (other_numbers, "silently different"),
        (foreign_exception, "KeyError"),
        (huge_allocation, "MemoryError"),
        (endless_loop, "not done"),
    ],
)
def test_the_fuzzer_sees_what_it_is_for(monkeypatch, loader, problem):
    fuzz_checkpoints.sample("pth")
    monkeypatch.setattr(fuzz_checkpoints, "load", loader)
    monkeypatch.setattr(fuzz_checkpoints, "SECONDS", 0.1)
    lines = []
    _, failures = fuzz_checkpoints.run(("pth",), 0, 7, 1, lines.append)
    assert len(failures) == 1
    assert problem in lines[0]
    assert "--kind pth --seed 0 --start 7 --count 1" in lines[0]
