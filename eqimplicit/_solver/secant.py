import abc
from typing import Generic

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, Float, Int

from .._custom_types import Aux, Vector, Y
from .._misc import (
    accumulation_dtype,
    check_positive,
    check_positive_int,
    dot,
    safe_sqrt,
    shared_max,
)
from .iteration import AbstractFixedPointIteration


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
        )

    def propose(
        self,
        z: Vector,
        image: Vector,
        history: SecantHistory,
        num_steps: Int[Array, ""],
    ) -> tuple[Vector, SecantHistory]:
        damping = lax.stop_gradient(jnp.asarray(self.damping, z.dtype))
        # All examples of a batch that still run are at the same step, so they share a
        # row: were its index batched, every update would become a scatter.
        row = shared_max(num_steps) % self.history_size
        residual = image - z

        change = residual - history.residual
        size = _length(change)
        known = (num_steps > 0) & (size > 0)
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
