"""The solvers that `diffrax_solver` makes. Diffrax is optional: nothing else imports
this file.
"""

import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
from jaxtyping import Array, PyTree

from .._adjoint.linear_solve import LinearSolve
from .._layer.base import SolveOptions
from .._layer.defaults import is_small, linear_solver_for
from .._linear_solver.dense import DenseLU
from .._linear_solver.gmres import GMRES
from .._misc import all_finite, where
from .._solver.as_fixed_point import RootAsFixedPoint
from .base import (
    AbstractImplicitLayer,
    AbstractResidualLayer,
    add,
    solve_unknowns,
    StepEquation,
)
from .embedded import (
    continuous_weights,
    error_weights,
    ErrorWeights,
    is_first_same_as_last,
)
from .tableau import ButcherTableau


class _Field(eqx.Module):
    """That of a term, in the direction in which Diffrax goes through time."""

    term: Any

    def __call__(self, t, y, args):
        value = self.term.vf_prod(t, y, args, self.term.contr(0.0, 1.0))
        # Times may be of higher precision.
        return jtu.tree_map(lambda a, b: jnp.asarray(a).astype(b.dtype), value, y)


def _field(term: Any) -> Callable:
    innermost = term
    # Diffrax wraps terms for its own purposes: the direction of time, its adjoints.
    while hasattr(innermost, "term"):
        innermost = innermost.term
    if not isinstance(innermost, diffrax.ODETerm):
        raise ValueError(
            "The terms are not compatible with solver: a residual layer makes steps of "
            f"a single `diffrax.ODETerm`. Got {innermost!r}."
        )
    return _Field(term)


class _Step(NamedTuple):
    """A step by a layer that has this field and this length, from `y0` at `t0`, where
    the slope is `slope0`.
    """

    layer: AbstractResidualLayer
    t0: Any
    t1: Any
    y0: PyTree[Array]
    slope0: PyTree[Array]
    args: PyTree[Any]

    @property
    def length(self):
        return self.layer.step_size

    def slope(self, share, y):
        # At the end it must be the same number, on the same side of a jump.
        t = self.t1 if share == 1 else self.t0 + share * self.length
        return self.layer.vector_field(t, y, self.args)


def _advance(y, length, weights, slopes):
    """Adds stacked slopes, as many times over as the weights say."""

    def at(leaf, slope):
        weighted = jnp.tensordot(jnp.asarray(weights, leaf.dtype), slope, axes=1)
        return leaf + jnp.asarray(length, leaf.dtype) * weighted

    return jtu.tree_map(at, y, slopes)


class AbstractDenseOutput(eqx.Module):
    """What a solved step tells besides its end.

    - `error_order`: with which power of the step the estimate of the error shrinks.
    - `gamma`, `num_filters`: how often the error is divided by `I - h gamma J`, which
        takes out of it what a stiff field makes of it: once for each evaluation of the
        field within an evaluation. Zero is no filter.
    - `interpolation_cls`: a local interpolation of Diffrax.
    """

    num_filters: eqx.AbstractClassVar[int]

    @property
    @abc.abstractmethod
    def error_order(self) -> int: ...

    @property
    @abc.abstractmethod
    def gamma(self) -> float: ...

    @property
    @abc.abstractmethod
    def interpolation_cls(self) -> Any: ...

    @abc.abstractmethod
    def finish(
        self, step: _Step, y1: PyTree[Array], slopes: PyTree[Array]
    ) -> tuple[PyTree[Array], PyTree[Array], dict[str, Any]]:
        """The slope at the end, the error, and what the interpolation needs."""


class StageInterpolation(diffrax.AbstractLocalInterpolation):
    """The polynomial that has the slopes of the stages at their nodes."""

    t0: Any
    t1: Any
    y0: PyTree[Array]
    slopes: PyTree[Array]
    tableau: ButcherTableau = eqx.field(static=True)

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return jtu.tree_map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        length = self.t1 - self.t0
        share = jnp.where(length == 0, 0, t0 - self.t0) / jnp.where(
            length == 0, 1, length
        )
        polynomials = np.stack(continuous_weights(self.tableau))[:, ::-1]
        weights = jax.vmap(jnp.polyval, (0, None))(
            jnp.asarray(polynomials, share.dtype), share
        )
        return _advance(self.y0, length, weights, self.slopes)


class OfStages(AbstractDenseOutput):
    """By the slopes of the stages of a Runge-Kutta method."""

    tableau: ButcherTableau = eqx.field(static=True)
    weights: ErrorWeights = eqx.field(static=True)

    num_filters: ClassVar[int] = 1

    @property
    def error_order(self):
        return self.weights.order

    @property
    def gamma(self):
        return self.weights.start

    @property
    def interpolation_cls(self):
        return ft.partial(StageInterpolation, tableau=self.tableau)

    def finish(self, step, y1, slopes):
        zero = jtu.tree_map(jnp.zeros_like, step.y0)
        error = _advance(zero, step.length, self.weights.stages, slopes)
        error = add(error, self.weights.start * step.length, step.slope0)
        if is_first_same_as_last(self.tableau):
            slope1 = jtu.tree_map(lambda slope: slope[-1], slopes)
        else:
            slope1 = step.slope(1, y1)
        return slope1, error, dict(y0=step.y0, slopes=slopes)


def of_stages(tableau: Any) -> OfStages | None:
    """None for partitioned methods, and where no method is embedded."""
    if not isinstance(tableau, ButcherTableau):
        return None
    weights = error_weights(tableau)
    return None if weights is None else OfStages(tableau, weights)


class OfEnds(AbstractDenseOutput):
    r"""By the slopes at both ends: the error is the difference to Simpson's rule, with
    the state in the middle that Hermite's cubic polynomial has there,

    $$y_0 + \tfrac h 6 \big(F_0 + 4 F\big(\tfrac{y_0 + y_1} 2 + \tfrac h 8 (F_0 -
    F_1)\big) + F_1\big) - y_1$$
    """

    order: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)

    num_filters: ClassVar[int] = 2

    @property
    def error_order(self):
        return min(self.order + 1, 5)

    @property
    def gamma(self):
        return self.theta

    @property
    def interpolation_cls(self):
        if self.order == 1:
            return diffrax.LocalLinearInterpolation
        return diffrax.ThirdOrderHermitePolynomialInterpolation

    def finish(self, step, y1, slopes):
        del slopes
        h, slope0, slope1 = step.length, step.slope0, step.slope(1, y1)
        middle = jtu.tree_map(lambda a, b: (a + b) / 2, step.y0, y1)
        middle = add(add(middle, h / 8, slope0), -h / 8, slope1)
        error = jtu.tree_map(jnp.subtract, step.y0, y1)
        for weight, slope in ((1, slope0), (4, step.slope(0.5, middle)), (1, slope1)):
            error = add(error, weight * h / 6, slope)
        dense = dict(y0=step.y0, y1=y1)
        if self.order > 1:
            zero = jtu.tree_map(jnp.zeros_like, y1)
            dense |= dict(k0=add(zero, h, slope0), k1=add(zero, h, slope1))
        return slope1, error, dense


class AbstractLayerSolver(diffrax.AbstractAdaptiveSolver):
    """Makes the steps of a residual layer, with the field and the lengths of Diffrax.

    The solver's state is the slope at the start of the step.
    """

    layer: eqx.AbstractVar[AbstractResidualLayer]
    dense_output: eqx.AbstractVar[AbstractDenseOutput]

    # Of which more is asked in `_field`.
    term_structure: ClassVar = diffrax.AbstractTerm

    @abc.abstractmethod
    def solve(self, step: _Step) -> tuple[PyTree[Array], PyTree[Array], optx.RESULTS]:
        """The new state, the slopes of the stages if there are any, and whether they
        were found.
        """

    @property
    def interpolation_cls(self):  # pyright: ignore
        return self.dense_output.interpolation_cls

    def order(self, terms):
        del terms
        return self.layer.order

    def error_order(self, terms):
        del terms
        return self.dense_output.error_order

    def func(self, terms, t0, y0, args):
        return _field(terms)(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        del t1
        return _field(terms)(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        field, length = _field(terms), t1 - t0
        # A condition that is not mapped by `vmap` evaluates one branch only.
        slope0 = lax.cond(
            eqxi.unvmap_any(made_jump),
            lambda: field(t0, y0, args),
            lambda: solver_state,
        )
        layer = eqx.tree_at(
            lambda layer: (layer.vector_field, layer.step_size),
            self.layer,
            (field, length),
        )
        step = _Step(layer, t0, t1, y0, slope0, args)
        y1, slopes, result = self.solve(step)
        slope1, error, dense = self.dense_output.finish(step, y1, slopes)
        error = lax.stop_gradient(_filter(step, self.dense_output, error))
        # A step that was not found is rejected, by controllers that can.
        found = (result == optx.RESULTS.successful) & all_finite((y1, error))
        infinite = jtu.tree_map(lambda x: jnp.full_like(x, jnp.inf), error)
        error = where(found, error, infinite)
        return y1, error, dense, slope1, diffrax.RESULTS.promote(result)


def _filter(step: _Step, dense_output: AbstractDenseOutput, error: PyTree[Array]):
    gamma, num_times = dense_output.gamma, dense_output.num_filters
    if gamma == 0:
        return error
    _, product = jax.linearize(lambda y: step.slope(0, y), step.y0)
    operator = lambda v: add(v, -gamma * step.length, product(v))
    solver = DenseLU() if is_small(error) else GMRES(1e-2, 0.0)
    solve = LinearSolve(solver, frozenset(), throw=False)
    for _ in range(num_times):
        error = solve(operator, error)
    return error


class LayerSolver(AbstractLayerSolver):
    """Solves the equation of a step, if there is one, as the layer says."""

    layer: AbstractResidualLayer
    dense_output: AbstractDenseOutput

    def solve(self, step):
        layer = step.layer
        if isinstance(layer, AbstractImplicitLayer) and not layer.is_explicit:
            equation = layer.equation(step.y0, step.t0, step.args)
            return _solve(equation, step.y0, layer.options)
        solution = layer.solve(step.y0, step.t0, step.args)
        return solution.value, None, solution.result


class NewtonLayerSolver(AbstractLayerSolver, diffrax.AbstractImplicitSolver):
    """Solves the equation of a step to the tolerances of the step size controller, to
    which Diffrax sets those of the root finder.
    """

    layer: AbstractImplicitLayer
    dense_output: AbstractDenseOutput
    root_finder: optx.AbstractRootFinder = diffrax.with_stepsize_controller_tols(
        optx.Newton
    )()
    root_find_max_steps: int = eqx.field(default=20, static=True)

    def solve(self, step):
        y0, layer = step.y0, step.layer
        assert isinstance(layer, AbstractImplicitLayer)
        equation = layer.equation(y0, step.t0, step.args)
        atol = jtu.tree_map(
            lambda x: jnp.broadcast_to(self.root_finder.atol, x.shape), y0
        )
        root_finder = eqx.tree_at(
            lambda r: r.atol, self.root_finder, equation.scale(atol)
        )
        if isinstance(getattr(root_finder, "linear_solver", None), lx.AutoLinearSolver):
            root_finder = eqx.tree_at(
                lambda r: r.linear_solver, root_finder, linear_solver_for(y0)
            )
        solver = RootAsFixedPoint(root_finder, judge_step=is_small(y0), refine=True)
        options = dataclasses.replace(
            self.layer.options, solver=solver, max_steps=self.root_find_max_steps
        )
        return _solve(equation, y0, options)


def _solve(equation: StepEquation, y0: PyTree[Array], options: SolveOptions):
    # Where a step is not found, Diffrax says what to do.
    options = dataclasses.replace(options, throw=False)
    solution = solve_unknowns(equation, y0, options)
    return equation.new_state(solution.value), solution.value, solution.result
