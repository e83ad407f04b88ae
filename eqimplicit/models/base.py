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
from .._nn.convolution import Conv2d
from .._nn.normalisation import BatchNorm
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


Norm = Callable[[int, bool], Callable]


def paper_layer(atol: float, max_steps: int) -> Callable[[Callable], DEQ]:
    """How the JFB paper solves and differentiates."""
    solver = Picard(rtol=0.0, atol=atol)
    return ft.partial(DEQ, solver=solver, adjoint=JFBAdjoint(), max_steps=max_steps)


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
        norm: Callable[[int, bool], Callable] = BatchNorm,
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


class ResidualCell(eqx.Module):
    r"""A cell of residual blocks. It starts from $w = z + x$; each block does

    $$w \leftarrow \text{norm}(w + \sigma(\sigma(K_2 * \sigma(K_1 * w))))$$

    with biases and the leaky ReLU $\sigma$; and it returns $\gamma w$. The factor
    $\gamma$ is meant to make it a contraction, but does not guarantee that.
    """

    blocks: tuple["_ResidualBlock", ...]
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int = 32,
        num_blocks: int = 2,
        scale: float = 0.5,
        norm: Callable[[int, bool], Callable] = BatchNorm,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `channels`: the number of channels of the state.
        - `num_blocks`: the number of residual blocks.
        - `scale`: the factor $\gamma$.
        - `norm`: makes a normalisation layer, as `norm(channels, affine)`; here without
            parameters.
        - `key`: a `jax.random` key for the parameters.
        """
        keys = jr.split(key, num_blocks)
        self.blocks = tuple(_ResidualBlock(channels, norm, key=k) for k in keys)
        self.scale = scale

    def __call__(
        self,
        z: Float[Array, "*batch height width channels"],
        x: Float[Array, "*batch height width channels"],
        state: eqx.nn.State | None = None,
    ) -> Any:
        """**Arguments:**

        - `z`: the state, an image or a batch of them.
        - `x`: the input, of the same shape.
        - `state`: the Equinox state, if the normalisation has any.

        **Returns:**

        The new `z`, or with a `state` the pair of `z` and the new state.
        """
        w, new_state = z + x, state
        for block in self.blocks:
            w, new_state = block(w, new_state)
        w = self.scale * w
        return w if state is None else (w, new_state)


class _ResidualBlock(eqx.Module):
    convs: tuple[Conv2d, Conv2d]
    norm: Callable

    def __init__(self, channels, norm, *, key):
        conv = ft.partial(Conv2d, channels, channels, 3, padding=1)
        self.convs = conv(key=jr.fold_in(key, 0)), conv(key=jr.fold_in(key, 1))
        self.norm = norm(channels, False)

    def __call__(self, w, state):
        hidden = leaky_relu(self.convs[0](w))
        return self.norm(w + leaky_relu(leaky_relu(self.convs[1](hidden))), state)


class ConvHead(eqx.Module):
    """A convolution, drop-out of whole channels, and a linear map to the classes."""

    conv: Conv2d
    dropout: eqx.nn.Dropout
    weight: Float[Array, "features num_classes"]

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (9, 9, 32),
        hidden_channels: int = 16,
        num_classes: int = 10,
        dropout: float = 0.2,
        stride: int = 1,
        padding: int = 0,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_shape`: the height, width and number of channels of the input.
        - `hidden_channels`: the number of channels after the convolution.
        - `num_classes`: the number of classes.
        - `dropout`: the probability with which a channel is dropped.
        - `stride`, `padding`: those of the convolution, whose kernel is 3 x 3.
        - `key`: a `jax.random` key for the parameters.

        **Raises:** a `ValueError` if the input is smaller than the 3 x 3 kernel.
        """
        height, width, channels = in_shape
        if min(height, width) + 2 * padding < 3:
            raise ValueError(
                "The head's input must be at least 3 pixels high and wide. Got "
                f"{height} x {width}; use larger images or a smaller `pool`."
            )
        key_conv, key_weight = jr.split(key)
        height, width = ((n + 2 * padding - 3) // stride + 1 for n in (height, width))
        features = height * width * hidden_channels
        bound = features**-0.5
        self.conv = Conv2d(channels, hidden_channels, 3, stride, padding, key=key_conv)
        self.dropout = eqx.nn.Dropout(dropout)
        self.weight = jr.uniform(
            key_weight, (features, num_classes), minval=-bound, maxval=bound
        )

    def __call__(
        self,
        z: Float[Array, "*batch height width channels"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch num_classes"]:
        """**Arguments:**

        - `z`: an image, or a batch of them.
        - `key`: a `jax.random` key for the drop-out; not needed in inference mode.
        """
        y = drop_channels(self.dropout, leaky_relu(self.conv(z)), key)
        return y.reshape(*z.shape[:-3], -1) @ self.weight


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


def _max_pool(x, size):
    """Over windows that do not overlap; maxima of slices have the faster gradient."""
    height, width = x.shape[-3] // size, x.shape[-2] // size
    x = x[..., : height * size, : width * size, :]
    x = ft.reduce(jnp.maximum, [x[..., i::size, :, :] for i in range(size)])
    return ft.reduce(jnp.maximum, [x[..., i::size, :] for i in range(size)])
