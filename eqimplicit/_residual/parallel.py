"""The steps of a block, all at once: Newton's method on the whole trajectory."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._adjoint.implicit import ImplicitAdjoint
from .._adjoint.rules import apply_implicit_rule
from .._layer.base import finish
from .._layer.defaults import is_small
from .._linear_solver.neumann_series import NeumannSeries
from .._linear_solver.recurrence import recur
from .._linear_solver.small import apply, product, solve
from .._misc import all_finite, num_unknowns, ravel
from .._solver.as_fixed_point import is_rounding
from .._solver.measure import measure
from .base import AbstractImplicitLayer, AbstractResidualLayer, solve_unknowns
from .path import Path
from .sequential import ScanInputs
from .times import replace_where, with_step_size


# Newton's method takes five or six steps where it is of use at all.
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


class Unknowns(NamedTuple):
    """Of all steps: what their equations are solved for, and the states after them."""

    z: Float[Array, "steps unknowns"]
    y: Float[Array, "steps size"]


class _Step(eqx.Module):
    """The equation of one step, between flat arrays."""

    layer: AbstractImplicitLayer
    t: Any
    args: PyTree[Any]
    like: PyTree[Array]

    def equation(self, y, z0=None):
        _, unravel = ravel(self.like)
        return self.layer.equation(unravel(y), self.t, self.args, z0)

    def __call__(self, z, y):
        """The images of the unknowns, and the new state, given the old one."""
        equation = self.equation(y)
        _, unravel = ravel(equation.guess)
        image = equation.cell(unravel(z), equation.x)
        return ravel(image)[0], ravel(equation.new_state(unravel(z)))[0]

    def guess(self, y):
        return ravel(self.equation(y).guess)[0]

    def errors(self, z, image, new_z, y):
        """The residual, its error over the tolerance, that of a step, and whether the
        step is lost in rounding.
        """
        equation = self.equation(y)
        _, unravel = ravel(equation.guess)
        _, unravel_y = ravel(self.like)
        scale = equation.scale(unravel_y(y))
        solver, _ = self.layer.options.or_defaults(equation.guess, scale)
        z, image, new_z = unravel(z), unravel(image), unravel(new_z)
        measurement = measure(solver, z, image)
        step_error = measure(solver, z, new_z).error
        at_rest = is_rounding(z, new_z)
        return measurement.residual, measurement.error, step_error, at_rest


def _over_steps(inputs: ScanInputs, function: Any, *rows: Any) -> Any:
    """Maps `function(step, *row)` over all steps."""
    stack, shared, y0, steps, args = inputs

    def at(own, t, length, row):
        layer = with_step_size(eqx.combine(own, shared), length)
        assert isinstance(layer, AbstractImplicitLayer)
        return function(_Step(layer, t, args, y0), *row)

    return jax.vmap(at)(stack, steps.starts, steps.lengths, rows)


def _previous(inputs: ScanInputs, y: Array) -> Array:
    start, _ = ravel(inputs.y0)
    return jnp.concatenate([start[None], y[:-1]])


def _change(unknowns: Unknowns, residual: Any, inputs: Any) -> Unknowns:
    """How far all unknowns are from their images."""
    del residual
    inputs, _ = inputs
    z, y = _over_steps(
        inputs, lambda step, z, y: step(z, y), unknowns.z, _previous(inputs, unknowns.y)
    )
    return Unknowns(z - unknowns.z, y - unknowns.y)


class _Blocks(NamedTuple):
    r"""The Jacobian of a step: with $P = I - \partial z / \partial z$, the matrix
    $P^{-1} \partial z / \partial y$, the derivative of the new state by the unknowns,
    and that by the old state, with the unknowns following it.
    """

    pivot: Float[Array, "steps unknowns unknowns"]
    follow: Float[Array, "steps unknowns size"]
    advance: Float[Array, "steps size unknowns"]
    propagate: Float[Array, "steps size size"]

    def solve(self, p: Array, q: Array) -> Unknowns:
        """The unknowns of which the operator is `(p, q)`."""
        own = solve(self.pivot, p[..., None])[..., 0]
        y = recur(self.propagate, q + apply(self.advance, own))
        before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])
        return Unknowns(own + apply(self.follow, before), y)

    def solve_transposed(self, p: Array, q: Array) -> Unknowns:
        transpose = lambda matrices: jnp.swapaxes(matrices, -1, -2)
        # What the next step makes of this one's state.
        later = lambda x: jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])
        q = q + later(apply(transpose(self.follow), p))
        v = recur(later(transpose(self.propagate)), q, reverse=True)
        p = p + apply(transpose(self.advance), v)
        return Unknowns(solve(transpose(self.pivot), p[..., None])[..., 0], v)


def _blocks(operator: Any, like: Unknowns) -> _Blocks:
    """By products of `I - J`: a step sees its own unknowns and the state before it, so
    that one product gives one column of each.
    """
    num_steps, num_unknowns = like.z.shape
    size = like.y.shape[-1]

    def column(k):
        entries = jax.nn.one_hot(k, num_unknowns + size, dtype=like.z.dtype)
        rows = jnp.broadcast_to(entries, (num_steps, num_unknowns + size))
        return operator(Unknowns(rows[:, :num_unknowns], rows[:, num_unknowns:]))

    columns = jax.vmap(column, out_axes=-1)(jnp.arange(num_unknowns + size))
    pivot, minus_follow = jnp.split(columns.z, [num_unknowns], axis=-1)
    minus_advance, rest = jnp.split(columns.y, [num_unknowns], axis=-1)
    follow = solve(pivot, -minus_follow)
    direct = jnp.eye(size, dtype=rest.dtype)[None] - rest
    propagate = direct - product(minus_advance, follow)
    return _Blocks(pivot, follow, -minus_advance, propagate)


def _linear_solve(operator: Any, vector: Unknowns) -> Unknowns:
    flat, unravel = ravel(vector)
    blocks = _blocks(operator, vector)
    return unravel(
        lax.custom_linear_solve(
            lambda v: ravel(operator(unravel(v)))[0],
            flat,
            solve=lambda _, v: ravel(blocks.solve(*unravel(v)))[0],
            transpose_solve=lambda _, v: ravel(blocks.solve_transposed(*unravel(v)))[0],
        )
    )


class _Newton(NamedTuple):
    unknowns: Unknowns
    residual: Float[Array, " steps"]
    step_error: Float[Array, " steps"]
    converged: Bool[Array, " steps"]
    num_steps: Int[Array, ""]


def _newton(inputs: ScanInputs, max_steps: int) -> _Newton:
    y0, _ = ravel(inputs.y0)
    num_steps = len(inputs.steps.starts)
    y = jnp.broadcast_to(y0, (num_steps, *y0.shape))
    z = _over_steps(inputs, lambda step, y: step.guess(y), y)

    def measure_step(unknowns, change, new):
        rows = unknowns.z, unknowns.z + change.z, new.z, _previous(inputs, unknowns.y)
        return _over_steps(inputs, lambda step, *row: step.errors(*row), *rows)

    def improve(state):
        unknowns = state.unknowns
        change, product = jax.linearize(
            lambda u: _change(u, None, (inputs, None)), unknowns
        )
        operator = lambda v: jtu.tree_map(jnp.negative, product(v))
        blocks = _blocks(operator, unknowns)
        new = jtu.tree_map(jnp.add, unknowns, blocks.solve(*change))
        residual, error, step_error, at_rest = measure_step(unknowns, change, new)
        # As in `RootAsFixedPoint`: one short step is no proof, and the iterate after it
        # is the better one.
        contracted = step_error <= 0.5 * state.step_error
        at_rest = at_rest & (state.step_error < 1)
        converged = (step_error < 1) & ((error < 1) | contracted | at_rest)
        return _Newton(new, residual, step_error, converged, state.num_steps + 1)

    def goes_on(state):
        finite = jnp.all(jnp.isfinite(state.residual))
        return ~jnp.all(state.converged) & finite & (state.num_steps < max_steps)

    zero = jnp.zeros_like(y[:, 0])
    # Before the first step nothing has moved.
    start = _Newton(Unknowns(z, y), zero, zero, zero > 0, jnp.array(0))
    return lax.while_loop(goes_on, improve, start)


def _one_by_one(inputs: ScanInputs, start: _Newton) -> tuple[Unknowns, dict[str, Any]]:
    """What Newton's method has found, or if that is not the whole trajectory, what the
    steps find one after the other.
    """
    stack, shared, y0, steps, args = inputs
    num_steps = len(steps.starts)
    is_found = jnp.all(start.converged) & all_finite(start.unknowns)

    def goes_on(carry):
        k, *_ = carry
        return ~is_found & (k < num_steps)

    def make_step(carry):
        k, path, unknowns, stats = carry
        own, t, length = jtu.tree_map(
            lambda x: x[k], (stack, steps.starts, steps.lengths)
        )
        layer: Any = with_step_size(eqx.combine(own, shared), length)
        equation = layer.equation(path.y, t, args, path.extrapolate(length))
        solution = solve_unknowns(equation, path.y, layer.options)
        y = equation.new_state(solution.value)
        unknowns = Unknowns(
            unknowns.z.at[k].set(ravel(solution.value)[0]),
            unknowns.y.at[k].set(ravel(y)[0]),
        )
        found = (solution.result == optx.RESULTS.successful) & all_finite(y)
        new = {
            "num_steps": solution.stats["num_steps"],
            "residual": solution.stats["residual"],
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
    options = layer.options
    if not is_small(inputs.y0):
        raise ValueError(
            "A `parallel` block factorises the Jacobian of each step, and takes states "
            f"of at most 64 unknowns. Got {num_unknowns(inputs.y0)}."
        )

    def primal(inputs):
        inputs, _ = inputs
        newton = _newton(inputs, min(options.max_steps, _MAX_STEPS))
        return _one_by_one(inputs, newton)

    unknowns, stats = apply_implicit_rule(
        ImplicitAdjoint(), primal, _change, (inputs,), _linear_solve, exact=True
    )
    y = _keep_still(inputs, unknowns.y)
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


def _keep_still(inputs: ScanInputs, y: Array) -> Array:
    """After steps of length zero the state is that before them, to the bit."""
    lengths = inputs.steps.lengths
    if lengths is None:
        return y
    start, _ = ravel(inputs.y0)
    index = jnp.arange(1, len(lengths) + 1)
    last_moved = lax.cummax(jnp.where(lengths == 0, 0, index))
    before = jnp.concatenate([start[None], y])[last_moved]
    return replace_where((lengths == 0)[:, None], before, y)
