import abc
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, DTypeLike, PyTree

from .._misc import all_finite


class AbstractMatrixFreeSolver(lx.AbstractLinearSolver[lx.AbstractLinearOperator]):
    """A linear solver that needs nothing but products with a square operator."""

    @abc.abstractmethod
    def solve(
        self, operator: lx.AbstractLinearOperator, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Returns the solution, whether it was found, and statistics, among which
        `num_products` counts the products with the operator.
        """

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> lx.AbstractLinearOperator:
        if len(options) > 0:
            raise ValueError(
                f"{type(self).__name__} accepts no `options`. Got {sorted(options)}."
            )
        if operator.in_structure() != operator.out_structure():
            raise ValueError(
                f"{type(self).__name__} solves square systems only, but the operator "
                f"maps {operator.in_structure()} to {operator.out_structure()}."
            )
        return lx.linearise(operator)

    def compute(
        self,
        state: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        options: dict[str, Any],
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        del options
        return self.solve(state, vector)

    def transpose(
        self, state: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lx.AbstractLinearOperator, dict[str, Any]]:
        return state.transpose(), options

    def conj(
        self, state: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lx.AbstractLinearOperator, dict[str, Any]]:
        return lx.conj(state), options

    def assume_full_rank(self) -> bool:
        return True


def tolerance_for(rtol: Any, atol: Any, size: Array, dtype: DTypeLike) -> Array:
    """`atol + rtol * size`, with an `rtol` that products in `dtype` can reach."""
    if rtol is None:
        rtol = 1e-10 if jnp.finfo(dtype).bits >= 64 else 1e-6
    rtol, atol = lax.stop_gradient((rtol, atol))
    reachable = 4 * float(jnp.finfo(dtype).eps)
    rtol = jnp.maximum(jnp.asarray(rtol, size.dtype), reachable)
    return jnp.asarray(atol, size.dtype) + rtol * size


def result_of(
    converged: Bool[Array, ""], broken_down: Bool[Array, ""], vector: PyTree[Array]
) -> lx.RESULTS:
    """Why a solve ended that may not have met its tolerance."""
    result = lx.RESULTS.where(
        broken_down, lx.RESULTS.breakdown, lx.RESULTS.max_steps_reached
    )
    result = lx.RESULTS.where(all_finite(vector), result, lx.RESULTS.nonfinite_input)
    return lx.RESULTS.where(converged, lx.RESULTS.successful, result)
