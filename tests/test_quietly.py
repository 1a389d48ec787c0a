"""NumPy's error settings stay the caller's, whatever happens meanwhile."""

import numpy as np
import pytest

import pvt_ref
from pvt_ref.arrays import quietly


def test_quietly_is_quiet_and_changes_nothing_of_the_callers():
    with np.errstate(all="raise"):
        before = np.geterr()
        assert quietly(np.divide, 1.0, 0.0) == np.inf
        assert np.geterr() == before
        with pytest.raises(KeyboardInterrupt):
            quietly(interrupt)
        assert np.geterr() == before
        with pytest.raises(FloatingPointError):
            np.divide(1.0, 0.0)


def interrupt():
    assert set(np.geterr().values()) == {"ignore"}
    raise KeyboardInterrupt


def test_a_model_casts_images_in_a_context_of_its_own(monkeypatch):
    model = pvt_ref.load("digits")
    images = np.zeros((1, 1, 32, 32))
    images[0, 0, 0, 0] = 1e300

    def entered(self):  # what an interrupt at its end would leave behind
        raise AssertionError("numpy.errstate in the caller's context")

    with monkeypatch.context() as patch, np.errstate(over="raise"):
        patch.setattr(np.errstate, "__enter__", entered)
        with pytest.raises(pvt_ref.errors.NonFiniteError):
            model(images)
