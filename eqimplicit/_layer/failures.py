"""What a layer says when a cell fails, and when a solve does."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import PRNGKeyArray, PyTree


def explain_error(
    error: Exception,
    z0: PyTree[Any],
    cell: Callable,
    x: PyTree[Any],
    key: PRNGKeyArray | None,
    state: eqx.nn.State | None,
    remedy: str,
) -> str:
    """How the cell was called, and what may be wrong with that."""
    arguments = ["z", "x"] + ["state"] * (state is not None)
    arguments += ["key=key"] * (key is not None)
    shape = lambda tree: jtu.tree_map(jnp.shape, eqx.filter(tree, eqx.is_array_like))
    call = (
        f"The cell was called as `cell({', '.join(arguments)})`, with a state `z` of "
        f"shape {shape(z0)} and an input `x` of shape {shape(x)}."
    )
    positional = [z0, x] + [state] * (state is not None)
    if not _accepts(cell, positional, {}):
        return f"{call} Its signature is `{_signature(cell)}`."
    if key is not None and not _accepts(cell, positional, {"key": key}):
        return f"{call} It takes no `key`: call the layer without one."
    if key is None and "key" in str(error):
        return (
            f"{call} If it needs a key, as drop-out does, call the layer as "
            "`layer(x, key=key)`; or switch drop-out off by "
            "`equinox.nn.inference_mode(model)`."
        )
    return (
        f"{call} If `x` is a batch, call the layer as `jax.vmap(layer)(x)`. Otherwise: "
        f"{remedy}"
    )


def _signature(cell):
    try:
        return inspect.signature(cell)
    except (TypeError, ValueError):
        return None


def _accepts(cell, positional, keywords):
    signature = _signature(cell)
    if signature is None:
        return True
    try:
        signature.bind(*positional, **keywords)
    except TypeError:
        return False
    return True


# A message cannot hold a number that is not known when it is compiled: there is one for
# each power of ten.
_EXPONENTS = range(-12, 7)


def throw_unless_found(
    value: PyTree[Any], result: optx.RESULTS, stats: dict[str, Any], name: str
) -> PyTree[Any]:
    """Raises an error, at run time, that says how far the solve has come."""
    failed = result != optx.RESULTS.successful
    residual = stats.get("residual", jnp.nan)
    exponent = jnp.floor(jnp.log10(jnp.asarray(residual)))
    known = jnp.isfinite(exponent)
    exponent = jnp.clip(jnp.where(known, exponent, 0), _EXPONENTS[0], _EXPONENTS[-1])
    magnitude = jnp.where(known, 1 + exponent - _EXPONENTS[0], 0).astype(int)
    sizes = ["is zero or not finite"] + [f"is about 1e{k}" for k in _EXPONENTS]
    reasons = (
        "the solver broke down",
        "the maximum number of steps was reached",
        "a value was not finite",
        "the residual has ceased to shrink",
    )
    is_reason = [
        result == optx.RESULTS.nonlinear_max_steps_reached,
        result == optx.RESULTS.nonfinite,
        result == optx.RESULTS.nonlinear_divergence,
    ]
    reason = jnp.select(is_reason, [1, 2, 3], 0)
    messages = [
        f"`{name}` did not solve its equation: {reason}. The residual {size}. With "
        "`throw=False` the layer returns what it has, and `solve` says what happened."
        for reason in reasons
        for size in sizes
    ]
    index = magnitude + reason * len(sizes)
    return eqx.branched_error_if(value, failed, index, messages)
