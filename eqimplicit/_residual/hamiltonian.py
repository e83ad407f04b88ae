from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


class HamiltonianField(eqx.Module):
    r"""The vector field of a Hamiltonian system, whose flow conserves $H$ if $H$ does
    not depend on time (equation (4) of the paper):

    $$\dot y = \frac{\partial H}{\partial z}, \qquad
    \dot z = -\frac{\partial H}{\partial y}$$

    Its divergence is zero. Symplectic layers keep $H$ near its initial value for very
    long: [`eqimplicit.ThetaLayer`][] with $\theta = 1/2$ (midpoint),
    [`eqimplicit.RungeKuttaLayer`][] with a Gauss-Legendre tableau, and, if
    $H(y, z) = T(z) + V(y)$, [`eqimplicit.VerletLayer`][].

    Costs one gradient of $H$.
    """

    hamiltonian: Callable

    def __call__(
        self, t: Any, y: tuple[PyTree[Array], PyTree[Array]], args: PyTree[Any] = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """**Arguments:**

        - `t`, `args`: passed to the Hamiltonian.
        - `y`: the state, a tuple of positions and momenta of the same structure.

        **Returns:**

        The derivative of the state.
        """
        by_position, by_momentum = jax.grad(lambda y: self.hamiltonian(t, y, args))(y)
        return by_momentum, jtu.tree_map(jnp.negative, by_position)


HamiltonianField.__init__.__doc__ = """**Arguments:**

- `hamiltonian`: a callable, as a rule a Module, `hamiltonian(t, (y, z), args)` that
    returns a scalar.
"""
