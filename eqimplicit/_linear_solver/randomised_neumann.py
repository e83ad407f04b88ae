from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .base import AbstractMatrixFreeSolver


class RandomisedNeumannSeries(AbstractMatrixFreeSolver):
    r"""As many terms of the Neumann series as a roulette says, each divided by the
    probability that it is among them:

    $$x = \sum_{i<N} q^{-i} (I - A)^i b, \qquad P(N > i) = q^i$$
    """

    mean_terms: float | int | Float[Array, ""]
    key: PRNGKeyArray

    def num_terms(self) -> Int[Array, ""]:
        """How many the key says."""
        # Never zero, of which there is no logarithm.
        uniform = jr.uniform(self.key, minval=jnp.finfo(jnp.float32).tiny)
        quotient = jnp.log(uniform) / jnp.log(self._survival(uniform.dtype))
        return 1 + jnp.floor(quotient).astype(int)

    def _survival(self, dtype):
        return 1 - 1 / jnp.asarray(self.mean_terms, dtype)

    def solve(
        self, operator: lx.AbstractLinearOperator, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        num_terms = lax.stop_gradient(self.num_terms())

        def add_term(_, carry):
            term, total = carry
            image = operator.mv(term)
            weight = lambda x: (1 / self._survival(x.dtype)).astype(x.dtype)
            term = jtu.tree_map(lambda t, a: weight(t) * (t - a), term, image)
            return term, jtu.tree_map(jnp.add, total, term)

        _, total = lax.fori_loop(1, num_terms, add_term, (vector, vector))
        return total, lx.RESULTS.successful, {"num_products": num_terms - 1}
