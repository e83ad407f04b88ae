import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqimplicit as eqi

from .helpers import directional_difference, random_like


PROBES = {"Rademacher": jr.rademacher, "Gaussian": jr.normal}


def _diagonal_map(y):
    return {"a": jnp.array([2.0, -3.0]) * y["a"], "b": y["b"] ** 2}


_POINT = {"a": jnp.array([0.3, 0.4]), "b": jnp.array([1.5])}
_DIAGONAL = np.array([2.0, -3.0, 3.0])


def test_rademacher_is_exact_on_diagonal_maps(getkey):
    trace, square = eqi.divergence_and_frobenius(_diagonal_map, _POINT, key=getkey())
    assert jnp.allclose(trace, _DIAGONAL.sum(), rtol=1e-14)
    assert jnp.allclose(square, (_DIAGONAL**2).sum(), rtol=1e-14)


@pytest.mark.parametrize("name", PROBES)
def test_the_diagonal_of_a_diagonal_map_is_exact(name, getkey):
    actual = eqi.jacobian_diagonal(
        _diagonal_map, _POINT, key=getkey(), num_samples=3, probe=PROBES[name]
    )
    assert jnp.allclose(actual["a"], _DIAGONAL[:2], rtol=1e-13)
    assert jnp.allclose(actual["b"], _DIAGONAL[2:], rtol=1e-13)


@pytest.mark.parametrize("name", PROBES)
def test_estimates_are_unbiased_with_the_stated_error(name, getkey):
    matrix, num_samples, repeats = jr.normal(getkey(), (6, 6)), 8, 4000
    keys = jr.split(getkey(), repeats)

    @jax.jit
    @jax.vmap
    def estimate(key):
        return eqi.divergence_and_frobenius(
            lambda y: matrix @ y,
            jnp.ones(6),
            key=key,
            num_samples=num_samples,
            probe=PROBES[name],
        )

    def variance(a):
        s = (a + a.T) / 2
        diagonal = np.sum(np.diag(s) ** 2) if name == "Rademacher" else 0
        return 2 * (np.sum(s**2) - diagonal) / num_samples

    a = np.asarray(matrix)
    exact = (np.trace(a), a), (np.sum(a**2), a @ a.T)
    for estimates, (value, matrix_of_form) in zip(estimate(keys), exact):
        deviation = np.sqrt(variance(matrix_of_form))
        assert abs(np.mean(estimates) - value) < 4 * deviation / np.sqrt(repeats)
        assert np.isclose(np.std(estimates), deviation, rtol=0.1)


def test_parts_and_derivatives(getkey):
    weight, y, key = jr.normal(getkey(), (3, 3)), jr.normal(getkey(), (3,)), getkey()
    fn = lambda w: lambda y: jnp.tanh(w @ y)
    both = eqi.divergence_and_frobenius(fn(weight), y, key=key)
    assert eqi.divergence(fn(weight), y, key=key) == both[0]
    assert eqi.jacobian_frobenius(fn(weight), y, key=key) == both[1]

    @jax.jit
    def loss(point):
        weight, y = point
        trace, square = eqi.divergence_and_frobenius(fn(weight), y, key=key)
        return trace + square

    direction = random_like(getkey(), (weight, y))
    gradient = jax.jit(jax.grad(loss))((weight, y))
    expected = directional_difference(loss, (weight, y), direction, step=1e-3)
    actual = sum(jnp.vdot(a, b) for a, b in zip(gradient, direction))
    assert jnp.allclose(actual, expected, rtol=1e-8)


def test_the_error_of_the_diagonal_shrinks(getkey):
    matrix = jr.normal(getkey(), (6, 6))

    def error(num_samples):
        estimate = lambda key: eqi.jacobian_diagonal(
            lambda y: matrix @ y,
            jnp.ones(6),
            key=key,
            num_samples=num_samples,
            probe=jr.rademacher,
        )
        estimates = jax.vmap(estimate)(jr.split(getkey(), 500))
        return jnp.sqrt(jnp.mean((estimates - jnp.diag(matrix)[None]) ** 2, axis=0))

    off_diagonal = jnp.sum(matrix**2, axis=1) - jnp.diag(matrix) ** 2
    assert jnp.allclose(error(16), jnp.sqrt(off_diagonal / 16), rtol=0.15)


def test_total_variation_is_the_sum_of_squared_differences(getkey):
    stacked = {"w": jr.normal(getkey(), (4, 2, 3)), "n": jnp.arange(4), "f": jnp.tanh}
    w = np.asarray(stacked["w"])
    expected = sum(np.sum((w[k] - w[k - 1]) ** 2) for k in range(1, 4))
    assert jnp.allclose(eqi.total_variation(stacked), expected, rtol=1e-13)
    assert eqi.total_variation(jnp.ones((1, 3))) == 0


class Diagonal(eqx.Module):
    """Its Jacobian is diagonal, with the divergence `2 * sum(rate * y)`."""

    rate: jax.Array

    def __call__(self, t, y, args):
        return self.rate * y**2


def _block(key, stacked):
    make = lambda key: eqi.ThetaLayer(Diagonal(jr.uniform(key, (2,))), 0.5, 0.1)
    if stacked:
        layers = eqx.filter_vmap(make)(jr.split(key, 4))
        return eqi.ODEBlock(layers, 4, stacked=True)
    return eqi.ODEBlock(make(key), 4)


@pytest.mark.parametrize("power", (0.0, 2.0))
@pytest.mark.parametrize("stacked", (False, True))
def test_trajectory_penalty_is_equation_20(stacked, power, getkey):
    block, y0 = _block(getkey(), stacked), jnp.array([0.3, -0.5])
    states = eqx.filter_jit(block.trajectory)(y0)
    actual = eqi.trajectory_penalty(
        block,
        states,
        key=getkey(),
        divergence_weight=0.7,
        jacobian_weight=0.3,
        variation_weight=0.2,
        power=power,
    )
    rates = np.broadcast_to(block.layer.vector_field.rate, (4, 2))
    total = 0.0
    for t in range(5):
        diagonal = 2 * rates[min(t, 3)] * np.asarray(states[t])
        term = 0.7 / 2 * (t / 4) ** power * diagonal.sum()
        term += 0.3 / 4 * (diagonal**2).sum()
        total += term * (0.5 if t in (0, 4) else 1)
    if stacked:
        total += 0.2 / 4 * np.sum(np.diff(rates, axis=0) ** 2)
    assert jnp.allclose(actual, total / 4, rtol=1e-12)


@pytest.mark.parametrize("detach", (False, True))
def test_detached_states_carry_no_gradient(detach, getkey):
    block, key = _block(getkey(), False), getkey()

    def loss(y0, penalty):
        return penalty(block, block.trajectory(y0), key=key, detach=detach)

    trajectory = lambda *args, **kwargs: eqi.trajectory_penalty(
        *args, divergence_weight=1.0, **kwargs
    )
    for penalty in (trajectory, eqi.kinetic_penalty):
        gradient = eqx.filter_jit(jax.grad(loss))(jnp.ones(2), penalty)
        assert jnp.all(gradient == 0) == detach


def test_kinetic_penalty_is_the_integral(getkey):
    block, y0 = _block(getkey(), False), jnp.array([0.3, -0.5])
    states = eqx.filter_jit(block.trajectory)(y0)
    rate = np.asarray(block.layer.vector_field.rate)
    y = np.asarray(states)
    values = 0.7 * np.sum((rate * y**2) ** 2, 1) + 0.3 * np.sum((2 * rate * y) ** 2, 1)
    actual = eqi.kinetic_penalty(
        block, states, key=getkey(), kinetic_weight=0.7, jacobian_weight=0.3
    )
    assert jnp.allclose(actual, np.trapezoid(values, dx=0.1), rtol=1e-12)


@pytest.mark.parametrize("stacked", (False, True))
def test_penalties_on_the_times_of_the_data(stacked, getkey):
    block, y0, key = _block(getkey(), stacked), jnp.array([0.3, -0.5]), getkey()
    weights = dict(divergence_weight=0.3, jacobian_weight=0.7, power=2)

    def penalties(ts):
        t0 = 0.5 if ts is None else 0.0
        states = block.trajectory(y0, t0, ts=ts)
        trajectory = eqi.trajectory_penalty(
            block, states, t0, ts=ts, key=key, **weights
        )
        return trajectory, eqi.kinetic_penalty(block, states, t0, ts=ts, key=key)

    of_equal_steps, of_times = penalties(None), penalties(block.times(0.5))
    assert jnp.allclose(jnp.stack(of_times), jnp.stack(of_equal_steps), rtol=1e-12)

    ts = jnp.array([0.5, 0.6, 0.9, 0.9, 1.7])
    fields = [
        block.vector_field(t, y, ts=ts) for t, y in zip(ts, states_at(block, y0, ts))
    ]
    speeds = [jnp.sum(value**2) for value in fields]
    _, kinetic = penalties(ts)
    assert jnp.allclose(kinetic, jnp.trapezoid(jnp.stack(speeds), ts), rtol=1e-12)


def states_at(block, y0, ts):
    return eqx.filter_jit(block.trajectory)(y0, ts=ts)


@pytest.mark.parametrize("order", (1, 2, 3))
def test_total_derivatives_of_a_known_solution(order):
    # The solution from y(0) = 1 is exp(sin t).
    field = lambda t, y, args: y * jnp.cos(t)
    solution = lambda t: jnp.exp(jnp.sin(t))
    expected = solution
    for _ in range(order):
        expected = jax.grad(expected)
    t = 0.6
    actual = eqi.total_derivative(field, order)(t, solution(t)[None], None)
    assert jnp.allclose(actual, expected(t), rtol=1e-12)


def test_a_trajectory_of_another_length_is_named(getkey):
    block = _block(getkey(), False)
    for penalty in (eqi.trajectory_penalty, eqi.kinetic_penalty):
        with pytest.raises(ValueError, match=r"must have 5 states.*\[4\]"):
            penalty(block, jnp.ones((4, 2)), key=getkey())
    with pytest.raises(ValueError, match="num_samples"):
        eqi.divergence(jnp.sin, jnp.ones(2), key=getkey(), num_samples=0)


def test_lipschitz_constant_of_linear_layers(getkey):
    matrix, h, theta = jr.normal(getkey(), (4, 4)), 0.1, 0.7
    layer = eqi.ThetaLayer(lambda t, y, args: matrix @ y, theta, h)
    eye = jnp.eye(4)
    step = jnp.linalg.solve(eye - h * theta * matrix, eye + h * (1 - theta) * matrix)
    ys = jr.normal(getkey(), (3, 4))
    estimate = lambda fn: eqi.lipschitz_constant(fn, ys, key=jr.key(0), num_steps=200)
    actual = eqx.filter_jit(estimate)(layer)
    assert jnp.allclose(actual, jnp.linalg.norm(step, 2), rtol=1e-6)
    block = eqx.filter_jit(estimate)(eqi.ODEBlock(layer, 3))
    expected = jnp.linalg.norm(jnp.linalg.matrix_power(step, 3), 2)
    assert jnp.allclose(block, expected, rtol=1e-6)


@pytest.mark.slow
def test_total_variation_is_that_of_what_is_trained(getkey):
    key = getkey()

    def make(alpha, probe):
        network = eqx.nn.MLP(2, 2, 4, 1, key=key)
        network = eqi.with_spectral_norm(network, key=probe)
        return eqi.BoundedSpectrum(network, alpha, 1.0, jnp.zeros(2))

    stacked = eqx.filter_vmap(make)(jnp.array([-1.0, -2.0]), jr.split(getkey(), 2))
    assert eqi.total_variation(stacked) == 0
    gradient = eqx.filter_grad(eqi.total_variation)(stacked)
    assert all(jnp.all(x == 0) for x in jax.tree.leaves(gradient))


def test_a_part_without_weight_is_not_computed(getkey):
    """Its derivative at zero is infinite."""
    root = lambda t, y, args: jnp.sqrt(jnp.abs(y))
    block = eqi.ODEBlock(eqi.ThetaLayer(root, 0.0, 0.1), 3)
    assert eqi.kinetic_penalty(block, jnp.zeros((4, 2)), key=getkey()) == 0
