import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.custom_derivatives as jcd
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray


class Conv2d(eqx.Module):
    """A two-dimensional convolution of images that have their channels last.

    Made for the cells of implicit layers. On the CPU, in the loop of a solver, XLA is
    slow on convolutions, very slow if they have their channels first, and very slow on
    products with their transposed Jacobian. This layer is as fast inside a loop as
    outside, forwards and backwards: with 16 or more input channels and no stride it is
    a product of matrices there. On other devices it is XLA's convolution.
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
        out = _convolve(_fast, self.stride, self.padding, images, self.weight)
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


def _transpose(stride, padding, shape, y, weight):
    """The transpose of a convolution with respect to images of the given shape."""
    weight = jnp.swapaxes(jnp.flip(weight, (0, 1)), 2, 3)
    size = weight.shape[0]
    before = size - 1 - padding
    pads = [
        (before, n_in + size - 1 - before - (1 + (n_out - 1) * stride))
        for n_in, n_out in zip(shape[1:3], y.shape[1:3])
    ]
    return _fast(y, weight, pads, dilation=stride)


# In a loop on the CPU, XLA's convolution takes twice as long as the product of
# matrices, and JAX's transpose of it 20 to 50 times as long: outside loops XLA brings
# it into the form that it is fast on. So the value and its transpose are written out.
def _fast(x, weight, pads, stride=1, dilation=1):
    library = ft.partial(_library, pads=pads, stride=stride, dilation=dilation)
    if stride > 1 or dilation > 1 or weight.shape[2] < 16:
        return library(x, weight)
    matmul = ft.partial(_matmul, pads=pads)
    return lax.platform_dependent(x, weight, cpu=matmul, default=library)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _convolve(apply, stride, padding, x, weight):
    return apply(x, weight, [(padding, padding)] * 2, stride)


@ft.partial(_convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(apply, stride, padding, primals, tangents):
    del apply
    x, weight = primals
    t_x, t_weight = tangents
    # What is to be differentiated is not in a loop, and XLA would keep the products of
    # matrices for the gradient, of three times the size.
    out = _convolve(_library, stride, padding, x, weight)
    t_out = []
    if not isinstance(t_x, jcd.SymbolicZero):
        t_out.append(
            _with_transpose(
                lambda x: _convolve(_fast, stride, padding, x, weight),
                lambda y: _transpose(stride, padding, x.shape, y, weight),
                t_x,
                out.shape,
            )
        )
    if not isinstance(t_weight, jcd.SymbolicZero):
        t_out.append(_library(x, t_weight, [(padding, padding)] * 2, stride))
    return out, sum(t_out[1:], start=t_out[0])


def _with_transpose(linear, transpose, x, out_shape):
    """Applies the linear function $A$, with the given function as its transpose.

    Such functions have no primitive of their own in JAX that can be mapped, but linear
    solves have. This is one with a triangular system,

    $$u = x, \\quad y - A u = 0.$$
    """

    def matvec(solution):
        u, y = solution
        return u, y - linear(u)

    def solve(_, vector):
        u, y = vector
        return u, y + linear(u)

    def transpose_solve(_, vector):
        u, y = vector
        return u + transpose(y), y

    def zero(x):
        return jnp.broadcast_to(jnp.sum(x[:0]), out_shape)

    # Zeros, but as functions of `x` and `u`: all of the right-hand side has to be a
    # linear function, of the transposed system too.
    vector = x, zero(x)
    u, y = lax.custom_linear_solve(matvec, vector, solve, transpose_solve)
    return y + zero(u)
