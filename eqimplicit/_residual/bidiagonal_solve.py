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
from jaxtyping import Array, Bool, Int

from .._custom_types import LinearMap
from .._layer.defaults import is_small
from .._linear_solver.gmres import GMRES
from .._misc import all_finite, ravel, stop_gradient
from .all_steps import states_before, Unknowns
from .bidiagonal import blocks, diagonal_blocks


# A step of Newton's method then gains a digit.
_ROUGHLY = GMRES(0.1, 0.0, max_steps=50)


def newton_step(operator: LinearMap, change: Unknowns) -> Unknowns:
    """Exactly where the state is small; for large ones by GMRES, preconditioned with
    the recurrences of the components.
    """
    if is_small(change.y[0]):
        return blocks(operator, change).solve(change)
    precondition = diagonal_blocks(operator, change).solve
    step, _ = _by_gmres(_ROUGHLY, operator, change, precondition)
    return step


class TrajectorySolve(eqx.Module):
    """Applies the inverse at the solution of a trajectory, so that the result is
    differentiable and transposable.
    """

    throw: bool

    def __call__(self, operator: LinearMap, vector: Unknowns, point: Any) -> Unknowns:
        root, _, ((_, _, one_step, inputs), *_) = stop_gradient(point)
        before = states_before(inputs, root.y)
        linearise = lambda k: jax.linearize(
            lambda z, y: one_step(k, z, y, inputs), root.z[k], before[k]
        )[1]
        flat, unravel = ravel(vector)
        dense = is_small(vector.y[0])
        own = (blocks if dense else diagonal_blocks)(operator, vector)

        def solve(transposed, matvec, b):
            vector = unravel(b)
            invert = own.solve_transposed if transposed else own.solve
            if dense:
                solution, is_found = invert(vector), jnp.array(True)
            else:
                operator = lambda v: unravel(matvec(ravel(v)[0]))
                found = _by_gmres(GMRES(None, 0.0), operator, vector, invert)
                solution, is_found = _substitute(linearise, vector, found, transposed)
            solution, _ = ravel(solution)
            if self.throw:
                # Direct solvers do not look at what they return.
                failed = ~(is_found & all_finite(solution)) & jnp.any(b != 0)
                solution = lx.RESULTS.breakdown.error_if(solution, failed)
            return solution

        solution = lax.custom_linear_solve(
            lambda v: ravel(operator(unravel(v)))[0],
            flat,
            solve=ft.partial(solve, False),
            transpose_solve=ft.partial(solve, True),
        )
        return unravel(solution)


def _substitute(
    linearise: Callable[[Int[Array, ""]], Callable],
    vector: Unknowns,
    start: tuple[Unknowns, Bool[Array, ""]],
    transposed: bool,
) -> tuple[Unknowns, Bool[Array, ""]]:
    """The solution and whether it is one: `start`, or if it is none, step by step."""
    num_steps = len(vector.y)
    solution, is_found = start

    def goes_on(carry):
        k, *_ = carry
        return ~is_found & (k < num_steps)

    def make_step(carry):
        k, all_found, passed_on, solution = carry
        k_step = num_steps - 1 - k if transposed else k
        p, q = vector.z[k_step], vector.y[k_step]
        jvp = linearise(k_step)
        vjp = jax.linear_transpose(jvp, p, q)
        product = lambda u, v: vjp((u, v)) if transposed else jvp(u, v)
        zero_z, zero_y = jnp.zeros_like(p), jnp.zeros_like(q)

        if transposed:
            passed_on = passed_on + q
        own, is_solved = _by_gmres(
            GMRES(None, 0.0),
            lambda u: u - product(u, zero_y)[0],
            p + product(zero_z, passed_on)[0],
        )
        _, state = product(own, passed_on)
        if not transposed:
            passed_on = state = state + q
        new = Unknowns(own, passed_on)
        solution = jtu.tree_map(lambda x, row: x.at[k_step].set(row), solution, new)
        return k + 1, all_found & is_solved, state, solution

    carry = jnp.array(0), jnp.array(True), jnp.zeros_like(vector.y[0]), solution
    _, all_found, _, solution = lax.while_loop(goes_on, make_step, carry)
    return solution, all_found


def _by_gmres(
    solver: GMRES, operator: LinearMap, vector: Any, precondition: Any = lambda v: v
) -> tuple[Any, Bool[Array, ""]]:
    flat, unravel = ravel(vector)
    matvec = lambda v: ravel(operator(precondition(unravel(v))))[0]
    system = lx.FunctionLinearOperator(matvec, jax.eval_shape(lambda: flat))
    solution, result, _ = solver.solve(system, flat)
    return precondition(unravel(solution)), result == lx.RESULTS.successful
