import functools as ft
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jax.core import ShapedArray
from jax.interpreters import ad
from jaxtyping import Array, Float, PRNGKeyArray


class Conv2d(eqx.Module):
    r"""A two-dimensional convolution of images that have their channels last.

    Made for the cells of implicit layers. On the CPU, in the loop of a solver, XLA is
    slow on convolutions, very slow if they have their channels first, and very slow on
    products with their transposed Jacobian. The value of this layer and its products
    with $J$ and $J^\top$, which are what a solver's loops consist of, are as fast
    inside a loop as outside: with 16 or more input channels and no stride it is a
    product of matrices there. (The gradient of the kernel is XLA's, and slow where a
    loop itself is differentiated.) On other devices it is XLA's convolution.
    """

    weight: Float[Array, "height width in_channels out_channels"]
    bias: Float[Array, " out_channels"] | None
    stride: int = eqx.field(static=True)
    padding: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        use_bias: bool = True,
        dtype: Any = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_channels`: the number of channels of the input.
        - `out_channels`: the number of channels of the output.
        - `kernel_size`: the height and width of the kernel.
        - `stride`: the step of the kernel between two outputs.
        - `padding`: the number of zeros to add on each of the four sides.
        - `use_bias`: whether to add a bias to each channel.
        - `dtype`: the dtype of the parameters, by default JAX's default float.
        - `key`: a `jax.random` key for the parameters, uniform between
            `±1 / sqrt(in_channels * kernel_size**2)`.
        """
        key_weight, key_bias = jr.split(key)
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        bound = (in_channels * kernel_size**2) ** -0.5
        uniform = ft.partial(jr.uniform, dtype=dtype, minval=-bound, maxval=bound)
        self.weight = uniform(key_weight, shape)
        self.bias = uniform(key_bias, (out_channels,)) if use_bias else None
        self.stride = stride
        self.padding = padding

    def __call__(
        self,
        x: Float[Array, "*batch height width in_channels"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch new_height new_width out_channels"]:
        """**Arguments:**

        - `x`: an image, or any number of them along leading axes.
        - `key`: ignored; as in all of Equinox.
        """
        del key
        images = x.reshape(-1, *x.shape[-3:])
        pads = ((self.padding, self.padding),) * 2
        out = _convolve(images, self.weight, pads, self.stride)
        if self.bias is not None:
            out = out + jnp.expand_dims(self.bias, (0, 1, 2))
        return out.reshape(*x.shape[:-3], *out.shape[-3:])


def _library(x, weight, pads, stride=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        weight,
        window_strides=(stride, stride),
        padding=pads,
        lhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _matmul(x, weight, pads):
    """A convolution as one product of matrices: pixels that lie side by side in the
    input make one column each, the products are shifted by rows and added.
    """
    size, _, in_channels, out_channels = weight.shape
    offsets = range(size)
    sides = jnp.concatenate([_window(x, 2, i, size, pads[1]) for i in offsets], -1)
    matrix = weight.transpose(1, 2, 0, 3).reshape(size * in_channels, -1)
    rows = jnp.split(sides @ matrix, size, -1)
    return sum(_window(row, 1, i, size, pads[0]) for i, row in zip(offsets, rows))


def _window(x, axis, offset, size, pad):
    """What one entry of a kernel sees of a padded axis as the kernel moves along it."""
    before, after = pad
    config = [(0, 0, 0)] * x.ndim
    config[axis] = before - offset, after - (size - 1 - offset), 0
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _fast(x, weight, pads, stride=1, dilation=1):
    library = ft.partial(_library, pads=pads, stride=stride, dilation=dilation)
    if stride > 1 or dilation > 1 or weight.shape[2] < 16:
        return library(x, weight)
    matmul = ft.partial(_matmul, pads=pads)
    return lax.platform_dependent(x, weight, cpu=matmul, default=library)


# In a loop on the CPU, XLA's convolution takes twice as long as the product of
# matrices, and JAX's transpose of it 20 to 50 times as long: outside loops XLA brings
# it into the form that it is fast on. So this is a primitive, with the value and its
# transpose written out.
def _convolve(x, weight, pads, stride=1, dilation=1, is_fast=True):
    params = {"pads": pads, "stride": stride, "dilation": dilation, "is_fast": is_fast}
    return _convolution_p.bind(x, weight, **params)[0]


def _impl(x, weight, *, pads, stride, dilation, is_fast):
    apply = _fast if is_fast else _library
    return [apply(x, weight, pads, stride, dilation)]


def _abstract_eval(x, weight, **params):
    (out,) = jax.eval_shape(ft.partial(_impl, **params), x, weight)
    return [ShapedArray(out.shape, out.dtype)]


def _jvp(primals, tangents, *, pads, stride, dilation, is_fast):
    del is_fast
    (x, weight), (t_x, t_weight) = primals, tangents
    # What is to be differentiated is not in a loop, and XLA would keep the products of
    # matrices for the gradient, of three times the size.
    out = _convolve(x, weight, pads, stride, dilation, is_fast=False)
    t_out = []
    if not isinstance(t_x, ad.Zero):
        t_out.append(_convolve(t_x, weight, pads, stride, dilation))
    if not isinstance(t_weight, ad.Zero):
        t_out.append(_library(x, t_weight, pads, stride, dilation))
    return [out], [sum(t_out[1:], start=t_out[0])]


def _transpose(cotangents, x, weight, *, pads, stride, dilation, is_fast):
    """With respect to the images: a convolution with the flipped kernel, in which
    stride and dilation have changed places."""
    del is_fast
    (y,) = cotangents
    if isinstance(y, ad.Zero):
        return [None, None]
    if ad.is_undefined_primal(weight):
        of_weight = lambda w: _library(x, w, pads, stride, dilation)
        return [None, *jax.linear_transpose(of_weight, weight.aval)(y)]
    flipped = jnp.swapaxes(jnp.flip(weight, (0, 1)), 2, 3)
    size = weight.shape[0]

    def pad(before, n_in, n_out):
        new = size - 1 - before
        dilated_in, dilated_out = (n_in - 1) * dilation + 1, (n_out - 1) * stride + 1
        return new, dilated_in - dilated_out + size - 1 - new

    sizes = zip(pads, x.aval.shape[1:3], y.shape[1:3])
    new_pads = tuple(pad(before, n_in, n_out) for (before, _), n_in, n_out in sizes)
    return [_convolve(y, flipped, new_pads, dilation, stride), None]


_convolution_p = eqxi.create_vprim(
    "convolution", _impl, _abstract_eval, _jvp, _transpose
)
