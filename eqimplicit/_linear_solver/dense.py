from typing import Any

import lineax as lx
from jaxtyping import Array, PyTree

from .._misc import accumulation_dtype, ravel, state_dtype


class DenseLU(lx.AbstractLinearSolver[Any]):
    """As [`lineax.LU`][], in at least single precision, since there is no
    factorisation of a matrix in half precision.
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        matrix = operator.as_matrix()
        matrix = matrix.astype(accumulation_dtype(matrix.dtype))
        return lx.LU().init(lx.MatrixLinearOperator(matrix), options)

    def compute(
        self, state: Any, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        dtype = state_dtype(vector)
        b, unravel = ravel(vector)
        b = b.astype(accumulation_dtype(dtype))
        solution, result, stats = lx.LU().compute(state, b, options)
        return unravel(solution.astype(dtype)), result, stats

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        return lx.LU().transpose(state, options)

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        return lx.LU().conj(state, options)

    def assume_full_rank(self) -> bool:
        return True
