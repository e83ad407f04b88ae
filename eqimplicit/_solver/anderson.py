import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from .._custom_types import Aux, Norm, Vector, Y
from .base import AbstractSecantIteration


class Anderson(AbstractSecantIteration[Y, Aux]):
    r"""Anderson acceleration of type II: extrapolates from the last few iterates.

    With $g = f(z) - z$, and $s_i$, $y_i$ the last steps and the changes of $g$ that
    they made,

    $$z \leftarrow z + \lambda g - \sum_i \gamma_i (s_i + \lambda y_i), \qquad
    \gamma = \arg\min \|g - \sum_i \gamma_i y_i\|_2$$

    with the damping $\lambda$. On a linear problem with a history as long as the solve
    this is GMRES in disguise, so no method that sees only values of `f` does much
    better; it also converges on many maps that are not contractive.

    The sensible first choice. Increase `history_size` for hard problems.

    Costs one evaluation of `f` a step and memory for `2 * history_size + 4` copies of
    the state, each read once a step.

    ??? cite "References"

        ```bibtex
        @article{walker2011anderson,
            author = {Walker, Homer F. and Ni, Peng},
            title = {Anderson Acceleration for Fixed-Point Iterations},
            journal = {SIAM Journal on Numerical Analysis},
            volume = {49},
            number = {4},
            pages = {1715--1735},
            year = {2011},
        }
        ```
    """

    rtol: float | Float[Array, ""]
    atol: float | Float[Array, ""]
    norm: Norm = optx.max_norm
    history_size: int = eqx.field(default=5, static=True)
    damping: float | Float[Array, ""] = 1.0

    def pick_test(self, step: Vector, change: Vector) -> Vector:
        del step
        return change

    def new_row(
        self, step: Vector, column: Vector, mixed: Array, damping: Array
    ) -> Vector:
        del step, mixed, damping
        return column

    def pivot(
        self, schur: Float[Array, ""], step: Vector
    ) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        # A relative ridge: the new row of the normal equations has unit norm.
        ridge = jnp.asarray(jnp.finfo(step.dtype).eps, schur.dtype)
        return jnp.maximum(schur, 0) + ridge, jnp.array(True)


Anderson.__init__.__doc__ = """**Arguments:**

- `rtol`: relative tolerance, of `f(z) - z` against `f(z)`. A Python float, or a scalar
    array (which changes without recompilation).
- `atol`: absolute tolerance, likewise. Not both may be zero.
- `norm`: the norm of the error; any function from a pytree to a scalar.
- `history_size`: the number of earlier steps to extrapolate from.
- `damping`: the weight of the new iterate, positive; 1 is undamped.

**Raises:** a `ValueError` for tolerances that are negative or both zero, a
`history_size` below 1, or a `damping` that is not positive.
"""
