from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree

from .._misc import check_positive_int
from .base import AbstractMatrixFreeSolver


class FixedPointLinearSolver(AbstractMatrixFreeSolver):
    r"""Solves $A x = b$ as the fixed point of $x \mapsto b + x - A x$, with any
    fixed-point solver.

    For $A = I - J$ the map is $x \mapsto b + J x$: the backward equation of an implicit
    layer, solved as its forward equation was. [`eqimplicit.Picard`][] gives a Neumann
    series to a tolerance, [`eqimplicit.Anderson`][] a method close to GMRES.

    Costs one product with $A$ for each evaluation by the solver, counted by
    `num_products`.
    """

    solver: optx.AbstractFixedPointSolver
    max_steps: int = eqx.field(default=100, static=True)

    def __check_init__(self):
        check_positive_int("max_steps", self.max_steps)
        if not isinstance(self.solver, optx.AbstractFixedPointSolver):
            raise TypeError(
                "`solver` must be a fixed-point solver, for example "
                f"`Anderson(1e-6, 1e-6)`. Got {self.solver!r}."
            )

    def solve(
        self, operator: lx.AbstractLinearOperator, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        def fn(x, b):
            return jtu.tree_map(lambda bi, xi, axi: bi + xi - axi, b, x, operator.mv(x))

        sol = optx.fixed_point(
            fn,
            self.solver,
            vector,
            vector,
            max_steps=self.max_steps,
            throw=False,
        )
        result = lx.RESULTS.where(
            sol.result == optx.RESULTS.successful,
            lx.RESULTS.successful,
            lx.RESULTS.where(
                sol.result == optx.RESULTS.nonlinear_max_steps_reached,
                lx.RESULTS.max_steps_reached,
                lx.RESULTS.breakdown,
            ),
        )
        return sol.value, result, {"num_products": sol.stats["num_steps"]}


FixedPointLinearSolver.__init__.__doc__ = """**Arguments:**

- `solver`: an [`optimistix.AbstractFixedPointSolver`][]; its tolerances decide.
- `max_steps`: the largest number of its steps.

**Raises:** a `TypeError` if `solver` is not a fixed-point solver, a `ValueError` if
`max_steps` is below 1.
"""
