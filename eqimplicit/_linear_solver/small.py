"""Products and systems of small matrices, any number of them at once."""

import jax.numpy as jnp
from jaxtyping import Array, Float


# Up to this size they are written out, entry by entry: a library, or a sum over an axis
# of two, takes several times as long.
TINY = 3


def product(a: Float[Array, "*batch m n"], b: Float[Array, "*batch n p"]) -> Array:
    size = a.shape[-1]
    if size > TINY:
        return a @ b
    terms = [a[..., :, k, None] * b[..., None, k, :] for k in range(size)]
    return sum(terms[1:], start=terms[0])


def apply(a: Float[Array, "*batch m n"], x: Float[Array, "*batch n"]) -> Array:
    return product(a, x[..., None])[..., 0]


def solve(a: Float[Array, "*batch n n"], b: Float[Array, "*batch n p"]) -> Array:
    """`inverse(a) @ b`, by elimination with the largest pivot of each column."""
    size = a.shape[-1]
    if size > TINY:
        return jnp.linalg.solve(a, b)
    rows = [jnp.concatenate([a[..., i, :], b[..., i, :]], -1) for i in range(size)]
    for k in range(size):
        for i in range(k + 1, size):
            is_larger = (jnp.abs(rows[i][..., k]) > jnp.abs(rows[k][..., k]))[..., None]
            rows[k], rows[i] = (
                jnp.where(is_larger, rows[i], rows[k]),
                jnp.where(is_larger, rows[k], rows[i]),
            )
        for i in range(k + 1, size):
            factor = rows[i][..., k] / rows[k][..., k]
            rows[i] = rows[i] - factor[..., None] * rows[k]
    solution: list[Array] = []
    for k in reversed(range(size)):
        known = zip(range(k + 1, size), solution)
        rest = rows[k][..., size:]
        for i, x in known:
            rest = rest - rows[k][..., i, None] * x
        solution.insert(0, rest / rows[k][..., k, None])
    return jnp.stack(solution, -2)
