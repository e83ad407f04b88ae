from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, Int

from .._custom_types import Aux, Y
from .._misc import check_positive_int
from .measure import init_measurement, Measurement
from .wrapper import AbstractSolverWrapper, Concluded, Evaluation


class Record(eqx.Module):
    residuals: Float[Array, " length"]
    num_steps: Int[Array, ""]


class Recorded(AbstractSolverWrapper[Y, Aux, Record]):
    r"""Records the residuals of the very solve: `stats["residuals"]` holds $\|f(z) -
    z\|$ of its first `length` steps, in the norm of the solver, and NaN beyond the last
    of them. Under `jax.vmap`, and in the training step, each example has its own.

    The solve itself is unchanged. (To repeat a solve with another solver and look at
    its history, see [`eqimplicit.convergence_history`][].)

    Costs `length` numbers, and no evaluation.

    !!! example

        ```python
        solver = eqi.Recorded(eqi.Anderson(1e-4, 1e-4), length=50)
        solution = eqi.DEQ(cell, solver).solve(x)
        solution.stats["residuals"]
        ```
    """

    solver: optx.AbstractFixedPointSolver
    length: int = eqx.field(static=True)

    # Explicit, since type checkers would take inherited properties for fields.
    def __init__(self, solver: optx.AbstractFixedPointSolver, length: int):
        """**Arguments:**

        - `solver`: an [`optimistix.AbstractFixedPointSolver`][].
        - `length`: how many residuals there is room for; later ones are dropped.

        **Raises:** a `TypeError` if `solver` is no fixed-point solver; a `ValueError`
        if `length` is below 1.
        """
        self.solver = solver
        self.length = length

    def __check_init__(self):
        check_positive_int("length", self.length)

    def start(self, y: Y, aux: Aux) -> Record:
        residual = init_measurement(y).residual
        return Record(
            jnp.full_like(residual, jnp.nan, shape=(self.length,)), jnp.array(0)
        )

    def watch(
        self, own: Record, evaluation: Evaluation, measurement: Measurement
    ) -> Record:
        is_now = jnp.arange(self.length) == own.num_steps
        residuals = jnp.where(is_now, measurement.residual, own.residuals)
        return Record(residuals, own.num_steps + 1)

    def conclude(
        self, own: Record, result: optx.RESULTS, solution: Concluded, last: Callable
    ) -> Concluded:
        stats = {**solution.stats, "residuals": own.residuals}
        return solution._replace(stats=stats)
