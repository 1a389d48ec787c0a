import math

import numpy as np
from scipy.special import erf


def gelu_forward(p, x, ops):
    cdf = 0.5 * (1 + erf(x / math.sqrt(2)))
    return x * cdf, x


def gelu_backward(p, cache, dy, ops):
    x = cache
    cdf = 0.5 * (1 + erf(x / math.sqrt(2)))
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return dy * (cdf + x * density), None
