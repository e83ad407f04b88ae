from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from .._misc import check_positive_int, ravel


def divergence_and_frobenius(
    fn: Callable[[PyTree[Array]], PyTree[ArrayLike]],
    y: PyTree[ArrayLike],
    *,
    key: PRNGKeyArray,
    num_samples: int = 1,
    probe: Callable = jr.rademacher,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Estimates, from the same products, the trace and the squared Frobenius norm of
    the Jacobian $J$ of `fn` at `y`, by Hutchinson's estimators: with random probes $v$
    whose entries have mean zero and variance one,

    $$\operatorname{tr} J = \mathbb{E}[v^\top J v], \qquad
    \|J\|_F^2 = \mathbb{E}[\|v^\top J\|_2^2]$$

    Both are unbiased. With $S = (J + J^\top) / 2$ and $n$ samples, the standard error
    of the trace is $\sqrt{2 \|S\|_F^2 / n}$ for Gaussian probes and
    $\sqrt{2 (\|S\|_F^2 - \sum_i S_{ii}^2) / n}$ for Rademacher probes: never more, and
    zero if $J$ is diagonal. That of the norm is the same with
    $S = J J^\top$.

    Costs one linearisation of `fn` and `num_samples` products with $J^\top$.

    **Arguments:**

    - `fn`: a map `fn(y) -> y`.
    - `y`: a pytree of floating arrays, the point at which to take the Jacobian.
    - `key`: for the probes.
    - `num_samples`: $n$, the number of probes.
    - `probe`: `jax.random.rademacher` or `jax.random.normal`, or another function of a
        key, a shape and a dtype.

    **Returns:**

    The two estimates, scalars.
    """
    check_positive_int("num_samples", num_samples)
    point, unravel = ravel(y)
    _, vjp = jax.vjp(lambda v: ravel(fn(unravel(v)))[0], point)

    def sample(key):
        v = probe(key, point.shape, point.dtype)
        (product,) = vjp(v)
        return jnp.vdot(product, v), jnp.vdot(product, product)

    traces, squares = jax.vmap(sample)(jr.split(key, num_samples))
    return jnp.mean(traces), jnp.mean(squares)


def divergence(
    fn: Callable[[PyTree[Array]], PyTree[ArrayLike]],
    y: PyTree[ArrayLike],
    *,
    key: PRNGKeyArray,
    num_samples: int = 1,
    probe: Callable = jr.rademacher,
) -> Float[Array, ""]:
    """Estimates the divergence of a field, the trace of the Jacobian of `fn` at `y`.
    As a penalty it makes a field dissipative.

    As [`eqimplicit.divergence_and_frobenius`][], of which it is the first part.
    """
    return divergence_and_frobenius(
        fn, y, key=key, num_samples=num_samples, probe=probe
    )[0]


def jacobian_frobenius(
    fn: Callable[[PyTree[Array]], PyTree[ArrayLike]],
    y: PyTree[ArrayLike],
    *,
    key: PRNGKeyArray,
    num_samples: int = 1,
    probe: Callable = jr.rademacher,
) -> Float[Array, ""]:
    """Estimates the squared Frobenius norm of the Jacobian of `fn` at `y`. As a penalty
    it makes a field nearly constant around its trajectories, so that they are nearly
    straight; of the cell of a [`eqimplicit.DEQ`][] it makes the solves short.

    As [`eqimplicit.divergence_and_frobenius`][], of which it is the second part.
    """
    return divergence_and_frobenius(
        fn, y, key=key, num_samples=num_samples, probe=probe
    )[1]


def jacobian_diagonal(
    fn: Callable[[PyTree[Array]], PyTree[ArrayLike]],
    y: PyTree[ArrayLike],
    *,
    key: PRNGKeyArray,
    num_samples: int = 1,
    probe: Callable = jr.normal,
) -> PyTree[Array]:
    r"""Estimates the diagonal of the Jacobian $J$ of `fn` at `y` (Algorithm 2 of the
    paper): with random probes $v_k$, elementwise,

    $$d = \frac{\sum_k v_k \odot J v_k}{\sum_k v_k \odot v_k}$$

    (The paper prints a product where it divides.) Exact with any probe if $J$ is
    diagonal; otherwise the error of each entry shrinks as $n^{-1/2}$. Its variance
    for $n$ Rademacher probes is $\sum_{j \ne i} J_{ij}^2 / n$.

    Costs one linearisation of `fn` and `num_samples` products with $J$.

    **Arguments:** as [`eqimplicit.divergence_and_frobenius`][].

    **Returns:**

    A pytree like `y`.

    ??? cite "References"

        ```bibtex
        @article{bekas2007estimator,
            author = {Bekas, Costas and Kokiopoulou, Effrosyni and Saad, Yousef},
            title = {An Estimator for the Diagonal of a Matrix},
            journal = {Applied Numerical Mathematics},
            volume = {57},
            number = {11},
            pages = {1214--1229},
            year = {2007},
        }
        ```
    """
    check_positive_int("num_samples", num_samples)
    point, unravel = ravel(y)
    _, product = jax.linearize(lambda v: ravel(fn(unravel(v)))[0], point)

    def sample(key):
        v = probe(key, point.shape, point.dtype)
        return v * product(v), v * v

    numerators, denominators = jax.vmap(sample)(jr.split(key, num_samples))
    return unravel(jnp.sum(numerators, axis=0) / jnp.sum(denominators, axis=0))
