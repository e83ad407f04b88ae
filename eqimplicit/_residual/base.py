import abc
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from equinox import AbstractVar
from jaxtyping import Array, Float, PyTree

from .._adjoint.probe import (
    AbstractProbedLayer,
    BackwardStatus,
    Probed,
    split_probe,
    with_probe,
)
from .._custom_types import Y
from .._layer.base import check_same_structure, finish, solve_cell, SolveOptions
from .._misc import as_state, check_callable, check_positive, state_dtype
from .._parametrisation.base import resolve


class AbstractResidualLayer(eqx.Module):
    """A layer that maps the state at `t` to the state at `t + step_size`: what
    [`eqimplicit.ODEBlock`][] repeats.
    """

    vector_field: AbstractVar[Callable]
    step_size: AbstractVar[float | Float[Array, ""]]

    # Whether a step needs one state, so that it may be of any length.
    is_one_step: ClassVar[bool] = True

    @property
    def order(self) -> int | None:
        """The order of the scheme, if it is known."""

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

    def invert(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        """Steps backwards: from the state at `t + step_size` to the one at `t`. Not
        every layer can; those that cannot are refused by reversible blocks.

        **Arguments:**

        - `y`: the state that calling the layer returned.
        - `t`, `args`: what the layer was called with.
        - `z0`: the initial guess of the old state, by default the new one.

        **Returns:** as [`eqimplicit.AbstractResidualLayer.solve`][].

        **Raises:** as [`eqimplicit.AbstractResidualLayer.solve`][]; a
        `NotImplementedError` if the layer cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot step backwards.")

    def __call__(
        self,
        y: Y,
        t: Any = 0.0,
        args: PyTree[Any] = None,
        *,
        probe: BackwardStatus | None = None,
    ) -> Y:
        """**Arguments:**

        - `y`: the state, a pytree of floating arrays of one dtype.
        - `t`: the time at the start of the step.
        - `args`: passed to the vector field.
        - `probe`: an [`eqimplicit.backward_probe`][]. The gradient with respect to it
            says how the backward solve went.

        **Returns:**

        The state one step later, whether the solve has finished or not (unless
        `throw=True`): [`eqimplicit.AbstractResidualLayer.solve`][] tells.

        **Raises:** as [`eqimplicit.AbstractResidualLayer.solve`][].
        """
        layer = self if probe is None else with_probe(self, probe)
        return layer.solve(y, t, args).value


class StepEquation(eqx.Module):
    """The equation `z = cell(z, x)` of one step, and what its solution makes of the
    state.
    """

    cell: Callable
    x: PyTree[Any]
    guess: PyTree[Array]
    new_state: Callable
    scale: Callable


StepEquation.__init__.__doc__ = """**Arguments:**

- `cell`: a callable `cell(z, x) -> z`.
- `x`: its second argument: the old state, the time and the length of the step, and
    whatever else is differentiated.
- `guess`: an initial guess of `z`.
- `new_state`: a callable, the state one step later as a function of `z`.
- `scale`: a callable, what a size, or a tolerance, of the state is one of `z`. Where
    `z` is the new state it is `lambda size: size`.
"""


class AbstractImplicitLayer(AbstractResidualLayer, AbstractProbedLayer):
    """A residual layer whose step is the solution of an equation that it tells, so that
    a parallel [`eqimplicit.ODEBlock`][] and [`eqimplicit.diffrax_solver`][] can solve
    it in their own ways.
    """

    def report_to(self, probe: BackwardStatus) -> Any:
        probed = Probed(self.vector_field, probe)
        return eqx.tree_at(lambda layer: layer.vector_field, self, probed)

    @abc.abstractmethod
    def equation(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> StepEquation:
        """The equation of the step that
        [`eqimplicit.AbstractResidualLayer.solve`][] makes with these arguments.
        """

    @property
    @abc.abstractmethod
    def is_explicit(self) -> bool:
        """Whether nothing has to be solved, as for some arguments of the layer."""

    @property
    @abc.abstractmethod
    def options(self) -> SolveOptions:
        """By which solver and adjoint, as [`eqimplicit.SolveOptions`][]."""

    def solve_equation(self, equation: StepEquation, y: PyTree[Any]) -> optx.Solution:
        """The solution of a step from `y`, of which `value` is the new state."""
        _, probe = split_probe(self.vector_field)
        solution = solve_unknowns(equation, as_state(y), self.options, probe)
        value = equation.new_state(solution.value)
        return finish(value, solution.result, solution.stats, self.options)


def can_invert(layer: AbstractResidualLayer) -> bool:
    return type(layer).invert is not AbstractResidualLayer.invert


def check_residual_layer(
    vector_field: Any, step_size: Any, adjoint: Any = None
) -> None:
    check_callable("vector_field", vector_field, "vector_field(t, y, args)")
    check_positive("step_size", step_size)
    if differentiates_iterations(adjoint):
        warnings.warn(
            "`optimistix.RecursiveCheckpointAdjoint` differentiates the iterations of "
            "a solve, and a residual layer may take very few: where its initial guess "
            "already meets the tolerance, the gradient is zero. Use "
            "`eqimplicit.ImplicitAdjoint`, or a tolerance close to rounding.",
            stacklevel=2,
        )


def differentiates_iterations(adjoint: Any) -> bool:
    return isinstance(adjoint, optx.RecursiveCheckpointAdjoint)


class _Cast(eqx.Module):
    """A field whose time, which has single precision, has promoted its value."""

    vector_field: Callable

    def __call__(self, t, y, args):
        value = self.vector_field(t, y, args)
        return jtu.tree_map(lambda a, b: jnp.asarray(a).astype(b.dtype), value, y)


def check_scalar_step(step_size: Any) -> None:
    if jnp.ndim(step_size) > 0:
        raise ValueError(
            "`step_size` must be a number, unless the layers of an `ODEBlock` are "
            f"`stacked`. Got an array of shape {jnp.shape(step_size)}."
        )


def prepare(
    layer: AbstractResidualLayer, y: PyTree[Any], t: Any, args: PyTree[Any]
) -> tuple[Callable, PyTree[Array]]:
    """The field of a layer, resolved, and the state, checked."""
    check_scalar_step(layer.step_size)
    y = as_state(y)
    dtype = state_dtype(y, "Pass a `y` of floating arrays.")
    field = resolve(layer.vector_field)
    if jnp.finfo(dtype).bits < 32:
        field = _Cast(field)
    try:
        derivative = eqx.filter_eval_shape(field, t, y, args)
    except (TypeError, ValueError) as error:
        shapes = jtu.tree_map(jnp.shape, y)
        error.add_note(
            "The field was called as `vector_field(t, y, args)` with a state `y` of "
            f"shape {shapes}. If that is a batch, call the layer as "
            "`jax.vmap(layer)(y)`."
        )
        raise
    remedy = "A derivative is of the same kind as its state."
    check_same_structure("vector_field", derivative, y, remedy)
    return field, y


def solve_unknowns(
    equation: StepEquation,
    y: PyTree[Array],
    options: SolveOptions,
    probe: BackwardStatus | None = None,
) -> optx.Solution:
    """The solution `z` of a step's equation."""
    return solve_cell(
        equation.cell,
        equation.x,
        equation.guess,
        options,
        scale=equation.scale(y),
        probe=probe,
        remedy="Pass a `z0` like `y`.",
    )


def as_time(t: Any) -> Any:
    """A Python number as an array, of which every value has the same program. It is
    weakly typed, and so promotes no state.
    """
    if jnp.ndim(t) > 0:
        raise ValueError(
            "The time must be one number, that of the start. Got an array of shape "
            f"{jnp.shape(t)}. The times of the states of an `ODEBlock` are passed as "
            "`ts=...`; for a batch use `jax.vmap`; and a vector field for other "
            "packages is its `vector_field`, not the layer itself."
        )
    return jnp.asarray(t)


def add(y: PyTree[Array], factor: Any, direction: PyTree[Array]) -> PyTree[Array]:
    """`y + factor * direction`"""
    return jtu.tree_map(lambda a, b: a + jnp.asarray(factor, a.dtype) * b, y, direction)


def initial_guess(y: PyTree[Array], z0: PyTree[Array] | None) -> PyTree[Array]:
    return y if z0 is None else lax.stop_gradient(z0)


def explicit_solution(value: PyTree[Array], options: SolveOptions) -> optx.Solution:
    """That of a step for which nothing had to be solved."""
    residual = jnp.zeros((), state_dtype(value))
    stats = {"num_steps": jnp.array(0), "residual": residual}
    return finish(value, optx.RESULTS.successful, stats, options)
