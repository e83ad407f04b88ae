"""The networks of the image classification example."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from eqimplicit import models


class TanhCell(eqx.Module):
    """`z = tanh(W z + b + x)`, a dense layer that feeds itself."""

    linear: eqx.nn.Linear

    def __call__(
        self, z: Float[Array, " size"], x: Float[Array, " size"]
    ) -> Float[Array, " size"]:
        return jnp.tanh(self.linear(z) + x)


class FlatEncoder(eqx.Module):
    """Convolutions, then a linear map to a vector."""

    convolutions: models.ConvEncoder
    linear: eqx.nn.Linear

    def __call__(
        self,
        x: Float[Array, "height width channels"],
        state: None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, " size"], None]:
        features, _ = self.convolutions(x, state, key=key)
        return self.linear(features.reshape(-1)), None


class LinearHead(eqx.Module):
    """Drop-out, then a linear map to the logits."""

    dropout: eqx.nn.Dropout
    linear: eqx.nn.Linear

    def __call__(
        self, z: Float[Array, " size"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " num_classes"]:
        return self.linear(self.dropout(z, key=key))


def digits_classifier(
    layer: Callable[[Callable], Callable], *, key: PRNGKeyArray
) -> models.ImageClassifier:
    """For one image of 8 x 8 pixels: each image is an equation of its own."""
    channels, size = 64, 128
    keys = jr.split(key, 4)
    convolutions = models.ConvEncoder(
        hidden_channels=channels // 2,
        out_channels=channels,
        pool=2,
        norm=models.GroupNorm,
        key=keys[0],
    )
    linear = eqx.nn.Linear(4 * 4 * channels, size, key=keys[1])
    cell = TanhCell(eqx.nn.Linear(size, size, key=keys[2]))
    head = LinearHead(eqx.nn.Dropout(0.2), eqx.nn.Linear(size, 10, key=keys[3]))
    return models.ImageClassifier(FlatEncoder(convolutions, linear), layer(cell), head)
