import abc
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from equinox import AbstractVar
from jaxtyping import Array, Float, PyTree

from .._adjoint.implicit import ImplicitAdjoint
from .._custom_types import Y
from .._layer.base import check_same_structure, check_solve_arguments, solve_cell
from .._linear_solver.fixed_point import FixedPointLinearSolver
from .._linear_solver.gmres import GMRES
from .._misc import all_finite, check_positive, state_dtype
from .._parametrisation.base import resolve
from .._parametrisation.bounded import BoundedSpectrum
from .._solver.anderson import Anderson
from .._solver.as_fixed_point import RootAsFixedPoint
from .._solver.picard import Picard


class AbstractResidualLayer(eqx.Module):
    """A layer that maps the state at `t` to the state at `t + step_size`: what
    [`eqimplicit.ODEBlock`][] repeats.
    """

    vector_field: AbstractVar[Callable]
    step_size: AbstractVar[float | Float[Array, ""]]

    @abc.abstractmethod
    def solve(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        """As calling the layer, but returns the whole [`optimistix.Solution`][].

        **Arguments:** as for calling the layer, and

        - `z0`: the initial guess of the new state, by default the old one.

        **Returns:**

        A [`optimistix.Solution`][]: `value` is the state one step later, `result`
        whether it was found; a step that is not finite never counts as found. `stats`
        holds `num_steps`, the final `residual`, and what else the solver reports. An
        explicit layer takes no steps.

        **Raises:** a `ValueError` if the state is empty, not floating, or of mixed
        dtypes, or if the vector field returns anything other than its state in
        structure, shape and dtype.
        """

    @abc.abstractmethod
    def invert(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        """Steps backwards: from the state at `t + step_size` to the one at `t`.

        **Arguments:**

        - `y`: the state that calling the layer returned.
        - `t`, `args`: what the layer was called with.
        - `z0`: the initial guess of the old state, by default the new one.

        **Returns:** as [`eqimplicit.AbstractResidualLayer.solve`][].

        **Raises:** as [`eqimplicit.AbstractResidualLayer.solve`][].
        """

    def __call__(self, y: Y, t: Any = 0.0, args: PyTree[Any] = None) -> Y:
        """**Arguments:**

        - `y`: the state, a pytree of floating arrays of one dtype.
        - `t`: the time at the start of the step.
        - `args`: passed to the vector field.

        **Returns:**

        The state one step later, whether the solve has finished or not (unless
        `throw=True`): [`eqimplicit.AbstractResidualLayer.solve`][] tells.

        **Raises:** as [`eqimplicit.AbstractResidualLayer.solve`][].
        """
        return self.solve(y, t, args).value


class SolveOptions(eqx.Module):
    """How an implicit layer solves its equation."""

    solver: optx.AbstractFixedPointSolver | None
    adjoint: optx.AbstractAdjoint | None
    max_steps: int = eqx.field(static=True)
    throw: bool = eqx.field(static=True)

    def __check_init__(self):
        check_solve_arguments(
            Anderson(1e-4, 1e-4) if self.solver is None else self.solver,
            ImplicitAdjoint() if self.adjoint is None else self.adjoint,
            self.max_steps,
        )

    def solve(
        self,
        cell: Callable,
        x: PyTree[Any],
        z0: PyTree[Array],
        implicit: tuple[Callable | None, Any] = (None, None),
    ) -> optx.Solution:
        """Solves `z = cell(z, x)`; where that adds a weighted field to a constant,
        `implicit` is the field and its weight.
        """
        solver, adjoint = _defaults(z0, *implicit)
        return solve_cell(
            cell,
            x,
            z0,
            solver=solver if self.solver is None else self.solver,
            adjoint=adjoint if self.adjoint is None else self.adjoint,
            max_steps=self.max_steps,
            throw=self.throw,
            remedy="Pass a `z0` like `y`.",
        )


def _defaults(z0, field, weight):
    dtype = state_dtype(z0)
    tolerance = max(1e-6, 10 * float(jnp.finfo(dtype).eps))
    if jnp.finfo(dtype).bits < 32:
        return Anderson(tolerance, tolerance), ImplicitAdjoint()
    if sum(leaf.size for leaf in jtu.tree_leaves(z0)) <= 64:
        newton = optx.Newton(tolerance, tolerance, linear_solver=lx.LU())
        return RootAsFixedPoint(newton, judge_step=True), ImplicitAdjoint(lx.LU())
    if isinstance(field, BoundedSpectrum) and field.contracts(weight):
        picard = Picard(tolerance, tolerance, damping=field.damping(weight))
        return picard, ImplicitAdjoint(FixedPointLinearSolver(picard))
    newton = optx.Newton(tolerance, tolerance, linear_solver=GMRES(1e-2, 0.0))
    # Not judged by its steps, which an inexact solve may leave short.
    return RootAsFixedPoint(newton), ImplicitAdjoint()


def check_residual_layer(
    vector_field: Any, step_size: Any, adjoint: Any = None
) -> None:
    if not callable(vector_field):
        raise TypeError(
            "`vector_field` must be callable as `vector_field(t, y, args)`. Got "
            f"{vector_field!r}."
        )
    check_positive("step_size", step_size)
    if isinstance(adjoint, optx.RecursiveCheckpointAdjoint):
        warnings.warn(
            "`optimistix.RecursiveCheckpointAdjoint` differentiates the iterations of "
            "a solve, and a residual layer may take very few: where its initial guess "
            "already meets the tolerance, the gradient is zero. Use "
            "`eqimplicit.ImplicitAdjoint`, or a tolerance close to rounding.",
            stacklevel=2,
        )


def prepare(
    vector_field: Callable, y: PyTree[Any], t: Any, args: PyTree[Any]
) -> tuple[Callable, PyTree[Array]]:
    """The field with its parametrisations resolved, and the state, checked."""
    y = jtu.tree_map(jnp.asarray, y)
    state_dtype(y, "Pass a `y` of floating arrays.")
    field = resolve(vector_field)
    derivative = eqx.filter_eval_shape(field, t, y, args)
    remedy = "A derivative is of the same kind as its state."
    check_same_structure("vector_field", derivative, y, remedy)
    return field, y


def add(y: PyTree[Array], factor: Any, direction: PyTree[Array]) -> PyTree[Array]:
    """`y + factor * direction`"""
    return jtu.tree_map(lambda a, b: a + jnp.asarray(factor, a.dtype) * b, y, direction)


def initial_guess(y: PyTree[Array], z0: PyTree[Array] | None) -> PyTree[Array]:
    return y if z0 is None else lax.stop_gradient(z0)


def explicit_solution(value: PyTree[Array], throw: bool = False) -> optx.Solution:
    """That of a step for which nothing had to be solved."""
    result = optx.RESULTS.where(
        all_finite(value), optx.RESULTS.successful, optx.RESULTS.nonfinite
    )
    if throw:
        value = result.error_if(value, result != optx.RESULTS.successful)
    residual = jnp.zeros((), state_dtype(value))
    stats = {"num_steps": jnp.array(0), "residual": residual}
    return optx.Solution(value=value, result=result, aux=None, stats=stats, state=None)
