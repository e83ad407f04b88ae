from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import PyTree

from .._custom_types import Aux, Y
from .measure import init_measurement, Measurement
from .wrapper import AbstractSolverWrapper, Evaluation


class Best(eqx.Module):
    """The best iterate so far, with the auxiliary output there."""

    point: PyTree[Any]
    aux: PyTree[Any]
    measurement: Measurement


class BestSoFar(AbstractSolverWrapper[Y, Aux, Best]):
    """Returns the best iterate that a solver has measured, if it does not succeed: the
    one with the smallest residual, in the norm of the solver. A residual that is not
    finite is never the best.

    For solves that may end by their `max_steps`, where those of a method that is not
    monotone, such as [`eqimplicit.Anderson`][], end anywhere. A solve that succeeds is
    returned as it is. `stats["residual"]` and the auxiliary output are those of the
    best iterate. ([`optimistix.BestSoFarFixedPoint`][] drops the statistics of the
    solver, and may return the initial guess.)

    Costs two copies of the state, and no evaluation.
    """

    solver: optx.AbstractFixedPointSolver

    # Explicit, since type checkers would take inherited properties for fields.
    def __init__(self, solver: optx.AbstractFixedPointSolver):
        """**Arguments:**

        - `solver`: an [`optimistix.AbstractFixedPointSolver`][].

        **Raises:** a `TypeError` if `solver` is no fixed-point solver.
        """
        self.solver = solver

    def start(self, y: Y, aux: Aux) -> Best:
        return Best(y, aux, init_measurement(y))

    def watch(
        self, own: Best, evaluation: Evaluation, measurement: Measurement
    ) -> Best:
        new = Best(evaluation.point, evaluation.aux, measurement)
        # NaN compares false.
        is_better = measurement.residual < own.measurement.residual
        return choose(is_better, new, own)

    def conclude(
        self, own: Best, result: optx.RESULTS, solution: tuple[Y, Aux, dict[str, Any]]
    ) -> tuple[Y, Aux, dict[str, Any]]:
        value, aux, stats = solution
        has_any = own.measurement.residual < init_measurement(own.point).residual
        is_needed = has_any & (result != optx.RESULTS.successful)
        value, aux = choose(is_needed, (own.point, own.aux), (value, aux))
        residual = stats.get("residual", own.measurement.residual)
        residual = jnp.where(is_needed, own.measurement.residual, residual)
        return value, aux, {**stats, "residual": residual}


def choose(condition: Any, a: PyTree[Any], b: PyTree[Any]) -> PyTree[Any]:
    """`jax.numpy.where` on the arrays of two pytrees that may hold anything."""
    pick = lambda x, y: jnp.where(condition, x, y) if eqx.is_array(x) else y
    return jtu.tree_map(pick, a, b)
