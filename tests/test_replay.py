"""tools/replay.py sees a change of the last bits, and sees none where there is none."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import replay

TABLE = "reference, tanh GELU"
ONLY = f"small/plain/B 2, 32x32/{TABLE}/float*"  # two cases
OWN = f"{replay.OWN_NUMBERS}/reference/float64"


def recorded(path, only=ONLY):
    assert replay.main(["record", str(path), "--only", only]) == 0
    return str(path)


@pytest.fixture
def compared(capsys):
    """Exit status and output of a comparison."""

    def compare(path, *arguments, only=ONLY):
        capsys.readouterr()
        status = replay.main(["compare", path, "--only", only, *arguments])
        return status, capsys.readouterr().out

    return compare


def other_gelu(factor):
    def gelu(x):
        return replay.tanh_gelu(x) * np.asarray(factor, x.dtype)

    return lambda: replay.with_gelu(replay.reference(), gelu, replay.tanh_gelu_derivative)


def test_the_same_code_gives_the_same_digests(tmp_path, compared):
    status, out = compared(recorded(tmp_path / "before.json"))
    assert "small/plain  228 equal\n228 equal, 0 not as they were\n" in out
    assert status == 0


def test_another_gelu_is_reported_with_the_size_of_its_effect(tmp_path, compared, monkeypatch):
    before = recorded(tmp_path / "before.json")
    monkeypatch.setitem(replay.TABLES, TABLE, other_gelu(1 + 1e-6))
    status, out = compared(before, "--lines", "1000")
    assert status == 1
    lines = [line for line in out.splitlines() if line.startswith("  different: small/plain")]
    assert len(lines) > 200
    assert f"{len(lines)} not as they were" in out
    sizes = [float(line.partition(": about ")[2].split()[0]) for line in lines]
    assert 1e-8 < np.median(sizes) < 1e-5


def test_what_is_allowed_to_differ_does_not_fail(tmp_path, compared, monkeypatch):
    before = recorded(tmp_path / "before.json")
    monkeypatch.setitem(replay.TABLES, TABLE, other_gelu(1 + 1e-6))
    assert compared(before, "--allow", f"*/{TABLE}/*: *")[0] == 0
    assert compared(before, "--allow", f"*/{TABLE}/*: grad *")[0] == 1  # logits are left


def test_a_case_that_fails_is_missing_and_the_others_go_on(tmp_path, compared, monkeypatch):
    before = recorded(tmp_path / "before.json")
    float32 = replay.random_params

    def only_float32(config, dtype):
        if dtype is np.float64:
            raise ValueError("moved")
        return float32(config, dtype)

    monkeypatch.setattr(replay, "random_params", only_float32)
    status, out = compared(before)
    assert "114 equal, 114 missing" in out
    assert "float64: logits: ValueError: moved\n" in out
    assert status == 1


def test_a_training_s_own_random_numbers_may_change(tmp_path, compared, monkeypatch):
    before = recorded(tmp_path / "before.json", OWN)
    assert compared(before, only=OWN)[1].count("expected") == 0
    monkeypatch.setattr(replay, "RANDOM", replay.dataclasses.replace(replay.RANDOM, seed=6))
    status, out = compared(before, only=OWN)
    assert "expected" in out
    assert status == 0


def test_a_sketch_estimates_the_distance_of_two_arrays():
    rng = np.random.default_rng(0)
    ratios = []
    for size in (1, 5, 1000):
        for _ in range(100):
            x, d = rng.standard_normal((2, size))
            old, new = replay.digest(x), replay.digest(x + 1e-3 * d)
            apart, _ = replay.difference(old, new)
            ratios.append(apart / (1e-3 * np.linalg.norm(d) / np.linalg.norm(x)))
    assert 0.9 < np.mean(ratios) < 1.1
    shifted, _ = replay.difference(replay.digest(x), replay.digest(x + 0.01))
    assert 0.3 < shifted * np.linalg.norm(x) / (0.01 * np.sqrt(x.size)) < 3  # no sum of all
    assert replay.difference(replay.digest(x), replay.digest(x[:5]))[0] == np.inf
