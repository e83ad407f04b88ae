from typing import Any

import jax.scipy as jsp
import lineax as lx
from jaxtyping import Array, PyTree

from .._misc import accumulation_dtype, ravel, state_dtype


class DenseLU(lx.AbstractLinearSolver[Any]):
    """As [`lineax.LU`][], in at least single precision, since there is no factorisation
    of a matrix in half precision; and inside `jax.shard_map`, where that refuses its
    right-hand side.
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        del options
        matrix = operator.as_matrix()
        matrix = matrix.astype(accumulation_dtype(matrix.dtype))
        return jsp.linalg.lu_factor(matrix), False

    def compute(
        self, state: Any, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        del options
        (factors, pivots), transposed = state
        dtype = state_dtype(vector)
        b, unravel = ravel(vector)
        b = b.astype(factors.dtype)
        solution = jsp.linalg.lu_solve((factors, pivots), b, trans=int(transposed))
        return unravel(solution.astype(dtype)), lx.RESULTS.successful, {}

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        factorised, transposed = state
        return (factorised, not transposed), options

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        return state, options

    def assume_full_rank(self) -> bool:
        return True
