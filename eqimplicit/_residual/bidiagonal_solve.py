"""Solves of the linear system of a trajectory."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Float, Int

from .._adjoint.linear_solve import (
    count_products,
    differentiable_solve,
    LinearSolve,
    Solved,
    throw_if,
)
from .._adjoint.probe import BackwardStatus
from .._custom_types import LinearMap
from .._layer.defaults import is_small
from .._linear_solver.gmres import GMRES
from .._misc import accumulation_dtype, all_finite, ravel, stop_gradient
from .all_steps import states_before, Unknowns
from .bidiagonal import blocks, diagonal_blocks, num_block_products


# A step of Newton's method then gains a digit.
_ROUGHLY = GMRES(0.1, 0.0, max_steps=50)
# How often the scales of a system may be found anew.
_MAX_PASSES = 5


def newton_step(operator: LinearMap, change: Unknowns, unknowns: Unknowns) -> Solved:
    """Exactly where the state is small; for large ones by GMRES, preconditioned with
    the recurrences of the components, and relative to the sizes of the unknowns.
    """
    if is_small(change.y[0]):
        return Solved(blocks(operator, change).solve(change), jnp.array(True), {})
    precondition = diagonal_blocks(operator, change).solve
    return _by_gmres(_ROUGHLY, operator, change, precondition, _sizes(unknowns))


def _sizes(unknowns: Unknowns) -> Float[Array, "steps 1"]:
    """Of each step; none is so small that it could not be divided by."""
    largest = lambda x: jnp.max(jnp.abs(x), axis=1, keepdims=True)
    size = jnp.maximum(largest(unknowns.z), largest(unknowns.y))
    size = size.astype(accumulation_dtype(size.dtype))
    whole = jnp.max(size)
    smallest = float(jnp.finfo(size.dtype).tiny) ** 0.5 * whole
    return jnp.where(whole > 0, jnp.maximum(size, smallest), 1)


def _by_gmres(
    solver: GMRES,
    operator: LinearMap,
    vector: Unknowns,
    precondition: LinearMap,
    sizes: Float[Array, "steps 1"],
) -> Solved:
    """In units of the sizes, so that the steps with small ones count as well."""

    def multiply(u, factors):
        by = lambda x: (x.astype(factors.dtype) * factors).astype(x.dtype)
        return jtu.tree_map(by, u)

    scale, unscale = lambda u: multiply(u, sizes), lambda u: multiply(u, 1 / sizes)
    flat, unravel = ravel(unscale(vector))
    correct = lambda v: precondition(scale(unravel(v)))
    system = lx.FunctionLinearOperator(
        lambda v: ravel(unscale(operator(correct(v))))[0], jax.eval_shape(lambda: flat)
    )
    solution, result, stats = solver.solve(system, flat)
    is_found = result == lx.RESULTS.successful
    return Solved(correct(solution), is_found, stats)


class _Refined(NamedTuple):
    value: Unknowns
    residual: Unknowns
    is_close: Bool[Array, ""]
    is_found: Bool[Array, ""]
    num_passes: Int[Array, ""]
    num_products: Float[Array, ""]


def _solve_each_step(
    operator: LinearMap, vector: Unknowns, precondition: LinearMap
) -> Solved:
    """To the same relative accuracy in each step. Cotangents may decay by any factor
    along a trajectory, and are not known before: a solution gives the scales in which
    the next pass solves for what is missing.
    """
    dtype = vector.y.dtype
    tolerance = 1e-10 if jnp.finfo(dtype).bits >= 64 else 1e-6
    tolerance = max(tolerance, 4 * float(jnp.finfo(dtype).eps))
    # In the root mean square over the steps.
    solver = GMRES(0.0, tolerance * len(vector.y) ** 0.5)

    def measured(value, is_found, num_passes, num_products):
        residual = jtu.tree_map(jnp.subtract, vector, operator(value))
        small = _sizes(residual) <= 10 * tolerance * _sizes(value)
        is_zero = ~jnp.any(ravel(residual)[0])
        is_close = jnp.all(small) & all_finite(value) | is_zero
        return _Refined(
            value, residual, is_close, is_found, num_passes, num_products + 1
        )

    def goes_on(state):
        is_open = state.is_found & (state.num_passes < _MAX_PASSES)
        return ~state.is_close & is_open & all_finite(state.residual)

    def refine(state):
        sizes = _sizes(state.value)
        solved = _by_gmres(solver, operator, state.residual, precondition, sizes)
        value = jtu.tree_map(jnp.add, state.value, solved.value)
        products = state.num_products + solved.stats["num_products"]
        return measured(value, solved.is_found, state.num_passes + 1, products)

    start = measured(precondition(vector), jnp.array(True), 0, jnp.zeros(()))
    state = lax.while_loop(goes_on, refine, jtu.tree_map(jnp.asarray, start))
    return Solved(state.value, state.is_close, {"num_products": state.num_products})


class TrajectorySolve(eqx.Module):
    """Applies the inverse at the solution of a trajectory, so that the result is
    differentiable and transposable.
    """

    linear_solver: lx.AbstractLinearSolver
    throw: bool

    def __call__(
        self,
        operator: LinearMap,
        vector: Unknowns,
        point: Any,
        probe: BackwardStatus | None,
    ) -> Unknowns:
        root, _, ((_, _, one_step, inputs, _), *_) = stop_gradient(point)
        before = states_before(inputs, root.y)
        linearise = lambda k: jax.linearize(
            lambda z, y: one_step(k, z, y, inputs), root.z[k], before[k]
        )[1]
        _, unravel = ravel(vector)
        dense = is_small(vector.y[0])
        own = (blocks if dense else diagonal_blocks)(operator, vector)
        num_products = num_block_products(vector, dense)

        def solve(transposed, matvec, b):
            vector = unravel(b)
            invert = own.solve_transposed if transposed else own.solve
            if dense:
                solved = Solved(invert(vector), jnp.array(True), {})
            else:
                operator = lambda v: unravel(matvec(ravel(v)[0]))
                solved = _solve_each_step(operator, vector, invert)
                solved = self._substitute(linearise, vector, solved, transposed)
            value, _ = ravel(solved.value)
            if self.throw:
                # Direct solvers do not look at what they return.
                failed = ~(solved.is_found & all_finite(value)) & jnp.any(b != 0)
                value = throw_if(value, failed)
            products = solved.stats.get("num_products", 0) + num_products
            return Solved(value, solved.is_found, {"num_products": products})

        return differentiable_solve(
            operator, vector, probe, ft.partial(solve, False), ft.partial(solve, True)
        )

    def _substitute(
        self,
        linearise: Callable[[Int[Array, ""]], Callable],
        vector: Unknowns,
        start: Solved,
        transposed: bool,
    ) -> Solved:
        """What has been found, or if that is no solution, one step after the other, by
        the linear solver of the layer.
        """
        num_steps = len(vector.y)
        linear_solve = LinearSolve(self.linear_solver, frozenset(), throw=False)

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
            own = linear_solve.solve(
                frozenset(),
                lambda u: u - product(u, zero_y)[0],
                p + product(zero_z, passed_on)[0],
            )
            _, state = product(own.value, passed_on)
            if not transposed:
                passed_on = state = state + q
            row = Unknowns(own.value, passed_on)
            value = jtu.tree_map(lambda x, r: x.at[k_step].set(r), solved.value, row)
            products = count_products(own.stats, p.size) / num_steps
            stats = {"num_products": solved.stats["num_products"] + products}
            is_found = solved.is_found & own.is_found
            return k + 1, Solved(value, is_found, stats), state

        solved = start._replace(is_found=jnp.array(True))
        carry = jnp.array(0), solved, jnp.zeros_like(vector.y[0])
        _, solved, _ = lax.while_loop(goes_on, make_step, carry)
        return solved
