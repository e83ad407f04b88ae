import abc
from collections.abc import Callable
from typing import Any

import lineax as lx
from jaxtyping import Array, PyTree

from .base import AbstractFixedPointAdjoint
from .guards import check_fixed_point
from .linear_solve import LinearSolve
from .rules import apply_implicit_rule


class AbstractSeriesAdjoint(AbstractFixedPointAdjoint):
    """An adjoint with a series in products with the Jacobian for the inverse."""

    @property
    @abc.abstractmethod
    def series(self) -> lx.AbstractLinearSolver:
        """The series, as the solver that it approximates."""

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree[Any],
        tags: frozenset[object],
    ) -> PyTree[Array]:
        del tags
        check_fixed_point(self, inputs)
        linear_solve = LinearSolve(self.series, frozenset(), throw=False)
        return apply_implicit_rule(
            self, primal_fn, rewrite_fn, inputs, linear_solve, exact=False
        )
