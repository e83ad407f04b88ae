from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Int

from .._custom_types import Aux, Y
from .._misc import check_positive_int, is_concrete
from .measure import Measurement
from .wrapper import AbstractSolverWrapper, Evaluation, stop_early


def _check_array(num_steps: Any) -> None:
    if not jnp.issubdtype(num_steps.dtype, jnp.integer):
        raise TypeError(f"`num_steps` must be an integer. Got {num_steps!r}.")
    if is_concrete(num_steps) and np.any(np.asarray(num_steps) < 1):
        raise ValueError(f"`num_steps` must be at least 1. Got {num_steps!r}.")


class Budget(AbstractSolverWrapper[Y, Aux, Int[Array, ""]]):
    """Stops a solver after a number of steps, which may be an array: it changes without
    recompilation, from one training step to the next, and under `jax.vmap` each example
    may have its own. The `max_steps` of the layer stays the ceiling.

    What does not suffice ends as it does at `max_steps`: `result` is
    `nonlinear_max_steps_reached`, and the value the last iterate that was measured.
    A budget that suffices changes nothing.

    For adaptive computation, anytime predictions, and solves that are refined as
    training goes on. Around the solver of an [`eqimplicit.FixedPointLinearSolver`][] it
    bounds the backward solve.

    Costs a counter. Steps are those of the solver, one evaluation of `f` each for
    [`eqimplicit.Picard`][], [`eqimplicit.Anderson`][] and [`eqimplicit.Broyden`][].

    !!! example

        ```python
        solver = eqi.Anderson(rtol=1e-4, atol=1e-4)

        def predict(x, num_steps):
            return eqi.DEQ(cell, eqi.Budget(solver, num_steps))(x)

        jax.vmap(predict)(xs, jnp.array([4, 8, 16]))

        # Another budget for a layer that there is already.
        deq = eqi.DEQ(cell, eqi.Budget(solver, jnp.array(4)))
        where = lambda deq: deq.solver.num_steps
        deq = eqx.tree_at(where, deq, jnp.array(8))
        ```
    """

    solver: optx.AbstractFixedPointSolver
    num_steps: int | Int[Array, "..."]

    # Explicit, since type checkers would take inherited properties for fields.
    def __init__(
        self,
        solver: optx.AbstractFixedPointSolver,
        num_steps: int | Int[Array, "..."],
    ):
        """**Arguments:**

        - `solver`: an [`optimistix.AbstractFixedPointSolver`][].
        - `num_steps`: the number of steps, at least 1. A Python integer is compiled in,
            an integer array is not. (Where it is traced, what is below 1 is taken as
            1.)

        **Raises:** a `TypeError` if `solver` is no fixed-point solver or an array
        `num_steps` is not of integers; a `ValueError` if `num_steps` is below 1, or,
        when the solver is used, no single number.
        """
        self.solver = solver
        self.num_steps = num_steps

    def __check_init__(self):
        if isinstance(self.num_steps, jax.Array):
            _check_array(self.num_steps)
        else:
            check_positive_int("num_steps", self.num_steps)

    def start(self, y: Y, aux: Aux) -> Int[Array, ""]:
        # Where it was put in by `equinox.tree_at`.
        if not jnp.issubdtype(jnp.result_type(self.num_steps), jnp.integer):
            raise TypeError(f"`num_steps` must be an integer. Got {self.num_steps!r}.")
        if jnp.ndim(self.num_steps) > 0:
            raise ValueError(
                "The `num_steps` of a `Budget` must be one number where it is used. "
                f"Got an array of shape {jnp.shape(self.num_steps)}. For a budget for "
                "each example make the solver inside of `jax.vmap`."
            )
        return jnp.array(0)

    def watch(
        self, own: Int[Array, ""], evaluation: Evaluation, measurement: Measurement
    ) -> Int[Array, ""]:
        return own + 1

    def judge(
        self, own: Int[Array, ""], terminate: Bool[Array, ""], result: optx.RESULTS
    ) -> optx.RESULTS:
        is_spent = own >= jnp.maximum(self.num_steps, 1)
        reason = optx.RESULTS.nonlinear_max_steps_reached
        return stop_early(is_spent, terminate, result, reason)
