"""The steps of a block, all at once: Newton's method on the whole trajectory."""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from .._adjoint.implicit import ImplicitAdjoint
from .._adjoint.probe import EquationProbe, split_probe
from .._adjoint.rules import apply_implicit_rule
from .._layer.base import finish
from .._layer.defaults import is_small
from .._linear_solver.neumann_series import NeumannSeries
from .._misc import accumulation_dtype, all_finite, num_unknowns, ravel, two_norm
from .all_steps import (
    are_states,
    change,
    keep_still,
    over_steps,
    states_before,
    step_at,
    Unknowns,
)
from .base import AbstractImplicitLayer, AbstractResidualLayer, solve_unknowns
from .bidiagonal_solve import newton_step, TrajectorySolve
from .path import Path
from .sequential import ScanInputs
from .times import stay_if_still


# Newton's method takes five to seven steps where it is of use at all, with inexact
# ones up to fifteen.
_MAX_STEPS = 20


def check_parallel(layer: AbstractResidualLayer) -> None:
    name = type(layer).__name__
    if not isinstance(layer, AbstractImplicitLayer):
        raise ValueError(
            f"A {name} has no `equation` that a `parallel` block could solve."
        )
    adjoint = layer.options.adjoint
    is_exact = isinstance(adjoint, ImplicitAdjoint) and not isinstance(
        adjoint.linear_solver, NeumannSeries
    )
    if adjoint is not None and not is_exact:
        raise ValueError(
            f"The gradient of a `parallel` block is exact: its {name} must have no "
            f"`adjoint`, or an `eqimplicit.ImplicitAdjoint`. Got {adjoint!r}."
        )


def _check_is_componentwise(inputs: ScanInputs) -> None:
    """The equations of a large state are taken apart by its components."""
    guess, y0 = eqx.filter_eval_shape(_guess, inputs), inputs.y0
    if not (is_small(y0) or are_states(guess, y0)):
        raise ValueError(
            f"Of a state of more than 64 unknowns (here {num_unknowns(y0)}) a "
            "`parallel` block takes steps whose equation is for a state, or for "
            f"several along a leading axis. Got one for {guess}."
        )


def _guess(inputs):
    step = step_at(inputs, 0)
    return step.layer.equation(inputs.y0, step.t, step.args).guess


class _Newton(NamedTuple):
    unknowns: Unknowns
    residual: Float[Array, " steps"]
    error: Float[Array, " steps"]
    converged: Bool[Array, " steps"]
    num_steps: Int[Array, ""]


def _newton(inputs: ScanInputs, max_steps: int) -> _Newton:
    y0, _ = ravel(inputs.y0)
    exact = is_small(y0)
    num_steps = len(inputs.steps.starts)
    y = jnp.broadcast_to(y0, (num_steps, *y0.shape))
    z = over_steps(inputs, lambda step, y: step.guess(y), y)

    def judge(now, image, new):
        rows = states_before(inputs, now.y), now, image, new
        return over_steps(inputs, lambda step, *row: step.judge(*row), *rows)

    def improve(state):
        unknowns = state.unknowns
        distance, product = jax.linearize(lambda u: change(u, inputs), unknowns)
        operator = lambda v: jtu.tree_map(jnp.negative, product(v))
        step = newton_step(operator, distance, unknowns)
        image = jtu.tree_map(jnp.add, unknowns, distance)
        new = jtu.tree_map(jnp.add, unknowns, step.value)
        residual, is_solved, error, at_rest = judge(unknowns, image, new)
        is_solved = is_solved & (state.num_steps > 0)
        # That of a linear solve that has stagnated is short as well.
        at_rest = at_rest & step.is_found
        # As in `RootAsFixedPoint` one short step is no proof, and less so from a guess
        # that is the same for all steps; and the iterate after it is the better one.
        if exact:
            contracted = error <= 0.5 * state.error
            again = (state.error < 1) & (is_solved | at_rest)
            converged = (error < 1) & (contracted | again)
        else:
            converged = is_solved | at_rest & (state.error < 1)
        return _Newton(new, residual, error, converged, state.num_steps + 1)

    def goes_on(state):
        finite = jnp.all(jnp.isfinite(state.residual))
        return ~jnp.all(state.converged) & finite & (state.num_steps < max_steps)

    zero = jnp.zeros_like(y[:, 0], accumulation_dtype(y.dtype))
    # Before the first step nothing has moved.
    start = _Newton(Unknowns(z, y), zero, zero, zero > 0, jnp.array(0))
    return lax.while_loop(goes_on, improve, start)


def _one_by_one(inputs: ScanInputs, start: _Newton) -> tuple[Unknowns, dict[str, Any]]:
    """What Newton's method has found, or if that is not the whole trajectory, what the
    steps find one after the other.
    """
    y0, steps = inputs.y0, inputs.steps
    num_steps = len(steps.starts)
    is_found = jnp.all(start.converged) & all_finite(start.unknowns)

    def goes_on(carry):
        k, *_ = carry
        return ~is_found & (k < num_steps)

    def make_step(carry):
        k, path, unknowns, stats = carry
        step = step_at(inputs, k)
        length = None if steps.lengths is None else steps.lengths[k]
        guess = path.extrapolate(length)
        equation = step.layer.equation(path.y, step.t, step.args, guess)
        solution = solve_unknowns(equation, path.y, step.layer.options)
        z = step.ravel(solution.value)
        image = equation.cell(solution.value, equation.x)
        residual = two_norm(jtu.tree_map(jnp.subtract, image, solution.value))
        solution = eqx.tree_at(
            lambda s: s.value, solution, equation.new_state(solution.value)
        )
        solution = stay_if_still(solution, path.y, length)
        y = solution.value
        unknowns = Unknowns(
            unknowns.z.at[k].set(z),
            unknowns.y.at[k].set(ravel(y)[0]),
        )
        found = (solution.result == optx.RESULTS.successful) & all_finite(y)
        new = {
            "num_steps": solution.stats["num_steps"],
            "residual": solution.stats.get("residual", residual),
            "found": found,
        }
        stats = {key: stats[key].at[k].set(new[key]) for key in stats}
        return k + 1, path.append(y, length), unknowns, stats

    stats = {
        "num_steps": jnp.broadcast_to(start.num_steps, (num_steps,)),
        "residual": start.residual,
        "found": start.converged,
    }
    path = Path.start(y0, steps.lengths)
    carry = jnp.array(0), path, start.unknowns, stats
    _, _, unknowns, stats = lax.while_loop(goes_on, make_step, carry)
    in_parallel = jnp.broadcast_to(is_found, (num_steps,))
    return unknowns, {**stats, "in_parallel": in_parallel}


def run_in_parallel(inputs: ScanInputs) -> optx.Solution:
    """As a scan over the steps, whose `value` are the states after them."""
    layer: Any = eqx.combine(inputs.stack, inputs.shared)
    options, (_, probe) = layer.options, split_probe(layer.vector_field)

    _check_is_componentwise(inputs)

    def primal(inputs):
        newton = _newton(inputs, min(options.max_steps, _MAX_STEPS))
        return _one_by_one(inputs, newton)

    # What the field closes over may be differentiated as well. (Equinox believes that a
    # plain function closes over nothing, but its arguments do.)
    primal = eqx.filter_closure_convert(primal, inputs)
    structure, _ = eqx.filter_eval_shape(primal, inputs)
    distance = eqx.filter_closure_convert(ft.partial(change), structure, inputs)
    z, y = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), structure)
    one_step = lambda k, z, y, inputs: step_at(inputs, k)(z, y)
    one_step = eqx.filter_closure_convert(
        ft.partial(one_step), jnp.array(0), z, y, inputs
    )

    def solve(everything):
        primal, _, _, inputs, _ = everything[0]
        return primal(inputs)

    def rewrite(unknowns, residual, everything):
        _, distance, _, inputs, _ = everything[0]
        return distance(unknowns, inputs)

    adjoint = options.adjoint or ImplicitAdjoint()
    unknowns, stats = apply_implicit_rule(
        adjoint,
        solve,
        rewrite,
        ((primal, distance, one_step, inputs, EquationProbe(probe)),),
        TrajectorySolve(adjoint.linear_solver, adjoint.throw),
        exact=True,
    )
    y = keep_still(inputs, unknowns.y)
    _, unravel = ravel(inputs.y0)

    def finish_step(y, stats):
        is_found, stats = (
            stats["found"],
            {k: v for k, v in stats.items() if k != "found"},
        )
        result = optx.RESULTS.where(
            is_found,
            optx.RESULTS.successful,
            optx.RESULTS.nonlinear_max_steps_reached,
        )
        return finish(unravel(y), result, stats, options)

    return jax.vmap(finish_step)(y, dict(stats))
