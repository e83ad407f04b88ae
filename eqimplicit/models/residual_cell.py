import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._nn.convolution import Conv2d
from .._nn.normalisation import BatchNorm
from .base import leaky_relu, Normalisation


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
