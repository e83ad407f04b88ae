import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import directional_difference, random_like, tree_dot


LAYERS = {
    "Verlet": eqi.VerletLayer,
    "RevNet": eqi.RevNetLayer,
    "leapfrog": eqi.LeapfrogLayer,
    "midpoint": eqi.MidpointLayer,
}
TWO_STEP = ("leapfrog", "midpoint")


class Partitioned(eqx.Module):
    weight: jax.Array

    def __call__(self, t, y, args):
        y, z = y
        first, second = jnp.tanh(self.weight @ z + t), jnp.sin(self.weight.T @ y)
        return first, args * second


class Plain(eqx.Module):
    weight: jax.Array

    def __call__(self, t, y, args):
        return args * jnp.tanh(self.weight @ y) * jnp.cos(t)


def _layer(name, key, step_size=0.1):
    weight = jr.normal(key, (3, 3))
    field = Plain(weight) if name in TWO_STEP else Partitioned(weight)
    return LAYERS[name](field, step_size)


def _state(key):
    return tuple(jr.normal(key, (2, 3)))


@pytest.mark.parametrize("name", LAYERS)
def test_steps_by_its_formula(name, getkey):
    layer, h, t = _layer(name, getkey()), 0.1, 0.4
    y, z = _state(getkey())
    field = lambda t, *y: layer.vector_field(t, y[0] if len(y) == 1 else y, 1.3)
    if name == "Verlet":
        half = y + h / 2 * field(t, y, z)[0]
        new = z + h * field(t + h / 2, half, z)[1]
        expected = half + h / 2 * field(t + h, half, new)[0], new
    elif name == "RevNet":
        first = y + h * field(t, y, z)[0]
        expected = first, z + h * field(t, first, z)[1]
    elif name == "leapfrog":
        expected = 2 * y - z + h**2 * field(t, y), y
    else:
        expected = z + 2 * h * field(t, y), y
    solution = layer.solve((y, z), t, 1.3)
    assert eqx.tree_equal(solution.value, expected, rtol=1e-13, atol=1e-14)
    assert solution.result == optx.RESULTS.successful
    assert solution.stats["num_steps"] == 0


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_backwards_undoes_one_forwards(name, getkey):
    layer, y = _layer(name, getkey()), _state(getkey())
    back = layer.invert(layer(y, 0.4, 1.3), 0.4, 1.3).value
    assert eqx.tree_equal(back, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_in_a_reversible_block_by_finite_differences(name, getkey):
    layer, y = _layer(name, getkey()), _state(getkey())
    weights = random_like(getkey(), y)

    @eqx.filter_jit
    def loss(point, reversible=True):
        weight, h, y, t0, args = point
        field = type(layer.vector_field)(weight)
        block = eqi.ODEBlock(LAYERS[name](field, h), 5, reversible=reversible)
        return tree_dot(weights, block(y, t0, args))

    point = layer.vector_field.weight, jnp.array(0.1), y, jnp.array(0.4), jnp.array(1.3)
    direction = random_like(getkey(), point)
    expected = directional_difference(loss, point, direction, step=1e-3)
    gradient = jax.jit(jax.grad(loss))(point)
    stored = jax.jit(jax.grad(lambda p: loss(p, False)))(point)
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-8)
    assert eqx.tree_equal(gradient, stored, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_second_order_under_halving(name):
    """On a rotation, but the symplectic Euler method, which is of first."""

    def error(num_steps):
        h = 1 / num_steps
        one, zero = jnp.array(1.0), jnp.array(0.0)
        if name == "leapfrog":
            layer = eqi.LeapfrogLayer(lambda t, y, args: -y, h)
            start, exact = (one, one - h**2 / 2), jnp.cos(1.0)
        elif name == "midpoint":
            rotate = lambda t, y, args: jnp.stack([y[1], -y[0]])
            layer = eqi.MidpointLayer(rotate, h)
            y0 = jnp.array([1.0, 0.0])
            start, exact = (y0, y0 - h * rotate(0.0, y0, None)), jnp.cos(1.0)
        else:
            layer = LAYERS[name](lambda t, y, args: (y[1], -y[0]), h)
            start, exact = (one, zero), jnp.cos(1.0)
        y = eqx.filter_jit(eqi.ODEBlock(layer, num_steps))(start)[0]
        return jnp.abs(jnp.ravel(y)[0] - exact)

    order = jnp.log2(error(40) / error(80))
    assert abs(order - (1 if name == "RevNet" else 2)) < 0.1


def test_verlet_is_stable_up_to_its_limit():
    """Its eigenvalues on a frequency have modulus one up to `h w = 2`."""

    def growth(h):
        block = eqi.ODEBlock(eqi.VerletLayer(lambda t, y, args: (y[1], -y[0]), h), 200)
        states = eqx.filter_jit(block.trajectory)((jnp.array(1.0), jnp.array(0.0)))
        return jnp.max(jnp.abs(states[0]))

    assert growth(1.9) < 5
    assert growth(2.1) > 1e10


def test_a_state_that_is_not_a_pair_is_named(getkey):
    with pytest.raises(ValueError, match="VerletLayer.*two parts"):
        _layer("Verlet", getkey())(jnp.ones(3))
    with pytest.raises(ValueError, match="step_size"):
        _layer("midpoint", getkey(), step_size=0.0)
