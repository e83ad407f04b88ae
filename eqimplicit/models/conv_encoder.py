import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._nn.convolution import Conv2d
from .._nn.normalisation import BatchNorm
from .base import Normalisation


class ConvEncoder(eqx.Module):
    """Two convolutions with normalisation: an image to the input of the cell."""

    convs: tuple[Conv2d, Conv2d]
    norms: tuple[Callable, Callable]
    pool: int = eqx.field(static=True)
    slope: float = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: int = 16,
        out_channels: int = 32,
        pool: int = 3,
        norm: Normalisation = BatchNorm,
        use_bias: bool = True,
        slope: float = 0.1,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_channels`: the number of channels of the image.
        - `hidden_channels`: the number of channels after the first convolution.
        - `out_channels`: the number of channels after the second.
        - `pool`: the size of the windows of the max-pooling between the two.
        - `norm`: makes a normalisation layer, as `norm(channels, affine)`.
        - `use_bias`: whether the convolutions have biases.
        - `slope`: that of the leaky ReLU on negative numbers.
        - `key`: a `jax.random` key for the parameters.
        """
        keys = jr.split(key)
        conv = ft.partial(Conv2d, kernel_size=3, padding=1, use_bias=use_bias)
        self.convs = (
            conv(in_channels, hidden_channels, key=keys[0]),
            conv(hidden_channels, out_channels, key=keys[1]),
        )
        self.slope = slope
        self.norms = norm(hidden_channels, True), norm(out_channels, True)
        self.pool = pool

    def __call__(
        self,
        x: Float[Array, "*batch height width in_channels"],
        state: eqx.nn.State | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        Float[Array, "*batch new_height new_width out_channels"], eqx.nn.State | None
    ]:
        """**Arguments:**

        - `x`: an image, or a batch of them.
        - `state`: the Equinox state, if the normalisation has any.
        - `key`: ignored; there is no drop-out.

        **Returns:**

        A pair of the features and the new state.
        """
        x, state = self.norms[0](self.convs[0](x), state)
        x = jax.nn.leaky_relu(_max_pool(x, self.pool), self.slope)
        x, state = self.norms[1](self.convs[1](x), state)
        return jax.nn.leaky_relu(x, self.slope), state


def _max_pool(x, size):
    """Over windows that do not overlap; maxima of slices have the faster gradient."""
    height, width = x.shape[-3] // size, x.shape[-2] // size
    x = x[..., : height * size, : width * size, :]
    x = ft.reduce(jnp.maximum, [x[..., i::size, :, :] for i in range(size)])
    return ft.reduce(jnp.maximum, [x[..., i::size, :] for i in range(size)])
