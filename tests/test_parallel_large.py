"""Parallel blocks of more unknowns than a Jacobian is factorised for."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
import pytest

import eqimplicit as eqi
from eqimplicit._residual.all_steps import Unknowns
from eqimplicit._residual.bidiagonal import blocks as dense_blocks, diagonal_blocks

from .helpers import directional_difference, relative_error
from .test_block_properties import PRECISIONS
from .test_parallel import blocks, make
from .test_times import cast, IS_STILL, TIMES


SIZE = 70


class Field(eqx.Module):
    """Of a state of two parts, in which everything depends on everything."""

    rates: jax.Array
    mix: jax.Array

    def __init__(self, key, size=SIZE):
        self.rates = jnp.linspace(0.5, 20, size)
        self.mix = jr.normal(key, (size, size)) / size**0.5

    def __call__(self, t, y, args):
        first, second = y
        flat = jnp.concatenate([first.reshape(-1), second])
        forcing = jnp.sin(jnp.asarray(t).astype(flat.dtype))
        slope = jnp.tanh(self.mix @ flat) + forcing - self.rates * flat
        return slope[: first.size].reshape(first.shape), slope[first.size :]


def loss_of(solution):
    return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jtu.tree_leaves(solution.value))


@pytest.mark.parametrize(
    "name, precision",
    (
        ("theta 0.5, midpoint", "float64"),
        *(
            pytest.param(name, precision, marks=pytest.mark.slow)
            for name, precision in (
                ("Gauss 2", "float32"),
                ("theta 0.5, midpoint", "float32"),
                ("theta 1, trapezoid", "float64"),
                ("Gauss 2", "float64"),
            )
        ),
    ),
)
def test_values_and_gradients_are_those_of_steps_in_turn(name, precision, getkey):
    dtype = PRECISIONS[precision]
    y0 = cast((jr.normal(getkey(), (4, 10)), jr.normal(getkey(), (30,))), dtype)
    field, ts = cast(Field(getkey()), dtype), jnp.array(TIMES, dtype)

    @jax.jit
    def run(point):
        def loss(point, parallel):
            field, y0, ts = point
            block = blocks(make(name, field), 1)[parallel]
            solution = block.solve(y0, ts=ts)
            return loss_of(solution), solution

        return [
            jax.value_and_grad(loss, has_aux=True)(point, parallel)
            for parallel in (False, True)
        ]

    ((_, in_turn), expected), ((_, at_once), actual) = run((field, y0, ts))
    assert jnp.all(at_once.result == optx.RESULTS.successful)
    assert jnp.all(at_once.stats["in_parallel"])
    # The default tolerances of Newton's method with GMRES, and what ten steps add up.
    tolerance = 1e-7 if precision == "float64" else 2e-5
    assert relative_error(at_once.value, in_turn.value) < tolerance
    for leaf, other in zip(jtu.tree_leaves(actual), jtu.tree_leaves(expected)):
        assert leaf.dtype == dtype
        assert relative_error(leaf, other) < 10 * tolerance
    for leaf in jtu.tree_leaves(at_once.value):
        steps = leaf[1:][IS_STILL] == leaf[:-1][IS_STILL]
        assert jnp.all(steps)


@pytest.mark.slow
def test_second_derivatives_and_batches(getkey):
    field, y0 = Field(getkey()), jr.normal(getkey(), (2, SIZE))
    block = eqi.ODEBlock(make("theta 0.5, midpoint", field), 6, parallel=True)

    def loss(scale, y):
        y = scale * y
        return loss_of(block.solve((y[:40].reshape(4, 10), y[40:])))

    @jax.jit
    def run(scale):
        in_turn = [jax.grad(loss)(scale, y) for y in y0]
        batched = jax.vmap(jax.grad(loss), (None, 0))(scale, y0)
        forwards = jax.jacfwd(loss)(scale, y0[0])
        return jnp.stack(in_turn), batched, forwards, jax.hessian(loss)(scale, y0[0])

    scale = jnp.array(0.8)
    in_turn, batched, forwards, second = run(scale)
    assert jnp.allclose(batched, in_turn, rtol=1e-9)
    assert jnp.allclose(forwards, in_turn[0], rtol=1e-9)
    one = jnp.ones(())
    first = directional_difference(jax.jit(lambda s: loss(s, y0[0])), scale, one, 1e-3)
    assert jnp.allclose(forwards, first, rtol=1e-8)
    gradient = jax.jit(jax.grad(lambda s: loss(s, y0[0])))
    assert jnp.allclose(second, directional_difference(gradient, scale, one, 1e-3))


def test_the_blocks_of_components_by_themselves(getkey):
    """Where a component depends on itself alone the estimate is exact."""
    rates = jnp.linspace(0.1, 3.0, 5)
    num_steps, num_stages, size = 4, 2, 5
    a = jr.normal(getkey(), (num_stages + 1, num_stages + 1))

    def operator(unknowns):
        z, y = unknowns
        before = jnp.concatenate([jnp.zeros((1, size)), y[:-1]])
        slots = jnp.concatenate(
            [z.reshape(num_steps, num_stages, size), before[:, None]], 1
        )
        image = jnp.einsum("ij,kjn->kin", a, slots) * rates[None, None]
        return Unknowns(z - image[:, :-1].reshape(z.shape), y - image[:, -1])

    vector = Unknowns(
        jr.normal(getkey(), (num_steps, num_stages * size)),
        jr.normal(getkey(), (num_steps, size)),
    )

    def there_and_back(vector):
        for make_blocks in (dense_blocks, diagonal_blocks):
            own = make_blocks(operator, vector)
            transpose = jax.linear_transpose(operator, vector)
            yield operator(own.solve(vector))
            yield transpose(own.solve_transposed(vector))[0]

    for again in jax.jit(lambda v: list(there_and_back(v)))(vector):
        assert relative_error(again, vector) < 1e-12


def allen_cahn(diffusion):
    def field(t, y, args):
        laplacian = jnp.roll(y, 1) + jnp.roll(y, -1) - 2 * y
        return diffusion * SIZE**2 * laplacian + y - y**3

    return field


def test_what_is_not_found_at_once_is_found_step_by_step(getkey):
    """Fronts between unstable states, by long steps: neither the states nor the
    gradient come out of the estimate of the diagonal.
    """
    y0 = jr.normal(getkey(), (SIZE,))

    @jax.jit
    def run(diffusion):
        def loss(diffusion, parallel):
            layer = eqi.ThetaLayer(allen_cahn(diffusion), 1.0, 0.1)
            solution = eqi.ODEBlock(layer, 150, parallel=parallel).solve(y0)
            return loss_of(solution), solution

        return [
            jax.value_and_grad(loss, has_aux=True)(diffusion, parallel)
            for parallel in (False, True)
        ]

    ((_, in_turn), expected), ((_, at_once), actual) = run(jnp.array(1e-3))
    assert not jnp.any(at_once.stats["in_parallel"])
    assert jnp.all(at_once.result == optx.RESULTS.successful)
    assert relative_error(at_once.value, in_turn.value) < 1e-6
    assert relative_error(actual, expected) < 1e-6


def test_a_linear_solve_that_stagnates_is_no_solution(getkey):
    """Rotations, on which GMRES with a short memory makes no progress: a step that it
    leaves short says nothing.
    """
    matrix = jr.normal(getkey(), (SIZE, SIZE)) / SIZE**0.5
    matrix, y0 = matrix - matrix.T, jr.normal(getkey(), (SIZE,))
    field = lambda t, y, speed: speed * (matrix @ y) + jnp.sin(y)

    @jax.jit
    def run(speed):
        solutions = [
            block.solve(y0, args=speed)
            for block in blocks(eqi.ThetaLayer(field, 0.5, 0.1), 6)
        ]
        return [(s.value, s.result == optx.RESULTS.successful) for s in solutions]

    for speed, found in ((30.0, True), (300.0, False)):
        (expected, all_found), (actual, found_too) = run(jnp.array(speed))
        assert jnp.array_equal(all_found, found_too)
        assert bool(jnp.all(found_too)) == found
        if found:
            assert relative_error(actual, expected) < 1e-6


def test_gradients_that_vanish_along_a_trajectory_are_right_in_each_step(getkey):
    weight = jr.normal(getkey(), (SIZE, SIZE)) / SIZE**0.5

    class Field(eqx.Module):
        bias: jax.Array

        def __call__(self, t, y, args):
            return -6 * y + 2 * jnp.tanh(weight @ y + self.bias)

    make_layer = lambda key: eqi.ThetaLayer(Field(jr.normal(key, (SIZE,))), 0.5, 0.2)
    layers = eqx.filter_vmap(make_layer)(jr.split(getkey(), 30))
    y0 = jr.normal(getkey(), (SIZE,))

    @jax.jit
    def run(bias):
        def loss(bias, parallel):
            field = eqx.tree_at(lambda l: l.vector_field.bias, layers, bias)
            block = eqi.ODEBlock(field, 30, stacked=True, parallel=parallel)
            return jnp.sum(block(y0) ** 2)

        return [jax.grad(loss)(bias, parallel) for parallel in (False, True)]

    expected, actual = run(layers.vector_field.bias)
    sizes = jnp.linalg.norm(expected, axis=1)
    assert sizes[0] < 1e-12 * sizes[-1]
    assert jnp.all(jnp.linalg.norm(actual - expected, axis=1) < 1e-7 * sizes)


def test_what_is_left_is_left_to_the_linear_solver_of_the_layer(getkey):
    """On stiff diffusion with long steps, for which the docs advise an LU."""
    y0 = jr.normal(getkey(), (SIZE,))

    def field(t, y, diffusion):
        return diffusion * (jnp.roll(y, 1) + jnp.roll(y, -1) - 2 * y) - y**3

    newton = optx.Newton(1e-10, 1e-10, linear_solver=lx.LU())
    layer = eqi.ThetaLayer(
        field,
        1.0,
        0.1,
        solver=eqi.RootAsFixedPoint(newton, judge_step=True, refine=True),
        adjoint=eqi.ImplicitAdjoint(lx.LU()),
    )

    @jax.jit
    def run(diffusion):
        def loss(diffusion, probe, parallel):
            block = blocks(layer, 10)[parallel]
            return jnp.sum(block(y0, args=diffusion, probe=probe) ** 2)

        probe = eqi.backward_probe()
        return [
            jax.grad(loss, (0, 1))(diffusion, probe, parallel)
            for parallel in (False, True)
        ]

    (expected, _), (actual, status) = run(jnp.array(1e5))
    assert jnp.allclose(actual, expected, rtol=1e-6) and status.found


class Odd(eqi.AbstractImplicitLayer):
    """Whose unknowns are no states."""

    vector_field: object
    step_size: float = 0.1

    is_explicit = False

    @property
    def options(self):
        return eqi.SolveOptions(None, None, 100, False, "Odd")

    def equation(self, y, t=0.0, args=None, z0=None):
        return eqi.StepEquation(
            lambda z, x: z,
            y,
            jnp.zeros(3),
            new_state=lambda z: y,
            scale=lambda size: jnp.ones(3),
        )

    def solve(self, y, t=0.0, args=None, z0=None):
        return self.solve_equation(self.equation(y, t, args, z0), y)


def test_what_is_refused():
    block = eqi.ODEBlock(Odd(lambda t, y, args: -y), 3, parallel=True)
    with pytest.raises(ValueError, match=r"65\) a `parallel` block takes steps"):
        block(jnp.ones(65))


@pytest.mark.parametrize("size", (2, 65))
def test_a_gradient_that_is_not_there_raises_on_demand(size):
    """`I - h J` is zero in the second step."""
    field = lambda t, y, args: jnp.where(t > 0.5, y + 1, -y)
    adjoint = eqi.ImplicitAdjoint(throw=True)
    layer = eqi.ThetaLayer(field, 1.0, 1.0, adjoint=adjoint)
    block = eqi.ODEBlock(layer, 3, parallel=True)
    gradient = eqx.filter_jit(jax.grad(lambda y: jnp.sum(block(y, -1.0))))
    with pytest.raises(RuntimeError, match="backward solve"):
        jax.block_until_ready(gradient(jnp.ones(size)))
