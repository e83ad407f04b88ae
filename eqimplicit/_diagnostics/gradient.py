from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._adjoint.base import AbstractFixedPointAdjoint
from .._adjoint.implicit import ImplicitAdjoint
from .._adjoint.jfb import JFBAdjoint
from .._adjoint.neumann import NeumannAdjoint
from .._adjoint.phantom import PhantomAdjoint
from .._layer.base import evaluate_cell
from .._layer.deq import DEQ
from .._linear_solver.gmres import GMRES
from .._misc import accumulation_dtype, check_callable, state_dtype, two_norm
from .._parametrisation.base import resolve


class GradientReport(eqx.Module):
    """How one adjoint fares in [`eqimplicit.gradient_report`][].

    **Attributes:**

    - `adjoint`: the adjoint.
    - `cosine`: the cosine between its gradient and the exact one, of the loss with
        respect to all floating arrays in the layer's cell.
    - `relative_error`: the size of their difference over the size of the exact one.
    - `residual`: how far its cotangent $w$ is from solving $(I - J)^\\top w = g$,
        relative to $g$.
    - `num_products`: the number of products with $J$ that one gradient takes, or -1
        where it is not known.
    """

    adjoint: optx.AbstractAdjoint
    cosine: Float[Array, ""]
    relative_error: Float[Array, ""]
    residual: Float[Array, ""]
    num_products: Int[Array, ""]

    def __str__(self):
        values = self.cosine, self.relative_error, self.residual, self.num_products
        if any(isinstance(x, jax.core.Tracer) or x.ndim > 0 for x in values):
            return repr(self)
        cosine, error, residual, products = (x.item() for x in values)
        return (
            f"{_short_name(self.adjoint)}: cosine {cosine:.6f}, relative error "
            f"{error:.1e}, residual {residual:.1e}, {products} products"
        )


def _short_name(adjoint: optx.AbstractAdjoint) -> str:
    """Its class and numbers, without the solvers in it."""
    numbers = [
        f"{name}={value}"
        for name, value in vars(adjoint).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return f"{type(adjoint).__name__}({', '.join(numbers)})"


def gradient_report(
    layer: DEQ,
    loss: Callable[[PyTree[Array]], Float[Array, ""]],
    x: PyTree[Any],
    z0: PyTree[Array] | None = None,
    *,
    adjoints: Sequence[optx.AbstractAdjoint] | None = None,
    key: PRNGKeyArray | None = None,
    state: eqx.nn.State | None = None,
) -> list[GradientReport]:
    r"""Compares the gradients that several adjoints give for the same layer, input and
    loss with the exact one.

    For when training goes wrong, to see whether an approximate gradient is to blame, or
    an exact one whose backward solve does not finish; and to choose an adjoint. The
    reference solves the adjoint equation at the layer's own solution to a tolerance
    near the precision of its numbers; its report comes first, and a residual that is
    not small there says that there is no trustworthy gradient at all.

    Works under `equinox.filter_jit` and `equinox.filter_vmap`; costs a forward and a
    backward solve for each adjoint.

    **Arguments:**

    - `layer`: a [`eqimplicit.DEQ`][].
    - `loss`: a function of the layer's solution to a scalar.
    - `x`, `z0`, `key`, `state`: as for calling the layer.
    - `adjoints`: the adjoints to compare. By default the layer's own, and one of each
        other kind in this package.

    **Returns:**

    A list of [`eqimplicit.GradientReport`][]s, the reference's first. `print` shows
    each as a line.

    **Raises:** a `TypeError` if `layer` is no [`eqimplicit.DEQ`][] or `loss` cannot be
    called.
    """
    if not isinstance(layer, DEQ):
        raise TypeError(
            "`layer` must be an `eqimplicit.DEQ`, such as that inside a model, with a "
            "`loss` that does what comes after it. Got an object of type "
            f"`{type(layer).__name__}`."
        )
    check_callable("loss", loss, "loss(z)")
    if adjoints is None:
        kinds = (
            JFBAdjoint(),
            NeumannAdjoint(num_terms=5),
            PhantomAdjoint(num_steps=5),
            ImplicitAdjoint(),
        )
        own = layer.adjoint or ImplicitAdjoint()
        adjoints = [own, *(x for x in kinds if not isinstance(x, type(own)))]
    # The solution itself, to which some adjoints add steps.
    plain = eqx.tree_at(lambda d: d.adjoint, layer, ImplicitAdjoint())
    z = jax.lax.stop_gradient(plain.solve(x, z0, key=key, state=state).value)
    dtype = accumulation_dtype(state_dtype(z))
    tolerance = 10 * float(jnp.finfo(dtype).eps)
    reference = ImplicitAdjoint(GMRES(tolerance, 0.0, restart=50, max_steps=1000))

    def gradient(adjoint):
        return _gradient(layer, loss, x, z, z0, key, state, adjoint)

    exact, _ = gradient(reference)
    cotangent = jax.grad(loss)(z)
    cell = resolve(layer.cell)
    evaluate = lambda y: evaluate_cell(cell, y, x, key, state)[0]
    _, pull_back = jax.vjp(evaluate, z)

    def report(adjoint):
        grads, w = gradient(adjoint)
        residual = jtu.tree_map(
            lambda g, w, p: g - w + p, cotangent, w, pull_back(w)[0]
        )
        error = jtu.tree_map(jnp.subtract, grads, exact)
        inner = sum(
            jnp.vdot(a.astype(dtype), b.astype(dtype))
            for a, b in zip(jtu.tree_leaves(grads), jtu.tree_leaves(exact))
        )
        size, exact_size = (two_norm(tree).astype(dtype) for tree in (grads, exact))
        return GradientReport(
            adjoint=adjoint,
            cosine=inner / (size * exact_size),
            relative_error=two_norm(error).astype(dtype) / exact_size,
            residual=two_norm(residual) / two_norm(cotangent),
            num_products=_num_products(adjoint, pull_back, cotangent),
        )

    return [report(adjoint) for adjoint in (reference, *adjoints)]


class _Shifted(eqx.Module):
    """The cell plus a constant, the gradient with respect to which is the cotangent $w$
    that the adjoint found.
    """

    cell: Callable
    shift: PyTree[Array]

    def __call__(self, z, x, *args, **kwargs):
        output = self.cell(z, x, *args, **kwargs)
        if not args:
            return jtu.tree_map(jnp.add, output, self.shift)
        image, new_state = output
        return jtu.tree_map(jnp.add, image, self.shift), new_state


def _gradient(layer, loss, x, z, z0, key, state, adjoint):
    shifted = _Shifted(layer.cell, jtu.tree_map(jnp.zeros_like, z))
    cell, static = eqx.partition(shifted, eqx.is_inexact_array)

    def loss_of(cell):
        new_layer = eqx.tree_at(
            lambda d: (d.cell, d.adjoint), layer, (eqx.combine(cell, static), adjoint)
        )
        return loss(new_layer.solve(x, z0, key=key, state=state).value)

    grads = jax.grad(loss_of)(cell)
    return grads.cell, grads.shift


def _num_products(adjoint, pull_back, cotangent):
    if not isinstance(adjoint, AbstractFixedPointAdjoint):
        return jnp.array(-1)
    operator = lambda w: jtu.tree_map(jnp.subtract, w, pull_back(w)[0])
    return resolve(adjoint).count_products(operator, cotangent)
