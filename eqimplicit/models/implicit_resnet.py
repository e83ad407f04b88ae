from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._nn.convolution import Conv2d
from .._parametrisation.bounded import BoundedSpectrum
from .._parametrisation.spectral_norm import with_spectral_norm
from .._residual.ode_block import ODEBlock
from .._residual.theta import ThetaLayer


class ConvField(eqx.Module):
    r"""The vector field of a residual block with pre-activation,
    $F(y) = K_2 * \max(0, K_1 * \max(0, y))$. Without biases, and with spectrally
    normalised kernels, so that it is 1-Lipschitz."""

    convs: tuple[Conv2d, Conv2d]

    def __init__(self, shape: tuple[int, int, int], *, key: PRNGKeyArray):
        """**Arguments:**

        - `shape`: the height, width and number of channels of the state.
        - `key`: a `jax.random` key for the parameters.
        """
        *keys, norm_key = jr.split(key, 3)
        channels = shape[-1]
        convs = tuple(
            Conv2d(channels, channels, 3, padding=1, use_bias=False, key=k)
            for k in keys
        )
        self.convs = with_spectral_norm(convs, input_shape=shape, key=norm_key)

    def __call__(
        self, t: Any, y: Float[Array, "height width channels"], args: Any = None
    ) -> Float[Array, "height width channels"]:
        """**Arguments:** as for any vector field; `t` and `args` are ignored.

        **Returns:**

        The derivative of `y`.
        """
        for conv in self.convs:
            y = conv(jax.nn.relu(y))
        return y


class ImplicitResNet(eqx.Module):
    r"""A pre-activation residual network whose blocks are implicit: theta layers with a
    field $F_{\alpha, \beta}$ of two convolutions (the network of the paper's
    robustness experiment).

    A convolution; then stages, each an [`eqimplicit.ODEBlock`][] of blocks with
    parameters of their own; then the mean over all pixels and a linear map. An implicit
    block needs a state that keeps its shape. So from the second stage on the change of
    shape comes first, as a strided 3 x 3 convolution, and the blocks work on the new
    shape. (In a ResNet it is the first convolution of the stage's first block.)

    Takes one image, as all of Equinox does: every image has solves of its own.

    Its defaults, with 8 initial channels and eight blocks as in a ResNet-18, have
    220,754 parameters; those of the paper 175 thousand.

    ??? cite "References"

        ```bibtex
        @article{reshniak2021robust,
            author = {Reshniak, Viktor and Webster, Clayton G.},
            title = {Robust Learning with Implicit Residual Networks},
            journal = {Machine Learning and Knowledge Extraction},
            volume = {3},
            number = {1},
            pages = {34--55},
            year = {2021},
        }
        ```
    """

    stem: Conv2d
    transitions: tuple[Conv2d | None, ...]
    stages: tuple[ODEBlock, ...]
    linear: eqx.nn.Linear

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        channels: Sequence[int] = (8, 16, 32, 64),
        num_blocks: int = 2,
        alpha: float = -3.0,
        beta: float = 1.0,
        layer: Callable[[Callable], Any] = ThetaLayer,
        stem_stride: int = 1,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `in_shape`: the height, width and number of channels of an image.
        - `num_classes`: the number of classes.
        - `channels`: the number of channels of each stage.
        - `num_blocks`: the number of blocks in each stage.
        - `alpha`, `beta`: the bounds of the fields' spectrum.
        - `layer`: makes a residual layer from a field; for example
            `functools.partial(eqi.ThetaLayer, theta=1.0)`.
        - `stem_stride`: the stride of the first convolution.
        - `key`: a `jax.random` key for the parameters.
        """
        keys = jr.split(key, len(channels) + 2)
        height, width, in_channels = in_shape
        self.stem = Conv2d(
            in_channels, channels[0], 3, stem_stride, 1, use_bias=False, key=keys[0]
        )
        height, width = (-(-n // stem_stride) for n in (height, width))
        transitions, stages, before = [], [], channels[0]
        for i, (after, stage_key) in enumerate(zip(channels, keys[1:-1])):
            transition_key, blocks_key = jr.split(stage_key)
            if i == 0:
                transitions.append(None)
            else:
                conv = Conv2d(
                    before, after, 3, 2, 1, use_bias=False, key=transition_key
                )
                transitions.append(conv)
                height, width = -(-height // 2), -(-width // 2)
            shape = height, width, after

            @eqx.filter_vmap
            def make(key, shape=shape):
                return layer(BoundedSpectrum(ConvField(shape, key=key), alpha, beta))

            blocks = make(jr.split(blocks_key, num_blocks))
            stages.append(ODEBlock(blocks, num_blocks, stacked=True))
            before = after
        self.transitions = tuple(transitions)
        self.stages = tuple(stages)
        self.linear = eqx.nn.Linear(before, num_classes, key=keys[-1])

    def __call__(
        self, x: Float[Array, "height width in_channels"]
    ) -> Float[Array, " num_classes"]:
        """**Arguments:**

        - `x`: an image.

        **Returns:**

        One logit for each class.
        """
        return self.solve(x)[0]

    def solve(self, x: Float[Array, "height width in_channels"]) -> tuple[Any, Any]:
        """As calling it, but also returns what [`eqimplicit.ODEBlock.solve`][] of each
        stage does.

        **Returns:**

        A pair of the logits and a tuple with one [`optimistix.Solution`][] a stage.
        """
        y, solutions = self.stem(x), []
        for transition, stage in zip(self.transitions, self.stages):
            y = y if transition is None else transition(y)
            solution = stage.solve(y)
            y = solution.value[-1]
            solutions.append(solution)
        features = jnp.mean(jax.nn.relu(y), axis=(0, 1))
        return self.linear(features), tuple(solutions)
