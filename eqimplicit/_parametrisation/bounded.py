from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._misc import check_callable
from .base import resolve
from .untrained import Untrained, untrained


class BoundedSpectrum(eqx.Module):
    r"""A vector field whose Jacobian has all its eigenvalues in the disc around
    $(\alpha + \beta) / 2$ that touches $\alpha$ and $\beta$ (equation (19) of the
    paper):

    $$F_{\alpha, \beta}(t, y) = \frac{\alpha + \beta}{2} y
    + \frac{\beta - \alpha}{2} S(\vartheta) \odot F_{-1, 1}(t, y)$$

    with a 1-Lipschitz field $F_{-1, 1}$ and the sigmoid $S$. It is
    $\max(|\alpha|, |\beta|)$-Lipschitz.

    Choose $\alpha$ and $\beta$ by [`eqimplicit.stability_function`][]: in a
    [`eqimplicit.ThetaLayer`][] every solve is well-posed if
    $h \theta \beta < 1$. $F_{\alpha, 1 / (h \theta)}$ with
    $\alpha < 1 / (h \theta)$ is the largest such class; at $\beta$ itself lies the pole
    of the stability function, so that a solve may take long there.

    !!! example

        ```python
        mlp = eqx.nn.MLP(2, 2, 16, 2, jax.nn.relu, key=key)
        mlp = eqi.with_spectral_norm(mlp, key=key)  # 1-Lipschitz
        field = eqi.BoundedSpectrum(lambda t, y, args: mlp(y), alpha=-25.0, beta=-15.0)
        ```

        (As a Module of yours, not a `lambda`, if the network is to be trained.)
    """

    vector_field: Callable
    alpha: float | Float[Array, ""] | Untrained = eqx.field(converter=untrained)
    beta: float | Float[Array, ""] | Untrained = eqx.field(converter=untrained)
    scale: PyTree[Float[Array, "..."]] | None = None

    def __check_init__(self):
        check_callable("vector_field", self.vector_field, "vector_field(t, y, args)")
        numbers = isinstance(self.alpha, float | int) and isinstance(
            self.beta, float | int
        )
        if numbers and not self.alpha <= self.beta:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(
                "`alpha` must not be above `beta`. Got "
                f"alpha={self.alpha!r}, beta={self.beta!r}."
            )

    def __call__(
        self, t: Any, y: PyTree[Array], args: PyTree[Any] = None
    ) -> PyTree[Array]:
        """**Arguments:** as for any vector field.

        **Returns:**

        The derivative of `y`.
        """
        value = self.vector_field(t, y, args)
        if self.scale is not None:
            gate = jtu.tree_map(jax.nn.sigmoid, self.scale)
            value = jtu.tree_map(jnp.multiply, gate, value)
        alpha, beta = lax.stop_gradient(resolve((self.alpha, self.beta)))
        centre, radius = (alpha + beta) / 2, (beta - alpha) / 2
        return jtu.tree_map(
            lambda a, b: (
                jnp.asarray(centre, a.dtype) * a + jnp.asarray(radius, a.dtype) * b
            ),
            y,
            value,
        )

    def damping(self, weight: Any) -> Any:
        r"""The damping with which Picard iteration converges on
        $y' = x + w F(y')$, for the weight $w = h \theta$ (and with which the Neumann
        series converges for its derivative):

        $$\lambda = \frac{1}{1 - w (\alpha + \beta) / 2}$$

        Every step reduces the error by at least the factor
        $w (\beta - \alpha) / 2 / (1 - w (\alpha + \beta) / 2)$, which is below one
        if $w \beta < 1$.
        """
        alpha, beta = resolve((self.alpha, self.beta))
        return 1 / (1 - weight * (alpha + beta) / 2)


BoundedSpectrum.__init__.__doc__ = r"""**Arguments:**

- `vector_field`: $F_{-1, 1}$, called as `vector_field(t, y, args)`. It must be
    1-Lipschitz in `y` already, e.g. by [`eqimplicit.with_spectral_norm`][]: this is not
    checked.
- `alpha`, `beta`: $\alpha$ and $\beta$, not below $\alpha$. Python floats, or scalar
    arrays (one for each of stacked layers), which are not trained: they are held as
    [`eqimplicit.Untrained`][].
- `scale`: $\vartheta$, a pytree of the structure and shapes of the state (or that
    broadcast to them), which is trained with the model; `None` means $S = 1$.

**Raises:** a `TypeError` if `vector_field` is not callable, a `ValueError` if `alpha`
is above `beta`.
"""
