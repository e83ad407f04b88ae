import jax.lax as lax
from jaxtyping import Array, Float

from .small import apply, product


def recur(
    matrices: Float[Array, "steps n n"],
    vectors: Float[Array, "steps n"],
    reverse: bool = False,
) -> Float[Array, "steps n"]:
    """The solution of `y[k] = matrices[k] @ y[k - 1] + vectors[k]` from `y[-1] = 0`, or
    backwards of `y[k] = matrices[k] @ y[k + 1] + vectors[k]`, in a number of steps that
    is the logarithm of theirs.
    """

    def then(first, second):
        (a, x), (b, y) = first, second
        return product(b, a), apply(b, x) + y

    elements = matrices, vectors
    _, solution = lax.associative_scan(then, elements, reverse=reverse)
    return solution
