from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._misc import (
    accumulation_dtype,
    check_positive,
    check_positive_int,
    dot,
    ravel,
    two_norm,
)
from .base import AbstractMatrixFreeSolver


class _State(NamedTuple):
    total: Float[Array, " size"]
    residual: Float[Array, " size"]
    share: Float[Array, ""]
    num_products: Int[Array, ""]
    is_open: Bool[Array, ""]


class AdaptiveNeumannSeries(AbstractMatrixFreeSolver):
    r"""Adds terms of a Neumann series of which each has a damping of its own, until the
    next one is a small share of the sum:

    $$x \leftarrow x + \lambda r, \qquad \lambda = \frac{\langle r, A r \rangle}{\|A
    r\|^2}, \qquad r \leftarrow r - \lambda A r$$

    from $x = 0$, $r = b$. The damping is the one that makes the next residual $r$ the
    smallest, and comes from the product that the next term needs anyway.
    """

    rtol: float | Float[Array, ""]
    max_terms: int = eqx.field(static=True)

    def __check_init__(self):
        check_positive("rtol", self.rtol)
        check_positive_int("max_terms", self.max_terms)

    def solve(
        self, operator: lx.AbstractLinearOperator, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        b, unravel = ravel(vector)
        target = b.astype(accumulation_dtype(b.dtype))
        # Cotangents may be so tiny that their squares underflow.
        size = two_norm(target)
        target = target / jnp.where(size > 0, size, 1)
        rtol = lax.stop_gradient(self.rtol)

        def goes_on(state: _State) -> Bool[Array, ""]:
            return state.is_open & (state.num_products < self.max_terms)

        def add_term(state: _State) -> _State:
            r = state.residual
            image, _ = ravel(operator.mv(unravel(r.astype(b.dtype))))
            image = image.astype(r.dtype)
            along, square = dot(r, image), dot(image, image)
            # Where the product does not point forwards, no damping helps.
            is_useful = along > 0
            damping = jnp.where(is_useful, along / jnp.where(square > 0, square, 1), 0)
            term = damping * r
            total = state.total + term
            share = two_norm(term) / jnp.where(is_useful, two_norm(total), 1)
            return _State(
                total,
                r - damping * image,
                jnp.where(is_useful, share, state.share),
                state.num_products + 1,
                is_useful & (share > rtol),
            )

        one = jnp.ones_like(size)
        start = _State(0 * target, target, one, jnp.array(0), jnp.any(b != 0))
        state = lax.while_loop(goes_on, add_term, start)
        converged = (state.share <= rtol) | jnp.all(state.residual == 0)
        result = lx.RESULTS.where(
            converged, lx.RESULTS.successful, lx.RESULTS.max_steps_reached
        )
        stats = {
            "num_products": state.num_products,
            "residual": size * two_norm(state.residual),
        }
        return unravel((size * state.total).astype(b.dtype)), result, stats
