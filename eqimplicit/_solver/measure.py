import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree

from .._misc import accumulation_dtype, broadcast_prefix, ravel, state_dtype


# An `rtol` below so many roundings of `f(z)` itself is taken as these.
NUM_ROUNDINGS = 4


class Measurement(eqx.Module):
    """How far an iterate is from being a fixed point.

    `error` is the norm of `f(z) - z` over `atol + rtol * |f(z)|`, converged below 1;
    `residual` is the norm of `f(z) - z` itself.
    """

    error: Float[Array, ""]
    residual: Float[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        # The norm of the quotient alone could overflow `f(z)` to infinity and read 0.
        return (self.error < 1) & jnp.isfinite(self.residual)


def measure(
    solver: optx.AbstractFixedPointSolver, y: PyTree[Array], image: PyTree[Array]
) -> Measurement:
    rtol, atol = lax.stop_gradient((solver.rtol, solver.atol))
    dtype = accumulation_dtype(state_dtype(y))
    roundings = NUM_ROUNDINGS * float(jnp.finfo(state_dtype(y)).eps)
    difference = jtu.tree_map(lambda a, b: a.astype(dtype) - b.astype(dtype), image, y)
    residual = solver.norm(difference)
    if _is_absolute(solver, dtype):
        # All numbers have the same scale: no second pass over them.
        return Measurement(_scale(residual, atol), residual)

    rtol = jnp.maximum(jnp.asarray(rtol, dtype), roundings)

    def scaled(difference, image_leaf, atol):
        size = jnp.abs(image_leaf.astype(dtype))
        return _scale(difference, jnp.asarray(atol, dtype) + rtol * size)

    scales = broadcast_prefix(atol, image)
    error = solver.norm(jtu.tree_map(scaled, difference, image, scales))
    return Measurement(error, residual)


def _is_absolute(solver, dtype):
    """Whether the tolerance is absolute, and no square of a difference above it
    underflows in the norm.
    """
    if not all(isinstance(tol, (int, float)) for tol in (solver.rtol, solver.atol)):
        return False
    return solver.rtol == 0 and solver.atol**2 > jnp.finfo(dtype).tiny


def _scale(difference, scale):
    # An exact zero has converged, also where the scale is zero.
    is_zero = difference == 0
    scale = jnp.asarray(scale, difference.dtype)
    return jnp.where(is_zero, 0, difference / jnp.where(is_zero, 1, scale))


def init_measurement(y: PyTree[Array]) -> Measurement:
    # Nothing was evaluated yet: neither converged, nor (as infinity would) diverged.
    dtype = accumulation_dtype(state_dtype(y))
    # Made from the state, so that inside `jax.shard_map` it varies as that does.
    largest = jnp.full_like(ravel(y)[0], jnp.finfo(dtype).max, dtype, shape=())
    return Measurement(error=largest, residual=largest)
