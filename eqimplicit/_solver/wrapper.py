"""Solvers around solvers: what they share, and how they see what is evaluated."""

import abc
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from equinox import AbstractVar
from jaxtyping import Array, Bool, PyTree

from .._custom_types import Aux, Norm, Y
from .measure import measure, Measurement


Own = TypeVar("Own")


class Evaluation(NamedTuple):
    """Where `f` was evaluated in a step, its image there, and its auxiliary output."""

    point: PyTree[Array]
    image: PyTree[Array]
    aux: PyTree[Any]


class _Watched(eqx.Module):
    """`f`, whose auxiliary output is the whole evaluation."""

    fn: Callable

    def __call__(self, y, args):
        image, aux = self.fn(y, args)
        return image, Evaluation(y, image, aux)


class _Watcher(eqx.Module):
    """Any solver, with steps that also return the evaluation that they report."""

    solver: optx.AbstractFixedPointSolver

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        aux_struct = Evaluation(f_struct, f_struct, aux_struct)
        return self.solver.init(
            _Watched(fn), y, args, options, f_struct, aux_struct, tags
        )

    def watched_step(self, fn, y, *rest):
        return self.solver.step(_Watched(fn), y, *rest)

    def terminate(self, fn, y, *rest):
        return self.solver.terminate(_Watched(fn), y, *rest)

    def postprocess(self, fn, y, aux, *rest):
        aux = Evaluation(y, y, aux)
        y, aux, stats = self.solver.postprocess(_Watched(fn), y, aux, *rest)
        return Concluded(y, aux.aux, stats)


class Concluded(NamedTuple):
    """What a solve returns."""

    value: PyTree[Array]
    aux: PyTree[Any]
    stats: dict[str, Any]


class WrapperState(eqx.Module, Generic[Own]):
    inner: PyTree[Any]
    own: Own


def _zeros(struct):
    is_array = isinstance(struct, jax.ShapeDtypeStruct)
    return jnp.zeros(struct.shape, struct.dtype) if is_array else struct


class AbstractSolverWrapper(
    optx.AbstractFixedPointSolver[Y, Aux, WrapperState[Own]], Generic[Y, Aux, Own]
):
    """A solver that steps as another one does, and watches what that evaluates."""

    solver: AbstractVar[optx.AbstractFixedPointSolver]

    def __check_init__(self):
        check_fixed_point_solver(self.solver)

    @abc.abstractmethod
    def start(self, y: Y, aux: Aux) -> Own:
        """What is known before the first step; `aux` has only the right structure."""

    @abc.abstractmethod
    def watch(self, own: Own, evaluation: Evaluation, measurement: Measurement) -> Own:
        """What is known after a step that made an evaluation."""

    def perturb(self, own: Own, y: Y) -> Y:
        """What is evaluated next, in place of the iterate."""
        return y

    def judge(
        self, own: Own, terminate: Bool[Array, ""], result: optx.RESULTS
    ) -> optx.RESULTS:
        """The result so far, given what the solver says. All but success end it."""
        return result

    def conclude(
        self, own: Own, result: optx.RESULTS, solution: Concluded, last: Callable
    ) -> Concluded:
        """What to return, given what the solver returns; `last()` evaluates the last
        proposal.
        """
        return solution

    @property
    def rtol(self):
        return self.solver.rtol

    @property
    def atol(self):
        return self.solver.atol

    @property
    def norm(self) -> Norm:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.norm

    @property
    def _inner(self) -> Any:
        is_wrapper = isinstance(self.solver, AbstractSolverWrapper)
        return self.solver if is_wrapper else _Watcher(self.solver)

    def init(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        f_struct: PyTree[jax.ShapeDtypeStruct],
        aux_struct: PyTree[jax.ShapeDtypeStruct],
        tags: frozenset[object],
    ) -> WrapperState[Own]:
        inner = self._inner.init(fn, y, args, options, f_struct, aux_struct, tags)
        return WrapperState(inner, self.start(y, jtu.tree_map(_zeros, aux_struct)))

    def watched_step(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: WrapperState[Own],
        tags: frozenset[object],
    ) -> tuple[Y, WrapperState[Own], Evaluation]:
        y = self.perturb(state.own, y)
        new_y, inner, evaluation = self._inner.watched_step(
            fn, y, args, options, state.inner, tags
        )
        measurement = measure(self, evaluation.point, evaluation.image)
        own = self.watch(state.own, evaluation, lax.stop_gradient(measurement))
        return new_y, WrapperState(inner, own), evaluation

    def step(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: WrapperState[Own],
        tags: frozenset[object],
    ) -> tuple[Y, WrapperState[Own], Aux]:
        y, state, evaluation = self.watched_step(fn, y, args, options, state, tags)
        return y, state, evaluation.aux

    def terminate(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: WrapperState[Own],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        terminate, result = self._inner.terminate(
            fn, y, args, options, state.inner, tags
        )
        return terminate, self.judge(state.own, terminate, result)

    def postprocess(
        self,
        fn: Callable,
        y: Y,
        aux: Aux,
        args: PyTree[Any],
        options: dict[str, Any],
        state: WrapperState[Own],
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        solution = self._inner.postprocess(
            fn, y, aux, args, options, state.inner, tags, result
        )
        last = lambda: Evaluation(y, *fn(y, args))
        return self.conclude(state.own, result, Concluded(*solution), last)


def check_fixed_point_solver(solver: Any) -> None:
    if isinstance(solver, optx.AbstractRootFinder):
        raise TypeError(
            f"`solver` must be a fixed-point solver. Got the root finder {solver!r}; "
            "wrap it as `eqimplicit.RootAsFixedPoint(solver)`."
        )
    if not isinstance(solver, optx.AbstractFixedPointSolver):
        raise TypeError(
            "`solver` must be an instance of `optimistix.AbstractFixedPointSolver`, "
            f"for example `eqimplicit.Anderson(1e-4, 1e-4)`. Got {solver!r}."
        )


def stop_early(
    condition: Bool[Array, ""],
    terminate: Bool[Array, ""],
    result: optx.RESULTS,
    reason: optx.RESULTS,
) -> optx.RESULTS:
    """The result, or where the condition holds and nothing was decided, the reason."""
    undecided = ~terminate & (result == optx.RESULTS.successful)
    return optx.RESULTS.where(condition & undecided, reason, result)
