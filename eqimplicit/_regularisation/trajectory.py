from collections.abc import Callable
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from .._adjoint.probe import split_probe
from .._misc import (
    accumulation_dtype,
    as_state,
    check_positive_int,
    ravel,
    state_dtype,
)
from .._parametrisation.bounded import BoundedSpectrum
from .._parametrisation.spectral_norm import SpectralNorm
from .._residual.ode_block import ODEBlock
from .._residual.times import elapsed
from .base import divergence_and_frobenius, jacobian_frobenius


def total_variation(stacked: PyTree[Any]) -> Float[Array, ""]:
    r"""The squared differences of the parameters of consecutive layers,
    $\sum_k \|\gamma_k - \gamma_{k-1}\|_2^2$. As a penalty it makes stacked layers a
    field that varies slowly in time.

    Costs two passes over the parameters.

    **Arguments:**

    - `stacked`: a pytree whose floating arrays have a leading axis, one entry a layer;
        all else in it is ignored, and so are the bounds of constraints and the vectors
        of [`eqimplicit.SpectralNorm`][]. For a stacked [`eqimplicit.ODEBlock`][], its
        `layer.vector_field`.

    **Returns:**

    A scalar, zero for a single layer.
    """
    leaves = [x for x in jtu.tree_leaves(_trained(stacked)) if _is_floating(x)]
    return sum(
        (jnp.sum(jnp.square(jnp.diff(leaf, axis=0))) for leaf in leaves), jnp.zeros(())
    )


def _trained(tree: PyTree[Any]) -> PyTree[Any]:
    """Without what is no parameter: vectors of power iterations, and bounds."""

    def replace(node):
        if isinstance(node, SpectralNorm):
            return node.weight
        if isinstance(node, BoundedSpectrum):
            return _trained(node.vector_field), node.scale
        return node

    is_leaf = lambda x: isinstance(x, SpectralNorm | BoundedSpectrum)
    return jtu.tree_map(replace, tree, is_leaf=is_leaf)


def _is_floating(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)


def trajectory_penalty(
    block: ODEBlock,
    trajectory: PyTree[Array],
    t0: Any = 0.0,
    args: PyTree[Any] = None,
    *,
    ts: ArrayLike | None = None,
    key: PRNGKeyArray,
    divergence_weight: float | int | Float[Array, ""] = 0,
    jacobian_weight: float | int | Float[Array, ""] = 0,
    variation_weight: float | int | Float[Array, ""] = 0,
    power: float | int = 0,
    detach: bool = False,
    num_samples: int = 1,
    probe: Callable = jr.rademacher,
) -> Float[Array, ""]:
    r"""The penalty of the paper on the field $F$ of a block along a trajectory $y_t$ of
    $T$ steps and $d$ unknowns (equation (20)):

    $$\frac 1 T \left( \mathop{{\sum}'}_{t=0}^T \left[ \frac{\alpha_{div}}{d}
    \left( \frac t T \right)^p \nabla \cdot F(y_t)
    + \frac{\alpha_{jac}}{d^2} \left\| \frac{\partial F}{\partial y}(y_t) \right\|_F^2
    \right] + \frac{\alpha_{TV}}{T} \sum_{t=1}^T \|\gamma_t - \gamma_{t-1}\|^2 \right)$$

    where the prime halves the first and the last term. The first part rewards
    dissipation, the more the later; the second makes the field constant around the
    trajectory; the third makes the parameters of stacked layers vary slowly. The
    divergence and the norm are estimated from the same products.

    At `y_t` the field is that of the step that starts there; at the last one, of the
    last step. (The paper's equation (23) divides the third part by $T$ once only.) With
    `ts`, $t / T$ is the share of the time that has passed, and the mean of the first
    two parts is that over time, by the trapezoidal rule.

    Costs a linearisation of $F$ and `num_samples` products for each state, as a batch.

    **Arguments:**

    - `block`: the block.
    - `trajectory`: what its `trajectory` returned, for one example.
    - `t0`, `args`, `ts`: what that was called with.
    - `key`: for the probes.
    - `divergence_weight`, `jacobian_weight`, `variation_weight`: $\alpha_{div}$,
        $\alpha_{jac}$ and $\alpha_{TV}$. What has the Python number zero for its weight
        is not computed.
    - `power`: $p$; $0^0$ is one.
    - `detach`: whether to stop the gradient through the states, so that only the field
        there is penalised, as the paper's code does.
    - `num_samples`, `probe`: as [`eqimplicit.divergence_and_frobenius`][].

    **Returns:**

    A scalar.

    **Raises:** a `ValueError` if the trajectory has not `num_steps + 1` states, or
    those of `ts`.
    """
    times, states, clock = _times_and_states(block, trajectory, t0, ts, detach)
    steps, size = len(times) - 1, ravel(jtu.tree_map(lambda x: x[0], states))[0].size

    def at(t, y, key):
        field = _field(block, t, args, t0, ts)
        return divergence_and_frobenius(
            field, y, key=key, num_samples=num_samples, probe=probe
        )

    total = jnp.zeros(())
    if not (_is_zero(divergence_weight) and _is_zero(jacobian_weight)):
        keys = jr.split(key, steps + 1)
        traces, squares = jax.vmap(at)(times, states, keys)
        dtype = traces.dtype
        if ts is None:
            passed = jnp.linspace(0, 1, steps + 1, dtype=dtype)
        else:
            whole = clock[-1]
            # No time at all has no mean, and no penalty.
            passed = (clock / jnp.where(whole == 0, 1, whole)).astype(dtype)
        growth = passed**power
        values = (
            jnp.asarray(divergence_weight, dtype) / size * growth * traces
            + jnp.asarray(jacobian_weight, dtype) / size**2 * squares
        )
        total = jnp.trapezoid(values, passed)
    if block.stacked and not _is_zero(variation_weight):
        field, _ = split_probe(block.layer.vector_field)
        variation = total_variation(field)
        total = total + variation_weight / steps**2 * variation
    return total


def kinetic_penalty(
    block: ODEBlock,
    trajectory: PyTree[Array],
    t0: Any = 0.0,
    args: PyTree[Any] = None,
    *,
    ts: ArrayLike | None = None,
    key: PRNGKeyArray,
    kinetic_weight: float | int | Float[Array, ""] = 1,
    jacobian_weight: float | int | Float[Array, ""] = 0,
    detach: bool = False,
    num_samples: int = 1,
    probe: Callable = jr.rademacher,
) -> Float[Array, ""]:
    r"""The penalty of Finlay et al. on the field of a block along a trajectory, by the
    trapezoidal rule with the block's times:

    $$\alpha_K \int \|F(t, y(t))\|_2^2 \, dt
    + \alpha_J \int \left\| \frac{\partial F}{\partial y}(t, y(t)) \right\|_F^2 dt$$

    The first part makes trajectories straight, the second the field constant around
    them.

    Costs a linearisation of $F$ and `num_samples` products for each state, as a batch.

    **Arguments:** as [`eqimplicit.trajectory_penalty`][], but

    - `kinetic_weight`, `jacobian_weight`: $\alpha_K$ and $\alpha_J$.

    **Returns:**

    A scalar.

    **Raises:** as [`eqimplicit.trajectory_penalty`][].

    ??? cite "References"

        ```bibtex
        @inproceedings{finlay2020train,
            author = {Finlay, Chris and Jacobsen, Joern-Henrik and Nurbekyan, Levon and
                      Oberman, Adam},
            title = {How to Train Your Neural {ODE}: the World of {J}acobian and Kinetic
                     Regularization},
            booktitle = {International Conference on Machine Learning},
            year = {2020},
        }
        ```
    """
    times, states, clock = _times_and_states(block, trajectory, t0, ts, detach)

    def at(t, y, key):
        field = _field(block, t, args, t0, ts)
        value = ravel(field(y))[0]
        dtype = value.dtype
        kinetic = jnp.asarray(kinetic_weight, dtype) * jnp.vdot(value, value)
        if _is_zero(jacobian_weight):
            return kinetic
        square = jacobian_frobenius(
            field, y, key=key, num_samples=num_samples, probe=probe
        )
        return kinetic + jnp.asarray(jacobian_weight, dtype) * square

    values = jax.vmap(at)(times, states, jr.split(key, len(times)))
    return jnp.trapezoid(values, clock.astype(values.dtype))


def total_derivative(
    vector_field: Callable, order: int
) -> Callable[[Any, PyTree[Array], PyTree[Any]], PyTree[Array]]:
    r"""The derivative $d^K y / dt^K$ of the solutions of $\dot y = F(t, y)$, as a
    function of the time and the state. Its squared norm along a trajectory is the
    penalty of Kelly et al.: matched to the order of a method it makes its steps
    accurate, so that fewer do.

    Costs $2^{K-1}$ evaluations of the field, by forward mode in forward mode.

    **Arguments:**

    - `vector_field`: a callable `vector_field(t, y, args) -> dy/dt`.
    - `order`: $K$, at least 1; with 1 it is the vector field.

    **Returns:**

    A function of `t`, `y` and `args`, as the vector field.

    ??? cite "References"

        ```bibtex
        @inproceedings{kelly2020learning,
            author = {Kelly, Jacob and Bettencourt, Jesse and Johnson, Matthew J and
                      Duvenaud, David K},
            title = {Learning Differential Equations that are Easy to Solve},
            booktitle = {Advances in Neural Information Processing Systems},
            year = {2020},
        }
        ```
    """
    check_positive_int("order", order)
    if order == 1:
        return vector_field
    lower = total_derivative(vector_field, order - 1)

    def derivative(t, y, args=None):
        y = as_state(y)
        dtype = jtu.tree_leaves(y)[0].dtype
        t = jnp.asarray(t, dtype)
        velocity = jnp.ones_like(t), vector_field(t, y, args)
        return jax.jvp(lambda t, y: lower(t, y, args), (t, y), velocity)[1]

    return derivative


def _times_and_states(block, trajectory, t0, ts, detach):
    dtype = accumulation_dtype(state_dtype(trajectory))
    times = block.times(t0, ts=ts).astype(dtype)
    lengths = {len(leaf) for leaf in jtu.tree_leaves(trajectory)}
    if lengths != {len(times)}:
        raise ValueError(
            f"`trajectory` must have {len(times)} states along its leading axis, as "
            f"many as there are times. Got {sorted(lengths)}. For a batch of "
            "trajectories, use `jax.vmap`."
        )
    states = lax.stop_gradient(trajectory) if detach else trajectory
    return times, states, times if ts is None else elapsed(ts).astype(dtype)


def _field(block, t, args, t0, ts):
    """That of the block at a time, which does not promote its value."""

    def field(y):
        value = block.vector_field(t, y, args, t0, ts=ts)
        return jtu.tree_map(lambda a, b: jnp.asarray(a).astype(b.dtype), value, y)

    return field


def _is_zero(weight: Any) -> bool:
    return isinstance(weight, int | float) and weight == 0
