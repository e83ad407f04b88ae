"""The times of a block's states, and the steps between them."""

from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax.core import ShapedArray
from jax.interpreters import ad
from jaxtyping import Array, Bool, Float, PyTree

from .._misc import all_finite, at_least_single, is_concrete
from .base import AbstractResidualLayer


class Steps(eqx.Module):
    """Where in time each step starts, and how long it is, or None for as long as its
    layer says.
    """

    starts: Float[Array, " steps"]
    lengths: Float[Array, " steps"] | None


def check_times(ts: Any) -> np.ndarray | Array:
    """Increasing times; equal neighbours are allowed. Where they are traced, the steps
    tell instead. Those of NumPy keep their precision, or clocks that count seconds from
    far away would stand still.
    """
    if not isinstance(ts, jax.Array):
        ts = np.asarray(ts)
    if ts.dtype.kind in "cmMOSUb":
        raise ValueError(f"`ts` must be real numbers. Got dtype {ts.dtype}.")
    if not jnp.issubdtype(ts.dtype, jnp.floating):
        ts = ts.astype(float)
    ts = at_least_single(ts)
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


def steps_between(ts: np.ndarray | Array) -> Steps:
    """Steps of NaN where the times do not increase, so that what follows is NaN."""
    lengths = ts[1:] - ts[:-1]
    is_good = jnp.isfinite(lengths) & (lengths >= 0)
    # A product, so that derivatives are NaN as well.
    lengths = jnp.asarray(lengths) * jnp.where(is_good, 1, jnp.nan)
    return Steps(jnp.asarray(ts[:-1]), lengths)


def elapsed(ts: Any) -> Float[Array, " times"]:
    """The time since the first one, also of clocks that count from far away."""
    lengths = jnp.asarray(steps_between(check_times(ts)).lengths)
    return jnp.concatenate([jnp.zeros_like(lengths, shape=(1,)), jnp.cumsum(lengths)])


def with_step_size(
    layer: AbstractResidualLayer, length: Float[Array, ""] | None
) -> AbstractResidualLayer:
    """The layer with another step, or for None with its own."""
    if length is None:
        return layer
    try:
        return eqx.tree_at(lambda layer: layer.step_size, layer, length)
    except (TypeError, ValueError) as error:
        error.add_note(
            f"`ts` replaces the `step_size` of a {type(layer).__name__}, which must be "
            "a field, and not a static one."
        )
        raise


def stay_if_still(
    solution: optx.Solution, y: PyTree[Array], length: Float[Array, ""] | None
) -> optx.Solution:
    """A step of length zero found nothing but `y`, whatever rounding made of it. Its
    derivative stays that of what was found: the state changes with the length of a step
    also where that is zero.
    """
    if length is None:
        return solution
    is_still = length == 0
    value = replace_where(is_still, y, solution.value)
    is_found = is_still & all_finite(y)
    result = optx.RESULTS.where(is_found, optx.RESULTS.successful, solution.result)
    return eqx.tree_at(lambda s: (s.value, s.result), solution, (value, result))


def replace_where(
    condition: Bool[Array, "..."], start: PyTree[Array], found: PyTree[Array]
) -> PyTree[Array]:
    """`start` where the condition holds, with the derivative of `found`."""
    bind = lambda found, start: _replace_p.bind(found, start, condition)[0]
    return jtu.tree_map(bind, found, start)


# A primitive: JAX forgets the rule of a `jax.custom_jvp` in a scan whose derivative is
# differentiated again.
def _impl(found, start, is_still):
    return [jnp.where(is_still, start, found)]


def _abstract_eval(found, start, is_still):
    del start, is_still
    return [ShapedArray(found.shape, found.dtype)]


def _jvp(primals, tangents):
    t_found, _, _ = tangents
    return _replace_p.bind(*primals), [ad.instantiate_zeros(t_found)]


def _transpose(cotangents, *primals):
    raise NotImplementedError  # not linear


_replace_p = eqxi.create_vprim("replace", _impl, _abstract_eval, _jvp, _transpose)
