from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import Aux, Y
from .._misc import check_positive, check_positive_int, is_concrete
from .best_so_far import Best
from .measure import Measurement
from .wrapper import AbstractSolverWrapper, Concluded, Evaluation, stop_early


class Progress(eqx.Module):
    """The last residual that was a progress, how many steps ago that was, and the best
    iterate.
    """

    residual: Float[Array, ""]
    num_steps: Int[Array, ""]
    best: Best


class Patience(AbstractSolverWrapper[Y, Aux, Progress]):
    """Gives a solver up whose residual has not shrunk by a factor within a number of
    steps, and returns the best iterate that it has measured, as
    [`eqimplicit.BestSoFar`][] does.

    For solves that stagnate: at a tolerance below what rounding or noise allows, or on
    an equation without a solution. `result` is `nonlinear_divergence` then, so that it
    is told from an exhausted `max_steps`. A solve that keeps shrinking changes in
    nothing.

    Costs as [`eqimplicit.BestSoFar`][].
    """

    solver: optx.AbstractFixedPointSolver
    num_steps: int = eqx.field(static=True)
    factor: float | Float[Array, ""]

    # Explicit, since type checkers would take inherited properties for fields.
    def __init__(
        self,
        solver: optx.AbstractFixedPointSolver,
        num_steps: int,
        factor: float | Float[Array, ""] = 0.9,
    ):
        """**Arguments:**

        - `solver`: an [`optimistix.AbstractFixedPointSolver`][].
        - `num_steps`: how many steps in a row may bring nothing.
        - `factor`: what the residual must have shrunk by since it last did, at most 1.

        **Raises:** a `TypeError` if `solver` is no fixed-point solver; a `ValueError`
        if `num_steps` is below 1, or `factor` not positive or above 1.
        """
        self.solver = solver
        self.num_steps = num_steps
        self.factor = factor

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        check_positive("factor", self.factor)
        if is_concrete(self.factor) and np.asarray(self.factor) > 1:
            raise ValueError(f"`factor` must be at most 1. Got {self.factor!r}.")

    def start(self, y: Y, aux: Aux) -> Progress:
        best = Best.start(y, aux)
        return Progress(best.residual, jnp.array(0), best)

    def watch(
        self, own: Progress, evaluation: Evaluation, measurement: Measurement
    ) -> Progress:
        residual = measurement.residual
        has_shrunk = residual <= self.factor * own.residual
        return Progress(
            jnp.where(has_shrunk, residual, own.residual),
            jnp.where(has_shrunk, 0, own.num_steps + 1),
            own.best.or_better(evaluation, residual),
        )

    def judge(
        self, own: Progress, terminate: Bool[Array, ""], result: optx.RESULTS
    ) -> optx.RESULTS:
        is_lost = own.num_steps >= self.num_steps
        reason = optx.RESULTS.nonlinear_divergence
        return stop_early(is_lost, terminate, result, reason)

    def conclude(
        self, own: Progress, result: optx.RESULTS, solution: Concluded, last: Callable
    ) -> Concluded:
        return own.best.unless_successful(result, solution)
