from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._custom_types import Aux, Y
from .measure import init_measurement, Measurement
from .wrapper import AbstractSolverWrapper, Concluded, Evaluation


def _choose(condition, a, b):
    """`jax.numpy.where` on the arrays of two pytrees that may hold anything."""
    pick = lambda x, y: jnp.where(condition, x, y) if eqx.is_array(x) else y
    return jtu.tree_map(pick, a, b)


class Best(eqx.Module):
    """The best iterate so far, with the auxiliary output and the residual there, which
    is infinite if there is none.
    """

    point: PyTree[Any]
    aux: PyTree[Any]
    residual: Float[Array, ""]

    @classmethod
    def start(cls, y: PyTree[Array], aux: PyTree[Any]) -> "Best":
        largest = init_measurement(y).residual
        return cls(y, aux, jnp.full_like(largest, jnp.inf))

    def or_better(self, new: Evaluation, residual: Float[Array, ""]) -> "Best":
        # NaN compares false.
        is_better = residual < self.residual
        return _choose(is_better, Best(new.point, new.aux, residual), self)

    def unless_successful(self, result: optx.RESULTS, solution: Concluded) -> Concluded:
        """The solution of a solve that has succeeded, otherwise the best iterate."""
        value, aux, stats = solution
        has_any = jnp.isfinite(self.residual)
        is_needed = has_any & (result != optx.RESULTS.successful)
        value, aux = _choose(is_needed, (self.point, self.aux), (value, aux))
        own = jnp.where(has_any, self.residual, jnp.nan)
        residual = jnp.where(is_needed, own, stats.get("residual", own))
        return Concluded(value, aux, {**stats, "residual": residual})


class BestSoFar(AbstractSolverWrapper[Y, Aux, Best]):
    """Returns the best iterate that a solver has measured, if it does not succeed: the
    one with the smallest residual, in the norm of the solver. A residual that is not
    finite is never the best.

    For solves that may end by their `max_steps`, where those of a method that is not
    monotone, such as [`eqimplicit.Anderson`][], end anywhere. A solve that succeeds is
    returned as it is. `stats["residual"]` and the auxiliary output are those of the
    value. (Of a success whose solver reports no residual, the smallest that was
    measured.) ([`optimistix.BestSoFarFixedPoint`][] drops the statistics of the
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
        return Best.start(y, aux)

    def watch(
        self, own: Best, evaluation: Evaluation, measurement: Measurement
    ) -> Best:
        return own.or_better(evaluation, measurement.residual)

    def conclude(
        self, own: Best, result: optx.RESULTS, solution: Concluded, last: Callable
    ) -> Concluded:
        return own.unless_successful(result, solution)
