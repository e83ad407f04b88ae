"""The equations of all steps of a trajectory, between flat arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._custom_types import Vector
from .._misc import ravel
from .._solver.as_fixed_point import is_rounding
from .._solver.measure import measure
from .base import AbstractImplicitLayer, StepEquation
from .sequential import ScanInputs
from .times import replace_where, with_step_size


class Unknowns(NamedTuple):
    """Of all steps: what their equations are solved for, and the states after them."""

    z: Float[Array, "steps unknowns"]
    y: Float[Array, "steps size"]


def ravel_unknowns(
    z: PyTree[Array], y: PyTree[Array]
) -> tuple[Vector, Callable[[Vector], PyTree[Array]]]:
    """As `ravel`, but where the unknowns are stages of the state `y`, one stage after
    the other.
    """
    if not _are_stages(z, y):
        return ravel(z)
    stages = jax.vmap(lambda stage: ravel(stage)[0])(z)
    _, unravel = ravel(y)
    return stages.reshape(-1), lambda v: jax.vmap(unravel)(v.reshape(stages.shape))


def are_states(z: PyTree[Any], y: PyTree[Any]) -> bool:
    """Whether the unknowns of a step are a state, or one for each stage."""
    return _are_stages(z, y) or _shapes(z) == _shapes(y)


def _are_stages(z, y):
    number = {leaf.shape[:1] for leaf in jtu.tree_leaves(z)}
    stages = lambda leaf: jax.ShapeDtypeStruct((*max(number), *leaf.shape), leaf.dtype)
    return len(number) == 1 and _shapes(z) == _shapes(jtu.tree_map(stages, y))


def _shapes(tree):
    return jtu.tree_map(jnp.shape, tree)


class Step(eqx.Module):
    """The equation of one step."""

    layer: AbstractImplicitLayer
    t: Any
    args: PyTree[Any]
    like: PyTree[Array]

    def equation(self, y: Array) -> StepEquation:
        _, unravel = ravel(self.like)
        return self.layer.equation(unravel(y), self.t, self.args)

    def __call__(self, z: Array, y: Array) -> tuple[Array, Array]:
        """The images of the unknowns, and the new state, given the old one."""
        equation = self.equation(y)
        _, unravel = ravel_unknowns(equation.guess, self.like)
        image = equation.cell(unravel(z), equation.x)
        return self.ravel(image), ravel(equation.new_state(unravel(z)))[0]

    def ravel(self, z: PyTree[Array]) -> Array:
        return ravel_unknowns(z, self.like)[0]

    def guess(self, y: Array) -> Array:
        return self.ravel(self.equation(y).guess)

    def judge(self, z, image, new_z, y, new_y):
        """The residual, and whether it meets its tolerance; over their tolerances the
        larger of the steps of the unknowns and of the new state; and whether both are
        lost in rounding.
        """
        (old, after), (_, unravel_y) = y, ravel(self.like)
        equation = self.equation(old)
        _, unravel = ravel_unknowns(equation.guess, self.like)
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


def over_steps(inputs: ScanInputs, function: Any, *rows: Any) -> Any:
    """Maps `function(step, *row)` over all steps."""
    at = lambda own, row: function(_step(inputs, own), *row)
    return jax.vmap(at)(_rows(inputs), rows)


def step_at(inputs: ScanInputs, k: Any) -> Step:
    return _step(inputs, jtu.tree_map(lambda x: x[k], _rows(inputs)))


def _rows(inputs):
    return inputs.stack, inputs.steps.starts, inputs.steps.lengths


def _step(inputs, row):
    own, t, length = row
    layer = with_step_size(eqx.combine(own, inputs.shared), length)
    assert isinstance(layer, AbstractImplicitLayer)
    return Step(layer, t, inputs.args, inputs.y0)


def states_before(inputs: ScanInputs, y: Array) -> Array:
    start, _ = ravel(inputs.y0)
    return jnp.concatenate([start[None], y])[:-1]


def change(unknowns: Unknowns, inputs: ScanInputs) -> Unknowns:
    """How far all unknowns are from their images."""
    before = states_before(inputs, unknowns.y)
    z, y = over_steps(inputs, lambda step, z, y: step(z, y), unknowns.z, before)
    return Unknowns(z - unknowns.z, y - unknowns.y)


def keep_still(inputs: ScanInputs, y: Array) -> Array:
    """After steps of length zero the state is that before them, to the bit."""
    lengths = inputs.steps.lengths
    if lengths is None:
        return y
    start, _ = ravel(inputs.y0)
    index = jnp.arange(1, len(lengths) + 1)
    last_moved = lax.cummax(jnp.where(lengths == 0, 0, index))
    before = jnp.concatenate([start[None], y])[last_moved]
    return replace_where((lengths == 0)[:, None], before, y)
