"""How near two results must be: over whole tensors, never element by element."""

import numpy as np

FORWARD = 1e-12  # relative L2, float64
GRADIENT = 1e-10


def relative(ours, reference) -> float:
    """L2 distance over the reference's norm."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, f"{ours.shape} != {reference.shape}"
    norm = np.linalg.norm(reference.ravel())
    return float(np.linalg.norm((ours - reference).ravel()) / (norm if norm else 1.0))


def assert_near(ours, reference, tolerance: float, what: str = "") -> None:
    """Near, and the reference is not all zeros: a test against zeros shows nothing."""
    assert np.any(np.asarray(reference)), f"{what}: the reference is zero"
    error = relative(ours, reference)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def split_key_bias(key: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The K half of a kv bias (third of qkv), whose gradient is rounding noise; the rest."""
    if not key.endswith("kv.bias"):
        return x[:0], x
    C = x.shape[0] // (3 if key.endswith("qkv.bias") else 2)
    start = len(x) - 2 * C  # before it, the biases of the queries
    return x[start : start + C], np.concatenate((x[:start], x[start + C :]))


def assert_gradients_near(
    mine: dict,
    theirs: dict,
    tolerance: float = GRADIENT,
    scale: float = 0.0,
    unused=(),
    may_vanish: bool = False,
) -> None:
    """Every parameter gradient, in relative L2 of its own array.

    Beside the tolerance, 1e-13 of the model's largest gradient is allowed, which is the rounding
    noise left where terms cancel. So it is for the K half of attn.kv.bias (a shift of all keys
    changes no softmax), and for q where there is but one key.

    Args:
        mine, theirs: arrays by key.
        tolerance: relative, per array.
        scale: taken for the largest gradient if it is larger.
        unused: keys that the pass did not use; ours must be exactly 0 there.
        may_vanish: whether random masks may have cut an array off, so that its gradient is 0.
    """
    assert list(mine) == list(theirs)
    largest = max(scale, *(np.abs(r).max() for r in theirs.values()))
    assert largest > 0
    for key, g in mine.items():
        r = theirs[key]
        if key in unused:
            assert not np.any(g), f"{key} was not used, yet its gradient is not 0"
            continue
        noise, g = split_key_bias(key, np.asarray(g))
        _, r = split_key_bias(key, np.asarray(r))
        if noise.size:
            assert np.abs(noise).max() <= 1e-12 * largest, f"{key}: the K half is not 0"
        if not may_vanish and "attn.q." not in key:
            assert np.any(r), f"{key}: the reference is zero"
        error = np.linalg.norm((g - r).ravel())
        allowed = tolerance * np.linalg.norm(r.ravel()) + 1e-13 * largest * np.sqrt(r.size)
        assert error <= allowed, f"{key}: error {error:.2e} > {allowed:.2e}"


def squared_errors(ours, theirs, exact) -> tuple[float, float]:
    """Of two float32 results, relative to the exact one."""
    exact = np.asarray(exact, np.float64)
    norm = np.linalg.norm(exact.ravel())
    first, second = (
        float((np.linalg.norm((np.asarray(x, np.float64) - exact).ravel()) / norm) ** 2)
        for x in (ours, theirs)
    )
    return first, second


def assert_float32_error(pairs, floor_ulp: float = 4.0, what: str = "") -> None:
    """Our float32 errs at most twice as much as PyTorch's on the same inputs.

    Args:
        pairs: (ours32, torch32, exact64) triples. Small cases scatter, so their squared errors
            are added up before the comparison.
        floor_ulp: an error of so many units in the last place is always allowed.
    """
    assert_errs_at_most_twice([squared_errors(*x) for x in pairs if np.any(x[2])], floor_ulp, what)


def assert_errs_at_most_twice(squares, floor_ulp: float = 4.0, what: str = "") -> None:
    """The same of :func:`squared_errors`."""
    assert squares, f"{what}: nothing was compared"
    ours, theirs = np.sqrt(np.mean(squares, axis=0))
    floor = floor_ulp * np.finfo(np.float32).eps / 2
    assert ours <= max(2 * theirs, floor), f"{what}: float32 error {ours:.1e}, PyTorch {theirs:.1e}"
