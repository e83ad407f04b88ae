from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.scipy as jsp
import lineax as lx
from jaxtyping import Array, Float, Int, PyTree

from .._misc import accumulation_dtype, ravel, state_dtype
from .small import apply, solve, TINY


class _Inverse(eqx.Module):
    matrix: Float[Array, "n n"]

    def solve(self, b):
        return apply(self.matrix, b)

    def transpose(self):
        return _Inverse(self.matrix.T)


class _Factors(eqx.Module):
    factors: Float[Array, "n n"]
    pivots: Int[Array, " n"]
    is_transposed: bool = eqx.field(static=True)

    def solve(self, b):
        factors = self.factors, self.pivots
        return jsp.linalg.lu_solve(factors, b, trans=int(self.is_transposed))

    def transpose(self):
        return _Factors(self.factors, self.pivots, not self.is_transposed)


class DenseLU(lx.AbstractLinearSolver[Any]):
    """As [`lineax.LU`][], in at least single precision, since there is no factorisation
    of a matrix in half precision; and inside `jax.shard_map`, where that refuses its
    right-hand side. The inverse of a matrix of up to three rows is written out, without
    a call of a library.
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        del options
        matrix = operator.as_matrix()
        matrix = matrix.astype(accumulation_dtype(matrix.dtype))
        if len(matrix) <= TINY:
            return _Inverse(solve(matrix, jnp.eye(len(matrix), dtype=matrix.dtype)))
        factors, pivots = jsp.linalg.lu_factor(matrix)
        return _Factors(factors, pivots, False)

    def compute(
        self, state: Any, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        del options
        b, unravel = ravel(vector)
        solution = state.solve(b.astype(accumulation_dtype(b.dtype)))
        solution = unravel(solution.astype(state_dtype(vector)))
        return solution, lx.RESULTS.successful, {}

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        return state.transpose(), options

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        return state, options

    def assume_full_rank(self) -> bool:
        return True
