r"""The linear system of a trajectory: a step sees its own unknowns and the state before
it, so that the matrix is block bidiagonal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._custom_types import LinearMap
from .._linear_solver.recurrence import recur
from .._linear_solver.small import apply, product, solve
from .._misc import accumulation_dtype
from .all_steps import Unknowns


# The error of the estimate is what the other entries weigh, over the root of this. With
# four, a quasi-Newton method on 128 unknowns took a tenth to a quarter more steps
# than with the diagonal itself.
_NUM_PROBES = 4


class Blocks(NamedTuple):
    r"""The Jacobian of a step: with $P = I - \partial z / \partial z$, the matrix
    $P^{-1} \partial z / \partial y$, the derivative of the new state by the unknowns,
    and that by the old state, with the unknowns following it.
    """

    pivot: Float[Array, "steps *batch unknowns unknowns"]
    follow: Float[Array, "steps *batch unknowns size"]
    advance: Float[Array, "steps *batch size unknowns"]
    propagate: Float[Array, "steps *batch size size"]

    @classmethod
    def of(cls, matrix: Array, num_unknowns: int) -> "Blocks":
        """Given those of the operator: by columns, what it makes of the unknowns and of
        the state, if that is the same before and after a step.
        """
        # There is no factorisation of a matrix in half precision.
        matrix = matrix.astype(accumulation_dtype(matrix.dtype))
        of_z, of_y = jnp.split(matrix, [num_unknowns], axis=-2)
        pivot, minus_follow = jnp.split(of_z, [num_unknowns], axis=-1)
        minus_advance, rest = jnp.split(of_y, [num_unknowns], axis=-1)
        follow = solve(pivot, -minus_follow)
        identity = jnp.eye(rest.shape[-1], dtype=rest.dtype)
        direct = jnp.broadcast_to(identity, rest.shape) - rest
        propagate = direct - product(minus_advance, follow)
        return cls(pivot, follow, -minus_advance, propagate)

    def solve(self, vector: Unknowns) -> Unknowns:
        """The unknowns of which the operator is `vector`."""
        p, q = self._layout(vector)
        own = solve(self.pivot, p[..., None])[..., 0]
        y = recur(self.propagate, q + apply(self.advance, own))
        before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])
        z = own + apply(self.follow, before)
        return _flatten(z, y, vector)

    def solve_transposed(self, vector: Unknowns) -> Unknowns:
        p, q = self._layout(vector)
        transpose = lambda matrices: jnp.swapaxes(matrices, -1, -2)
        # What the next step makes of this one's state.
        later = lambda x: jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])
        q = q + later(apply(transpose(self.follow), p))
        v = recur(later(transpose(self.propagate)), q, reverse=True)
        p = p + apply(transpose(self.advance), v)
        z = solve(transpose(self.pivot), p[..., None])[..., 0]
        return _flatten(z, v, vector)

    def _layout(self, vector):
        """Axes as those of the blocks: steps, components if those are apart, entries.
        (The stages of a component are far from each other in the flat vector.)
        """
        p, q = (x.astype(self.pivot.dtype) for x in vector)
        if self.pivot.ndim == 3:
            return p, q
        num_steps, size = q.shape
        return jnp.swapaxes(p.reshape(num_steps, -1, size), 1, 2), q[..., None]


def _flatten(z, y, like):
    if z.ndim > 2:
        z, y = jnp.swapaxes(z, 1, 2), y[..., 0]
    flat = z.reshape(like.z.shape), y.reshape(like.y.shape)
    return Unknowns(*jtu.tree_map(lambda x, a: x.astype(a.dtype), flat, tuple(like)))


def blocks(operator: LinearMap, like: Unknowns) -> Blocks:
    """With a product for each unknown of a step and each entry of the state."""
    num_steps, num_unknowns = like.z.shape
    size = like.y.shape[-1]

    def column(k):
        entries = jax.nn.one_hot(k, num_unknowns + size, dtype=like.z.dtype)
        rows = jnp.broadcast_to(entries, (num_steps, num_unknowns + size))
        image = operator(Unknowns(*jnp.split(rows, [num_unknowns], axis=1)))
        return jnp.concatenate(image, 1)

    columns = jax.vmap(column, out_axes=-1)(jnp.arange(num_unknowns + size))
    return Blocks.of(columns, num_unknowns)


def diagonal_blocks(operator: LinearMap, like: Unknowns) -> Blocks:
    """Only what each component makes of itself, as an estimate: the mean of the
    products with few vectors of random signs, times these.
    """
    num_steps, size = like.y.shape
    num_stages = like.z.shape[-1] // size
    slots = jnp.arange(num_stages + 1)

    def column(slot, signs):
        entries = jnp.where(slots[:, None] == slot, signs[None], 0)
        rows = jnp.broadcast_to(entries, (num_steps, num_stages + 1, size))
        z, y = jnp.split(rows.reshape(num_steps, -1), [num_stages * size], axis=1)
        image = jnp.concatenate(operator(Unknowns(z, y)), 1)
        return jnp.swapaxes(image.reshape(rows.shape) * signs[None, None], 1, 2)

    signs = jr.rademacher(jr.key(0), (_NUM_PROBES, size), like.z.dtype)
    of_slot = lambda slot: jnp.mean(jax.vmap(lambda s: column(slot, s))(signs), 0)
    columns = jax.vmap(of_slot, out_axes=-1)(slots)
    return Blocks.of(columns, num_stages)


def num_block_products(like: Unknowns, dense: bool) -> int:
    """How many products with the operator its blocks take."""
    num_unknowns, size = like.z.shape[-1], like.y.shape[-1]
    if dense:
        return num_unknowns + size
    return _NUM_PROBES * (num_unknowns // size + 1)
