"""Modules that take images with their channels last, one or any number at a time."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._adjoint.jfb import JFBAdjoint
from .._layer.deq import DEQ
from .._solver.picard import Picard


leaky_relu = ft.partial(jax.nn.leaky_relu, negative_slope=0.1)


def drop_channels(dropout: eqx.nn.Dropout, x: Array, key: PRNGKeyArray | None) -> Array:
    """Drop-out of whole channels of images."""
    mask = jnp.ones((*x.shape[:-3], 1, 1, x.shape[-1]), x.dtype)
    return x * dropout(mask, key=key)


def chain(
    blocks: Sequence[Callable], w: Array, state: Any, key: PRNGKeyArray | None
) -> tuple[Array, Any]:
    """Applies blocks `block(w, state, key) -> (w, state)` one after the other."""
    for i, block in enumerate(blocks):
        w, state = block(w, state, None if key is None else jr.fold_in(key, i))
    return w, state


Normalisation = Callable[[int, bool], Callable]


def paper_layer(atol: float, max_steps: int) -> Callable[[Callable], DEQ]:
    """How the JFB paper solves and differentiates."""
    solver = Picard(rtol=0.0, atol=atol)
    return ft.partial(DEQ, solver=solver, adjoint=JFBAdjoint(), max_steps=max_steps)


class ImageClassifier(eqx.Module):
    """An implicit layer between an encoder and a head.

    With batch normalisation it takes a whole batch, which is then one state of the
    layer. With a normalisation of each example it takes one image, as all of Equinox
    does: put a `jax.vmap` around it.
    """

    encoder: Callable
    layer: Callable
    head: Callable

    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        state: eqx.nn.State | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Any:
        """**Arguments:**

        - `x`: an image, or a batch of them.
        - `state`: the Equinox state, if the normalisation has any.
        - `key`: a `jax.random` key for the drop-out; not needed in inference mode.

        **Returns:**

        One logit for each class, or with a `state` the pair of the logits and the new
        state.
        """
        encoder_key = None if key is None else jr.fold_in(key, 0)
        features, new_state = self.encoder(x, state, key=encoder_key)
        if state is None:
            return self.head(self.layer(features), key=key)
        z, new_state = self.layer(features, state=new_state)
        return self.head(z, key=key), new_state


ImageClassifier.__init__.__doc__ = """**Arguments:**

- `encoder`: a callable `encoder(x, state, key=key) -> (features, state)`.
- `layer`: a [`eqimplicit.DEQ`][], or a callable with its signature.
- `head`: a callable `head(z, key=key) -> logits`.
"""


class OneStep(eqx.Module):
    """The explicit counterpart of an [`eqimplicit.DEQ`][]: one application of the cell,
    to zero. No equation is solved."""

    cell: Callable

    def __call__(
        self, x: Array, z0: Array | None = None, *, state: eqx.nn.State | None = None
    ) -> Any:
        """**Arguments:**

        - `x`: the input.
        - `z0`: what the cell is applied to, by default zeros like `x`.
        - `state`: if given, an `equinox.nn.State`, and the cell is called as
            `cell(z, x, state)`.

        **Returns:**

        What the cell returns.
        """
        z0 = jnp.zeros_like(x) if z0 is None else z0
        return self.cell(z0, x) if state is None else self.cell(z0, x, state)


OneStep.__init__.__doc__ = """**Arguments:**

- `cell`: a callable `cell(z, x) -> z`.
"""
