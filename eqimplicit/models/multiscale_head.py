import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._nn.convolution import Conv2d
from .._nn.normalisation import GroupNorm
from .multiscale_cell import Branches


class MDEQHead(eqx.Module):
    """Bottleneck blocks on every branch, which are added from the largest image down;
    then a 1 x 1 convolution, the mean over all pixels, and a linear map."""

    bottlenecks: tuple["_Bottleneck", ...]
    downs: tuple[Conv2d, ...]
    down_norms: tuple[GroupNorm, ...]
    conv: Conv2d
    norm: GroupNorm
    linear: eqx.nn.Linear

    def __init__(
        self,
        channels: int = 24,
        num_branches: int = 2,
        head_channels: int = 8,
        final_channels: int = 200,
        num_classes: int = 10,
        groups: int = 8,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `channels`, `num_branches`: those of the [`eqimplicit.models.MDEQCell`][].
        - `head_channels`: how many channels the first bottleneck has inside; each next
            one has twice as many. They return four times as many.
        - `final_channels`: the number of channels before the linear map.
        - `num_classes`: the number of classes.
        - `groups`: the number of groups of the normalisation.
        - `key`: a `jax.random` key for the parameters.
        """
        keys = jr.split(key, 4)
        inside = [head_channels * 2**i for i in range(num_branches)]
        norm = ft.partial(GroupNorm, groups=groups)
        self.bottlenecks = tuple(
            _Bottleneck(channels, n, norm, key=k)
            for n, k in zip(inside, jr.split(keys[0], num_branches))
        )
        self.downs = tuple(
            Conv2d(4 * n, 8 * n, 3, 2, 1, key=k)
            for n, k in zip(inside[:-1], jr.split(keys[1], num_branches))
        )
        self.down_norms = tuple(norm(8 * n) for n in inside[:-1])
        self.conv = Conv2d(4 * inside[-1], final_channels, 1, key=keys[2])
        self.norm = norm(final_channels)
        self.linear = eqx.nn.Linear(final_channels, num_classes, key=keys[3])

    def __call__(
        self, z: Branches, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch num_classes"]:
        """**Arguments:**

        - `z`: the branches, of one image or of a batch.
        - `key`: ignored; there is no drop-out.
        """
        del key
        w, *others = (block(branch) for block, branch in zip(self.bottlenecks, z))
        for other, down, norm in zip(others, self.downs, self.down_norms):
            w = other + jax.nn.relu(norm(down(w))[0])
        features = jnp.mean(jax.nn.relu(self.norm(self.conv(w))[0]), axis=(-3, -2))
        linear = jnp.vectorize(self.linear, signature="(n)->(m)")
        return linear(features)


class _Bottleneck(eqx.Module):
    convs: tuple[Conv2d, Conv2d, Conv2d]
    skip: Conv2d
    norms: tuple[GroupNorm, GroupNorm, GroupNorm, GroupNorm]

    def __init__(self, channels, inside, norm, *, key):
        keys = jr.split(key, 4)
        conv = ft.partial(Conv2d, use_bias=False)
        self.convs = (
            conv(channels, inside, 1, key=keys[0]),
            conv(inside, inside, 3, padding=1, key=keys[1]),
            conv(inside, 4 * inside, 1, key=keys[2]),
        )
        self.skip = conv(channels, 4 * inside, 1, key=keys[3])
        self.norms = norm(inside), norm(inside), norm(4 * inside), norm(4 * inside)

    def __call__(self, w):
        skip = self.norms[3](self.skip(w))[0]
        for conv, norm in zip(self.convs[:2], self.norms):
            w = jax.nn.relu(norm(conv(w))[0])
        return jax.nn.relu(skip + self.norms[2](self.convs[2](w))[0])
