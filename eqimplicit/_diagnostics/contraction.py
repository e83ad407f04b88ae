import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from .._layer.base import evaluate_cell
from .._misc import check_positive, check_positive_int, ravel, two_norm
from .._parametrisation.base import resolve


def contraction_factor(
    fn: Callable[[PyTree[Array]], PyTree[ArrayLike]],
    y: PyTree[ArrayLike],
    *,
    key: PRNGKeyArray,
    num_samples: int = 1,
    scale: float | Float[Array, ""] = 1.0,
) -> Float[Array, ""]:
    r"""Probes the Lipschitz constant of `fn` with random perturbations,

    $$\frac{\sum_i \|f(y + n_i) - f(y)\|_2}{\sum_i \|n_i\|_2},$$

    with normal $n_i$ of the size of $y$ (of unit size, where that is zero).

    A lower bound, and often a weak one: random directions are seldom the worst. The JFB
    paper's check that a layer is a contraction while it trains. For the true constant
    at a point see [`eqimplicit.spectral_norm`][].

    Costs `num_samples + 1` evaluations of `fn`.

    **Arguments:**

    - `fn`: a map `fn(y) -> y`; it may take a whole batch.
    - `y`: a pytree of floating arrays.
    - `key`: for the perturbations.
    - `num_samples`: the number of perturbations.
    - `scale`: the size of a perturbation relative to that of `y`.

    **Returns:**

    A scalar.
    """
    check_positive_int("num_samples", num_samples)
    check_positive("scale", scale)
    z, unravel = ravel(y)
    image, _ = ravel(fn(y))
    size = two_norm(z) / z.size**0.5
    size = jnp.where(size > 0, size, 1)

    def probe(key):
        noise = (scale * size).astype(z.dtype) * jr.normal(key, z.shape, z.dtype)
        start = z + noise
        moved, _ = ravel(fn(unravel(start)))
        return two_norm(moved - image), two_norm(start - z)

    moved, noise = jax.lax.map(probe, jr.split(key, num_samples))
    return jnp.sum(moved) / jnp.sum(noise)


class ContractionMonitor(eqx.Module):
    """Watches, between training steps, that a cell stays a contraction.

    It warns when [`eqimplicit.contraction_factor`][] exceeds a bound. Only if it is
    told which weights to touch does it also shrink them: the JFB paper's code does so
    silently at every forward pass, and so may change a model while it is evaluated.
    """

    bound: float = 1.0
    rescale: Callable[[Any], Any] | None = None
    num_samples: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        check_positive("bound", self.bound)
        check_positive_int("num_samples", self.num_samples)

    def __call__(
        self,
        cell: Callable,
        z: PyTree[Array],
        x: PyTree[Any],
        *,
        key: PRNGKeyArray,
        state: eqx.nn.State | None = None,
    ) -> tuple[Callable, Float[Array, ""]]:
        """Call it outside `jax.jit`.

        **Arguments:**

        - `cell`, `z`, `x`, `state`: the cell is probed around `z` as `cell(z, x)`, or
            with a `state` as `cell(z, x, state)`.
        - `key`: for the perturbations.

        **Returns:**

        The cell (rescaled, if it was to be and had to be) and the factor that was
        found.
        """
        factor = _probe(cell, z, x, key, state, self.num_samples)
        if isinstance(factor, jax.core.Tracer):
            raise ValueError(
                "`ContractionMonitor` warns in Python, so it must be called outside "
                "`jax.jit`. Inside, use `eqimplicit.contraction_factor`."
            )
        if factor <= self.bound:
            return cell, factor
        warnings.warn(
            f"The cell expands random perturbations by {float(factor):.3g}, more than "
            f"the bound {self.bound:.3g}: it may have ceased to be a contraction.",
            stacklevel=2,
        )
        if self.rescale is not None and jnp.isfinite(factor):
            weights = self.rescale(cell)
            shrink = (self.bound / factor) ** (1 / len(jtu.tree_leaves(weights)))
            shrunk = jtu.tree_map(lambda w: shrink.astype(w.dtype) * w, weights)
            cell = eqx.tree_at(self.rescale, cell, shrunk)
        return cell, factor


@eqx.filter_jit
def _probe(cell, z, x, key, state, num_samples):
    cell = resolve(cell)
    fn = lambda y: evaluate_cell(cell, y, x, None, state)[0]
    return contraction_factor(fn, z, key=key, num_samples=num_samples)


ContractionMonitor.__init__.__doc__ = """**Arguments:**

- `bound`: the largest factor to accept without a warning.
- `rescale`: a function from the cell to a pytree of its weights, as for
    `equinox.tree_at`. When the bound is exceeded, each of them is multiplied by
    `(bound / factor) ** (1 / number of weights)`, unless the factor is not finite. By
    default the cell is left alone.
- `num_samples`: the number of perturbations per call.

**Raises:** a `ValueError` for a `bound` that is not positive or a `num_samples` below
1.
"""
