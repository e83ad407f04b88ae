from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._misc import accumulation_dtype


class BatchNorm(eqx.Module):
    r"""Batch normalisation of images that have their channels last:

    $$y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \varepsilon}} w + b$$

    for each channel. In training mode the mean and variance are those over the batch
    and all pixels, and the state is returned with new running statistics; in inference
    mode they are the running statistics, and the state is returned unchanged.

    Takes the whole batch, not one example under a `vmap` with an axis name: in training
    mode the examples depend on each other, so in an implicit layer the batch must be
    one state. (Through `equinox.nn.BatchNorm`, which has the channels first, gradients
    took four times as long on the CPU.)
    """

    weight: Float[Array, " channels"] | None
    bias: Float[Array, " channels"] | None
    statistics: eqx.nn.StateIndex
    decay: float = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    inference: bool

    def __init__(
        self,
        channels: int,
        affine: bool = True,
        decay: float = 0.9,
        epsilon: float = 1e-5,
        inference: bool = False,
        dtype: Any = None,
    ):
        r"""**Arguments:**

        - `channels`: the number of channels.
        - `affine`: whether there are a weight and a bias for each channel.
        - `decay`: the weight of the old running statistics when new ones come in.
        - `epsilon`: what is added to the variance.
        - `inference`: whether to use the running statistics. Switch it with
            `equinox.nn.inference_mode`.
        - `dtype`: the dtype of the parameters and statistics, by default JAX's default
            float.
        """
        self.weight, self.bias = _affine_parameters(channels, affine, dtype)
        initial = jnp.zeros(channels, dtype), jnp.ones(channels, dtype)
        self.statistics = eqx.nn.StateIndex(initial)
        self.decay = decay
        self.epsilon = epsilon
        self.inference = inference

    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        state: eqx.nn.State | None,
    ) -> tuple[Float[Array, "batch height width channels"], eqx.nn.State]:
        """**Arguments:**

        - `x`: a batch of images, of shape `(batch, height, width, channels)`.
        - `state`: the Equinox state that holds the running statistics.

        **Returns:**

        A pair of the normalised batch and the new state.

        **Raises:** a `ValueError` if `x` is one image, or if there is no state.
        """
        if x.ndim != 4 or state is None:
            raise ValueError(
                "`BatchNorm` takes a batch of images, of shape (batch, height, width, "
                f"channels), and an Equinox state. Got shape {x.shape} and {state!r}. "
                "For one image at a time use `GroupNorm`."
            )
        if self.inference:
            moments = state.get(self.statistics)
        else:
            moments = _moments(x, (0, 1, 2))
            state = self._update(state, *moments, x.size // x.shape[-1])
        return _normalise(x, moments, self.weight, self.bias, self.epsilon), state

    def _update(self, state, mean, variance, count):
        variance = variance * (count / max(count - 1, 1))

        def update(old, new):
            new = lax.stop_gradient(new).reshape(-1).astype(old.dtype)
            return self.decay * old + (1 - self.decay) * new

        old = state.get(self.statistics)
        return state.set(self.statistics, jtu.tree_map(update, old, (mean, variance)))


class GroupNorm(eqx.Module):
    """Group normalisation of images that have their channels last: as
    [`eqimplicit.models.BatchNorm`][], but with the mean and variance over the pixels of
    one image and a group of channels.

    It leaves the examples of a batch independent, so that each may have a solve of its
    own.

    ??? cite "References"

        ```bibtex
        @inproceedings{wu2018group,
            author = {Wu, Yuxin and He, Kaiming},
            title = {Group Normalization},
            booktitle = {European Conference on Computer Vision},
            year = {2018},
        }
        ```
    """

    weight: Float[Array, " channels"] | None
    bias: Float[Array, " channels"] | None
    groups: int = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        affine: bool = True,
        groups: int = 4,
        epsilon: float = 1e-5,
        dtype: Any = None,
    ):
        """**Arguments:**

        - `channels`: the number of channels.
        - `affine`: whether there are a weight and a bias for each channel.
        - `groups`: the number of groups, a divisor of `channels`.
        - `epsilon`: what is added to the variance.
        - `dtype`: the dtype of the parameters, by default JAX's default float.

        **Raises:** a `ValueError` if `groups` does not divide `channels`.
        """
        if channels % groups != 0:
            raise ValueError(
                f"`groups` must divide `channels`. Got {channels} channels and "
                f"{groups} groups."
            )
        self.weight, self.bias = _affine_parameters(channels, affine, dtype)
        self.groups = groups
        self.epsilon = epsilon

    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        state: eqx.nn.State | None = None,
    ) -> tuple[Float[Array, "*batch height width channels"], eqx.nn.State | None]:
        """**Arguments:**

        - `x`: an image, or any number of them along leading axes.
        - `state`: passed on, so that this can take the place of a batch norm.

        **Returns:**

        A pair of the normalised images and `state`.
        """
        grouped = self.groups, x.shape[-1] // self.groups
        y = x.reshape(*x.shape[:-1], *grouped)
        weight = None if self.weight is None else self.weight.reshape(grouped)
        bias = None if self.bias is None else self.bias.reshape(grouped)
        y = _normalise(y, _moments(y, (-4, -3, -1)), weight, bias, self.epsilon)
        return y.reshape(x.shape), state


class NoNorm(eqx.Module):
    """Returns its input: takes the place of a normalisation that is to be left out."""

    def __init__(self, channels: int = 0, affine: bool = False):
        """**Arguments:**

        - `channels`, `affine`: ignored; as for [`eqimplicit.models.BatchNorm`][].
        """
        del channels, affine

    def __call__(
        self, x: Float[Array, "*shape"], state: eqx.nn.State | None = None
    ) -> tuple[Float[Array, "*shape"], eqx.nn.State | None]:
        """**Arguments:**

        - `x`: images, or anything else.
        - `state`: passed on.

        **Returns:**

        A pair of `x` and `state`.
        """
        return x, state


def _affine_parameters(channels, affine, dtype):
    if not affine:
        return None, None
    return jnp.ones(channels, dtype), jnp.zeros(channels, dtype)


def _moments(x, axes):
    x = x.astype(accumulation_dtype(x.dtype))
    mean = jnp.mean(x, axes, keepdims=True)
    return mean, jnp.mean(jnp.square(x - mean), axes, keepdims=True)


def _normalise(x, moments, weight, bias, epsilon):
    dtype = accumulation_dtype(x.dtype)
    mean, variance = (_broadcast(a.astype(dtype), x) for a in moments)
    # All factors as one, all summands as one: the gradient of the usual order of things
    # has more sums over the batch, and takes twice as long.
    scale = lax.rsqrt(variance + epsilon)
    if weight is not None:
        scale = scale * _broadcast(weight.astype(dtype), x)
    shift = -mean * scale
    if bias is not None:
        shift = shift + _broadcast(bias.astype(dtype), x)
    return (x.astype(dtype) * scale + shift).astype(x.dtype)


def _broadcast(a, x):
    return jnp.expand_dims(a, range(x.ndim - a.ndim))
