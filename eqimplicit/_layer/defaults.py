from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree

from .._adjoint.implicit import ImplicitAdjoint
from .._linear_solver.dense import DenseLU
from .._linear_solver.gmres import GMRES
from .._misc import at_most, num_unknowns, state_dtype
from .._solver.anderson import Anderson
from .._solver.as_fixed_point import RootAsFixedPoint


# The largest state whose Jacobian is factorised.
_DENSE = 64


def default_solver(
    state: PyTree[Array], scale: PyTree[Array] | None = None
) -> tuple[optx.AbstractFixedPointSolver, optx.AbstractAdjoint]:
    r"""The solver and the adjoint of a layer that is made without any.

    They depend on the precision of the state and on the number $n$ of its unknowns,
    never on a value: that a number is an array changes nothing.

    | | solver | `rtol` | `atol` |
    |---|---|---|---|
    | [`eqimplicit.DEQ`][] in float64 | [`eqimplicit.Anderson`][] | 1e-8 | 1e-8 |
    | in float32 | the same | 1e-4 | 1e-4 |
    | in half precision | the same | $4 \epsilon$ | $4 \epsilon$ |
    | residual layers, $n \le 64$ | Newton, dense Jacobian | $\tau$ | $a_i$ |
    | residual layers, $n > 64$ | Newton, [`eqimplicit.GMRES`][] | $\tau$ | $a$ |

    The adjoint is [`eqimplicit.ImplicitAdjoint`][], where the Jacobian is dense with
    its factorisation, otherwise with its own default.

    Here $\epsilon$ is the precision of the numbers (7.8e-3 in bfloat16, 9.8e-4 in
    float16), and $\tau$ is 1e-6, or where that is larger $4 \epsilon$; with GMRES in
    float64 it is 1e-8. With the size $s_i$ of each unknown, that of the state before
    the step, $a_i = \tau s_i + 4 \epsilon \max s$ and $a = \tau \max s$.

    Why. A network learns with solutions to 1e-4, and Anderson's method finds them in
    the fewest evaluations; where the numbers can do more, they are asked to. A
    trajectory adds up the errors of its steps, so these are judged unknown by unknown,
    and the iterate that follows the one that met the tolerance is returned
    ([`eqimplicit.RootAsFixedPoint`][] with `refine=True`), which for Newton's method is
    right to about $\tau^2$; with GMRES, whose systems are solved to 1e-4 in float64 and
    1e-3 below, by as much better. On a very stiff field of more than 64 unknowns it may
    not finish, and says so: pass Newton's method with `lineax.LU()`.

    **Arguments:**

    - `state`: what is solved for, a pytree of floating arrays of one dtype.
    - `scale`: the sizes $s$ of the unknowns of a residual layer, a pytree like the
        state; `None` for a [`eqimplicit.DEQ`][].

    **Returns:**

    The solver and the adjoint.
    """
    dtype = state_dtype(state)
    eps = float(jnp.finfo(dtype).eps)
    is_double = jnp.finfo(dtype).bits >= 64
    if scale is None:
        tolerance = max(1e-8 if is_double else 1e-4, 4 * eps)
        return Anderson(tolerance, tolerance), ImplicitAdjoint()
    largest = _largest(scale)
    if is_small(state):
        tolerance = max(1e-6, 4 * eps)
        atol = jtu.tree_map(lambda s: tolerance * jnp.abs(s) + 4 * eps * largest, scale)
        newton = optx.Newton(tolerance, atol, linear_solver=linear_solver_for(state))
        solver = RootAsFixedPoint(newton, judge_step=True, refine=True)
        return solver, ImplicitAdjoint(DenseLU())
    tolerance = max(1e-8 if is_double else 1e-6, 4 * eps)
    gmres = linear_solver_for(state)
    newton = optx.Newton(tolerance, tolerance * largest, linear_solver=gmres)
    # Not judged by its steps, which an inexact solve may leave short.
    return RootAsFixedPoint(newton, refine=True), ImplicitAdjoint()


def linear_solver_for(state: PyTree[Array]) -> lx.AbstractLinearSolver:
    """That of the Newton steps of a residual layer."""
    if is_small(state):
        return DenseLU()
    is_double = jnp.finfo(state_dtype(state)).bits >= 64
    return GMRES(1e-4 if is_double else 1e-3, 0.0)


def is_small(state: PyTree[Array]) -> bool:
    """Whether the Jacobian of a residual layer is factorised."""
    return at_most(_DENSE + 1, num_unknowns(state)) <= _DENSE


def _largest(scale: PyTree[Array]) -> Any:
    """The largest size; one, where all are zero."""
    sizes = [jnp.max(jnp.abs(s), initial=0) for s in jtu.tree_leaves(scale)]
    largest = jnp.max(jnp.stack(sizes))
    return jnp.where(largest > 0, largest, 1)
