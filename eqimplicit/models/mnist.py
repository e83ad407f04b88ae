from collections.abc import Callable

import jax.random as jr
from jaxtyping import PRNGKeyArray

from .._nn.normalisation import BatchNorm
from .base import ImageClassifier, Normalisation, paper_layer
from .conv_encoder import ConvEncoder
from .conv_head import ConvHead
from .residual_cell import ResidualCell


def jfb_mnist(
    in_shape: tuple[int, int, int] = (28, 28, 1),
    num_classes: int = 10,
    channels: int = 32,
    pool: int = 3,
    norm: Normalisation = BatchNorm,
    cell_norm: Normalisation | None = None,
    layer: Callable[[ResidualCell], Callable] = paper_layer(1e-4, 50),
    *,
    key: PRNGKeyArray,
) -> ImageClassifier:
    """The network that the JFB paper trains on MNIST, of 54,352 parameters.

    The defaults are the paper's: batch normalisation, so that it takes whole batches,
    and Picard iteration to an absolute tolerance of 1e-4 in at most 50 steps.

    !!! example

        ```python
        make = eqx.nn.make_with_state(eqi.models.jfb_mnist)
        net, state = make(key=key)
        logits, state = net(images, state, key=key)  # images: (batch, 28, 28, 1)

        # The same in explicit form, with the same parameters.
        explicit = eqx.tree_at(
            lambda n: n.layer, net, eqi.models.OneStep(net.layer.cell)
        )

        # One example at a time.
        net = eqi.models.jfb_mnist(norm=eqi.models.GroupNorm, key=key)
        logits = jax.vmap(lambda x, k: net(x, key=k))(images, keys)
        ```

    **Arguments:**

    - `in_shape`: the height, width and number of channels of an image.
    - `num_classes`: the number of classes.
    - `channels`: the number of channels of the state. The encoder's first convolution
        and the head's have half as many.
    - `pool`: the size of the encoder's max-pooling; 1 for images as small as 8 x 8.
    - `norm`: makes a normalisation layer, as `norm(channels, affine)`:
        [`eqimplicit.models.BatchNorm`][] or [`eqimplicit.models.GroupNorm`][].
    - `cell_norm`: that of the cell, by default `norm`. For its exact gradients the
        paper takes [`eqimplicit.models.NoNorm`][].
    - `layer`: makes the layer from the cell; for example
        `functools.partial(eqi.DEQ, solver=eqi.Anderson(1e-3, 1e-3))`, or
        [`eqimplicit.models.OneStep`][] for the explicit network.
    - `key`: a `jax.random` key for the parameters.

    **Returns:**

    An [`eqimplicit.models.ImageClassifier`][].

    **Raises:** a `ValueError` if `channels` is odd, or if less than 3 x 3 pixels are
    left after the pooling.

    ??? cite "References"

        ```bibtex
        @inproceedings{fung2022jfb,
            author = {Fung, Samy Wu and Heaton, Howard and Li, Qiuwei and McKenzie,
                      Daniel and Osher, Stanley and Yin, Wotao},
            title = {{JFB}: {J}acobian-Free Backpropagation for Implicit Networks},
            booktitle = {AAAI Conference on Artificial Intelligence},
            year = {2022},
        }
        ```
    """
    if channels % 2 != 0:
        raise ValueError(f"`channels` must be even. Got {channels}.")
    height, width, in_channels = in_shape
    half = channels // 2
    keys = jr.split(key, 3)
    encoder = ConvEncoder(in_channels, half, channels, pool, norm, key=keys[0])
    cell = ResidualCell(channels, norm=cell_norm or norm, key=keys[1])
    latent_shape = (height // pool, width // pool, channels)
    head = ConvHead(latent_shape, half, num_classes, key=keys[2])
    return ImageClassifier(encoder, layer(cell), head)
