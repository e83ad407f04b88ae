"""What the slopes of a step tell besides its end: its error, and the states on the
way.
"""

import functools as ft
from typing import NamedTuple

import numpy as np
from numpy.polynomial import polynomial

from .tableau import ButcherTableau, order_of


def is_interpolatory(tableau: ButcherTableau) -> bool:
    """Whether the weights are those of the polynomial through the slopes."""
    nodes = np.asarray(tableau.c)
    if len(set(nodes.tolist())) < len(nodes):
        return False
    ends = [polynomial.polyval(1.0, p) for p in continuous_weights(tableau)]
    return np.allclose(ends, tableau.b, rtol=0, atol=1e-9)


@ft.cache
def continuous_weights(tableau: ButcherTableau) -> tuple[np.ndarray, ...]:
    """For each stage the polynomial in the share of the step, lowest power first, that
    is the integral of the one that is one at its node and zero at the others.
    """
    nodes = np.asarray(tableau.c)
    lagrange = np.linalg.inv(polynomial.polyvander(nodes, len(nodes) - 1))
    return tuple(polynomial.polyint(column) for column in lagrange.T)


def is_first_same_as_last(tableau: ButcherTableau) -> bool:
    """Whether the last stage is the new state."""
    difference = np.asarray(tableau.a[-1]) - np.asarray(tableau.b)
    return bool(np.all(np.abs(difference) < 1e-12)) and abs(tableau.c[-1] - 1) < 1e-12


class ErrorWeights(NamedTuple):
    """Of the slope at the start, and of those of the stages; and with which power of
    the step their sum goes to zero.
    """

    start: float
    stages: tuple[float, ...]
    order: int


@ft.cache
def error_weights(tableau: ButcherTableau) -> ErrorWeights | None:
    r"""The difference to the method that is embedded once the slope at the start is a
    stage as well.

    Its weight $\gamma$ there is the real eigenvalue of $A$, if there is one, so that
    the matrix of the filter is one of the method's own; otherwise the geometric mean of
    all. The other weights integrate polynomials as exactly as they can. None for
    methods that have the slope at the start among their stages, or two stages at one
    node. For Radau IIA it is that of section IV.8 of Hairer and Wanner.
    """
    a, b, c = (np.asarray(x) for x in (tableau.a, tableau.b, tableau.c))
    size = len(b)
    if np.any(np.isclose(c, 0)) or not is_interpolatory(tableau):
        return None
    eigenvalues = np.linalg.eigvals(a)
    real = eigenvalues[np.abs(eigenvalues.imag) < 1e-6].real
    gamma = float(real[0] if len(real) else np.abs(np.prod(eigenvalues)) ** (1 / size))
    powers = np.arange(size)
    moments = 1 / (powers + 1) - gamma * (powers == 0)
    weights = np.linalg.solve(polynomial.polyvander(c, size - 1).T, moments)
    extended = np.zeros((size + 1, size + 1))
    extended[1:, 1:] = a
    order = order_of(extended, np.append(gamma, weights))
    stages = tuple(float(x) for x in weights - b)
    return ErrorWeights(gamma, stages, min(order, tableau.order) + 1)
