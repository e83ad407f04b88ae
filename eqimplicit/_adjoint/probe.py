import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._misc import is_concrete


class BackwardStatus(eqx.Module):
    """How backward solves went, in sums over all that there were: over the layers that
    share a probe, the examples of a `jax.vmap`, the steps of a block. It is the
    gradient of a loss with respect to an [`eqimplicit.backward_probe`][].

    All are zero where no backward solve ran. Printed, it is a line of means over the
    solves. It says nothing of the forward solves, nor how far the series of a
    [`eqimplicit.NeumannAdjoint`][] is from the exact gradient, but by its `residual`.
    """

    num_solves: Float[Array, "..."]
    num_failed: Float[Array, "..."]
    residual: Float[Array, "..."]
    num_products: Float[Array, "..."]

    @property
    def found(self) -> Bool[Array, "..."]:
        """Whether there were backward solves, and all have finished."""
        return (self.num_solves > 0) & (self.num_failed == 0)

    def __str__(self):
        if not is_concrete(self.num_solves) or self.num_solves.ndim > 0:
            return repr(self)
        if self.num_solves == 0:
            return "no backward solves"
        return (
            f"{self.num_solves:.0f} backward solves, "
            f"{self.num_failed / self.num_solves:.0%} failed, "
            f"residual {self.residual / self.num_solves:.0e}, "
            f"{self.num_products / self.num_solves:.1f} products"
        ).replace("%", " %")


BackwardStatus.__init__.__doc__ = r"""**Arguments:**

- `num_solves`: how many backward solves ran. (Where the examples of a `jax.vmap` share
    their equation, as those of an affine cell may, one serves them all.)
- `num_failed`: how many of them did not meet their tolerance, broke down, or returned
    what is not finite.
- `residual`: $\|g - (I - J)^\top w\|_2 / \|g\|_2$, of the cotangent $g$ and what the
    linear solver made of it; zero for a cotangent that is zero.
- `num_products`: the products with $J^\top$. Those of a direct solver are one for each
    unknown; NaN for a solver that does not count its own.
"""


def backward_probe(shape: tuple[int, ...] = ()) -> BackwardStatus:
    """A probe for the backward solves of implicit layers, which have no other way out
    of `jax.grad`. Pass it to a layer as `layer(x, probe=probe)`, or put it into all
    layers of a model by [`eqimplicit.with_probe`][]; the gradient of the loss with
    respect to it is the [`eqimplicit.BackwardStatus`][].

    Works under `jax.jit`, `jax.vmap` and in `jax.lax.scan`, without a host callback.
    The values and gradients of the layer are as without it. What is reported are the
    backward solves of [`eqimplicit.ImplicitAdjoint`][] and
    [`eqimplicit.NeumannAdjoint`][]; adjoints without any leave the status zero, as do
    those of Optimistix.

    Costs, where it is differentiated, at most one product with $J^\\top$ for each
    backward solve, to measure the residual of solvers that do not report it, and
    otherwise nothing.

    !!! example

        ```python
        @eqx.filter_jit
        @eqx.filter_grad
        def gradients(model_and_probe, x):
            model, probe = model_and_probe
            return jnp.sum(model(x, probe=probe) ** 2)

        grads, status = gradients((deq, eqi.backward_probe()), x)
        status.found, status.residual
        ```

    **Arguments:**

    - `shape`: of each number: `()` for sums over everything, `(batch,)` for a probe
        that is mapped with the examples, and tells each by itself.

    **Returns:**

    An [`eqimplicit.BackwardStatus`][] of zeros.
    """
    zeros = jnp.zeros(shape)
    return BackwardStatus(zeros, zeros, zeros, zeros)


class AbstractProbedLayer(eqx.Module):
    """A layer that can report of its backward solves."""

    @abc.abstractmethod
    def report_to(self, probe: BackwardStatus) -> Any:
        """The layer with a probe in its equation."""


class Probed(eqx.Module):
    """A function in an equation, with the probe of the layer that solves it. It has the
    attributes of the function.
    """

    function: Callable
    probe: BackwardStatus

    @property
    def __wrapped__(self):
        return self.function

    def __check_init__(self):
        if not isinstance(self.probe, BackwardStatus):
            raise TypeError(
                f"`probe` must be an `eqimplicit.backward_probe()`. Got {self.probe!r}."
            )

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __getattr__(self, name):
        if name.startswith("__") or name in ("function", "probe"):
            raise AttributeError(name)
        return getattr(self.function, name)


def with_probe(tree: PyTree[Any], probe: BackwardStatus) -> PyTree[Any]:
    """Puts a probe into all implicit layers of a model, as calling each of them with
    `probe=probe` does. (Not into layers inside of the cell of another layer.)

    Inside of the loss, as in the example: a model that kept its probe would have it
    trained.

    !!! example

        ```python
        @eqx.filter_jit
        def step(model, x):
            def loss(model_and_probe):
                model = eqi.with_probe(*model_and_probe)
                return jnp.sum(model(x) ** 2)

            pair = model, eqi.backward_probe()
            value, (grads, status) = eqx.filter_value_and_grad(loss)(pair)
            return value, grads, status
        ```

    **Arguments:**

    - `tree`: any pytree, for example a model with several implicit layers. (Not one of
        models that are stacked for a `jax.vmap`: use this inside of that.)
    - `probe`: an [`eqimplicit.backward_probe`][], or what was made of one by `jax.vmap`
        or `jax.grad`.

    **Returns:**

    The same pytree, whose layers report to the probe; one without implicit layers as it
    is.

    **Raises:** a `TypeError` if `probe` is none.
    """
    if not isinstance(probe, BackwardStatus):
        raise TypeError(
            f"`probe` must be an `eqimplicit.backward_probe()`. Got {probe!r}."
        )
    put = lambda node: node.report_to(probe) if _is_layer(node) else node
    return jtu.tree_map(put, tree, is_leaf=_is_layer)


def _is_layer(node):
    return isinstance(node, AbstractProbedLayer)


def split_probe(function: Callable) -> tuple[Callable, BackwardStatus | None]:
    """The function in an equation as it was, and the probe of the layer, if any."""
    if isinstance(function, Probed):
        return function.function, function.probe
    return function, None


class EquationProbe(eqx.Module):
    """Among the inputs of a solve, the probe that this solve reports to. (Others may be
    among them, of layers inside of its equation.)
    """

    probe: BackwardStatus | None


def tangent_of_probe(inputs: PyTree[Any], tangents: PyTree[Any]) -> Any:
    """That of the probe of a solve; None if it has none or needs no derivative."""
    probe, tangent = _find(inputs), _find(tangents)
    if len(jtu.tree_leaves(tangent)) == 0:
        return None
    full = lambda x, t: jnp.zeros_like(x) if t is None else t
    return jtu.tree_map(full, probe, tangent)


def _find(tree):
    is_own = lambda node: isinstance(node, EquationProbe)
    nodes = jtu.tree_leaves(tree, is_leaf=is_own)
    return next((node.probe for node in nodes if is_own(node)), None)
