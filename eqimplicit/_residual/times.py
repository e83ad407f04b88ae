"""The times of a block's states, and the steps between them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, DTypeLike, Float, PyTree

from .._misc import all_finite, at_least_single, inexact, is_concrete
from .base import AbstractResidualLayer


class Steps(eqx.Module):
    """Where in time each step starts, and how long it is, or None for as long as its
    layer says.
    """

    starts: Float[Array, " steps"]
    lengths: Float[Array, " steps"] | None


def check_times(ts: Any) -> Float[Array, " times"]:
    """Increasing times; equal neighbours are allowed. Where they are traced, the steps
    tell instead.
    """
    ts = at_least_single(inexact(ts))
    if ts.ndim != 1 or ts.size == 0:
        raise ValueError(
            "`ts` must hold the times of one trajectory, in one axis. Got an array of "
            f"shape {ts.shape}. For a batch of trajectories use `jax.vmap`."
        )
    if is_concrete(ts):
        times = np.asarray(ts)
        bad = np.flatnonzero(~np.isfinite(times))
        if bad.size > 0:
            raise ValueError(
                f"`ts` must be finite, but `ts[{bad[0]}]` is {times[bad[0]]}. Pad a "
                "series by repeating its last time."
            )
        falls = np.flatnonzero(np.diff(times) < 0)
        if falls.size > 0:
            k = falls[0]
            raise ValueError(
                f"`ts` must not decrease, but `ts[{k + 1}]`, which is {times[k + 1]}, "
                f"comes after `ts[{k}]`, which is {times[k]}."
            )
    return ts


def steps_between(times: Float[Array, " times"], dtype: DTypeLike) -> Steps:
    """Steps of NaN where the times do not increase, so that what follows is NaN."""
    lengths = jnp.diff(times)
    is_good = jnp.isfinite(lengths) & (lengths >= 0)
    # A product, so that derivatives are NaN as well.
    lengths = lengths * jnp.where(is_good, 1, jnp.nan)
    # The field must not be promoted by its time.
    return Steps(times[:-1].astype(dtype), lengths.astype(dtype))


def with_step_size(
    layer: AbstractResidualLayer, length: Float[Array, ""] | None
) -> AbstractResidualLayer:
    """The layer with another step, or for None with its own."""
    if length is None:
        return layer
    return eqx.tree_at(lambda layer: layer.step_size, layer, length)


def stay_if_still(
    solution: optx.Solution, y: PyTree[Array], length: Float[Array, ""] | None
) -> optx.Solution:
    """A step of length zero found nothing but `y`, whatever rounding made of it."""
    if length is None:
        return solution
    is_still = length == 0
    value = jtu.tree_map(
        lambda found, start: _replace(found, start, is_still), solution.value, y
    )
    is_found = is_still & all_finite(y)
    result = optx.RESULTS.where(is_found, optx.RESULTS.successful, solution.result)
    return eqx.tree_at(lambda s: (s.value, s.result), solution, (value, result))


@jax.custom_jvp
def _replace(found: Array, start: Array, is_still: Bool[Array, ""]) -> Array:
    """The derivative stays that of what was found: the state changes with the length
    of a step also where that is zero.
    """
    return jnp.where(is_still, start, found)


@_replace.defjvp
def _replace_jvp(primals, tangents):
    t_found, _, _ = tangents
    return _replace(*primals), t_found
