import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._nn.convolution import Conv2d
from .._nn.normalisation import GroupNorm
from .._parametrisation.weight_norm import WeightNorm
from .base import drop_channels


# Images of different sizes.
Branches = tuple[Float[Array, "*batch _ _ channels"], ...]


class MDEQCell(eqx.Module):
    r"""The cell of a multiscale deep equilibrium model. Its state is a pytree: one
    image a branch, each of half the height and width of the one before.

    Each branch goes through a residual block,

    $$w_i = \text{norm}(\sigma(\text{norm}(K_2 * \sigma(\text{norm}(K_1 * z_i)) + x_i) +
        z_i))$$

    in which the input $x$ enters the first branch only. Then every branch is the sum of
    all of them, brought to its size and number of pixels (up by a 1 x 1 convolution and
    copies of pixels, down by strided convolutions), and
    $\text{norm}(K_3 * \sigma(\cdot))$.

    The kernels are weight-normalised ([`eqimplicit.WeightNorm`][]), the normalisation
    is that of groups, so that examples are independent.
    """

    blocks: tuple["_Block", ...]
    fusion: tuple[tuple[Callable, ...], ...]
    last: tuple["_PostFuse", ...]

    def __init__(
        self,
        channels: int = 24,
        num_branches: int = 2,
        expansion: int = 5,
        groups: int = 8,
        dropout: float = 0.0,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `channels`: the number of channels of each branch.
        - `num_branches`: the number of branches.
        - `expansion`: how many times as many channels a block has inside.
        - `groups`: the number of groups of the normalisation of the blocks; that after
            the fusion has half as many.
        - `dropout`: the probability with which a channel is dropped in the blocks, the
            same ones in each evaluation of a solve.
        - `key`: a `jax.random` key for the parameters.
        """
        keys = jr.split(key, 3)
        each = range(num_branches)
        norm = ft.partial(GroupNorm, groups=groups)
        self.blocks = tuple(
            _Block(channels, expansion, norm, dropout, key=k)
            for k in jr.split(keys[0], num_branches)
        )
        self.fusion = tuple(
            tuple(
                _resampling(channels, i, j, norm, key=jr.fold_in(keys[1], i + 16 * j))
                for i in each
            )
            for j in each
        )
        last_norm = ft.partial(GroupNorm, groups=max(1, groups // 2))
        self.last = tuple(
            _PostFuse(channels, last_norm, key=k)
            for k in jr.split(keys[2], num_branches)
        )

    def __call__(
        self,
        z: Branches,
        x: Float[Array, "*batch height width channels"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Branches:
        """**Arguments:**

        - `z`: the state, a tuple of images.
        - `x`: the input, of the shape of the first of them.
        - `key`: a `jax.random` key for the drop-out; not needed in inference mode.

        **Returns:**

        The new `z`.
        """
        each = range(len(z))
        keys = [None] * len(z) if key is None else jr.split(key, len(z))
        injections = (x, *[0.0] * (len(z) - 1))
        w = [self.blocks[i](z[i], injections[i], keys[i]) for i in each]
        sums = [
            sum(move(branch, w[j].shape) for move, branch in zip(self.fusion[j], w))
            for j in each
        ]
        return tuple(self.last[j](sums[j]) for j in each)


class _Block(eqx.Module):
    convs: tuple[Conv2d, Conv2d]
    norms: tuple[GroupNorm, GroupNorm, GroupNorm]
    dropout: eqx.nn.Dropout

    def __init__(self, channels, expansion, norm, dropout, *, key):
        keys = jr.split(key)
        inside = expansion * channels
        self.convs = (
            _weight_normalised(channels, inside, 3, key=keys[0]),
            _weight_normalised(inside, channels, 3, key=keys[1]),
        )
        self.norms = norm(inside), norm(channels), norm(channels)
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(self, z, x, key):
        hidden = jax.nn.relu(self.norms[0](self.convs[0](z))[0])
        hidden = drop_channels(self.dropout, self.convs[1](hidden), key)
        hidden = self.norms[1](hidden + x)[0]
        return self.norms[2](jax.nn.relu(hidden + z))[0]


class _PostFuse(eqx.Module):
    conv: Conv2d
    norm: GroupNorm

    def __init__(self, channels, norm, *, key):
        self.conv = _weight_normalised(channels, channels, 1, key=key)
        self.norm = norm(channels)

    def __call__(self, w):
        return self.norm(self.conv(jax.nn.relu(w)))[0]


class _Up(eqx.Module):
    conv: Conv2d
    norm: GroupNorm

    def __call__(self, w, shape):
        w = self.norm(self.conv(w))[0]
        factor = shape[-3] // w.shape[-3]
        return jnp.repeat(jnp.repeat(w, factor, axis=-3), factor, axis=-2)


class _Down(eqx.Module):
    convs: tuple[Conv2d, ...]
    norms: tuple[GroupNorm, ...]

    def __call__(self, w, shape):
        del shape
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            w = norm(conv(w if i == 0 else jax.nn.relu(w)))[0]
        return w


def _same(w, shape):
    del shape
    return w


def _resampling(channels, source, target, norm, *, key):
    """From one branch to another."""
    if source == target:
        return _same
    if source > target:
        conv = Conv2d(channels, channels, 1, use_bias=False, key=key)
        return _Up(_small(conv, key), norm(channels))
    keys = jr.split(key, target - source)
    convs = [Conv2d(channels, channels, 3, 2, 1, use_bias=False, key=k) for k in keys]
    convs = tuple(_small(conv, k) for conv, k in zip(convs, keys))
    return _Down(convs, tuple(norm(channels) for _ in keys))


def _small(conv, key):
    """With the initial kernel of the paper, Gaussian with standard deviation .01."""
    weight = 0.01 * jr.normal(key, conv.weight.shape, conv.weight.dtype)
    return eqx.tree_at(lambda c: c.weight, conv, weight)


def _weight_normalised(before, after, size, *, key):
    conv = Conv2d(before, after, size, padding=size // 2, use_bias=False, key=key)
    normalise = ft.partial(WeightNorm, axis=-1)
    return eqx.tree_at(lambda c: c.weight, _small(conv, key), replace_fn=normalise)


class ZeroBranches(eqx.Module):
    """The initial guess of a [`eqimplicit.models.MDEQCell`][]: zeros."""

    num_branches: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Branches:
        """**Arguments:**

        - `x`: the input of the cell.
        """
        *batch, height, width, channels = x.shape
        return tuple(
            jnp.zeros((*batch, height // 2**i, width // 2**i, channels), x.dtype)
            for i in range(self.num_branches)
        )


ZeroBranches.__init__.__doc__ = """**Arguments:**

- `num_branches`: the number of branches.
"""
