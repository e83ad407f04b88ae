from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import directional_difference, random_like, slow_but, tree_dot


class Field(eqx.Module):
    weight: jax.Array

    def __call__(self, t, y, args):
        return jnp.tanh(self.weight @ y) * jnp.cos(t)


def _layer(key, theta=0.5, step_size=0.2):
    solver = eqi.RootAsFixedPoint(optx.Newton(1e-13, 1e-13))
    field = Field(jr.normal(key, (3, 3)))
    return eqi.ThetaLayer(field, theta, step_size, solver=solver)


def _stacked(key, num_steps):
    layers = eqx.filter_vmap(_layer)(jr.split(key, num_steps))
    return eqi.ODEBlock(layers, num_steps, stacked=True)


@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("theta", (0.0, 0.5))
def test_is_a_layer_after_the_other(stacked, theta, getkey):
    num_steps = 4
    y = jr.normal(getkey(), (3,))
    keys = jr.split(getkey(), num_steps)
    make = lambda key: _layer(key, theta)
    if stacked:
        layers = [make(key) for key in keys]
        block = eqi.ODEBlock(eqx.filter_vmap(make)(keys), num_steps, stacked=True)
    else:
        layers = [make(keys[0])] * num_steps
        block = eqi.ODEBlock(layers[0], num_steps)

    @eqx.filter_jit
    def one_by_one(layers, y):
        states = [y]
        for k, layer in enumerate(layers):
            states.append(layer(states[-1], 0.3 + 0.2 * k))
        return jnp.stack(states)

    expected = one_by_one(layers, y)
    solution = eqx.filter_jit(block.solve)(y, 0.3)
    assert jnp.allclose(solution.value, expected, rtol=1e-11, atol=1e-12)
    assert jnp.all(solution.result == optx.RESULTS.successful)
    assert solution.stats["num_steps"].shape == (num_steps,)
    assert jnp.array_equal(eqx.filter_jit(block.trajectory)(y, 0.3), solution.value)
    assert jnp.array_equal(eqx.filter_jit(block)(y, 0.3), solution.value[-1])


def test_derivatives_of_stacked_layers_by_finite_differences(getkey):
    block, y = _stacked(getkey(), 4), jr.normal(getkey(), (3,))
    weights = jr.normal(getkey(), (5, 3))

    @eqx.filter_jit
    def loss(point):
        weight, y, t0 = point
        of_weight = eqx.tree_at(lambda b: b.layer.vector_field.weight, block, weight)
        return jnp.sum(weights * of_weight.trajectory(y, t0))

    point = block.layer.vector_field.weight, y, jnp.array(0.3)
    direction = random_like(getkey(), point)
    expected = directional_difference(loss, point, direction, step=1e-3)
    tangent = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,))[1])(point, direction)
    gradient = jax.jit(jax.grad(loss))(point)
    assert jnp.allclose(tangent, expected, rtol=1e-8)
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-8)


def test_the_program_does_not_grow_with_the_number_of_steps(getkey):
    layer = _layer(getkey())

    def size(num_steps):
        block = eqi.ODEBlock(layer, num_steps)
        gradient = jax.grad(lambda y: jnp.sum(block(y)))
        return str(jax.make_jaxpr(gradient)(jnp.ones(3))).count(" = ")

    assert size(1000) == size(10)


def test_the_parabola_through_the_last_states_saves_evaluations(getkey):
    block = eqi.ODEBlock(
        eqi.ThetaLayer(Field(jr.normal(getkey(), (3, 3))), 0.5, 0.1), 50
    )
    y = jr.normal(getkey(), (3,))

    @eqx.filter_jit
    def from_the_state(y):
        def step(y, t):
            solution = block.layer.solve(y, t)
            return solution.value, solution.stats["num_steps"]

        return jax.lax.scan(step, y, block.times()[:-1])[1]

    steps = eqx.filter_jit(block.solve)(y).stats["num_steps"]
    assert jnp.sum(steps) < jnp.sum(from_the_state(y))


def test_one_bad_step_is_flagged(getkey):
    def field(t, y, args):
        return jnp.where(t > 0.4, jnp.nan, -y)

    block = eqi.ODEBlock(eqi.ThetaLayer(field, 0.5, 0.2), 5)
    solution = eqx.filter_jit(block.solve)(jnp.ones(2))
    successful = solution.result == optx.RESULTS.successful
    assert successful.tolist() == [True, True, False, False, False]


def test_the_field_of_a_repeated_layer_goes_into_diffrax(getkey):
    block, y = eqi.ODEBlock(_layer(getkey(), step_size=0.005), 200), jnp.ones(3)
    assert block.jump_times().shape == (0,)
    expected = diffrax.diffeqsolve(
        diffrax.ODETerm(block.vector_field),
        diffrax.Dopri5(),
        0.0,
        1.0,
        0.01,
        y,
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
    )
    assert expected.ys is not None
    # The midpoint rule is of second order.
    assert jnp.allclose(eqx.filter_jit(block)(y), expected.ys[0], atol=1e-4)


def test_the_field_of_stacked_layers_jumps_between_steps(getkey):
    block = _stacked(getkey(), 4)
    y, t0 = jr.normal(getkey(), (3,)), 0.7
    jumps = block.jump_times(t0)
    assert jnp.allclose(jumps, t0 + 0.2 * jnp.arange(1.0, 4.0), rtol=1e-15)
    assert jnp.allclose(block.times(t0)[jnp.array([0, -1])], jnp.array([t0, t0 + 0.8]))
    starts = block.times(t0)[:-1]
    for k, t in enumerate(starts):
        own = jax.tree.map(lambda x: x[k], block.layer.vector_field)
        for time in (t, t + 0.19):
            actual = block.vector_field(time, y, None, t0)
            assert jnp.allclose(actual, own(time, y, None), rtol=1e-12)


def test_steps_of_their_own_length(getkey):
    sizes = jnp.array([0.1, 0.3, 0.2])
    make = lambda key, h: _layer(key, step_size=h)
    layers = eqx.filter_vmap(make)(jr.split(getkey(), 3), sizes)
    block = eqi.ODEBlock(layers, 3, stacked=True)
    assert jnp.allclose(block.times(1.0), jnp.array([1.0, 1.1, 1.4, 1.6]), rtol=1e-15)


@pytest.mark.parametrize("stacked", slow_but((False, True), True))
def test_the_gradient_of_a_reversible_block_is_that_of_stored_states(stacked, getkey):
    stored = _stacked(getkey(), 6)
    if not stacked:
        stored = eqi.ODEBlock(_layer(getkey()), 6)
    block = eqi.ODEBlock(stored.layer, 6, stacked, reversible=True)
    field = lambda t, y, args: args["rate"] * y * jnp.sin(t)
    with_args = eqi.ODEBlock(
        eqi.ThetaLayer(field, 0.5, 0.2, solver=block.layer.solver), 6, reversible=True
    )
    y, weights = jr.normal(getkey(), (2, 3))

    def loss(point, block):
        layer, y, t0, args = point
        block = eqx.tree_at(lambda b: b.layer, block, layer)
        return jnp.vdot(weights, block(y, t0, args))

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    args = {"rate": jnp.array(0.7), "flag": 3, "unused": None}
    for reversible in (block, with_args):
        point = reversible.layer, y, jnp.array(0.3), args
        other = eqi.ODEBlock(reversible.layer, 6, reversible.stacked)
        actual, expected = gradient(point, reversible), gradient(point, other)
        assert eqx.tree_equal(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("all_optimisations")
def test_the_gradient_of_a_reversible_block_stores_no_states(getkey):
    layer, y = _layer(getkey(), step_size=0.01), jr.normal(getkey(), (3,))

    def memory(num_steps, reversible):
        block = eqi.ODEBlock(layer, num_steps, reversible=reversible)
        gradient = jax.jit(jax.grad(lambda y: jnp.sum(block(y))))
        return gradient.lower(y).compile().memory_analysis().temp_size_in_bytes

    # The times are an array of their own.
    grown = memory(2000, True) - memory(20, True)
    assert grown <= 4 * 8 * 2000
    assert memory(2000, False) - memory(20, False) > 3 * grown


def test_a_way_back_that_is_lost_gives_nan(getkey):
    """Implicit Euler damps a stiff field, so that nothing is left to go back from."""
    layer = eqi.ThetaLayer(lambda t, y, args: -50.0 * (y - args), 1.0, 0.1)
    gradient = jax.jit(
        jax.grad(
            lambda y, a, reversible: eqi.ODEBlock(layer, 30, reversible=reversible)(
                y, 0.0, a
            ).sum(),
            (0, 1),
        ),
        static_argnums=2,
    )
    y, args = jr.normal(getkey(), (3,)), jnp.array([0.3, 0.2, 0.1])
    assert all(jnp.all(jnp.isnan(g)) for g in gradient(y, args, True))
    assert all(jnp.all(jnp.isfinite(g)) for g in gradient(y, args, False))


def test_bad_arguments_are_named(getkey):
    with pytest.raises(ValueError, match="num_steps"):
        eqi.ODEBlock(_layer(getkey()), 0)
    with pytest.raises(TypeError, match="layer"):
        eqi.ODEBlock(lambda y: y, 3)
    with pytest.raises(ValueError, match=r"weight.*\(3, 3\)"):
        eqi.ODEBlock(_layer(getkey()), 4, stacked=True)


def test_a_fast_first_step_does_not_lead_to_another_root():
    """The equation of a step is quadratic: from too far off, its other root wins."""
    layer = eqi.ThetaLayer(lambda t, y, args: -20.0 * y**2, 1.0, 0.1)
    y = jnp.array([1.0])
    states = eqx.filter_jit(eqi.ODEBlock(layer, 4).trajectory)(y)
    for expected in states[1:]:
        y = (jnp.sqrt(1 + 8 * y) - 1) / 4
        assert jnp.allclose(expected, y, rtol=1e-6)


def test_a_reversible_block_may_start_at_zero(getkey):
    layer = _layer(getkey())
    inner = layer.vector_field
    field = lambda t, y, args: inner(t, y, None) + jnp.cos(t + args)
    layer = eqi.ThetaLayer(field, 0.5, 0.1, solver=layer.solver)

    @eqx.filter_jit
    def gradient(reversible):
        block = eqi.ODEBlock(layer, 10, reversible=reversible)
        loss = lambda y, a: jnp.sum(jnp.sin(block(y, 0.0, a)))
        return jax.grad(loss, (0, 1))(jnp.zeros(3), jnp.array(0.3))

    assert eqx.tree_equal(gradient(True), gradient(False), rtol=1e-9, atol=1e-11)


def test_a_layer_that_cannot_step_backwards_is_no_reversible_block():
    class Forwards(eqi.AbstractResidualLayer):
        vector_field: Callable
        step_size: float = 1.0
        solve = eqi.ThetaLayer.solve

    layer = Forwards(lambda t, y, args: -y)
    with pytest.raises(NotImplementedError, match="Forwards cannot step backwards"):
        layer.invert(jnp.ones(1))
    with pytest.raises(ValueError, match="a Forwards has no `invert`"):
        eqi.ODEBlock(layer, 3, reversible=True)
