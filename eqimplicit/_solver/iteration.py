import abc
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._custom_types import Aux, History, Norm, Tolerances, Vector, Y
from .._misc import check_callable, check_tolerances, ravel, where
from .measure import init_measurement, measure, Measurement


class IterationState(eqx.Module, Generic[Y, History]):
    iterate: Y
    measurement: Measurement
    num_evaluations: Int[Array, ""]
    history: History


class AbstractFixedPointIteration(
    optx.AbstractFixedPointSolver[Y, Aux, IterationState[Y, History]],
    Generic[Y, Aux, History],
):
    """A solver that evaluates `f` once a step and proposes the next iterate from `z`,
    `f(z)` and a history of earlier ones, all of them flat vectors.

    The solution is the last iterate whose residual was measured, not the proposal that
    follows it, so that `result`, `stats` and auxiliary outputs describe it. Where that
    is not finite, it is the image `f(z)`, which is not finite either.
    """

    rtol: AbstractVar[float | Float[Array, ""]]
    atol: AbstractVar[Tolerances]
    norm: AbstractVar[Norm]

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_callable("norm", self.norm, "norm(tree)")

    @abc.abstractmethod
    def init_history(self, z: Vector) -> History:
        """The history before the first evaluation; only the shape and dtype of `z`
        matter.
        """

    @abc.abstractmethod
    def propose(
        self, z: Vector, image: Vector, history: History, num_steps: Int[Array, ""]
    ) -> tuple[Vector, History]:
        """The iterate to evaluate after `z`, where `image = f(z)`, and `num_steps`
        steps were made before.
        """

    def init(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        f_struct: PyTree[jax.ShapeDtypeStruct],
        aux_struct: PyTree[jax.ShapeDtypeStruct],
        tags: frozenset[object],
    ) -> IterationState[Y, History]:
        del fn, args, f_struct, aux_struct, tags
        if len(options) > 0:
            raise ValueError(
                f"{type(self).__name__} accepts no `options`. Got {sorted(options)}."
            )
        return IterationState(
            iterate=y,
            measurement=init_measurement(y),
            num_evaluations=jnp.array(0),
            history=self.init_history(ravel(y)[0]),
        )

    def step(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: IterationState[Y, History],
        tags: frozenset[object],
    ) -> tuple[Y, IterationState[Y, History], Aux]:
        del options, tags
        image, aux = fn(y, args)
        z, unravel = ravel(y)
        proposal, history = self.propose(
            z, ravel(image)[0], state.history, state.num_evaluations
        )
        measurement = measure(self, y, image)
        new_state = IterationState(
            iterate=where(jnp.isfinite(measurement.residual), y, image),
            measurement=measurement,
            num_evaluations=state.num_evaluations + 1,
            history=history,
        )
        return unravel(proposal), new_state, aux

    def terminate(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: IterationState[Y, History],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        del fn, y, args, options, tags
        result = optx.RESULTS.where(
            jnp.isfinite(state.measurement.residual),
            optx.RESULTS.successful,
            optx.RESULTS.nonfinite,
        )
        return state.measurement.converged, result

    def postprocess(
        self,
        fn: Callable,
        y: Y,
        aux: Aux,
        args: PyTree[Any],
        options: dict[str, Any],
        state: IterationState[Y, History],
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        del fn, y, args, options, tags, result
        stats = dict(
            num_evaluations=state.num_evaluations,
            residual=state.measurement.residual,
        )
        return state.iterate, aux, stats
