from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._custom_types import Y
from .._layer.base import check_solve_arguments, SolveOptions
from .._misc import inexact
from .._parametrisation.untrained import untrained
from .base import (
    AbstractImplicitLayer,
    add,
    as_time,
    check_residual_layer,
    explicit_solution,
    initial_guess,
    prepare,
    StepEquation,
)


class ThetaLayer(AbstractImplicitLayer):
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

    A step backwards is a step of length $-h$ with $1 - \theta$, so that the scheme with
    $\theta = 1/2$ is its own inverse.

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
    solver: optx.AbstractFixedPointSolver | None = eqx.field(
        default=None, converter=untrained
    )
    adjoint: optx.AbstractAdjoint | None = eqx.field(default=None, converter=untrained)
    max_steps: int = eqx.field(default=50, static=True)
    throw: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        check_residual_layer(self.vector_field, self.step_size, self.adjoint)
        # NaN compares false.
        if not isinstance(self.theta, (int, float)) or not 0 <= self.theta <= 1:
            raise ValueError(
                f"`theta` must be a Python number between 0 and 1. Got {self.theta!r}."
            )
        if self.form not in ("midpoint", "trapezoid"):
            raise ValueError(
                f'`form` must be "midpoint" or "trapezoid". Got {self.form!r}.'
            )
        check_solve_arguments(self.solver, self.adjoint, self.max_steps)

    @property
    def options(self) -> SolveOptions:
        return SolveOptions(
            self.solver, self.adjoint, self.max_steps, self.throw, "ThetaLayer"
        )

    @property
    def is_explicit(self) -> bool:
        return self.theta == 0

    @property
    def order(self) -> int:
        return 2 if self.theta == 0.5 else 1

    def solve(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        return _step(self, y, as_time(t), args, z0, self.step_size, self.theta)

    def invert(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        h = self.step_size
        return _step(self, y, as_time(t) + h, args, z0, -h, 1 - self.theta)

    def equation(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> StepEquation:
        return _equation(self, y, as_time(t), args, z0, self.step_size, self.theta)


def _equation(layer, y, t, args, z0, h, theta):
    field, y = prepare(layer, y, t, args)
    start, stage_time = y, t + h
    if layer.form == "midpoint":
        stage_time = t + theta * h
    elif theta < 1:
        start = add(y, (1 - theta) * h, field(t, y, args))
    return StepEquation(
        _Stage(field, theta, layer.form),
        (start, stage_time, h, args),
        initial_guess(y, z0),
        new_state=_same,
        scale=_same,
    )


def _same(tree):
    return tree


@eqx.filter_jit
def _step(layer: ThetaLayer, y, t, args, z0, h, theta):
    if theta == 0:
        field, y = prepare(layer, y, t, args)
        return explicit_solution(add(y, h, field(t, y, args)), layer.options)
    return layer.solve_equation(_equation(layer, y, t, args, z0, h, theta), y)


ThetaLayer.__init__.__doc__ = r"""**Arguments:**

- `vector_field`: a callable, as a rule a Module, `vector_field(t, y, args) -> dy/dt`,
    as in Diffrax. [Parametrisations][eqimplicit.AbstractParametrisation] in it are
    resolved once per solve.
- `theta`: $\theta$, a Python number between 0 and 1.
- `step_size`: $h$, in the units of `t`. A Python float, or a scalar array, which is
    differentiated.
- `form`: `"midpoint"` or `"trapezoid"`. On linear fields they agree.
- `solver`: an [`optimistix.AbstractFixedPointSolver`][]. By default Newton's method
    ([`eqimplicit.RootAsFixedPoint`][]), with a dense Jacobian for up to 64 unknowns and
    with [`eqimplicit.GMRES`][] above: [`eqimplicit.default_solver`][] says how far.
- `adjoint`: an [`optimistix.AbstractAdjoint`][]. By default
    [`eqimplicit.ImplicitAdjoint`][], with a dense factorisation for up to 64 unknowns.
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
            return add(start, h, self.vector_field(t, mean, args))
        return add(start, self.theta * h, self.vector_field(t, new, args))


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
    z = inexact(z)
    return (1 + (1 - theta) * z) / (1 - theta * z)
