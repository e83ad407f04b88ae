from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._misc import (
    accumulation_dtype,
    all_finite,
    check_positive_int,
    check_tolerances,
    state_dtype,
    two_norm,
)
from .base import AbstractMatrixFreeSolver, tolerance_for


class _State(eqx.Module):
    """A solution with its residual."""

    solution: PyTree[Array]
    residual_vector: PyTree[Array]
    residual: Float[Array, ""]
    num_products: Int[Array, ""]


class NeumannKrylov(AbstractMatrixFreeSolver):
    r"""Neumann iteration where it contracts, and another solver where it does not.

    Iterates $x \leftarrow x + r$, $r \leftarrow b - A x$ from $x = 0$, $r = b$, while
    the residual $\|r\|_2$ shrinks on average by the factor `rate` or better at each
    product, until it meets $\text{atol} + \text{rtol} \|b\|_2$. Keeping no basis, it is
    the cheapest method that there is for $A = I - J$ with a contractive $J$. As soon as
    it becomes too slow, it gives up, and `fallback` solves the system.

    Under `vmap` each example decides for itself. `fallback` is called with a zero
    right-hand side where it is not needed, which costs an iterative solver nothing; a
    direct one factorises all the same. `num_products` counts the products, those of
    `fallback` included if it counts them. As for [`eqimplicit.GMRES`][], a smaller
    `rtol` than four times the precision of the numbers is taken as four times it.
    """

    rtol: float | Float[Array, ""] | None
    atol: float | Float[Array, ""]
    fallback: lx.AbstractLinearSolver
    rate: float = 0.8
    patience: int = eqx.field(default=4, static=True)

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_positive_int("patience", self.patience)
        if not 0 < self.rate < 1:
            raise ValueError(f"`rate` must lie in (0, 1). Got {self.rate!r}.")
        if not isinstance(self.fallback, lx.AbstractLinearSolver):
            raise TypeError(
                "`fallback` must be a `lineax.AbstractLinearSolver`, for example "
                f"`GMRES(1e-6, 0.0)`. Got {self.fallback!r}."
            )

    def solve(
        self, operator: lx.AbstractLinearOperator, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        dtype = accumulation_dtype(state_dtype(vector))
        size = two_norm(vector)
        tolerance = tolerance_for(self.rtol, self.atol, size, state_dtype(vector))
        log_rate = jnp.log(jnp.asarray(self.rate, dtype))

        def go_on(state: _State) -> Bool[Array, ""]:
            expected = size * jnp.exp(log_rate * state.num_products)
            early = state.num_products < self.patience
            contracts = early | (state.residual <= expected)
            return (state.residual > tolerance) & contracts

        def step(state: _State) -> _State:
            solution = jtu.tree_map(jnp.add, state.solution, state.residual_vector)
            # Measured, not reduced by recurrence: rounding would go unnoticed.
            residual_vector = jtu.tree_map(jnp.subtract, vector, operator.mv(solution))
            return _State(
                solution=solution,
                residual_vector=residual_vector,
                residual=two_norm(residual_vector),
                num_products=state.num_products + 1,
            )

        zero = jtu.tree_map(jnp.zeros_like, vector)
        state = lax.while_loop(go_on, step, _State(zero, vector, size, jnp.array(0)))
        converged = jnp.isfinite(size) & (state.residual <= tolerance)

        remaining = jtu.tree_map(lambda x: jnp.where(converged, 0, x), vector)
        fallback_state = self.fallback.init(operator, {})
        other, other_result, stats = self.fallback.compute(
            fallback_state, remaining, {}
        )
        solution = jtu.tree_map(
            lambda a, b: jnp.where(converged, a, b), state.solution, other
        )
        # Direct solvers do not look at what they return.
        other_result = lx.RESULTS.where(
            all_finite(other), other_result, lx.RESULTS.breakdown
        )
        result = lx.RESULTS.where(converged, lx.RESULTS.successful, other_result)
        products = state.num_products + stats.get("num_products", 0)
        all_stats = {"num_products": products}
        if "residual" in stats:
            residual = jnp.where(converged, state.residual, stats["residual"])
            all_stats["residual"] = residual
        return solution, result, all_stats


NeumannKrylov.__init__.__doc__ = """**Arguments:**

- `rtol`: tolerance relative to the size of the right-hand side; `None` means 1e-10 in
    double precision and 1e-6 below.
- `atol`: absolute tolerance. Not both may be zero.
- `fallback`: the solver for systems on which the Neumann iteration is slow or diverges,
    e.g. [`eqimplicit.GMRES`][].
- `rate`: the slowest mean contraction per product to put up with, in (0, 1).
- `patience`: the number of products before the contraction is judged.

**Raises:** a `ValueError` or `TypeError` for arguments out of range or of the wrong
kind.
"""
