import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._nn.convolution import Conv2d
from .._nn.normalisation import BatchNorm
from .base import (
    chain,
    drop_channels,
    ImageClassifier,
    leaky_relu,
    Normalisation,
    paper_layer,
)
from .conv_head import ConvHead


class DeepEncoder(eqx.Module):
    r"""A wide convolution, then two runs of residual blocks

    $$w \leftarrow \text{norm}(\sigma(w + K_2 * \sigma(K_1 * w)))$$

    with biases, drop-out of whole channels before $K_2$ and the leaky ReLU $\sigma$;
    after each run, averages over windows of 2 x 2 pixels. The image is first framed by
    `margin` pixels of one grey value on each side, and then by copies of its border.
    """

    conv: Conv2d
    runs: tuple[tuple["_PostNormBlock", ...], tuple["_PostNormBlock", ...]]
    margin: int = eqx.field(static=True)
    grey: float = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 35,
        num_blocks: int = 16,
        dropout: float = 0.15,
        margin: int = 4,
        grey: float = 0.449,
        norm: Normalisation = BatchNorm,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_channels`: the number of channels of the image.
        - `channels`: the number of channels of the features.
        - `num_blocks`: the number of residual blocks in each of the two runs.
        - `dropout`: the probability with which a channel is dropped.
        - `margin`: the width of the frame, in pixels.
        - `grey`: the value of the frame.
        - `norm`: makes a normalisation layer, as `norm(channels, affine)`; here without
            parameters.
        - `key`: a `jax.random` key for the parameters.
        """
        key, *keys = jr.split(key, 2 * num_blocks + 1)
        self.conv = Conv2d(in_channels, channels, 7, key=key)
        blocks = [_PostNormBlock(channels, dropout, norm, key=key) for key in keys]
        self.runs = tuple(blocks[:num_blocks]), tuple(blocks[num_blocks:])
        self.margin = margin
        self.grey = grey

    def __call__(
        self,
        x: Float[Array, "*batch height width in_channels"],
        state: eqx.nn.State | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        Float[Array, "*batch new_height new_width channels"], eqx.nn.State | None
    ]:
        """**Arguments:**

        - `x`: an image, or a batch of them.
        - `state`: the Equinox state, if the normalisation has any.
        - `key`: a `jax.random` key for the drop-out; not needed in inference mode.

        **Returns:**

        A pair of the features and the new state.
        """
        keys = (None, None) if key is None else jr.split(key)
        x = _frame(x, self.margin, mode="constant", constant_values=self.grey)
        w = leaky_relu(self.conv(_frame(x, 3, mode="edge")))
        for run, run_key in zip(self.runs, keys):
            w, state = chain(run, w, state, run_key)
            w = _average_pool(w)
        return w, state


class PostNormCell(eqx.Module):
    r"""A cell of the residual blocks of a [`eqimplicit.models.DeepEncoder`][], without
    drop-out. It starts from $w = x + \gamma z$. The factor $\gamma$ is meant to make it
    a contraction, but does not guarantee that.
    """

    blocks: tuple["_PostNormBlock", ...]
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int = 35,
        num_blocks: int = 5,
        scale: float = 0.5,
        norm: Normalisation = BatchNorm,
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
        self.blocks = tuple(_PostNormBlock(channels, 0.0, norm, key=k) for k in keys)
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
        w, new_state = chain(self.blocks, x + self.scale * z, state, None)
        return w if state is None else (w, new_state)


class _PostNormBlock(eqx.Module):
    convs: tuple[Conv2d, Conv2d]
    dropout: eqx.nn.Dropout
    norm: Callable

    def __init__(self, channels, dropout, norm, *, key):
        conv = ft.partial(Conv2d, channels, channels, 3, padding=1)
        keys = jr.split(key)
        self.convs = conv(key=keys[0]), conv(key=keys[1])
        self.dropout = eqx.nn.Dropout(dropout)
        self.norm = norm(channels, False)

    def __call__(self, w, state, key):
        hidden = leaky_relu(self.convs[0](w))
        hidden = drop_channels(self.dropout, hidden, key)
        return self.norm(leaky_relu(w + self.convs[1](hidden)), state)


def _frame(x, width, **kwargs):
    pads = [(0, 0)] * (x.ndim - 3) + [(width, width), (width, width), (0, 0)]
    return jnp.pad(x, pads, **kwargs)


def _average_pool(x):
    *batch, height, width, channels = x.shape
    x = x[..., : height // 2 * 2, : width // 2 * 2, :]
    windows = x.reshape(*batch, height // 2, 2, width // 2, 2, channels)
    return jnp.mean(windows, axis=(-4, -2))


def jfb_cifar10(
    in_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    channels: int = 35,
    num_blocks: int = 16,
    norm: Normalisation = BatchNorm,
    cell_norm: Normalisation | None = None,
    layer: Callable[[PostNormCell], Callable] = paper_layer(1e-1, 50),
    *,
    key: PRNGKeyArray,
) -> ImageClassifier:
    """The network that the JFB paper trains on CIFAR-10, of 843,430 parameters.

    Five in six of them are in the encoder. The solver is Picard iteration to an
    absolute tolerance of 0.1 in at most 50 steps, as in the paper, but of the largest
    entry where that has the norm of an image. The head drops whole channels, the
    authors' single numbers.

    **Arguments:**

    - `in_shape`: the height, width and number of channels of an image.
    - `num_classes`: the number of classes.
    - `channels`: the number of channels, of the encoder as of the state.
    - `num_blocks`: the number of residual blocks in each half of the encoder.
    - `norm`, `cell_norm`, `layer`: as for [`eqimplicit.models.jfb_mnist`][].
    - `key`: a `jax.random` key for the parameters.

    **Returns:**

    An [`eqimplicit.models.ImageClassifier`][].
    """
    height, width, in_channels = in_shape
    keys = jr.split(key, 3)
    encoder = DeepEncoder(in_channels, channels, num_blocks, norm=norm, key=keys[0])
    cell = PostNormCell(channels, norm=cell_norm or norm, key=keys[1])
    margin = 2 * encoder.margin
    latent_shape = ((height + margin) // 4, (width + margin) // 4, channels)
    head = ConvHead(
        latent_shape, channels, num_classes, 0.1, stride=2, padding=1, key=keys[2]
    )
    return ImageClassifier(encoder, layer(cell), head)
