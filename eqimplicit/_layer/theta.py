from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._adjoint.implicit import ImplicitAdjoint
from .._custom_types import Y
from .._linear_solver.gmres import GMRES
from .._misc import all_finite, check_positive, state_dtype
from .._parametrisation.base import resolve
from .._solver.anderson import Anderson
from .._solver.root_as_fixed_point import RootAsFixedPoint
from .base import check_same_structure, check_solve_arguments, solve_cell


class ThetaLayer(eqx.Module):
    r"""An implicit residual layer: one step of a theta scheme for
    $\dot y = F(t, y)$ maps the state $y$ to the solution $y'$ of

    $$y' = y + h F(t + \theta h, (1 - \theta) y + \theta y')$$

    (`form="midpoint"`, equation (12) of the paper), or of

    $$y' = y + h \left((1 - \theta) F(t, y) + \theta F(t + h, y')\right)$$

    (`form="trapezoid"`, equation (11)). With $\theta = 0$ it is a ResNet's layer, the
    explicit Euler method, and solves nothing; $\theta = 1$ is the implicit Euler
    method. Of second order for $\theta = 1/2$, otherwise of first. For
    $\theta \ge 1/2$ no stable linear field is too stiff
    ([`eqimplicit.stability_function`][]).

    Takes one example, as all of Equinox does. Under `jax.vmap` every example stops on
    its own.

    Costs, besides those of the solver: for the trapezoid with $0 < \theta < 1$ one
    evaluation of $F$.

    ??? cite "References"

        ```bibtex
        @article{reshniak2021robust,
            author = {Reshniak, Viktor and Webster, Clayton G.},
            title = {Robust Learning with Implicit Residual Networks},
            journal = {Machine Learning and Knowledge Extraction},
            volume = {3},
            number = {1},
            pages = {34--55},
            year = {2021},
        }
        ```
    """

    vector_field: Callable
    theta: float = eqx.field(default=0.5, static=True)
    step_size: float | Float[Array, ""] = 1.0
    form: Literal["midpoint", "trapezoid"] = eqx.field(default="midpoint", static=True)
    solver: optx.AbstractFixedPointSolver | None = None
    adjoint: optx.AbstractAdjoint | None = None
    max_steps: int = eqx.field(default=50, static=True)
    throw: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        if not callable(self.vector_field):
            raise TypeError(
                "`vector_field` must be callable as `vector_field(t, y, args)`. Got "
                f"{self.vector_field!r}."
            )
        # Compared to itself, since NaN compares false.
        if not isinstance(self.theta, (int, float)) or not 0 <= self.theta <= 1:
            raise ValueError(
                f"`theta` must be a Python number between 0 and 1. Got {self.theta!r}."
            )
        if self.form not in ("midpoint", "trapezoid"):
            raise ValueError(
                f'`form` must be "midpoint" or "trapezoid". Got {self.form!r}.'
            )
        check_positive("step_size", self.step_size)
        check_solve_arguments(
            Anderson(1e-4, 1e-4) if self.solver is None else self.solver,
            ImplicitAdjoint() if self.adjoint is None else self.adjoint,
            self.max_steps,
        )

    def __call__(self, y: Y, t: Any = 0.0, args: PyTree[Any] = None) -> Y:
        """**Arguments:**

        - `y`: the state, a pytree of floating arrays of one dtype.
        - `t`: the time at the start of the step.
        - `args`: passed to the vector field.

        **Returns:**

        The state one step later, whether the solve has finished or not (unless
        `throw=True`): [`eqimplicit.ThetaLayer.solve`][] tells.

        **Raises:** as [`eqimplicit.ThetaLayer.solve`][].
        """
        return self.solve(y, t, args).value

    def solve(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        """As calling the layer, but returns the whole [`optimistix.Solution`][].

        **Arguments:** as for calling the layer, and

        - `z0`: the initial guess of the new state, by default the old one.

        **Returns:**

        A [`optimistix.Solution`][]: `value` is the state one step later, `result`
        whether it was found; a step that is not finite never counts as found. `stats`
        holds `num_steps`, the final `residual`, and what else the solver reports.

        **Raises:** a `ValueError` if the state is empty, not floating, or of mixed
        dtypes, or if the vector field returns anything other than its state in
        structure, shape and dtype.
        """
        y = jtu.tree_map(jnp.asarray, y)
        state_dtype(y, "Pass a `y` of floating arrays.")
        field = resolve(self.vector_field)
        derivative = jax.eval_shape(field, t, y, args)
        remedy = "A derivative is of the same kind as its state."
        check_same_structure("vector_field", derivative, y, remedy)
        h = self.step_size
        if self.theta == 0:
            return _explicit(_add(y, h, field(t, y, args)), self.max_steps)
        if self.form == "midpoint":
            start, stage_time = y, t + self.theta * h
        else:
            start, stage_time = y, t + h
            if self.theta < 1:
                start = _add(y, (1 - self.theta) * h, field(t, y, args))
        return solve_cell(
            _Stage(field, self.theta, self.form),
            (start, stage_time, h, args),
            y if z0 is None else lax.stop_gradient(z0),
            solver=_default_solver(y) if self.solver is None else self.solver,
            adjoint=_default_adjoint(y) if self.adjoint is None else self.adjoint,
            max_steps=self.max_steps,
            throw=self.throw,
            remedy="Pass a `z0` like `y`.",
        )


ThetaLayer.__init__.__doc__ = r"""**Arguments:**

- `vector_field`: a callable, as a rule a Module, `vector_field(t, y, args) -> dy/dt`,
    as in Diffrax. [Parametrisations][eqimplicit.AbstractParametrisation] in it are
    resolved once per solve.
- `theta`: $\theta$, a Python number between 0 and 1.
- `step_size`: $h$, in the units of `t`. A Python float, or a scalar array, which is
    differentiated.
- `form`: `"midpoint"` or `"trapezoid"`. On linear fields they agree.
- `solver`: an [`optimistix.AbstractFixedPointSolver`][]. By default Newton's method
    ([`eqimplicit.RootAsFixedPoint`][]), to the larger of 1e-6 and ten roundings: with a
    dense Jacobian for up to 64 unknowns, with [`eqimplicit.GMRES`][] above; in half
    precision [`eqimplicit.Anderson`][].
- `adjoint`: an [`optimistix.AbstractAdjoint`][]. By default
    [`eqimplicit.ImplicitAdjoint`][]: with a dense factorisation for up to 64 unknowns,
    with its own default above.
- `max_steps`: the largest number of steps of the solver.
- `throw`: whether to raise an error, at run time, if the solve has not finished.

**Raises:** a `TypeError` for arguments of the wrong kind, a `ValueError` if `theta` is
not between 0 and 1, if `step_size` is not positive, for a `form` that does not exist,
or if `max_steps` is below 1.
"""


class _Stage(eqx.Module):
    """The right-hand side of the equation, of which the new state is the solution."""

    vector_field: Callable
    theta: float = eqx.field(static=True)
    form: str = eqx.field(static=True)

    def __call__(self, new, x):
        start, t, h, args = x
        if self.form == "midpoint":
            mean = jtu.tree_map(
                lambda a, b: (1 - self.theta) * a + self.theta * b, start, new
            )
            return _add(start, h, self.vector_field(t, mean, args))
        return _add(start, self.theta * h, self.vector_field(t, new, args))


def _add(y, factor, direction):
    return jtu.tree_map(lambda a, b: a + jnp.asarray(factor, a.dtype) * b, y, direction)


def _explicit(value, max_steps):
    result = optx.RESULTS.where(
        all_finite(value), optx.RESULTS.successful, optx.RESULTS.nonfinite
    )
    stats = {"num_steps": jnp.array(0), "max_steps": max_steps}
    stats["residual"] = jnp.zeros((), state_dtype(value))
    return optx.Solution(value=value, result=result, aux=None, stats=stats, state=None)


def _is_dense(y):
    size = sum(leaf.size for leaf in jtu.tree_leaves(y))
    return size <= 64 and jnp.finfo(state_dtype(y)).bits >= 32


def _default_solver(y):
    info = jnp.finfo(state_dtype(y))
    tolerance = max(1e-6, 10 * float(info.eps))
    if info.bits < 32:
        return Anderson(tolerance, tolerance)
    linear_solver = lx.LU() if _is_dense(y) else GMRES(1e-2, 0.0)
    return RootAsFixedPoint(
        optx.Newton(tolerance, tolerance, linear_solver=linear_solver)
    )


def _default_adjoint(y):
    return ImplicitAdjoint(lx.LU()) if _is_dense(y) else ImplicitAdjoint()


def stability_function(z: Any, theta: float) -> Any:
    r"""What a step of the theta scheme multiplies a solution of $\dot y = \lambda y$
    with, for $z = h \lambda$:

    $$R(z) = \frac{1 + (1 - \theta) z}{1 - \theta z}$$

    The step is stable where $|R(z)| \le 1$: for $\theta < 1/2$ in a disc of the left
    half-plane, for $\theta = 1/2$ in the left half-plane, for $\theta > 1/2$ outside a
    disc of the right half-plane. It has its pole at $1 / \theta$.

    **Arguments:**

    - `z`: $h \lambda$, real or complex, a number or an array of any shape.
    - `theta`: $\theta$, between 0 and 1.

    **Returns:**

    $R(z)$, of the shape of `z`.
    """
    z = jnp.asarray(z)
    return (1 + (1 - theta) * z) / (1 - theta * z)
