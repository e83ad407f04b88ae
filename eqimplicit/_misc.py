import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.flatten_util as jfu
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, Int, PyTree

from ._custom_types import Vector


def state_dtype(tree: PyTree[Any], remedy: str = "") -> jnp.dtype:
    """The one floating dtype that all leaves of a state share."""
    leaves = jtu.tree_leaves_with_path(tree)
    if num_unknowns(tree) == 0:
        raise ValueError("The state of a fixed-point problem must not be empty.")
    _, first = leaves[0]
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                "The state of a fixed-point problem must consist of real floating-point"
                f" arrays, but leaf `state{jtu.keystr(path)}` has dtype {leaf.dtype}. "
                "Convert it, or split a complex state into real and imaginary parts. "
                f"{remedy}"
            )
        if leaf.dtype != first.dtype:
            raise ValueError(
                "The leaves of the state must share one dtype, but leaf "
                f"`state{jtu.keystr(path)}` has dtype {leaf.dtype}, where the first "
                f"leaf has {first.dtype}. Cast them to one dtype."
            )
    return first.dtype


def num_unknowns(tree: PyTree[Any]) -> Any:
    """The number of entries of a state, which is symbolic if its shape is."""
    return sum(math.prod(leaf.shape) for leaf in jtu.tree_leaves(tree))


def at_most(bound: int, size: Any) -> int:
    """The smaller of the two; a symbolic size counts as large."""
    return min(bound, size) if isinstance(size, int) else bound


def as_state(tree: PyTree[Any]) -> PyTree[Array]:
    """With arrays in place of Python numbers."""
    return jtu.tree_map(jnp.asarray, tree)


def inexact(x: Any) -> Array:
    """An array of real or complex numbers, also of integers."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float)


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Norms and small dense algebra are computed in at least single precision."""
    dtype = jnp.dtype(dtype)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def at_least_single(x: Any) -> Any:
    """An array of half precision in single precision; anything else as it is."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        return x
    is_half = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if is_half else x


def ravel(tree: PyTree[ArrayLike]) -> tuple[Vector, Callable[[Vector], PyTree[Array]]]:
    """Flattens a pytree to a vector; a single leaf is only reshaped."""
    tree = as_state(tree)
    leaves, treedef = jtu.tree_flatten(tree)
    if len(leaves) == 1:
        (leaf,) = leaves
        return leaf.reshape(-1), lambda v: treedef.unflatten([v.reshape(leaf.shape)])
    return jfu.ravel_pytree(tree)


def dot(a: Array, b: Array) -> Array:
    """`a @ b` in full precision, accumulated in at least float32."""
    return jnp.matmul(
        a,
        b,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(a.dtype),
    )


def two_norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """The Euclidean norm of all entries, accumulated in at least float32, that neither
    overflows nor underflows where its value does not.
    """
    leaves = [x.astype(accumulation_dtype(x.dtype)) for x in jtu.tree_leaves(tree)]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves]))
    scale = lax.stop_gradient(jnp.where(largest > 0, largest, 1))
    squares = [jnp.sum(jnp.square(x / scale)) for x in leaves]
    return scale * safe_sqrt(jnp.sum(jnp.stack(squares)))


def safe_sqrt(x: Float[Array, ""]) -> Float[Array, ""]:
    """The square root, with derivative zero at zero."""
    positive = x != 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


@jax.custom_batching.custom_vmap
def shared_max(x: Int[Array, ""]) -> Int[Array, ""]:
    """The largest of a batch of numbers, none below zero, as one number that is not
    batched, so that what is indexed with it is neither gathered nor scattered.
    """
    return x


@shared_max.def_vmap
def _shared_max_of_batch(axis_size, in_batched, x):
    del axis_size, in_batched
    return shared_max(jnp.max(x, axis=0, initial=0)), False


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jtu.tree_leaves(tree)]
    return jnp.all(jnp.stack(leaves))


def where(condition: Bool[Array, ""], a: PyTree[Array], b: PyTree[Array]):
    """`jax.numpy.where` on two pytrees of the same structure."""
    return jtu.tree_map(lambda x, y: jnp.where(condition, x, y), a, b)


def broadcast_prefix(prefix: PyTree[Any], tree: PyTree[Any]) -> PyTree[Any]:
    """A pytree of the structure of `tree`, given some first levels of it."""
    return jtu.tree_map(
        lambda x, sub: jtu.tree_map(lambda _: x, sub),
        prefix,
        tree,
        is_leaf=lambda x: hasattr(x, "__jax_array__"),
    )


def clone(tree: PyTree[Any]) -> PyTree[Any]:
    """A copy whose Equinox state can be used up instead of the original's."""
    return jtu.tree_map(lambda x: x, tree)


def stop_gradient(tree: PyTree[Any]) -> PyTree[Any]:
    """`jax.lax.stop_gradient` on the arrays of a pytree that may hold anything."""
    return jtu.tree_map(
        lambda x: lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree
    )


def check_callable(name: str, value: Any, usage: str) -> None:
    if not callable(value):
        raise TypeError(f"`{name}` must be callable as `{usage}`. Got {value!r}.")


def check_positive_int(name: str, value: Any) -> None:
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1. Got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    _check_finite_number(name, value)
    if is_concrete(value) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"`{name}` must be positive. Got {value!r}.")


def check_not_negative(name: str, value: Any) -> None:
    _check_finite_number(name, value)
    if is_concrete(value) and not np.all(np.asarray(value) >= 0):
        raise ValueError(f"`{name}` must not be negative or NaN. Got {value!r}.")


def check_at_least(name: str, value: Any, bound: int) -> None:
    _check_finite_number(name, value)
    if is_concrete(value) and not np.all(np.asarray(value) >= bound):
        raise ValueError(f"`{name}` must be at least {bound}. Got {value!r}.")


def check_fraction(name: str, value: Any) -> None:
    _check_finite_number(name, value)
    inside = lambda x: (np.asarray(x) > 0) & (np.asarray(x) < 1)
    if is_concrete(value) and not np.all(inside(value)):
        raise ValueError(f"`{name}` must be between 0 and 1. Got {value!r}.")


def check_key(key: Any) -> None:
    is_key = isinstance(key, jax.Array) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if not is_key:
        raise TypeError(f"`key` must be a `jax.random.key`. Got {key!r}.")


def check_tolerances(rtol: Any, atol: Any) -> None:
    """`rtol` may be None, for a default, and `atol` a pytree, one for each unknown."""
    rtol = 1.0 if rtol is None else rtol
    check_not_negative("rtol", rtol)
    scales = jtu.tree_leaves(atol)
    for scale in scales:
        check_not_negative("atol", scale)
    has_zero = lambda x: is_concrete(x) and np.any(np.asarray(x) == 0)
    if has_zero(rtol) and any(has_zero(scale) for scale in scales):
        raise ValueError(
            "`rtol` and `atol` must not both be zero: no solve could finish. Set at "
            "least one, e.g. `rtol=1e-4`."
        )


def is_concrete(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)


def _check_finite_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, np.number, np.ndarray, jax.Array)):
        raise TypeError(f"`{name}` must be a number or an array. Got {value!r}.")
    if is_concrete(value) and np.any(np.isposinf(np.asarray(value))):
        raise ValueError(f"`{name}` must be finite. Got {value!r}.")
