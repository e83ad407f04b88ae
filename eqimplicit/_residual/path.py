import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._misc import where


# How much longer than the step before one may be, to be guessed from that.
_FARTHEST = 2.0


class Path(eqx.Module):
    """The last state of a path, from which the next one is guessed: it lies on the
    parabola through the last three states, or on the line through the last two, or is
    the last one, as many as there are.

    The parabola is that of divided differences, in terms of the ratios of the steps;
    steps of length zero are none.
    """

    y: PyTree[Array]
    change: PyTree[Array]
    bend: PyTree[Array]
    has_moved: Bool[Array, ""]
    length: Float[Array, ""]

    @classmethod
    def start(cls, y: PyTree[Array], lengths: Float[Array, " steps"] | None) -> "Path":
        """`lengths` are those of the steps to come, or None if all are equal."""
        zero = jtu.tree_map(jnp.zeros_like, y)
        dtype = None if lengths is None else lengths.dtype
        return cls(y, zero, zero, jnp.array(False), jnp.ones((), dtype))

    def extrapolate(self, length: Float[Array, ""] | None) -> PyTree[Array]:
        ratio = jnp.minimum(self._ratio(length), _FARTHEST)

        def guess(y, change, bend):
            r = ratio.astype(y.dtype)
            return y + r * change + r * (r + 1) / 2 * bend

        return jtu.tree_map(guess, self.y, self.change, self.bend)

    def append(self, y: PyTree[Array], length: Float[Array, ""] | None) -> "Path":
        ratio = self._ratio(length)
        # A short step says little about the bend of a path that makes long ones.
        bends = self.has_moved & (ratio <= _FARTHEST)
        change = jtu.tree_map(jnp.subtract, y, self.y)

        def bend(new, old):
            r = ratio.astype(new.dtype)
            return jnp.where(bends, 2 * r / (1 + r) * (new - r * old), 0)

        bend = jtu.tree_map(bend, change, self.change)
        if length is None:
            return Path(y, change, bend, jnp.array(True), self.length)
        before = self.change, self.bend, self.has_moved, self.length
        after = change, bend, jnp.array(True), length
        return Path(y, *where(length == 0, before, after))

    def _ratio(self, length: Float[Array, ""] | None) -> Array:
        return jnp.array(1.0) if length is None else length / self.length
