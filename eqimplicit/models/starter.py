"""Cells to start from, whose equations stay solvable however they are trained."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._nn.convolution import Conv2d
from .._nn.normalisation import GroupNorm


def _contraction(layer, axis):
    """The layer with a weight whose absolute values sum to at most 0.9 along `axis`,
    over all that goes into one output. A weight that does is not changed.
    """
    sums = jnp.sum(jnp.abs(layer.weight), axis, keepdims=True)
    weight = layer.weight / jnp.maximum(1, sums / 0.9)
    return eqx.tree_at(lambda layer: layer.weight, layer, weight)


class DenseCell(eqx.Module):
    r"""A dense cell to start from, for a layer with all its defaults:

    $$\text{cell}(z, x) = \text{relu}(W z + \text{norm}(U x + b))$$

    with a layer normalisation of what comes from the input. Each row of $W$ is that of
    a trained matrix, scaled down if its absolute values sum to more than 0.9, so that

    $$\|\text{cell}(z, x) - \text{cell}(z', x)\|_\infty
    \leq \max_i \textstyle\sum_j |W_{ij}| \, \|z - z'\|_\infty
    \leq 0.9 \, \|z - z'\|_\infty$$

    whatever the parameters: there is one solution, to which Picard iteration converges
    from everywhere. Nothing has to be done for it in training. (A normalisation of $z$
    would undo the bound.)

    !!! example

        ```python
        cell = eqi.models.DenseCell(16, 64, key=key)
        layer = eqi.DEQ(cell, init=lambda x: jax.numpy.zeros(64))
        z = layer(jax.numpy.ones(16))
        ```
    """

    recurrent: eqx.nn.Linear
    inject: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, in_size: int, size: int, *, key: PRNGKeyArray):
        """**Arguments:**

        - `in_size`: the number of entries of the input.
        - `size`: the number of entries of the state. If it is not `in_size`, the layer
            needs an `init`, as in the example.
        - `key`: a `jax.random` key for the parameters.
        """
        keys = jr.split(key)
        self.recurrent = eqx.nn.Linear(size, size, use_bias=False, key=keys[0])
        self.inject = eqx.nn.Linear(in_size, size, key=keys[1])
        self.norm = eqx.nn.LayerNorm(size)

    def __call__(
        self, z: Float[Array, " size"], x: Float[Array, " in_size"]
    ) -> Float[Array, " size"]:
        """**Arguments:**

        - `z`: the state.
        - `x`: the input.
        """
        return jax.nn.relu(
            _contraction(self.recurrent, 1)(z) + self.norm(self.inject(x))
        )


class ConvCell(eqx.Module):
    r"""As [`eqimplicit.models.DenseCell`][], but with convolutions of 3 x 3 pixels, on
    images that have their channels last:

    $$\text{cell}(z, x) = \text{relu}(K * z + \text{norm}(L * x + b))$$

    The absolute values of $K$ that go into one channel sum to at most 0.9, so that it
    contracts in the maximum norm by this factor. The normalisation is one over the
    whole image, so that examples are independent.

    !!! example

        ```python
        cell = eqi.models.ConvCell(1, 16, key=key)
        layer = eqi.DEQ(cell, init=lambda x: jax.numpy.zeros((28, 28, 16)))
        z = jax.vmap(layer)(images)  # images: (batch, 28, 28, 1)
        ```
    """

    recurrent: Conv2d
    inject: Conv2d
    norm: GroupNorm

    def __init__(self, in_channels: int, channels: int, *, key: PRNGKeyArray):
        """**Arguments:**

        - `in_channels`: the number of channels of the input.
        - `channels`: the number of channels of the state. If it is not `in_channels`,
            the layer needs an `init`, as in the example.
        - `key`: a `jax.random` key for the parameters.
        """
        keys = jr.split(key)
        conv = ft.partial(Conv2d, out_channels=channels, kernel_size=3, padding=1)
        self.recurrent = conv(channels, use_bias=False, key=keys[0])
        self.inject = conv(in_channels, key=keys[1])
        self.norm = GroupNorm(channels, groups=1)

    def __call__(
        self,
        z: Float[Array, "*batch height width channels"],
        x: Float[Array, "*batch height width in_channels"],
    ) -> Float[Array, "*batch height width channels"]:
        """**Arguments:**

        - `z`: the state, of one image or any number of them along leading axes.
        - `x`: the input, likewise.
        """
        injected, _ = self.norm(self.inject(x))
        return jax.nn.relu(_contraction(self.recurrent, (0, 1, 2))(z) + injected)
