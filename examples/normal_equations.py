"""The exact gradient of the JFB paper's comparison: conjugate gradients on the normal
equations, with the paper's rule for when to stop.
"""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree


class NormalEquationsCG(lx.AbstractLinearSolver):
    r"""Solves $A x = b$ as $A^\top A x = A^\top b$ by conjugate gradients, one system
    for each entry of the leading axis, which $A$ must not mix. With
    $A = (I - J)^\top$ these are the paper's equations.

    It starts from $x = A^\top b$, and stops when every residual, in the two-norm, is
    within `atol`. There is no relative tolerance: the larger the batch, the smaller the
    gradient of its mean loss, and the earlier it stops.

    Each step takes two products with $A$ or $A^\top$, and the start three.
    """

    atol: float = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        return operator

    def compute(
        self, state: Any, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        del options
        operator, transposed = state, state.T
        treedef = jax.tree.structure(vector)

        def normal(x):
            product = operator.mv(treedef.unflatten([x]))
            return jax.tree.leaves(transposed.mv(product))[0]

        def inner(x, y):
            return jnp.sum(x * y, axis=range(1, x.ndim), keepdims=True)

        right = jax.tree.leaves(transposed.mv(vector))[0]
        residual = right - normal(right)
        square = inner(residual, residual)

        def is_unfinished(carry):
            *_, square, step = carry
            return (step < self.max_steps) & jnp.any(square > self.atol**2)

        def advance(carry):
            x, residual, direction, square, step = carry
            product = normal(direction)
            curvature = inner(direction, product)
            length = square / jnp.where(curvature > 0, curvature, 1)
            x = x + length * direction
            residual = residual - length * product
            new = inner(residual, residual)
            direction = residual + new / jnp.where(square > 0, square, 1) * direction
            return x, residual, direction, new, step + 1

        start = right, residual, residual, square, jnp.array(0)
        x, _, _, square, steps = lax.while_loop(is_unfinished, advance, start)
        result = lx.RESULTS.where(
            jnp.all(square <= self.atol**2),
            lx.RESULTS.successful,
            lx.RESULTS.max_steps_reached,
        )
        stats = {"num_steps": steps, "num_products": 2 * steps + 3}
        return treedef.unflatten([x]), result, stats

    def transpose(self, state: Any, options: dict[str, Any]):
        return state.T, options

    def conj(self, state: Any, options: dict[str, Any]):
        return lx.conj(state), options

    def assume_full_rank(self) -> bool:
        return True
