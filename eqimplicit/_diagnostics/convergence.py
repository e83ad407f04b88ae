from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._layer.base import check_same_structure
from .._misc import as_state, check_positive_int, state_dtype
from .._parametrisation.base import resolve


def convergence_history(
    fn: Callable[[PyTree[Array]], PyTree[ArrayLike]],
    y0: PyTree[ArrayLike],
    solver: optx.AbstractFixedPointSolver,
    *,
    num_steps: int,
    options: dict[str, Any] | None = None,
) -> Float[Array, " num_steps"]:
    """Runs a fixed number of steps of a solver, whatever its tolerances, and returns
    the residual at each iterate that it evaluated: what to plot when a solve does not
    converge.

    Costs `num_steps` steps of the solver.

    **Arguments:**

    - `fn`: a map `fn(y) -> y`, for a [`eqimplicit.DEQ`][] `lambda z: deq.cell(z, x)`
        (with [`eqimplicit.resolve`][] around the cell if it is parametrised).
    - `y0`: the initial guess, a pytree of floating arrays.
    - `solver`: any [`optimistix.AbstractFixedPointSolver`][], also of Optimistix.
    - `num_steps`: the number of steps.
    - `options`: options for the solver.

    **Returns:**

    An array of `num_steps` residuals, the norm (that of the solver) of `fn(y) - y`; the
    first is that of `y0`.

    **Raises:** a `TypeError` if `solver` is not a fixed-point solver, a `ValueError` if
    `fn` does not map its state to one like it.
    """
    check_positive_int("num_steps", num_steps)
    if not isinstance(solver, optx.AbstractFixedPointSolver):
        raise TypeError(
            "`solver` must be an instance of `optimistix.AbstractFixedPointSolver`. "
            f"Got {solver!r}."
        )
    options = {} if options is None else options
    no_tags = frozenset()

    def with_image(y, args):
        del args
        image = as_state(fn(y))
        return image, image

    solver, y0 = resolve(solver), as_state(y0)
    state_dtype(y0)
    f_struct, _ = jax.eval_shape(with_image, y0, None)
    check_same_structure("fn", f_struct, y0, "Change `fn` or `y0`.")
    init = solver.init(with_image, y0, None, options, f_struct, f_struct, no_tags)
    init, static = eqx.partition(init, eqx.is_array)

    def step(carry, _):
        y, dynamic = carry
        state = eqx.combine(dynamic, static)
        new_y, state, image = solver.step(with_image, y, None, options, state, no_tags)
        residual = solver.norm(jtu.tree_map(jnp.subtract, image, y))
        return (new_y, eqx.filter(state, eqx.is_array)), residual

    _, residuals = lax.scan(step, (y0, init), length=num_steps)
    return residuals
