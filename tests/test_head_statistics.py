"""Heads tell the statistics of a batch, and None if they took the running ones."""

import numpy as np
import pytest
from strategies import normal

from pvt_ref import REFERENCE
from pvt_ref.heads import mla as mla_file
from pvt_ref.heads import setr as setr_file
from pvt_ref.models import head_parts
from pvt_ref.tree import named_arrays


def drawn(leaf):
    """The ``make`` of builders: positive numbers, which suit a variance too."""
    seed = sum(map(ord, leaf.key))
    return np.array(0) if leaf.key.endswith("tracked") else np.abs(normal(seed, *leaf.shape)) + 0.1


def setr_case():
    p = head_parts.build_setr(drawn, 6, 4, 3, 2, 3)
    return p, head_parts.build_setr_buffers(drawn, 4, 2), normal(1, 2, 3, 2, 6), setr_file


def neck_case():
    p, buffers = head_parts.build_mla_neck(drawn, 6, 4), head_parts.build_mla_neck_buffers(drawn, 4)
    return p, buffers, [normal(j, 2, 3, 2, 6) for j in range(4)], mla_file


def head_case():
    p = head_parts.build_mla_head(drawn, 6, 4, 3)
    buffers = head_parts.build_mla_head_buffers(drawn, 4)
    return p, buffers, [normal(j, 2, 3, 2, 6) for j in range(4)], mla_file


CASES = {
    "setr": (setr_case, "setr_forward", "statistics"),
    "mla_neck": (neck_case, "mla_neck_forward", "neck_statistics"),
    "mla_head": (head_case, "mla_head_forward", "head_statistics"),
}


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_batch_or_none(name):
    case, forward, statistics = CASES[name]
    p, buffers, x, file = case()
    more = {"scale": 2} if name == "setr" else {}
    *_, cache = getattr(file, forward)(p, x, REFERENCE, buffers, False, **more)
    assert getattr(file, statistics)(cache) is None
    *_, cache = getattr(file, forward)(p, x, REFERENCE, buffers, True, **more)
    seen = dict(named_arrays(getattr(file, statistics)(cache)))
    assert list(seen) == [key for key, _ in named_arrays(buffers)]
    means = [key for key in seen if key.endswith("running_mean")]
    assert means
    # of another batch, other statistics: they are of this one
    other = [a**2 for a in x] if isinstance(x, list) else x**2
    *_, cache = getattr(file, forward)(p, other, REFERENCE, buffers, True, **more)
    moved = dict(named_arrays(getattr(file, statistics)(cache)))
    assert all(not np.allclose(seen[key], moved[key]) for key in means)
