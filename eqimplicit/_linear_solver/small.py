"""Products with small matrices, and their inverses, of any number of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float


# Up to this size a few products written out are faster than a call of a library.
TINY = 3


def product(a: Float[Array, "*batch m n"], b: Float[Array, "*batch n p"]) -> Array:
    if a.shape[-1] <= TINY:
        return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)
    return a @ b


def apply(a: Float[Array, "*batch m n"], x: Float[Array, "*batch n"]) -> Array:
    return product(a, x[..., None])[..., 0]


def solve(a: Float[Array, "*batch n n"], b: Float[Array, "*batch n p"]) -> Array:
    """`inverse(a) @ b`, by Cramer's rule if it is tiny."""
    size = a.shape[-1]
    if size > TINY:
        return jnp.linalg.solve(a, b)
    if size == 1:
        return b / a
    # Rows scaled to one, so that no determinant overflows.
    scale = jnp.max(jnp.abs(a), axis=-1, keepdims=True)
    a, b = a / scale, b / scale
    if size == 2:
        (p, q), (r, s) = _entries(a)
        adjugate = [[s, -q], [-r, p]]
    else:
        rows = [a[..., i, :] for i in range(3)]
        columns = [jnp.cross(rows[(i + 1) % 3], rows[(i + 2) % 3]) for i in range(3)]
        adjugate = [[columns[j][..., i] for j in range(3)] for i in range(3)]
    adjugate = jnp.stack([jnp.stack(row, -1) for row in adjugate], -2)
    determinant = jnp.sum(a[..., 0, :] * adjugate[..., :, 0], axis=-1)
    return product(adjugate, b) / determinant[..., None, None]


def _entries(a):
    return [[a[..., i, j] for j in range(a.shape[-1])] for i in range(a.shape[-2])]
