from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree

from .._misc import check_positive, check_positive_int
from .base import AbstractMatrixFreeSolver


class NeumannSeries(AbstractMatrixFreeSolver):
    r"""Approximates $A^{-1} b$ by the first $k$ terms of a damped Neumann series,

    $$\lambda \sum_{i<k} B^i b, \qquad B = I - \lambda A.$$

    For $A = I - J$ this is $B = \lambda J + (1 - \lambda) I$. Always takes `num_terms`
    terms, no fewer and no more: it approximates, it does not solve to a tolerance, and
    reports success. The error is exactly $B^k A^{-1} b$, so that the series converges
    when every eigenvalue $\mu$ of $J$ satisfies $|1 - \lambda (1 - \mu)| < 1$.

    Costs `num_terms - 1` products with $A$ and two vectors of memory.
    """

    num_terms: int = eqx.field(static=True)
    damping: float | Float[Array, ""] = 1.0

    def __check_init__(self):
        check_positive_int("num_terms", self.num_terms)
        check_positive("damping", self.damping)

    def solve(
        self, operator: lx.AbstractLinearOperator, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        damping = lax.stop_gradient(self.damping)

        def damped(tree):
            return jtu.tree_map(lambda x: jnp.asarray(damping, x.dtype) * x, tree)

        def add_term(_, carry):
            term, total = carry
            term = jtu.tree_map(jnp.subtract, term, damped(operator.mv(term)))
            return term, jtu.tree_map(jnp.add, total, term)

        first = damped(vector)
        _, total = lax.fori_loop(0, self.num_terms - 1, add_term, (first, first))
        stats = {"num_products": jnp.array(self.num_terms - 1)}
        return total, lx.RESULTS.successful, stats


NeumannSeries.__init__.__doc__ = """**Arguments:**

- `num_terms`: the number of terms, at least 1.
- `damping`: the weight $\\lambda$, positive; 1 is the plain series.

**Raises:** a `ValueError` if either is out of range.
"""
