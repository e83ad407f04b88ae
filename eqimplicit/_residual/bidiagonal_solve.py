"""Solves of the linear system of a trajectory."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Int

from .._adjoint.linear_solve import differentiable_solve, Solved
from .._adjoint.probe import BackwardStatus
from .._custom_types import LinearMap
from .._layer.defaults import is_small
from .._linear_solver.gmres import GMRES
from .._misc import all_finite, ravel, stop_gradient
from .all_steps import states_before, Unknowns
from .bidiagonal import blocks, count_products, diagonal_blocks


# A step of Newton's method then gains a digit.
_ROUGHLY = GMRES(0.1, 0.0, max_steps=50)


def newton_step(operator: LinearMap, change: Unknowns) -> Unknowns:
    """Exactly where the state is small; for large ones by GMRES, preconditioned with
    the recurrences of the components.
    """
    if is_small(change.y[0]):
        return blocks(operator, change).solve(change)
    precondition = diagonal_blocks(operator, change).solve
    return _by_gmres(_ROUGHLY, operator, change, precondition).value


class TrajectorySolve(eqx.Module):
    """Applies the inverse at the solution of a trajectory, so that the result is
    differentiable and transposable.
    """

    throw: bool

    def __call__(
        self,
        operator: LinearMap,
        vector: Unknowns,
        point: Any,
        probe: BackwardStatus | None,
    ) -> Unknowns:
        root, _, ((_, _, one_step, inputs), *_) = stop_gradient(point)
        before = states_before(inputs, root.y)
        linearise = lambda k: jax.linearize(
            lambda z, y: one_step(k, z, y, inputs), root.z[k], before[k]
        )[1]
        _, unravel = ravel(vector)
        dense = is_small(vector.y[0])
        own = (blocks if dense else diagonal_blocks)(operator, vector)
        num_products = count_products(vector, dense)

        def solve(transposed, matvec, b):
            vector = unravel(b)
            invert = own.solve_transposed if transposed else own.solve
            if dense:
                solved = Solved(invert(vector), jnp.array(True), {})
            else:
                operator = lambda v: unravel(matvec(ravel(v)[0]))
                solved = _by_gmres(GMRES(None, 0.0), operator, vector, invert)
                solved = _substitute(linearise, vector, solved, transposed)
            value, _ = ravel(solved.value)
            if self.throw:
                # Direct solvers do not look at what they return.
                failed = ~(solved.is_found & all_finite(value)) & jnp.any(b != 0)
                value = lx.RESULTS.breakdown.error_if(value, failed)
            products = solved.stats.get("num_products", 0) + num_products
            return Solved(value, solved.is_found, {"num_products": products})

        return differentiable_solve(
            operator, vector, probe, ft.partial(solve, False), ft.partial(solve, True)
        )


def _substitute(
    linearise: Callable[[Int[Array, ""]], Callable],
    vector: Unknowns,
    start: Solved,
    transposed: bool,
) -> Solved:
    """What has been found, or if that is no solution, one step after the other."""
    num_steps = len(vector.y)

    def goes_on(carry):
        k, *_ = carry
        return ~start.is_found & (k < num_steps)

    def make_step(carry):
        k, solved, passed_on = carry
        k_step = num_steps - 1 - k if transposed else k
        p, q = vector.z[k_step], vector.y[k_step]
        jvp = linearise(k_step)
        vjp = jax.linear_transpose(jvp, p, q)
        product = lambda u, v: vjp((u, v)) if transposed else jvp(u, v)
        zero_z, zero_y = jnp.zeros_like(p), jnp.zeros_like(q)

        if transposed:
            passed_on = passed_on + q
        own = _by_gmres(
            GMRES(None, 0.0),
            lambda u: u - product(u, zero_y)[0],
            p + product(zero_z, passed_on)[0],
        )
        _, state = product(own.value, passed_on)
        if not transposed:
            passed_on = state = state + q
        row = Unknowns(own.value, passed_on)
        value = jtu.tree_map(lambda x, r: x.at[k_step].set(r), solved.value, row)
        count = solved.stats["num_products"] + own.stats["num_products"] / num_steps
        is_found = solved.is_found & own.is_found
        return k + 1, Solved(value, is_found, {"num_products": count}), state

    solved = start._replace(is_found=jnp.array(True))
    carry = jnp.array(0), solved, jnp.zeros_like(vector.y[0])
    _, solved, _ = lax.while_loop(goes_on, make_step, carry)
    return solved


def _by_gmres(
    solver: GMRES, operator: LinearMap, vector: Any, precondition: Any = lambda v: v
) -> Solved:
    flat, unravel = ravel(vector)
    matvec = lambda v: ravel(operator(precondition(unravel(v))))[0]
    system = lx.FunctionLinearOperator(matvec, jax.eval_shape(lambda: flat))
    solution, result, stats = solver.solve(system, flat)
    is_found = result == lx.RESULTS.successful
    num_products = stats["num_products"].astype(float)
    value = precondition(unravel(solution))
    return Solved(value, is_found, {"num_products": num_products})
