"""Warm starts: the last solution of each training image, from which its next solve
starts. A store holds the solutions of all of them along a leading axis.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PyTree

from . import devices
from .classifiers import Output
from .command_line import UserError


def cold(
    forward: Callable[..., Output], model: Any, state: Any, images: Array, size: int
) -> PyTree[Array]:
    """The store of so many images before any of them was solved: zeros, from which a
    layer without an `init` starts. `images` are a batch of them."""
    output = eqx.filter_eval_shape(forward, model, state, images, jr.key(0))
    if output.solution is None:
        raise UserError("a warm start needs a network with an implicit layer")
    return jax.tree.map(
        lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), output.solution
    )


@jax.jit
def take(store: PyTree[Array], indices: Int[Array, " batch"]) -> PyTree[Array]:
    """The solutions of a batch."""
    return jax.tree.map(lambda x: x[indices], store)


@jax.jit(donate_argnames="store")
def put(
    store: PyTree[Array], indices: Int[Array, " batch"], solutions: PyTree[Array]
) -> PyTree[Array]:
    """The store with new solutions of a batch, in the memory of the old one."""
    new = jax.tree.map(lambda x, y: x.at[indices].set(y), store, solutions)
    return devices.keep_whole(new)
