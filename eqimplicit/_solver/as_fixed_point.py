import abc
import inspect
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree

from .._custom_types import Aux, Norm, Y
from .._misc import state_dtype, two_norm, where
from .measure import init_measurement, measure, Measurement


class _InnerState(eqx.Module, Generic[Y]):
    iterate: Y
    residual: Float[Array, ""]
    converged: Bool[Array, ""]
    # The length of the last step over its tolerance.
    step_error: Float[Array, ""]
    inner_state: PyTree[Any]


class _Residual(eqx.Module):
    """`g(z) = f(z) - z`, with `f(z)` itself in the auxiliary output."""

    fn: Callable

    def __call__(self, y, args):
        image, aux = self.fn(y, args)
        return jtu.tree_map(lambda a, b: a - b, image, y), (image, aux)


class _SquaredNorm(eqx.Module):
    """`|f(z) - z|^2`, with `f(z)` itself in the auxiliary output."""

    fn: Callable

    def __call__(self, y, args):
        residual, aux = _Residual(self.fn)(y, args)
        return two_norm(residual) ** 2, aux


class _Step(eqx.Module, Generic[Y]):
    """From `start` to `end`, with the lengths of it and of the one before over their
    tolerance; `found` says whether the inner solver has succeeded in finding it.
    """

    start: Y
    end: Y
    error: Float[Array, ""]
    previous_error: Float[Array, ""]
    found: Bool[Array, ""]


class _AbstractAsFixedPoint(
    optx.AbstractFixedPointSolver[Y, Aux, _InnerState[Y]], Generic[Y, Aux]
):
    """Makes a fixed-point solver of an inner solver of another kind of problem."""

    @property
    @abc.abstractmethod
    def inner(self) -> optx.AbstractIterativeSolver:
        """The solver of the other problem."""

    @abc.abstractmethod
    def objective(self, fn: Callable) -> Callable:
        """The other problem; its auxiliary output is `f(z)` and that of `f`."""

    @abc.abstractmethod
    def evaluate_and_step(
        self, fn: Callable, y: Y, args: PyTree[Any], *rest: Any
    ) -> tuple[tuple[PyTree[Array], Aux], Y, PyTree[Any]]:
        """`f` and its auxiliary output at `y`, the next iterate and the inner state."""

    @abc.abstractmethod
    def judge(
        self, measurement: Measurement, step: _Step[Y]
    ) -> tuple[Bool[Array, ""], Y]:
        """What to make of the residual and the step that the inner solver takes, and
        the solution if that has converged.
        """

    @property
    def rtol(self):
        return self.inner.rtol

    @property
    def atol(self):
        return self.inner.atol

    @property
    def norm(self) -> Norm:  # pyright: ignore[reportIncompatibleMethodOverride]
        # That of a class, as `optimistix.Bisection` has, would be bound as a method.
        of_class = inspect.getattr_static(type(self.inner), "norm", None)
        return vars(self.inner).get("norm", of_class)

    def init(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        f_struct: PyTree[jax.ShapeDtypeStruct],
        aux_struct: PyTree[jax.ShapeDtypeStruct],
        tags: frozenset[object],
    ) -> _InnerState[Y]:
        objective = self.objective(fn)
        f_struct, aux_struct = eqx.filter_eval_shape(objective, y, args)
        inner_state = self.inner.init(
            objective, y, args, options, f_struct, aux_struct, tags
        )
        start = init_measurement(y)
        # Before the first step nothing has moved.
        step_error = jnp.zeros_like(start.error)
        return _InnerState(y, start.residual, start.converged, step_error, inner_state)

    def step(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _InnerState[Y],
        tags: frozenset[object],
    ) -> tuple[Y, _InnerState[Y], Aux]:
        (image, aux), new_y, inner_state = self.evaluate_and_step(
            fn, y, args, options, state.inner_state, tags
        )
        _, inner_result = self.inner.terminate(
            self.objective(fn), new_y, args, options, inner_state, tags
        )
        step = _Step(
            start=y,
            end=new_y,
            error=measure(self, y, new_y).error,
            previous_error=state.step_error,
            found=inner_result == optx.RESULTS.successful,
        )
        measurement = measure(self, y, image)
        converged, solution = self.judge(measurement, step)
        iterate = where(converged, solution, y)
        iterate = where(jnp.isfinite(measurement.residual), iterate, image)
        new_state = _InnerState(
            iterate, measurement.residual, converged, step.error, inner_state
        )
        return new_y, new_state, aux

    def terminate(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _InnerState[Y],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        _, inner_result = self.inner.terminate(
            self.objective(fn), y, args, options, state.inner_state, tags
        )
        nonfinite = ~jnp.isfinite(state.residual)
        result = optx.RESULTS.where(nonfinite, optx.RESULTS.nonfinite, inner_result)
        result = optx.RESULTS.where(state.converged, optx.RESULTS.successful, result)
        return state.converged, result

    def postprocess(
        self,
        fn: Callable,
        y: Y,
        aux: Aux,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _InnerState[Y],
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        _, _, stats = self.inner.postprocess(
            self.objective(fn), y, aux, args, options, state.inner_state, tags, result
        )
        return state.iterate, aux, {**stats, "residual": state.residual}


class RootAsFixedPoint(_AbstractAsFixedPoint[Y, Aux]):
    r"""Makes a fixed-point solver of a root finder such as [`optimistix.Newton`][], by
    feeding it $g(z) = f(z) - z$.

    Optimistix accepts a root finder for a fixed-point problem as it is, but then hands
    the adjoint a rewritten problem that [`eqimplicit.JFBAdjoint`][] and its relatives
    cannot use. Wrapped, every adjoint sees the fixed-point problem.

    As with the other solvers here, the solution is the last iterate whose residual was
    measured, and it has converged when that residual meets the tolerances of the root
    finder (whose own stopping rule is not used). `stats` holds this `residual`.

    On a stiff problem this may ask for too much: rounding alone leaves a residual of
    $\|I - J\|$ roundings, however close the iterate is. There let the step decide as
    well (`judge_step=True`): Newton's step $(I - J)^{-1} g(z)$ is the distance
    to the solution, to first order. Two successive steps that contract are what counts
    as evidence, since one may be short far from any solution.

    The `options` of the solve go to the root finder as they are.

    Costs what the root finder costs: for Newton's method with a dense Jacobian, a
    product with the Jacobian for each unknown and a factorisation a step. Right for
    stiff problems with few unknowns.
    """

    root_finder: optx.AbstractRootFinder
    judge_step: bool = eqx.field(static=True)
    refine: bool = eqx.field(static=True)

    # Explicit, since type checkers would take the properties above for fields.
    def __init__(
        self,
        root_finder: optx.AbstractRootFinder,
        judge_step: bool = False,
        refine: bool = False,
    ):
        """**Arguments:**

        - `root_finder`: an [`optimistix.AbstractRootFinder`][], for example
            `optimistix.Newton(rtol=1e-6, atol=1e-6)`. Its tolerances and norm are used.
        - `judge_step`: whether an iterate has converged, too, if the step that the root
            finder takes from it meets the tolerances and is at most half as long as
            the step before (or is lost in rounding). For Newton's method, whose step is
            an estimate of the error; not for methods whose steps may be short far from
            a solution.
        - `refine`: whether to return the iterate that follows the one that has
            converged, if the step to it meets the tolerances. For Newton's method, for
            which that iterate is known already, and better by as much as one step makes
            it; `stats` still describe the one before.

        **Raises:** a `TypeError` if `root_finder` is not a root finder.
        """
        if not isinstance(root_finder, optx.AbstractRootFinder):
            raise TypeError(
                "`root_finder` must be an `optimistix.AbstractRootFinder`, for example "
                f"`optimistix.Newton(1e-6, 1e-6)`. Got {root_finder!r}."
            )
        self.root_finder = root_finder
        self.judge_step = judge_step
        self.refine = refine

    @property
    def inner(self) -> optx.AbstractRootFinder:
        # Optimistix takes one number, for a stopping rule that is not used here.
        scales = jtu.tree_leaves(self.root_finder.atol)
        if len(scales) == 1 and jnp.ndim(scales[0]) == 0:
            return self.root_finder
        smallest = jnp.min(jnp.stack([jnp.min(x) for x in scales]))
        return eqx.tree_at(lambda s: s.atol, self.root_finder, smallest)

    @property
    def atol(self):
        return self.root_finder.atol

    def objective(self, fn: Callable) -> Callable:
        return _Residual(fn)

    def evaluate_and_step(
        self, fn: Callable, y: Y, args: PyTree[Any], *rest: Any
    ) -> tuple[tuple[PyTree[Array], Aux], Y, PyTree[Any]]:
        new_y, inner_state, image_and_aux = self.inner.step(
            self.objective(fn), y, args, *rest
        )
        return image_and_aux, new_y, inner_state

    def judge(
        self, measurement: Measurement, step: _Step[Y]
    ) -> tuple[Bool[Array, ""], Y]:
        short = step.found & (step.error < 1)
        converged = measurement.converged
        if self.judge_step:
            # One short step is no proof: on a steep part of `f` every step is short.
            contracted = step.error <= 0.5 * step.previous_error
            at_rest = (step.previous_error < 1) & is_rounding(step.start, step.end)
            converged = converged | (short & (contracted | at_rest))
        if self.refine:
            converged = converged & short
        finite = jnp.isfinite(measurement.residual)
        solution = step.end if self.refine else step.start
        return converged & finite, solution


def is_rounding(start: PyTree[Array], end: PyTree[Array]) -> Bool[Array, ""]:
    """Whether a step is lost in that of where it leads."""
    eps = float(jnp.finfo(state_dtype(end)).eps)
    moved = two_norm(jtu.tree_map(jnp.subtract, end, start))
    return moved <= eps * two_norm(end)


class MinimiserAsFixedPoint(_AbstractAsFixedPoint[Y, Aux]):
    r"""Makes a fixed-point solver of a minimiser such as [`optimistix.LBFGS`][], by
    feeding it $\|f(z) - z\|_2^2$: how the paper of the implicit residual networks
    solves its equation (15).

    A gradient of the objective is a product with $(J - I)^\top$, so that its condition
    number is the square of that of the equation. It needs no linear solve, and memory
    for a few states; on stiff problems Newton's method
    ([`eqimplicit.RootAsFixedPoint`][]) needs far fewer evaluations. A minimum where
    $f(z) \neq z$ never counts as a solution.

    As with the other solvers here, the solution is the last iterate whose residual was
    measured, and it has converged when that residual meets the tolerances of the
    minimiser (whose own stopping rule is not used). `stats` holds this `residual`.

    Costs one evaluation of `f` a step besides those of the minimiser: for
    [`optimistix.LBFGS`][] one, and one transposed product where it is accepted.

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

    minimiser: optx.AbstractMinimiser

    def __init__(self, minimiser: optx.AbstractMinimiser):
        """**Arguments:**

        - `minimiser`: an [`optimistix.AbstractMinimiser`][], for example
            `optimistix.LBFGS(rtol=1e-6, atol=1e-6)`. Its tolerances and norm are used.

        **Raises:** a `TypeError` if `minimiser` is not a minimiser.
        """
        if not isinstance(minimiser, optx.AbstractMinimiser):
            raise TypeError(
                "`minimiser` must be an `optimistix.AbstractMinimiser`, for example "
                f"`optimistix.LBFGS(1e-6, 1e-6)`. Got {minimiser!r}."
            )
        self.minimiser = minimiser

    @property
    def inner(self) -> optx.AbstractMinimiser:
        return self.minimiser

    def objective(self, fn: Callable) -> Callable:
        return _SquaredNorm(fn)

    def evaluate_and_step(
        self, fn: Callable, y: Y, args: PyTree[Any], *rest: Any
    ) -> tuple[tuple[PyTree[Array], Aux], Y, PyTree[Any]]:
        # The auxiliary output of a minimiser's step need not be that of `y`.
        new_y, inner_state, _ = self.minimiser.step(self.objective(fn), y, args, *rest)
        return fn(y, args), new_y, inner_state

    def judge(
        self, measurement: Measurement, step: _Step[Y]
    ) -> tuple[Bool[Array, ""], Y]:
        return measurement.converged, step.start
