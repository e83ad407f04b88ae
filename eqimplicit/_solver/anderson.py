import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float

from .._custom_types import Aux, Norm, Tolerances, Vector, Y
from .._misc import check_not_negative
from .secant import AbstractSecantIteration


class Anderson(AbstractSecantIteration[Y, Aux]):
    r"""Anderson acceleration of type II: extrapolates from the last few iterates.

    With $g = f(z) - z$, and $s_i$, $y_i$ the last steps and the changes of $g$ that
    they made,

    $$z \leftarrow z + \lambda g - \sum_i \gamma_i (s_i + \lambda y_i), \qquad
    \gamma = \arg\min \|g - \sum_i \gamma_i y_i\|_2$$

    with the damping $\lambda$. Earlier steps are forgotten when a new one depends on
    them, which makes it the secant method for a single unknown. On a linear problem
    with a history as long as the solve this is GMRES in disguise, so no method that
    sees only values of `f` does much better; it also converges on many maps that are
    not contractive.

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
    atol: Tolerances
    norm: Norm = optx.max_norm
    history_size: int = eqx.field(default=5, static=True)
    damping: float | Float[Array, ""] = 1.0
    ridge: float | Float[Array, ""] = 1e-10

    def __check_init__(self):
        check_not_negative("ridge", self.ridge)

    def pick_test(self, step: Vector, change: Vector) -> Vector:
        del step
        return change

    def border(
        self,
        step: Vector,
        column: Float[Array, " history"],
        corner: Float[Array, ""],
        mixed: Float[Array, "history size"],
        damping: Float[Array, ""],
    ) -> tuple[Float[Array, " history"], Float[Array, ""]]:
        del step, mixed, damping
        return column, corner + lax.stop_gradient(jnp.asarray(self.ridge, corner.dtype))


Anderson.__init__.__doc__ = """**Arguments:**

- `rtol`: relative tolerance, of `f(z) - z` against `f(z)`. A Python float, or a scalar
    array (which changes without recompilation). Below four roundings of `f(z)` it is
    taken as these.
- `atol`: absolute tolerance, likewise; or a pytree of them like the state, or of arrays
    like its leaves: a scale for each unknown. Not both may be zero. (With a Python
    float and `rtol=0` it is taken as it is, also below rounding.)
- `norm`: the norm of the error; any function from a pytree to a scalar.
- `history_size`: the number of earlier steps to extrapolate from.
- `damping`: the weight of the new iterate, positive; 1 is undamped.
- `ridge`: Tikhonov regularisation of the least-squares problem, relative to the squared
    length of each $y_i$. Increase it if evaluations of `f` are noisy.

**Raises:** a `ValueError` for tolerances that are negative or both zero, a
`history_size` below 1, a `damping` that is not positive, or a negative `ridge`.
"""
