import abc
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._custom_types import Aux, History, Norm, Tolerances, Vector, Y
from .._misc import (
    accumulation_dtype,
    broadcast_prefix,
    check_positive,
    check_positive_int,
    check_tolerances,
    dot,
    ravel,
    safe_sqrt,
    shared_max,
    state_dtype,
    where,
)


# An `rtol` below so many roundings of `f(z)` itself is taken as these.
NUM_ROUNDINGS = 4


class Measurement(eqx.Module):
    """How far an iterate is from being a fixed point.

    `error` is the norm of `f(z) - z` over `atol + rtol * |f(z)|`, converged below 1;
    `residual` is the norm of `f(z) - z` itself.
    """

    error: Float[Array, ""]
    residual: Float[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        # The norm of the quotient alone could overflow `f(z)` to infinity and read 0.
        return (self.error < 1) & jnp.isfinite(self.residual)


def measure(
    solver: optx.AbstractFixedPointSolver, y: PyTree[Array], image: PyTree[Array]
) -> Measurement:
    rtol, atol = lax.stop_gradient((solver.rtol, solver.atol))
    dtype = accumulation_dtype(state_dtype(y))
    roundings = NUM_ROUNDINGS * float(jnp.finfo(state_dtype(y)).eps)
    difference = jtu.tree_map(lambda a, b: a.astype(dtype) - b.astype(dtype), image, y)
    residual = solver.norm(difference)
    if _is_absolute(solver, dtype):
        # All numbers have the same scale: no second pass over them.
        return Measurement(_scale(residual, atol), residual)

    rtol = jnp.maximum(jnp.asarray(rtol, dtype), roundings)

    def scaled(difference, image_leaf, atol):
        size = jnp.abs(image_leaf.astype(dtype))
        return _scale(difference, jnp.asarray(atol, dtype) + rtol * size)

    scales = broadcast_prefix(atol, image)
    error = solver.norm(jtu.tree_map(scaled, difference, image, scales))
    return Measurement(error, residual)


def _is_absolute(solver, dtype):
    """Whether the tolerance is absolute, and no square of a difference above it
    underflows in the norm.
    """
    if not all(isinstance(tol, (int, float)) for tol in (solver.rtol, solver.atol)):
        return False
    return solver.rtol == 0 and solver.atol**2 > jnp.finfo(dtype).tiny


def _scale(difference, scale):
    # An exact zero has converged, also where the scale is zero.
    is_zero = difference == 0
    scale = jnp.asarray(scale, difference.dtype)
    return jnp.where(is_zero, 0, difference / jnp.where(is_zero, 1, scale))


def init_measurement(y: PyTree[Array]) -> Measurement:
    # Nothing was evaluated yet: neither converged, nor (as infinity would) diverged.
    dtype = accumulation_dtype(state_dtype(y))
    # Made from the state, so that inside `jax.shard_map` it varies as that does.
    largest = jnp.full_like(ravel(y)[0], jnp.finfo(dtype).max, dtype, shape=())
    return Measurement(error=largest, residual=largest)


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
        if not callable(self.norm):
            raise TypeError(
                "`norm` must be a function from a pytree to a scalar, for example "
                f"`optimistix.max_norm`. Got {self.norm!r}."
            )

    @abc.abstractmethod
    def init_history(self, z: Vector) -> History:
        """The history before the first evaluation; only the shape and dtype of `z`
        matter.
        """

    @abc.abstractmethod
    def propose(
        self, z: Vector, image: Vector, history: History
    ) -> tuple[Vector, History]:
        """The iterate to evaluate after `z`, where `image = f(z)`."""

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
        proposal, history = self.propose(z, ravel(image)[0], state.history)
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


class SecantHistory(eqx.Module):
    r"""What a secant method remembers, one row for each of the last few steps.

    With $s$ a step and $y$ the change of the residual that it made, `mixed` holds
    $s + \lambda y$, `tests` the vectors against which the secant equations are solved,
    and `inverse` the inverse of their matrix (zero where a row is not in use).
    """

    step: Vector
    residual: Vector
    tests: Float[Array, "history size"]
    mixed: Float[Array, "history size"]
    inverse: Float[Array, "history history"]
    num_steps: Int[Array, ""]


class AbstractSecantIteration(
    AbstractFixedPointIteration[Y, Aux, SecantHistory], Generic[Y, Aux]
):
    r"""Steps by $\lambda g - (S + \lambda Y) M^{-1} T^\top g$, where $g = f(z) - z$,
    the columns of $S$ and $Y$ are earlier steps and the changes of $g$ that they made,
    and the method chooses the tests $T$ and the matrix $M$ (close to $T^\top Y$).

    $M^{-1}$ is kept, not $M$: a step deletes the oldest row and column and borders the
    rest with new ones, which is a few rank-one updates of a small matrix. So there is
    no factorisation, and each buffer is read once or twice a step whatever its size.
    """

    history_size: AbstractVar[int]
    damping: AbstractVar[float | Float[Array, ""]]

    @abc.abstractmethod
    def pick_test(self, step: Vector, change: Vector) -> Vector:
        """The test vector for a new step."""

    @abc.abstractmethod
    def border(
        self,
        step: Vector,
        column: Float[Array, " history"],
        corner: Float[Array, ""],
        mixed: Float[Array, "history size"],
        damping: Float[Array, ""],
    ) -> tuple[Float[Array, " history"], Float[Array, ""]]:
        r"""The last row of $M$ and its corner, given its last column $T^\top y$ and the
        end of that.
        """

    def __check_init__(self):
        check_positive_int("history_size", self.history_size)
        check_positive("damping", self.damping)

    def init_history(self, z: Vector) -> SecantHistory:
        buffer = jnp.zeros_like(z, shape=(self.history_size, z.size))
        return SecantHistory(
            step=jnp.zeros_like(z),
            residual=jnp.zeros_like(z),
            tests=buffer,
            mixed=buffer,
            inverse=jnp.zeros_like(
                z, accumulation_dtype(z.dtype), (self.history_size,) * 2
            ),
            num_steps=jnp.array(0),
        )

    def propose(
        self, z: Vector, image: Vector, history: SecantHistory
    ) -> tuple[Vector, SecantHistory]:
        damping = lax.stop_gradient(jnp.asarray(self.damping, z.dtype))
        # All examples of a batch that still run are at the same step, so they share a
        # row: were its index batched, every update would become a scatter.
        row = shared_max(history.num_steps) % self.history_size
        residual = image - z

        change = residual - history.residual
        size = _length(change)
        known = (history.num_steps > 0) & (size > 0)
        scale = jnp.where(known, 1 / jnp.where(known, size, 1), 0)
        normalise = lambda v: (scale * v.astype(scale.dtype)).astype(v.dtype)
        step, change = normalise(history.step), normalise(change)
        # Written before they are read, so that the buffers are updated in place.
        test = self.pick_test(step, change)
        tests = history.tests.at[row].set(test)
        mixed = history.mixed.at[row].set(step + damping * change)

        # Two products with a vector: XLA's CPU backend takes longer over one with both.
        column, projection = dot(tests, change), dot(tests, residual)
        last_row, corner = self.border(step, column, column[row], mixed, damping)
        inverse = _border(
            _delete(history.inverse, row),
            row,
            column,
            last_row,
            corner,
            scale=_length(test),
            known=known,
        )

        weights = (inverse @ projection).astype(z.dtype)
        proposal = z + (damping * residual - dot(weights, mixed).astype(z.dtype))
        return proposal, SecantHistory(
            step=proposal - z,
            residual=residual,
            tests=tests,
            mixed=mixed,
            inverse=inverse,
            num_steps=history.num_steps + 1,
        )


def _length(v: Vector) -> Float[Array, ""]:
    # Faster than `two_norm`; if it overflows, the method only steps as Picard's does.
    return safe_sqrt(dot(v, v))


def _delete(inverse: Array, row: Int[Array, ""]) -> Array:
    """The inverse of a matrix without its `row`-th row and column, zero there."""
    pivot = inverse[row, row]
    in_use = pivot != 0
    border = jnp.outer(inverse[:, row], inverse[row])
    inverse = inverse - jnp.where(in_use, border / jnp.where(in_use, pivot, 1), 0)
    return inverse.at[row].set(0).at[:, row].set(0)


def _border(inverse, row, column, last_row, corner, scale, known) -> Array:
    """The inverse of a matrix with a new row and column, if they are known. The matrix
    has entries of the size of `scale`.

    A step that (nearly) depends on the earlier ones would blow the inverse up. Being
    the most recent, it takes their place; unless it is no use by itself. (Updates of an
    inverse have errors of the square of its size, hence the root.)
    """
    eps = float(jnp.finfo(inverse.dtype).eps)
    left, right = inverse @ column, last_row @ inverse
    pivot = corner - last_row @ left
    size = jnp.max(jnp.abs(left)) * jnp.max(jnp.abs(right))
    smallest = scale * jnp.maximum(1e3 * eps, eps**0.5 * size)
    keep = known & (jnp.abs(pivot) > smallest)
    inverse, left, right = (jnp.where(keep, x, 0) for x in (inverse, left, right))
    pivot = jnp.where(keep, pivot, corner)
    safe = known & (jnp.abs(pivot) > scale * 1e3 * eps)
    border = jnp.outer(left.at[row].set(-1), right.at[row].set(-1))
    return inverse + jnp.where(safe, border / jnp.where(safe, pivot, 1), 0)
