from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, DTypeLike, Float, PyTree, UInt

from .base import AbstractParametrisation


class Untrained(AbstractParametrisation):
    """A floating-point array that is not trained: its bits, held as integers, which no
    filter for floating-point arrays finds, no optimiser decays, no cast to another
    precision touches and no gradient reaches.

    The layers of this package hold the array hyperparameters of their solver and
    adjoint in this way. Put it in place of any other array of a model that is to stay
    as it is, for example one that is not learned but changes without recompilation.

    `jax.numpy.asarray(untrained)` is the array, as is
    [`eqimplicit.resolve`][]`(untrained)`.
    """

    bits: UInt[Array, "..."]
    dtype: DTypeLike = eqx.field(static=True)

    def __init__(self, array: Float[Any, "..."]):
        """**Arguments:**

        - `array`: a floating-point array.
        """
        array = jnp.asarray(array)
        self.dtype = array.dtype
        unsigned = f"uint{8 * array.dtype.itemsize}"
        self.bits = lax.bitcast_convert_type(lax.stop_gradient(array), unsigned)

    def resolve(self) -> Float[Array, "..."]:
        return lax.bitcast_convert_type(self.bits, self.dtype)

    def __jax_array__(self) -> Float[Array, "..."]:
        return self.resolve()


def untrained(tree: PyTree[Any]) -> PyTree[Any]:
    """With an `Untrained` in place of each floating-point array."""

    def hide(x):
        is_real = eqx.is_inexact_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
        return Untrained(x) if is_real else x

    return jtu.tree_map(hide, tree)
