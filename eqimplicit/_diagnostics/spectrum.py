from collections.abc import Callable

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from .._misc import accumulation_dtype, check_positive_int, ravel, two_norm


def spectral_norm(
    fn: Callable[[PyTree[Array]], PyTree[ArrayLike]],
    y: PyTree[ArrayLike],
    *,
    key: PRNGKeyArray,
    num_steps: int = 30,
) -> Float[Array, ""]:
    r"""Estimates the largest singular value of the Jacobian of `fn` at `y`, by power
    iteration with $J^\top J$.

    The estimate grows towards the true value; its relative error shrinks with each step
    by the fourth power of the ratio of the second largest singular value to the
    largest.

    Below one, `fn` is a contraction near `y` and Picard iteration converges there.

    Costs one linearisation of `fn`, `num_steps + 1` products with $J$ and `num_steps`
    with its transpose.

    **Arguments:**

    - `fn`: a map `fn(y) -> y`.
    - `y`: a pytree of floating arrays, the point at which to take the Jacobian.
    - `key`: for the random vector to start from.
    - `num_steps`: the number of steps.

    **Returns:**

    A scalar.
    """
    check_positive_int("num_steps", num_steps)
    product, z = _linearise(fn, y)
    transposed = jax.linear_transpose(product, z)

    def step(_, v):
        (v,) = transposed(product(v))
        return v / _positive(two_norm(v)).astype(v.dtype)

    v = lax.fori_loop(0, num_steps, step, _random_unit(key, z))
    return two_norm(product(v))


def spectral_radius(
    fn: Callable[[PyTree[Array]], PyTree[ArrayLike]],
    y: PyTree[ArrayLike],
    *,
    key: PRNGKeyArray,
    num_steps: int = 50,
) -> Float[Array, ""]:
    r"""Estimates the largest modulus of an eigenvalue of the Jacobian of `fn` at `y`,
    by iterating with a plane, so that a dominant complex pair is found as well.

    The error shrinks with each step by the ratio of the third largest modulus to the
    largest: a Jacobian with many eigenvalues close to the largest, as a random matrix
    has, needs many steps.

    Below one, Picard iteration converges near `y`; the smaller, the faster.

    Costs one linearisation of `fn` and `2 * (num_steps + 1)` products with $J$.

    **Arguments:**

    - `fn`: a map `fn(y) -> y`.
    - `y`: a pytree of floating arrays, the point at which to take the Jacobian.
    - `key`: for the random plane to start from.
    - `num_steps`: the number of steps.

    **Returns:**

    A scalar.
    """
    check_positive_int("num_steps", num_steps)
    product, z = _linearise(fn, y)
    if z.size == 1:
        return jnp.abs(product(jnp.ones_like(z)))[0].astype(accumulation_dtype(z.dtype))

    def orthonormalise(a, b):
        a = a / _positive(two_norm(a)).astype(a.dtype)
        size = two_norm(b)
        b = b - jnp.vdot(a, b) * a
        b = b - jnp.vdot(a, b) * a
        # Where the plane has become a line, what is left is rounding.
        is_noise = two_norm(b) <= 10 * float(jnp.finfo(b.dtype).eps) * size
        b = jnp.where(is_noise, 0, b)
        return a, b / _positive(two_norm(b)).astype(b.dtype)

    def step(_, plane):
        a, b = plane
        return orthonormalise(product(a), product(b))

    key_a, key_b = jr.split(key)
    plane = orthonormalise(_random_unit(key_a, z), _random_unit(key_b, z))
    plane = jnp.stack(lax.fori_loop(0, num_steps, step, plane))
    images = jnp.stack([product(plane[0]), product(plane[1])])
    dtype = accumulation_dtype(z.dtype)
    (a, b), (c, d) = plane.astype(dtype) @ images.astype(dtype).T
    # The eigenvalues of the Jacobian restricted to the plane, a two-by-two matrix.
    half_trace, determinant = (a + d) / 2, a * d - b * c
    discriminant = half_trace**2 - determinant
    real = jnp.abs(half_trace) + jnp.sqrt(jnp.maximum(discriminant, 0))
    complex_pair = jnp.sqrt(jnp.maximum(determinant, 0))
    return jnp.where(discriminant >= 0, real, complex_pair)


def lipschitz_constant(
    fn: Callable[[PyTree[Array]], PyTree[ArrayLike]],
    ys: PyTree[Array],
    *,
    key: PRNGKeyArray,
    num_steps: int = 30,
) -> Float[Array, ""]:
    r"""Estimates a Lipschitz constant from below: the largest spectral norm of the
    Jacobian of `fn` at any of the given points. With a layer or a block for `fn` it is
    the constant of section 2.4.2 of the paper of the implicit residual networks,

    $$\sup_y \left\| \left( I - \frac{\partial \Phi}{\partial y'} \right)^{-1}
    \left( I + \frac{\partial \Phi}{\partial y} \right) \right\|_2$$

    on these points: above one, the layer may amplify a perturbation of its input.

    Costs one [`eqimplicit.spectral_norm`][] for each point, as a batch.

    **Arguments:**

    - `fn`: a map `fn(y) -> y`, for example an [`eqimplicit.ODEBlock`][].
    - `ys`: the points: a pytree of floating arrays with a leading axis.
    - `key`: for the random vectors to start from.
    - `num_steps`: the number of steps of each power iteration.

    **Returns:**

    A scalar.
    """
    num_points = len(jax.tree_util.tree_leaves(ys)[0])
    at = lambda y, key: spectral_norm(fn, y, key=key, num_steps=num_steps)
    return jnp.max(jax.vmap(at)(ys, jr.split(key, num_points)))


def _linearise(fn, y):
    z, unravel = ravel(y)
    _, product = jax.linearize(lambda v: ravel(fn(unravel(v)))[0], z)
    return product, z


def _random_unit(key, z):
    v = jr.normal(key, z.shape, z.dtype)
    return v / two_norm(v).astype(z.dtype)


def _positive(x):
    return jnp.where(x == 0, 1, x)
