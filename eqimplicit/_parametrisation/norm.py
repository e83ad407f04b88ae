import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractParametrisation


class WeightNorm(AbstractParametrisation):
    r"""Weight normalisation: $w = g \, v / \|v\|_2$, with one length $g$ for each slice
    of the weight along its first axis (each output unit of an [`equinox.nn.Linear`][]).

    Separates the length of a weight from its direction, which steadies the training of
    deep equilibrium models.

    ??? cite "References"

        ```bibtex
        @inproceedings{salimans2016weight,
            author = {Salimans, Tim and Kingma, Diederik P.},
            title = {Weight Normalization: A Simple Reparameterization to Accelerate
                     Training of Deep Neural Networks},
            booktitle = {Advances in Neural Information Processing Systems},
            year = {2016},
        }
        ```
    """

    direction: Float[Array, "out ..."]
    length: Float[Array, " out"]

    def __init__(self, weight: Float[Array, "out ..."]):
        """**Arguments:**

        - `weight`: the weight to start from, with at least one axis; `resolve` first
            returns just this weight. No slice of it may be zero.
        """
        self.direction = weight
        self.length = _lengths(weight)

    def resolve(self) -> Float[Array, "out ..."]:
        factor = self.length / _lengths(self.direction)
        shape = factor.shape + (1,) * (self.direction.ndim - 1)
        return factor.reshape(shape) * self.direction


def _lengths(weight: Float[Array, "out ..."]) -> Float[Array, " out"]:
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=tuple(range(1, weight.ndim))))
