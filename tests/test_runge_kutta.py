import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi
from eqimplicit._residual.tableau import _forests

from .helpers import directional_difference, random_like, tree_dot


GAUSS, RADAU = eqi.ButcherTableau.gauss_legendre, eqi.ButcherTableau.radau_iia

# The tableaux of the textbooks, and the orders they have.
_ROOT3, _R6, _ROOT15 = np.sqrt(3), np.sqrt(6), np.sqrt(15)
KNOWN = {
    "Gauss 1": (GAUSS(1), 2, [[1 / 2]]),
    "Gauss 2": (
        GAUSS(2),
        4,
        [[1 / 4, 1 / 4 - _ROOT3 / 6], [1 / 4 + _ROOT3 / 6, 1 / 4]],
    ),
    "Gauss 3": (
        GAUSS(3),
        6,
        [
            [5 / 36, 2 / 9 - _ROOT15 / 15, 5 / 36 - _ROOT15 / 30],
            [5 / 36 + _ROOT15 / 24, 2 / 9, 5 / 36 - _ROOT15 / 24],
            [5 / 36 + _ROOT15 / 30, 2 / 9 + _ROOT15 / 15, 5 / 36],
        ],
    ),
    "Radau 1": (RADAU(1), 1, [[1.0]]),
    "Radau 2": (RADAU(2), 3, [[5 / 12, -1 / 12], [3 / 4, 1 / 4]]),
    "Radau 3": (
        RADAU(3),
        5,
        [
            [(88 - 7 * _R6) / 360, (296 - 169 * _R6) / 1800, (-2 + 3 * _R6) / 225],
            [(296 + 169 * _R6) / 1800, (88 + 7 * _R6) / 360, (-2 - 3 * _R6) / 225],
            [(16 - _R6) / 36, (16 + _R6) / 36, 1 / 9],
        ],
    ),
    "SDIRK": (
        eqi.ButcherTableau.sdirk(),
        2,
        [[1 - 1 / np.sqrt(2), 0], [1 / np.sqrt(2), 1 - 1 / np.sqrt(2)]],
    ),
}

LOBATTO_A = eqi.ButcherTableau(((0.0, 0.0), (0.5, 0.5)), (0.5, 0.5), (0.0, 1.0))
LOBATTO_B = eqi.ButcherTableau(((0.5, 0.0), (0.5, 0.0)), (0.5, 0.5), (0.0, 1.0))


def _tight(field, tableau, step_size):
    solver = eqi.RootAsFixedPoint(optx.Newton(1e-14, 1e-14))
    return eqi.RungeKuttaLayer(field, tableau, step_size, solver)


@pytest.mark.parametrize("name", KNOWN)
def test_tableaux_are_those_of_the_textbooks(name):
    tableau, _, expected = KNOWN[name]
    assert np.allclose(tableau.a, expected, rtol=1e-13, atol=1e-14)
    # Every one has at least second order but the implicit Euler method.
    assert np.allclose(np.sum(tableau.a, axis=1), tableau.c, rtol=1e-13)


@pytest.mark.parametrize("name", KNOWN)
def test_order_under_halving(name):
    tableau, order, _ = KNOWN[name]

    def error(num_steps):
        layer = _tight(
            lambda t, y, args: y * jnp.cos(t) ** 2 - y**3, tableau, 2 / num_steps
        )
        block = eqi.ODEBlock(layer, num_steps)
        return eqx.filter_jit(block)(jnp.array([0.3]))[0]

    coarse, fine, finest = error(10), error(20), error(40)
    measured = np.log2(abs((coarse - fine) / (fine - finest)))
    assert abs(measured - order) < 0.25


@pytest.mark.parametrize("name", KNOWN)
def test_stability_function_is_the_paper_s_quotient_of_determinants(name, getkey):
    tableau, _, _ = KNOWN[name]
    a, b = np.asarray(tableau.a), np.asarray(tableau.b)
    eye, ones = np.eye(len(b)), np.ones((len(b), 1))
    zs = np.array([-200.0, -1 + 2j, 0.3j, 0.1])
    expected = [
        np.linalg.det(eye - z * a + z * ones * b) / np.linalg.det(eye - z * a)
        for z in zs
    ]
    actual = tableau.stability_function(jnp.asarray(zs))
    assert jnp.allclose(actual, jnp.asarray(expected), rtol=1e-9)


@pytest.mark.parametrize("name", KNOWN)
def test_a_linear_step_multiplies_by_the_stability_function(name):
    tableau, _, _ = KNOWN[name]
    z = jnp.array([-200.0, -3.0, 0.4])
    layer = eqi.RungeKuttaLayer(lambda t, y, args: z * y, tableau)
    solution = eqx.filter_jit(layer.solve)(jnp.ones(3))
    assert solution.result == optx.RESULTS.successful
    assert jnp.allclose(solution.value, tableau.stability_function(z), rtol=1e-8)


@pytest.mark.parametrize("theta", (0.5, 1.0))
def test_one_stage_is_a_theta_layer(theta, getkey):
    weight, y = jr.normal(getkey(), (3, 3)), jr.normal(getkey(), (3,))
    field = lambda t, y, args: jnp.tanh(weight @ y) * jnp.cos(t)
    tableau = GAUSS(1) if theta == 0.5 else RADAU(1)
    solver = eqi.RootAsFixedPoint(optx.Newton(1e-14, 1e-14))
    expected = eqi.ThetaLayer(field, theta, 0.2, solver=solver)(y, 0.3)
    assert jnp.allclose(_tight(field, tableau, 0.2)(y, 0.3), expected, rtol=1e-12)


def _pendulum(t, y, args):
    momentum, position = y[1], y[0]
    return args * momentum, -jnp.sin(position) * jnp.cos(t)


def test_a_partitioned_pair_is_the_verlet_method(getkey):
    y = jr.normal(getkey(), (2,)), jr.normal(getkey(), (2,))
    autonomous = lambda t, y, args: _pendulum(0.0, y, args)
    pair = _tight(autonomous, (LOBATTO_A, LOBATTO_B), 0.1)
    # In it the part whose slopes are halved comes first.
    swapped = lambda t, y, args: autonomous(t, y[::-1], args)[::-1]
    verlet = eqi.VerletLayer(swapped, 0.1)
    expected = verlet(y[::-1], 0.3, 1.7)[::-1]
    assert eqx.tree_equal(pair(y, 0.3, 1.7), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "tableau", (GAUSS(2), (GAUSS(2), RADAU(2))), ids=("one", "partitioned")
)
def test_derivatives_by_finite_differences(tableau, getkey):
    y = jr.normal(getkey(), (2,)), jr.normal(getkey(), (2,))
    weights = random_like(getkey(), y)

    @eqx.filter_jit
    def loss(point):
        y, t, args, h = point
        out = _tight(_pendulum, tableau, h)(y, t, args)
        return tree_dot(weights, jax.tree.map(jnp.sin, out))

    point = y, jnp.array(0.2), jnp.array(0.7), jnp.array(0.3)
    direction = random_like(getkey(), point)
    tangent = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,))[1])(point, direction)
    gradient = jax.jit(jax.grad(loss))(point)
    expected = directional_difference(loss, point, direction, step=1e-3)
    assert jnp.allclose(tangent, expected, rtol=1e-8)
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-8)


@pytest.mark.parametrize(
    "tableau", (GAUSS(2), RADAU(2), (GAUSS(2), RADAU(2))), ids=("G", "R", "GR")
)
def test_a_step_backwards_undoes_one_forwards(tableau, getkey):
    y = jr.normal(getkey(), (2,)), jr.normal(getkey(), (2,))
    layer = _tight(_pendulum, tableau, 0.3)
    back = eqx.filter_jit(lambda y: layer.invert(layer(y, 0.4, 1.3), 0.4, 1.3))(y)
    assert eqx.tree_equal(back.value, y, rtol=1e-11, atol=1e-12)


def test_a_large_state_needs_no_matrix(getkey):
    scale = 1 + jr.uniform(getkey(), (50,))
    layer = eqi.RungeKuttaLayer(lambda t, y, args: -scale * y**3, GAUSS(2), 0.2)
    y = jr.normal(getkey(), (50,))
    solution = eqx.filter_jit(layer.solve)(y)
    expected = eqx.filter_jit(_tight(layer.vector_field, GAUSS(2), 0.2))(y)
    assert solution.result == optx.RESULTS.successful
    assert jnp.allclose(solution.value, expected, atol=1e-6)


def test_gauss_keeps_the_energy_of_a_hamiltonian_and_radau_does_not():
    energy = lambda t, y, args: y[1] ** 2 / 2 - jnp.cos(y[0])
    field = eqi.HamiltonianField(energy)
    y0 = jnp.array(1.5), jnp.array(0.0)

    def drift(tableau):
        block = eqi.ODEBlock(_tight(field, tableau, 0.4), 500)
        states = eqx.filter_jit(block.trajectory)(y0)
        energies = jax.vmap(ft.partial(energy, 0.0), in_axes=(0, None))(states, None)
        return jnp.max(jnp.abs(energies[-50:] - energies[0]))

    assert drift(GAUSS(2)) < 1e-3
    assert drift(RADAU(2)) > 0.02


def test_bad_arguments_are_named(getkey):
    with pytest.raises(ValueError, match="square"):
        eqi.ButcherTableau(((0.5,),), (0.5, 0.5), (0.5, 0.5))
    with pytest.raises(ValueError, match="sum to 1"):
        eqi.ButcherTableau(((0.5,),), (0.7,), (0.5,))
    with pytest.raises(ValueError, match="num_stages"):
        GAUSS(0)
    field = lambda t, y, args: y
    with pytest.raises(TypeError, match="tableau"):
        eqi.RungeKuttaLayer(field, "gauss")
    with pytest.raises(ValueError, match="stages"):
        eqi.RungeKuttaLayer(field, (GAUSS(1), GAUSS(2)))
    with pytest.raises(ValueError, match="tuple of 2 parts"):
        eqi.RungeKuttaLayer(field, (GAUSS(1), GAUSS(1)))(jnp.ones(3))
    with pytest.raises(ValueError, match="step_size"):
        eqi.RungeKuttaLayer(field, GAUSS(1), -1.0)


def test_many_stages_are_as_accurate_as_few():
    tableau = GAUSS(16)
    a, b = np.asarray(tableau.a), np.asarray(tableau.b)
    # What makes the method symplectic.
    assert np.allclose(b[:, None] * a + (b[:, None] * a).T, np.outer(b, b), atol=1e-14)
    assert np.isclose(sum(RADAU(10).b), 1, rtol=1e-13)


@pytest.mark.parametrize("stages", (1, 2, 3, 4))
def test_a_tableau_knows_its_order(stages):
    assert eqi.ButcherTableau.gauss_legendre(stages).order == 2 * stages
    assert eqi.ButcherTableau.radau_iia(stages).order == 2 * stages - 1
    assert eqi.ButcherTableau.sdirk().order == 2
    # Kutta's method meets all eight conditions of order four.
    kutta = eqi.ButcherTableau(
        ((0.0,) * 4, (0.5, 0.0, 0.0, 0.0), (0.0, 0.5, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
        (0.0, 0.5, 0.5, 1.0),
    )
    heun = eqi.ButcherTableau(
        ((0.0,) * 3, (1 / 3, 0.0, 0.0), (0.0, 2 / 3, 0.0)),
        (0.25, 0.0, 0.75),
        (0.0, 1 / 3, 2 / 3),
    )
    assert (kutta.order, heun.order) == (4, 3)


def test_as_many_conditions_as_there_are_trees():
    trees = [[]]
    for size in range(1, 9):
        trees.append(list(_forests(trees, size - 1, size - 1)))
    assert [len(x) for x in trees[1:]] == [1, 1, 2, 4, 9, 20, 48, 115]
