import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, Int

from .._custom_types import Aux, Norm, Tolerances, Vector, Y
from .._misc import check_positive
from .iteration import AbstractFixedPointIteration


class Picard(AbstractFixedPointIteration[Y, Aux, None]):
    r"""Picard iteration: applies `f` again and again,

    $$z \leftarrow \lambda f(z) + (1 - \lambda) z$$

    with the damping $\lambda$. Converges linearly when every eigenvalue $\mu$ of the
    Jacobian of `f` satisfies $|1 - \lambda (1 - \mu)| < 1$; without damping, when the
    spectral radius is below one.

    Use it for contractive maps: nothing is cheaper per step, and nothing is more
    predictable. On harder maps [`eqimplicit.Anderson`][] needs fewer evaluations.

    Costs one evaluation of `f` a step and carries two copies of the state.
    """

    rtol: float | Float[Array, ""]
    atol: Tolerances
    norm: Norm = optx.max_norm
    damping: float | Float[Array, ""] = 1.0

    def __check_init__(self):
        check_positive("damping", self.damping)

    def init_history(self, z: Vector) -> None:
        del z

    def propose(
        self, z: Vector, image: Vector, history: None, num_steps: Int[Array, ""]
    ) -> tuple[Vector, None]:
        del num_steps
        if isinstance(self.damping, (int, float)) and self.damping == 1:
            return image, history
        damping = lax.stop_gradient(jnp.asarray(self.damping, z.dtype))
        return z + damping * (image - z), history


Picard.__init__.__doc__ = """**Arguments:**

- `rtol`: relative tolerance, of `f(z) - z` against `f(z)`. A Python float, or a scalar
    array (which changes without recompilation). Below four roundings of `f(z)` it is
    taken as these.
- `atol`: absolute tolerance, likewise; or a pytree of them like the state, or of arrays
    like its leaves: a scale for each unknown. Not both may be zero. (With a Python
    float and `rtol=0` it is taken as it is, also below rounding.)
- `norm`: the norm of the error; any function from a pytree to a scalar.
- `damping`: the weight of the new iterate, positive; 1 is undamped. (The `damp` of
    [`optimistix.FixedPointIteration`][] weights the old iterate.)

**Raises:** a `ValueError` for tolerances that are negative or both zero, or a `damping`
that is not positive.
"""
