from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree

from .._misc import check_positive_int, num_unknowns, two_norm
from .._solver.wrapper import check_fixed_point_solver
from .base import AbstractMatrixFreeSolver


class FixedPointLinearSolver(AbstractMatrixFreeSolver):
    r"""Solves $A x = b$ as the fixed point of $x \mapsto b + x - A x$, with any
    fixed-point solver.

    For $A = I - J$ the map is $x \mapsto b + J x$: the backward equation of an implicit
    layer, solved as its forward equation was. [`eqimplicit.Picard`][] gives a Neumann
    series to a tolerance, [`eqimplicit.Anderson`][] a method close to GMRES.

    The right-hand side is scaled first, so that the mean of its squared entries is one,
    and the solver's tolerances are relative to it: in its norm, if that is the largest
    entry or the root mean square, what it finds has a residual of at most
    $\text{atol} \|b\|_2 + \text{rtol} \|x\|_2$, whatever the number of unknowns.

    Costs one product with $A$ for each evaluation by the solver, counted by
    `num_products` if the solver counts them.
    """

    solver: optx.AbstractFixedPointSolver
    max_steps: int = eqx.field(default=100, static=True)

    def __check_init__(self):
        check_positive_int("max_steps", self.max_steps)
        check_fixed_point_solver(self.solver)

    def solve(
        self, operator: lx.AbstractLinearOperator, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        def fn(x, b):
            return jtu.tree_map(lambda bi, xi, axi: bi + xi - axi, b, x, operator.mv(x))

        # Cotangents may be tiny: the solver's tolerances are for entries of unit size.
        size = two_norm(vector) / num_unknowns(vector) ** 0.5
        size = jnp.where(size > 0, size, 1)
        vector = jtu.tree_map(lambda b: b / size.astype(b.dtype), vector)
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
        value = jtu.tree_map(lambda x: size.astype(x.dtype) * x, sol.value)
        products = sol.stats.get("num_evaluations")
        return value, result, {} if products is None else {"num_products": products}


FixedPointLinearSolver.__init__.__doc__ = """**Arguments:**

- `solver`: an [`optimistix.AbstractFixedPointSolver`][]; its tolerances decide.
- `max_steps`: the largest number of its steps.

**Raises:** a `TypeError` if `solver` is not a fixed-point solver, a `ValueError` if
`max_steps` is below 1.
"""
