"""The steps of a block, all at once: Newton's method on the whole trajectory."""

import functools as ft
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
from .._misc import accumulation_dtype, all_finite, num_unknowns, ravel, two_norm
from .._solver.as_fixed_point import is_rounding
from .._solver.measure import measure
from .base import AbstractImplicitLayer, AbstractResidualLayer, solve_unknowns
from .path import Path
from .sequential import ScanInputs
from .times import replace_where, stay_if_still, with_step_size


# Newton's method takes five to seven steps where it is of use at all.
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

    def equation(self, y):
        _, unravel = ravel(self.like)
        return self.layer.equation(unravel(y), self.t, self.args)

    def __call__(self, z, y):
        """The images of the unknowns, and the new state, given the old one."""
        equation = self.equation(y)
        _, unravel = ravel(equation.guess)
        image = equation.cell(unravel(z), equation.x)
        return ravel(image)[0], ravel(equation.new_state(unravel(z)))[0]

    def guess(self, y):
        return ravel(self.equation(y).guess)[0]

    def judge(self, z, image, new_z, y, new_y):
        """The residual, and whether it meets its tolerance; over their tolerances the
        larger of the steps of the unknowns and of the new state; and whether both are
        lost in rounding.
        """
        (old, after), (_, unravel_y) = y, ravel(self.like)
        equation = self.equation(old)
        _, unravel = ravel(equation.guess)
        size, steps = unravel_y(old), []
        for before, then, scale in (
            (unravel(z), unravel(new_z), equation.scale(size)),
            (unravel_y(after), unravel_y(new_y), size),
        ):
            solver, _ = self.layer.options.or_defaults(before, scale)
            error = measure(solver, before, then).error
            steps.append((error, is_rounding(before, then)))
        solver, _ = self.layer.options.or_defaults(equation.guess, equation.scale(size))
        measured = measure(solver, unravel(z), unravel(image))
        (error_z, rests_z), (error_y, rests_y) = steps
        error, at_rest = jnp.maximum(error_z, error_y), rests_z & rests_y
        return measured.residual, measured.converged, error, at_rest


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
    return jnp.concatenate([start[None], y])[:-1]


def _change(unknowns: Unknowns, inputs: ScanInputs) -> Unknowns:
    """How far all unknowns are from their images."""
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
        dtype = p.dtype
        p, q = p.astype(self.pivot.dtype), q.astype(self.pivot.dtype)
        own = solve(self.pivot, p[..., None])[..., 0]
        y = recur(self.propagate, q + apply(self.advance, own))
        before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])
        z = own + apply(self.follow, before)
        return Unknowns(z.astype(dtype), y.astype(dtype))

    def solve_transposed(self, p: Array, q: Array) -> Unknowns:
        dtype = p.dtype
        p, q = p.astype(self.pivot.dtype), q.astype(self.pivot.dtype)
        transpose = lambda matrices: jnp.swapaxes(matrices, -1, -2)
        # What the next step makes of this one's state.
        later = lambda x: jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])
        q = q + later(apply(transpose(self.follow), p))
        v = recur(later(transpose(self.propagate)), q, reverse=True)
        p = p + apply(transpose(self.advance), v)
        z = solve(transpose(self.pivot), p[..., None])[..., 0]
        return Unknowns(z.astype(dtype), v.astype(dtype))


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
    # There is no factorisation of a matrix in half precision.
    dtype = accumulation_dtype(like.z.dtype)
    columns = jtu.tree_map(lambda x: x.astype(dtype), columns)
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
    error: Float[Array, " steps"]
    converged: Bool[Array, " steps"]
    num_steps: Int[Array, ""]


def _newton(inputs: ScanInputs, max_steps: int) -> _Newton:
    y0, _ = ravel(inputs.y0)
    num_steps = len(inputs.steps.starts)
    y = jnp.broadcast_to(y0, (num_steps, *y0.shape))
    z = _over_steps(inputs, lambda step, y: step.guess(y), y)

    def judge(unknowns, change, new):
        before = _previous(inputs, unknowns.y)
        rows = unknowns.z, unknowns.z + change.z, new.z, (before, unknowns.y), new.y
        return _over_steps(inputs, lambda step, *row: step.judge(*row), *rows)

    def improve(state):
        unknowns = state.unknowns
        change, product = jax.linearize(lambda u: _change(u, inputs), unknowns)
        operator = lambda v: jtu.tree_map(jnp.negative, product(v))
        blocks = _blocks(operator, unknowns)
        new = jtu.tree_map(jnp.add, unknowns, blocks.solve(*change))
        residual, is_solved, error, at_rest = judge(unknowns, change, new)
        # As in `RootAsFixedPoint` one short step is no proof, and less so from a guess
        # that is the same for all steps; and the iterate after it is the better one.
        contracted = error <= 0.5 * state.error
        again = (state.error < 1) & (is_solved & (state.num_steps > 0) | at_rest)
        converged = (error < 1) & (contracted | again)
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
        z = ravel(solution.value)[0]
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
    options = layer.options
    if not is_small(inputs.y0):
        raise ValueError(
            "A `parallel` block factorises the Jacobian of each step, and takes states "
            f"of at most 64 unknowns. Got {num_unknowns(inputs.y0)}."
        )

    def primal(inputs):
        newton = _newton(inputs, min(options.max_steps, _MAX_STEPS))
        return _one_by_one(inputs, newton)

    # What the field closes over may be differentiated as well. (Equinox believes that a
    # plain function closes over nothing, but its arguments do.)
    primal = eqx.filter_closure_convert(primal, inputs)
    structure, _ = eqx.filter_eval_shape(primal, inputs)
    change = eqx.filter_closure_convert(ft.partial(_change), structure, inputs)

    def solve(everything):
        primal, _, inputs = everything[0]
        return primal(inputs)

    def rewrite(unknowns, residual, everything):
        _, change, inputs = everything[0]
        return change(unknowns, inputs)

    unknowns, stats = apply_implicit_rule(
        ImplicitAdjoint(),
        solve,
        rewrite,
        ((primal, change, inputs),),
        _linear_solve,
        exact=True,
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
