import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, PyTree

from .._custom_types import LinearMap, Vector
from .._misc import all_finite, ravel, stop_gradient, two_norm
from .probe import BackwardStatus


class Solved(NamedTuple):
    """What a linear solver returned, with the statistics that it reports."""

    value: PyTree[Array]
    is_found: Bool[Array, ""]
    stats: dict[str, Any]


Solve = Callable[[Callable[[Vector], Vector], Vector], Solved]


def differentiable_solve(
    operator: LinearMap,
    vector: PyTree[Array],
    probe: BackwardStatus | None,
    solve: Solve,
    transpose_solve: Solve,
) -> PyTree[Array]:
    """Applies a linear solver, so that the result is differentiable and transposable
    whatever that does inside. Given the tangent of a probe, the transposed solve gives
    it the status as its cotangent.

    The leaves are solved for as one vector: JAX does not transpose a solve of whose
    right-hand side only some leaves depend on what is differentiated.
    """
    flat, unravel = ravel(vector)
    matvec = lambda v: ravel(operator(unravel(v)))[0]
    if probe is None:
        value_of = lambda solve: lambda matvec, b: solve(matvec, b).value
        return unravel(
            lax.custom_linear_solve(
                matvec, flat, value_of(solve), value_of(transpose_solve)
            )
        )

    def own(matvec):
        return lambda v: matvec((v, jtu.tree_map(jnp.zeros_like, probe)))[0]

    def forwards(matvec, pair):
        b, probe = pair
        return solve(own(matvec), b).value, probe

    def backwards(matvec, pair):
        b, _ = pair
        solved = transpose_solve(own(matvec), b)
        return solved.value, _status(own(matvec), b, solved, probe)

    value, unchanged = lax.custom_linear_solve(
        lambda pair: (matvec(pair[0]), pair[1]),
        (_tie(flat, probe), _tie(probe, flat)),
        forwards,
        backwards,
    )
    return unravel(_tie(value, unchanged))


def _tie(tree, other):
    """Depends on the other one as well, with derivative zero: JAX transposes only
    solves all of whose right-hand side is differentiated. (A product with zero could be
    NaN.)
    """
    total = sum(jnp.sum(x).astype(float) for x in jtu.tree_leaves(other))
    pick = lambda x: jnp.where(jnp.array(True), x, jnp.asarray(total).astype(x.dtype))
    return jtu.tree_map(pick, tree)


def _status(matvec, b, solved, like):
    size = two_norm(b)
    is_zero = size == 0
    num_products = count_products(solved.stats, b.size)
    if "residual" in solved.stats:
        residual = solved.stats["residual"]
    else:
        residual = two_norm(matvec(solved.value) - b)
        num_products = num_products + 1
    failed = ~is_zero & ~(solved.is_found & all_finite(solved.value))
    residual = jnp.where(is_zero, 0, residual / jnp.where(is_zero, 1, size))

    def spread(x, like):
        """Over a probe of several entries, so that they sum up to it."""
        return jnp.full_like(like, jnp.asarray(x).astype(like.dtype) / like.size)

    return BackwardStatus(
        # One for each example of a batch, all of which have their own cotangent.
        num_solves=spread(is_zero | ~is_zero, like.num_solves),
        num_failed=spread(failed, like.num_failed),
        residual=spread(residual, like.residual),
        num_products=spread(num_products, like.num_products),
    )


def count_products(stats: dict[str, Any], size: int) -> Any:
    """NaN for the iterative solvers of Lineax, which count steps only."""
    return stats.get("num_products", jnp.nan if "num_steps" in stats else size)


def num_products_of(
    solver: lx.AbstractLinearSolver, operator: LinearMap, cotangent: PyTree[Array]
) -> Any:
    """How many a solve takes, or -1 for a solver that does not count them."""
    structure = jax.eval_shape(lambda: cotangent)
    system = lx.FunctionLinearOperator(operator, structure)
    _, _, stats = solver.compute(solver.init(system, {}), cotangent, {})
    return jnp.asarray(stats.get("num_products", -1))


def throw_if(value: PyTree[Array], failed: Bool[Array, ""]) -> PyTree[Array]:
    message = (
        "The backward solve of an `eqimplicit.ImplicitAdjoint` did not finish: the "
        "maximum number of steps of its `linear_solver` was reached (which is not the "
        "`max_steps` of the layer), or it broke down. With `throw=False` the gradient "
        "is what it has."
    )
    return eqx.error_if(value, failed, message)


class LinearSolve(eqx.Module):
    """Applies a Lineax solver to a linear map. It raises only on demand. (A
    differentiated `lineax.linear_solve` always raises on failure, by means of a host
    callback.)
    """

    solver: lx.AbstractLinearSolver
    tags: frozenset[object]
    throw: bool

    def __call__(
        self,
        operator: LinearMap,
        vector: PyTree[Array],
        point: Any = None,
        probe: BackwardStatus | None = None,
    ) -> PyTree[Array]:
        del point
        return differentiable_solve(
            operator,
            vector,
            probe,
            ft.partial(self.solve, self.tags),
            ft.partial(self.solve, lx.transpose_tags(self.tags)),
        )

    def solve(
        self,
        tags: frozenset[object],
        matvec: Callable[[Vector], Vector],
        vector: Vector,
    ) -> Solved:
        """Of one vector, as it is."""
        structure = jax.eval_shape(lambda: vector)
        operator = lx.FunctionLinearOperator(matvec, structure, tags)
        solver = stop_gradient(self.solver)
        state = solver.init(operator, {})
        solution, result, stats = solver.compute(state, vector, {})
        # A masked loss has zero cotangents, on which some solvers divide zero by zero.
        is_zero = jnp.all(vector == 0)
        if self.throw:
            # Direct solvers do not look at what they return.
            result = lx.RESULTS.where(
                all_finite(solution), result, lx.RESULTS.breakdown
            )
            failed = (result != lx.RESULTS.successful) & ~is_zero
            solution = throw_if(solution, failed)
        value = jnp.where(is_zero, 0, solution)
        return Solved(value, result == lx.RESULTS.successful, stats)


def negate_tags(tags: frozenset[object]) -> frozenset[object]:
    """Tags of a matrix to those of its negative."""
    negative: dict[object, object] = {
        lx.positive_semidefinite_tag: lx.negative_semidefinite_tag,
        lx.negative_semidefinite_tag: lx.positive_semidefinite_tag,
    }
    tags = frozenset(negative.get(tag, tag) for tag in tags)
    return tags - {lx.unit_diagonal_tag}
