"""The equations of all steps of a trajectory, between flat arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

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
    if _shapes(z) == _shapes(y):
        return False
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

    def judge(
        self, y: Array, now: Unknowns, image: Unknowns, new: Unknowns
    ) -> "Judgement":
        """Of the unknowns `now`, given the state before the step, the images of `now`,
        and the unknowns that follow.
        """
        _, unravel_y = ravel(self.like)
        equation = self.equation(y)
        _, unravel_z = ravel_unknowns(equation.guess, self.like)
        size, parts = unravel_y(y), []
        for unravel, rows, scale in (
            (unravel_z, (now.z, image.z, new.z), equation.scale(size)),
            (unravel_y, (now.y, image.y, new.y), size),
        ):
            start, target, end = map(unravel, rows)
            solver, _ = self.layer.options.or_defaults(start, scale)
            measured = measure(solver, start, target)
            parts.append(
                Judgement(
                    measured.residual,
                    measured.converged,
                    measure(solver, start, end).error,
                    is_rounding(start, end),
                )
            )
        of_z, of_y = parts
        return Judgement(
            of_z.residual,
            of_z.is_solved & of_y.is_solved,
            jnp.maximum(of_z.error, of_y.error),
            of_z.at_rest & of_y.at_rest,
        )


class Judgement(NamedTuple):
    """The residual of a step, and whether it meets its tolerance; the length of the
    step of Newton's method over its tolerance, and whether that is lost in rounding.
    """

    residual: Float[Array, "..."]
    is_solved: Bool[Array, "..."]
    error: Float[Array, "..."]
    at_rest: Bool[Array, "..."]


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
