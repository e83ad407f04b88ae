"""The steps of a block, one after the other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree

from .._misc import ravel
from .base import AbstractResidualLayer
from .path import Path
from .times import stay_if_still, Steps, with_step_size


class ScanInputs(NamedTuple):
    """What is scanned over: the arrays of each layer, and the rest that they share, the
    initial state, the steps, and `args`.
    """

    stack: PyTree[Array]
    shared: PyTree[Any]
    y0: PyTree[Array]
    steps: Steps
    args: PyTree[Any]


def _layer(own, shared, length) -> AbstractResidualLayer:
    return with_step_size(eqx.combine(own, shared), length)


def scan(
    inputs: ScanInputs, keep: Callable[[optx.Solution], Any]
) -> tuple[PyTree[Array], Any]:
    """The last state, and what is to be kept of each step."""
    stack, shared, y0, steps, args = inputs

    def step(path, x):
        own, t, length = x
        guess = path.extrapolate(length)
        solution = _layer(own, shared, length).solve(path.y, t, args, guess)
        solution = stay_if_still(solution, path.y, length)
        return path.append(solution.value, length), keep(solution)

    start = Path.start(y0, steps.lengths)
    path, kept = lax.scan(step, start, (stack, steps.starts, steps.lengths))
    return path.y, kept


def run(inputs: ScanInputs) -> PyTree[Array]:
    y, _ = scan(inputs, lambda solution: None)
    return y


@eqx.filter_custom_vjp
def run_reversibly(inputs: ScanInputs) -> PyTree[Array]:
    """As `run`, but the gradient finds the states again by stepping backwards."""
    return run(inputs)


@run_reversibly.def_fwd
def _forward(perturbed, inputs):
    del perturbed
    y = run(inputs)
    return y, y


@run_reversibly.def_bwd
def _backward(last, cotangent, perturbed, inputs):
    """Carries the path and the cotangents back, from one step to the one before."""
    del perturbed
    stack, shared, y0, steps, args = inputs

    def step(carry, x):
        path, sizes, y_bar, shared_bar, args_bar = carry
        own, t, length = x
        guess = path.extrapolate(length)
        solution = _layer(own, shared, length).invert(path.y, t, args, guess)
        previous = stay_if_still(solution, path.y, length).value

        def forward(point):
            own, shared, previous, t, length, args = point
            solution = _layer(own, shared, length).solve(previous, t, args, path.y)
            return stay_if_still(solution, previous, length).value

        point = own, shared, previous, t, length, args
        _, vjp = eqx.filter_vjp(forward, point)
        ((own_bar, shared_add, y_bar, t_bar, length_bar, args_add),) = vjp(y_bar)
        shared_bar = eqx.apply_updates(shared_bar, shared_add)
        args_bar = eqx.apply_updates(args_bar, args_add)
        sizes = _largest(sizes, previous)
        carry = path.append(previous, length), sizes, y_bar, shared_bar, args_bar
        return carry, (own_bar, t_bar, length_bar)

    zeros = lambda tree: jtu.tree_map(
        jnp.zeros_like, eqx.filter(tree, eqx.is_inexact_array)
    )
    cotangent = jtu.tree_map(
        lambda c, y: jnp.zeros_like(y) if c is None else c,
        cotangent,
        last,
        is_leaf=lambda x: x is None,
    )
    start = Path.start(last, steps.lengths)
    carry = start, _largest(last, y0), cotangent, zeros(shared), zeros(args)
    xs = stack, steps.starts, steps.lengths
    carry, bars = lax.scan(step, carry, xs, reverse=True)
    path, sizes, y_bar, shared_bar, args_bar = carry
    stack_bar, starts_bar, lengths_bar = bars
    lost = _is_lost(path.y, y0, sizes, len(steps.starts))
    bars = ScanInputs(
        stack_bar, shared_bar, y_bar, Steps(starts_bar, lengths_bar), args_bar
    )
    return jtu.tree_map(lambda x: jnp.where(lost, jnp.nan, x), bars)


def _largest(a, b):
    return jtu.tree_map(lambda x, y: jnp.maximum(jnp.abs(x), jnp.abs(y)), a, b)


def _is_lost(y, y0, sizes, num_steps):
    """Whether any unknown has missed its initial value by more than a thousandth of the
    largest that it has been, and by more than the roundings of all steps explain.
    """
    missed, sizes = (
        ravel(tree)[0] for tree in (jtu.tree_map(jnp.subtract, y, y0), sizes)
    )
    rounding = float(jnp.finfo(sizes.dtype).eps) * num_steps**0.5 * jnp.max(sizes)
    # NaN compares false.
    return ~jnp.all(jnp.abs(missed) <= 1e-3 * sizes + rounding)
