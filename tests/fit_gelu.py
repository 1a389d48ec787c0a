"""Makes the coefficients that pvt_ref/kernels/cpu/gelu.py computes GELU with in float32.

    python tests/fit_gelu.py

With u(x) = artanh(erf(x / sqrt(2))), GELU is x (1 + tanh u) / 2. u is odd, so u(x) = x Q(x^2), and
Q is taken as a polynomial. A change of u by e changes GELU by x e / (2 cosh^2 u): the polynomial
that keeps the largest such change smallest is the solution of a linear programme.
"""

import numpy as np
from scipy.optimize import linprog
from scipy.special import erf, erfc

DEGREE = 6  # the least whose error is below the rounding of float32; odd degrees turn down again
END = 6.0  # beyond it, tanh u is 1 in float32 as long as u keeps growing


def target(x: np.ndarray) -> np.ndarray:
    """Artanh of erf(x / sqrt(2)), without cancellation where erf is near 1."""
    z = x / np.sqrt(2)
    return 0.5 * (np.log1p(erf(z)) - np.log(erfc(z)))


def fit() -> tuple[list[float], float]:
    """The coefficients of Q, lowest power first, and the largest error of GELU."""
    x = END / 2 * (1 - np.cos(np.linspace(0, np.pi, 4001)))
    x = x[x > 1e-3]  # nearer to zero, u is linear and GELU tiny
    u = target(x)
    weight = np.maximum(x / (2 * np.cosh(u) ** 2), 1e-12)
    columns = weight[:, None] * x[:, None] ** (2 * np.arange(DEGREE + 1) + 1)
    size = np.abs(columns).max(axis=0)
    columns, wanted = columns / size, weight * u
    unit = 1e-6  # of the error, so that the solver's tolerances do not hide it
    bound = np.full((len(x), 1), -unit)
    solution = linprog(
        np.eye(DEGREE + 2)[-1],  # the error bound
        A_ub=np.block([[columns, bound], [-columns, bound]]),
        b_ub=np.concatenate([wanted, -wanted]),
        bounds=[(None, None)] * (DEGREE + 1) + [(0, None)],
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert solution.status == 0, solution.message
    return list(solution.x[:-1] / size), float(solution.x[-1] * unit)


def main() -> None:
    coefficients, error = fit()
    print(f"GELU within {error:.2e} with Q's coefficients, lowest power first:")
    for c in coefficients:
        print(f"    {c:.9g},")


if __name__ == "__main__":
    main()
