import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._nn.convolution import Conv2d
from .base import drop_channels, leaky_relu


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
