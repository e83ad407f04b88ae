import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree

from .._misc import stop_gradient
from .guards import check_fixed_point, check_uncoupled
from .probe import tangent_of_probe


while_loop = ft.partial(eqxi.while_loop, kind="lax")


def attach_steps(
    adjoint: optx.AbstractAdjoint,
    primal_fn: Callable,
    rewrite_fn: Callable,
    inputs: tuple[Any, ...],
    num_steps: int,
    damping: Any,
) -> tuple[PyTree[Array], PyTree[Any]]:
    """Solves without a derivative, then takes differentiable damped steps."""
    check_fixed_point(adjoint, inputs)
    root, residual = primal_fn(stop_gradient(inputs) + (while_loop,))
    _check_rewritten(rewrite_fn, root, residual, inputs)
    steps = _DampedSteps(rewrite_fn, num_steps)
    damping, residual = stop_gradient((damping, residual))
    root = _once_differentiable(
        steps, type(adjoint).__name__, root, residual, inputs, damping
    )
    return root, residual


def apply_implicit_rule(
    adjoint: optx.AbstractAdjoint,
    primal_fn: Callable,
    rewrite_fn: Callable,
    inputs: tuple[Any, ...],
    linear_solve: Callable[..., PyTree[Array]],
    *,
    exact: bool,
) -> tuple[PyTree[Array], PyTree[Any]]:
    r"""Gives the solution the tangent $S \, \partial f / \partial \theta \,
    \dot\theta$, where `linear_solve` applies $S \approx (I - J)^{-1}$, as
    `linear_solve(operator, vector, point, probe)`: given the product with $I - J$, a
    vector, the solution with its residual and the inputs, and the tangent of a probe.

    `exact` says that $S$ is that inverse, so that derivatives of the derivative are
    true; otherwise they are refused.
    """
    name = None if exact else type(adjoint).__name__
    inputs = inputs + (while_loop,)
    root, residual = _implicit(primal_fn, rewrite_fn, inputs, linear_solve, name)
    _check_rewritten(rewrite_fn, root, residual, inputs)
    return root, residual


def _check_rewritten(rewrite_fn, root, residual, inputs):
    jaxpr, _, _ = eqx.filter_make_jaxpr(rewrite_fn)(root, residual, inputs)
    check_uncoupled(jaxpr.jaxpr)


class _DampedSteps(eqx.Module):
    rewrite_fn: Callable
    num_steps: int = eqx.field(static=True)

    def __call__(self, root, residual, inputs, damping):
        def step(z, _):
            change = self.rewrite_fn(z, residual, inputs)
            return jtu.tree_map(
                lambda zi, ci: zi + jnp.asarray(damping, zi.dtype) * ci, z, change
            ), None

        # The solution has no derivative, so that the first step has one product less.
        # The others are a compiled loop only if they are many: convolutions in a loop
        # are slow on the CPU.
        z, _ = step(root, None)
        length = self.num_steps - 1
        z, _ = lax.scan(step, z, length=length, unroll=length < 16)
        return z


def _refuse_second_derivative(primals: PyTree[Any], name: str) -> PyTree[Any]:
    return eqxi.nondifferentiable(
        primals,
        msg=(
            f"Derivatives of a derivative by `{name}` are not defined: they would be "
            "those of an approximation, neither of the gradient that it returned nor "
            "of the exact one. Use `eqimplicit.ImplicitAdjoint` for second derivatives."
        ),
    )


def _split(primals: PyTree[Any], tangents: PyTree[Any]) -> tuple[PyTree[Any], ...]:
    unperturbed = jtu.tree_map(
        lambda t: t is None, tangents, is_leaf=lambda t: t is None
    )
    fixed, perturbed = eqx.partition(primals, unperturbed, is_leaf=lambda x: x is None)
    return perturbed, fixed


@eqx.filter_custom_jvp
def _once_differentiable(fn, name, *args):
    del name
    return fn(*args)


@_once_differentiable.def_jvp
def _once_differentiable_jvp(primals, tangents):
    fn, name, *args = primals
    _, _, *t_args = tangents
    perturbed, fixed = _split(_refuse_second_derivative(args, name), t_args)
    return jax.jvp(lambda p: fn(*eqx.combine(p, fixed)), (perturbed,), (t_args,))


@eqx.filter_custom_jvp
def _implicit(primal_fn, rewrite_fn, inputs, linear_solve, name):
    del rewrite_fn, linear_solve, name
    return jtu.tree_map(jnp.asarray, primal_fn(inputs))


@_implicit.def_jvp
def _implicit_jvp(primals, tangents):
    primal_fn, rewrite_fn, inputs, linear_solve, name = primals
    _, _, t_inputs, _, _ = tangents
    # Itself again, so that a derivative of this rule sees the root's own derivative.
    out = _implicit(primal_fn, rewrite_fn, inputs, linear_solve, name)
    root, residual = out
    if name is not None:
        root, inputs = _refuse_second_derivative((root, inputs), name)

    perturbed, fixed = _split(inputs, t_inputs)
    _, t_image = jax.jvp(
        lambda p: rewrite_fn(root, residual, eqx.combine(p, fixed)),
        (perturbed,),
        (t_inputs,),
    )
    _, minus_operator = jax.linearize(lambda z: rewrite_fn(z, residual, inputs), root)
    operator = lambda v: jtu.tree_map(jnp.negative, minus_operator(v))
    point = root, residual, inputs
    probe = tangent_of_probe(inputs, t_inputs)
    t_root = linear_solve(operator, t_image, point, probe)
    return out, (t_root, jtu.tree_map(lambda _: None, residual))
