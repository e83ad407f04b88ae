import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import optimistix as optx
from jaxtyping import Array, Int, PyTree

from .._custom_types import LinearMap


class Inputs(NamedTuple):
    """Names the `inputs` of [`optimistix.AbstractAdjoint.apply`][]: `Inputs(*inputs)`
    is what Optimistix was asked to solve, by which solver, and in how many steps.
    """

    fn: Callable
    solver: optx.AbstractIterativeSolver
    y0: PyTree[Array]
    args: PyTree[Any]
    options: dict[str, Any]
    max_steps: int | None
    f_struct: PyTree[Any]
    aux_struct: PyTree[Any]
    tags: frozenset[object]


class Outcome(NamedTuple):
    """Names the second of the two things that `primal_fn` returns beside the solution:
    `Outcome(*residual)` says how the solve went.
    """

    num_steps: Int[Array, ""]
    result: optx.RESULTS
    state: PyTree[Any]
    static_state: Any
    aux: PyTree[Any]
    stats: dict[str, Any]


class AbstractFixedPointAdjoint(optx.AbstractAdjoint):
    """An adjoint that refuses equations of examples that are coupled, as the two rules
    for differentiation do, and that knows what its gradients cost.
    """

    @abc.abstractmethod
    def count_products(
        self, operator: LinearMap, cotangent: PyTree[Array]
    ) -> Int[Array, ""]:
        r"""How many products with $J$ one gradient takes, or -1 if that is not known.

        `operator` is the product with $(I - J)^\top$, and `cotangent` that of the
        solution.
        """
