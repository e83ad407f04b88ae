import equinox as eqx
import optimistix as optx
from jaxtyping import Array, Float

from .._custom_types import Aux, Norm, Tolerances, Vector, Y
from .._misc import dot
from .secant import AbstractSecantIteration


class Broyden(AbstractSecantIteration[Y, Aux]):
    r"""Broyden's (first, or good) method with limited memory.

    Finds a root of $g(z) = f(z) - z$ by quasi-Newton steps $z \leftarrow z - H g(z)$.
    The approximate inverse Jacobian $H$ starts as $-\lambda I$ (whose step is the
    damped Picard step) and satisfies the secant equations of the last `history_size`
    steps. It is held in compact form: with the steps $s_i$ as columns of $S$, the
    changes of $g$ as columns of $Y$, and $L$ the strictly lower triangle of $S^\top S$,

    $$-H g = \lambda g - (S + \lambda Y) (S^\top Y + L / \lambda)^{-1} S^\top g.$$

    So the oldest step can be forgotten without upsetting the others, and the method
    does not break down when its memory is full. A step that would make $H$ singular
    makes it start afresh.

    Costs one evaluation of `f` a step and memory for `2 * history_size + 4` copies of
    the state, half of them read once a step and half twice.

    ??? cite "References"

        ```bibtex
        @article{broyden1965class,
            author = {Broyden, Charles G.},
            title = {A Class of Methods for Solving Nonlinear Simultaneous Equations},
            journal = {Mathematics of Computation},
            volume = {19},
            pages = {577--593},
            year = {1965},
        }

        @article{byrd1994representations,
            author = {Byrd, Richard H. and Nocedal, Jorge and Schnabel, Robert B.},
            title = {Representations of quasi-{Newton} matrices and their use in limited
                     memory methods},
            journal = {Mathematical Programming},
            volume = {63},
            pages = {129--156},
            year = {1994},
        }
        ```
    """

    rtol: float | Float[Array, ""]
    atol: Tolerances
    norm: Norm = optx.max_norm
    history_size: int = eqx.field(default=20, static=True)
    damping: float | Float[Array, ""] = 1.0

    def pick_test(self, step: Vector, change: Vector) -> Vector:
        del change
        return step

    def border(
        self,
        step: Vector,
        column: Float[Array, " history"],
        corner: Float[Array, ""],
        mixed: Float[Array, "history size"],
        damping: Float[Array, ""],
    ) -> tuple[Float[Array, " history"], Float[Array, ""]]:
        return dot(mixed, step) / damping.astype(column.dtype), corner


Broyden.__init__.__doc__ = """**Arguments:**

- `rtol`: relative tolerance, of `f(z) - z` against `f(z)`. A Python float, or a scalar
    array (which changes without recompilation). Below four roundings of `f(z)` it is
    taken as these.
- `atol`: absolute tolerance, likewise; or a pytree of them like the state, or of arrays
    like its leaves: a scale for each unknown. Not both may be zero. (With a Python
    float and `rtol=0` it is taken as it is, also below rounding.)
- `norm`: the norm of the error; any function from a pytree to a scalar.
- `history_size`: the number of steps that the approximate inverse Jacobian remembers.
- `damping`: the first approximate inverse Jacobian is `-damping` times the identity;
    positive; 1 makes the first step a Picard step.

**Raises:** a `ValueError` for tolerances that are negative or both zero, a
`history_size` below 1, or a `damping` that is not positive.
"""
