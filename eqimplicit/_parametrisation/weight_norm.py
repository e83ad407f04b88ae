import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractParametrisation


class WeightNorm(AbstractParametrisation):
    r"""Weight normalisation: $w = g \, v / \|v\|_2$, with one length $g$ for each slice
    of the weight along one axis, that of the output units: the first of an
    [`equinox.nn.Linear`][], the last of an [`eqimplicit.models.Conv2d`][].

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

    direction: Float[Array, "_ ..."]
    length: Float[Array, " units"]
    axis: int = eqx.field(static=True)

    def __init__(self, weight: Float[Array, "_ ..."], axis: int = 0):
        """**Arguments:**

        - `weight`: the weight to start from; `resolve` first returns just this weight.
            No slice of it may be zero.
        - `axis`: the axis of the output units.

        **Raises:** a `ValueError` if the weight has no such axis.
        """
        if not -weight.ndim <= axis < weight.ndim:
            raise ValueError(
                f"`axis` must be one of the {weight.ndim} axes of the weight. Got "
                f"{axis}."
            )
        self.direction = weight
        self.axis = axis
        self.length = jnp.linalg.vector_norm(weight, axis=self._other_axes())

    def resolve(self) -> Float[Array, "_ ..."]:
        others = self._other_axes()
        factor = self.length / jnp.linalg.vector_norm(self.direction, axis=others)
        return jnp.expand_dims(factor, others) * self.direction

    def _other_axes(self):
        ndim = self.direction.ndim
        return tuple(i for i in range(ndim) if i != self.axis % ndim)
