import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from .._custom_types import LinearMap
from .._misc import all_finite, ravel, stop_gradient


class LinearSolve(eqx.Module):
    """Applies a Lineax solver to a linear map, so that the result is differentiable and
    transposable whatever the solver does inside, and so that it raises only on demand.

    (A differentiated `lineax.linear_solve` always raises on failure, by means of a host
    callback.)

    The leaves are solved for as one vector: JAX does not transpose a solve of whose
    right-hand side only some leaves depend on what is differentiated.
    """

    solver: lx.AbstractLinearSolver
    tags: frozenset[object]
    throw: bool

    def __call__(
        self, operator: LinearMap, vector: PyTree[Array], point: Any = None
    ) -> PyTree[Array]:
        del point
        flat, unravel = ravel(vector)
        solution = lax.custom_linear_solve(
            lambda v: ravel(operator(unravel(v)))[0],
            flat,
            solve=ft.partial(self._solve, self.tags),
            transpose_solve=ft.partial(self._solve, lx.transpose_tags(self.tags)),
        )
        return unravel(solution)

    def _solve(self, tags, matvec, vector):
        structure = jax.eval_shape(lambda: vector)
        operator = lx.FunctionLinearOperator(matvec, structure, tags)
        solver = stop_gradient(self.solver)
        state = solver.init(operator, {})
        solution, result, _ = solver.compute(state, vector, {})
        # A masked loss has zero cotangents, on which some solvers divide zero by zero.
        is_zero = jnp.all(vector == 0)
        if self.throw:
            # Direct solvers do not look at what they return.
            result = lx.RESULTS.where(
                all_finite(solution), result, lx.RESULTS.breakdown
            )
            failed = (result != lx.RESULTS.successful) & ~is_zero
            solution = result.error_if(solution, failed)
        return jnp.where(is_zero, 0, solution)


def negate_tags(tags: frozenset[object]) -> frozenset[object]:
    """Tags of a matrix to those of its negative."""
    negative: dict[object, object] = {
        lx.positive_semidefinite_tag: lx.negative_semidefinite_tag,
        lx.negative_semidefinite_tag: lx.positive_semidefinite_tag,
    }
    tags = frozenset(negative.get(tag, tag) for tag in tags)
    return tags - {lx.unit_diagonal_tag}
