from collections.abc import Callable
from typing import Any

import equinox as eqx
import lineax as lx
from jaxtyping import Array, Int, PyTree

from .._custom_types import LinearMap
from .._linear_solver.gmres import GMRES
from .._linear_solver.neumann_krylov import NeumannKrylov
from .._linear_solver.neumann_series import NeumannSeries
from .base import AbstractFixedPointAdjoint
from .guards import check_fixed_point
from .linear_solve import LinearSolve, negate_tags, num_products_of
from .rules import apply_implicit_rule


class ImplicitAdjoint(AbstractFixedPointAdjoint):
    r"""Exact differentiation by the implicit function theorem,

    $$\frac{\mathrm{d}z}{\mathrm{d}\theta} = (I - J)^{-1} \frac{\partial f}{\partial
    \theta},$$

    in reverse mode by solving $(I - J)^\top w = g$ for the cotangent $g$ to the
    tolerance of a linear solver.

    Compared with [`optimistix.ImplicitAdjoint`][]: the default solver is matrix-free
    and takes no more products with $J$ than the tolerance asks for; an unfinished
    backward solve raises only with `throw=True`; there is no host callback in the
    compiled gradient otherwise; and a zero cotangent gives a zero gradient with any
    solver.

    Accepts every problem of Optimistix whose unknowns are real, also root-finding,
    least-squares and minimisation problems. The value is the solution, unchanged.

    Costs one linearisation of `f` and as many products with $J$ as the linear solver
    needs. Memory for one application and the solver's own. Forward mode and derivatives
    of any order work (except with [`eqimplicit.NeumannSeries`][], which is not exact
    and makes this [`eqimplicit.NeumannAdjoint`][]). Auxiliary outputs and stats have no
    derivative.

    !!! warning

        The gradient is that of an exact solution, so it is only as good as the solution
        and the linear solve are. An [`eqimplicit.backward_probe`][] tells the residual
        of the backward solve, and whether it has finished.
    """

    linear_solver: lx.AbstractLinearSolver = NeumannKrylov(
        rtol=None, atol=0.0, fallback=GMRES(rtol=None, atol=0.0)
    )
    throw: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        if not isinstance(self.linear_solver, lx.AbstractLinearSolver):
            raise TypeError(
                "`linear_solver` must be a `lineax.AbstractLinearSolver`, for example "
                f"`eqimplicit.GMRES(1e-6, 0.0)`. Got {self.linear_solver!r}."
            )

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree[Any],
        tags: frozenset[object],
    ) -> PyTree[Array]:
        # `tags` describe the Jacobian of the rewritten problem, J - I.
        linear_solve = LinearSolve(self.linear_solver, negate_tags(tags), self.throw)
        exact = not isinstance(self.linear_solver, NeumannSeries)
        if not exact:
            check_fixed_point(self, inputs)
        return apply_implicit_rule(
            self, primal_fn, rewrite_fn, inputs, linear_solve, exact=exact
        )

    def count_products(
        self, operator: LinearMap, cotangent: PyTree[Array]
    ) -> Int[Array, ""]:
        return num_products_of(self.linear_solver, operator, cotangent)


ImplicitAdjoint.__init__.__doc__ = """**Arguments:**

- `linear_solver`: any Lineax solver, for the matrix $I - J$. The default iterates
    Neumann's series while that contracts, and otherwise turns to GMRES, to a residual
    of 1e-6, in float64 of 1e-10, relative to the right-hand side.
- `throw`: whether to raise an error, at run time, if the linear solve did not finish.
    It costs a host callback in each compiled gradient.

**Raises:** a `TypeError` if `linear_solver` is not a linear solver.
"""
