import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .small import apply, product


def recur(
    matrices: Float[Array, "steps *batch n n"],
    vectors: Float[Array, "steps *batch n"],
    reverse: bool = False,
) -> Float[Array, "steps *batch n"]:
    """The solution of `y[k] = matrices[k] @ y[k - 1] + vectors[k]` from `y[-1] = 0`, or
    backwards of `y[k] = matrices[k] @ y[k + 1] + vectors[k]`.

    By an associative scan, in as many steps as the logarithm of theirs. On the CPU, of
    which the few cores would rather do less than wait less, one after the other.
    """

    def in_turn(matrices, vectors):
        def step(y, x):
            matrix, vector = x
            y = apply(matrix, y) + vector
            return y, y

        start = jnp.zeros_like(vectors[0])
        _, solution = lax.scan(step, start, (matrices, vectors), reverse=reverse)
        return solution

    def at_once(matrices, vectors):
        def then(first, second):
            (a, x), (b, y) = first, second
            return product(b, a), apply(b, x) + y

        elements = matrices, vectors
        _, solution = lax.associative_scan(then, elements, reverse=reverse)
        return solution

    return lax.platform_dependent(matrices, vectors, cpu=in_turn, default=at_once)
