import functools as ft
from collections.abc import Callable, Sequence

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
from .residual_cell import ResidualCell


class ResNetEncoder(eqx.Module):
    r"""A convolution, then one residual block for each number of channels:

    $$w \leftarrow \sigma(\text{skip}(w) + \text{norm}(K_2 *
        \sigma(\text{norm}(K_1 * w))))$$

    with drop-out of whole channels after each normalisation and the leaky ReLU
    $\sigma$. From the second block on $K_1$ has a stride of 2, and the skip connection
    takes every second pixel and adds channels of zeros: it has no parameters.
    """

    conv: Conv2d
    norm: Callable
    blocks: tuple["_BasicBlock", ...]

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (16, 32, 64),
        dropout: float = 0.1,
        norm: Normalisation = BatchNorm,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_channels`: the number of channels of the image.
        - `channels`: the number of channels after each block. The first convolution has
            as many as the first block.
        - `dropout`: the probability with which a channel is dropped.
        - `norm`: makes a normalisation layer, as `norm(channels, affine)`.
        - `key`: a `jax.random` key for the parameters.
        """
        key, *keys = jr.split(key, len(channels) + 1)
        first = channels[0]
        conv = ft.partial(Conv2d, kernel_size=3, padding=1, use_bias=False)
        self.conv = conv(in_channels, first, key=key)
        self.norm = norm(first, True)
        self.blocks = tuple(
            _BasicBlock(before, after, stride, dropout, norm, conv, key=key)
            for before, after, stride, key in zip(
                (first, *channels), channels, (1, *[2] * len(channels)), keys
            )
        )

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
        - `key`: a `jax.random` key for the drop-out; not needed in inference mode.

        **Returns:**

        A pair of the features and the new state.
        """
        x, state = self.norm(self.conv(x), state)
        return chain(self.blocks, leaky_relu(x), state, key)


class _BasicBlock(eqx.Module):
    convs: tuple[Conv2d, Conv2d]
    norms: tuple[Callable, Callable]
    dropout: eqx.nn.Dropout

    def __init__(self, before, after, stride, dropout, norm, conv, *, key):
        keys = jr.split(key)
        self.convs = (
            conv(before, after, stride=stride, key=keys[0]),
            conv(after, after, key=keys[1]),
        )
        self.norms = norm(after, True), norm(after, True)
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(self, w, state, key):
        keys = (None, None) if key is None else jr.split(key)
        hidden, state = self.norms[0](self.convs[0](w), state)
        hidden = drop_channels(self.dropout, leaky_relu(hidden), keys[0])
        hidden, state = self.norms[1](self.convs[1](hidden), state)
        hidden = drop_channels(self.dropout, hidden, keys[1])
        stride = self.convs[0].stride
        skip = w[..., ::stride, ::stride, :]
        more = hidden.shape[-1] - skip.shape[-1]
        skip = jnp.pad(skip, [(0, 0)] * (skip.ndim - 1) + [(0, more)])
        return leaky_relu(skip + hidden), state


def jfb_svhn(
    in_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    channels: tuple[int, int, int] = (16, 32, 64),
    norm: Normalisation = BatchNorm,
    cell_norm: Normalisation | None = None,
    layer: Callable[[ResidualCell], Callable] = paper_layer(1e-4, 200),
    *,
    key: PRNGKeyArray,
) -> ImageClassifier:
    """The network that the JFB paper trains on SVHN, of 163,488 parameters.

    The paper's 164 thousand are 163,744: the authors' code holds 256 more, of two
    normalisations that it never calls. They are left out. The solver is Picard
    iteration to an absolute tolerance of 1e-4 in at most 200 steps, as in the paper,
    but of the largest entry where that has the norm of an image.

    **Arguments:**

    - `in_shape`: the height, width and number of channels of an image.
    - `num_classes`: the number of classes.
    - `channels`: the numbers of channels of the encoder's blocks. The state has as many
        as the last, the head's convolution as many as the first.
    - `norm`, `cell_norm`, `layer`: as for [`eqimplicit.models.jfb_mnist`][].
    - `key`: a `jax.random` key for the parameters.

    **Returns:**

    An [`eqimplicit.models.ImageClassifier`][].
    """
    height, width, in_channels = in_shape
    keys = jr.split(key, 3)
    encoder = ResNetEncoder(in_channels, channels, norm=norm, key=keys[0])
    cell = ResidualCell(channels[-1], 1, 0.9, cell_norm or norm, key=keys[1])
    latent_shape = (-(-height // 4), -(-width // 4), channels[-1])
    head = ConvHead(latent_shape, channels[0], num_classes, key=keys[2])
    return ImageClassifier(encoder, layer(cell), head)
