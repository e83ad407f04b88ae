"""Blocks as their users run them, with the default solver, against tightly solved twins
and closed forms.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import relative_error, slow_but


def theta_layer(theta, form):
    return lambda field, h, **kwargs: eqi.ThetaLayer(field, theta, h, form, **kwargs)


def runge_kutta_layer(tableau):
    return lambda field, h, **kwargs: eqi.RungeKuttaLayer(field, tableau, h, **kwargs)


SCHEMES = {
    # how a layer is made, its order
    "theta 0.25, midpoint": (theta_layer(0.25, "midpoint"), 1),
    "theta 0.25, trapezoid": (theta_layer(0.25, "trapezoid"), 1),
    "theta 0.5, midpoint": (theta_layer(0.5, "midpoint"), 2),
    "theta 0.5, trapezoid": (theta_layer(0.5, "trapezoid"), 2),
    "theta 1, midpoint": (theta_layer(1.0, "midpoint"), 1),
    "theta 1, trapezoid": (theta_layer(1.0, "trapezoid"), 1),
    "Gauss 2": (runge_kutta_layer(eqi.ButcherTableau.gauss_legendre(2)), 4),
    "Radau 2": (runge_kutta_layer(eqi.ButcherTableau.radau_iia(2)), 3),
    "SDIRK": (runge_kutta_layer(eqi.ButcherTableau.sdirk()), 2),
}
PRECISIONS = {"float64": jnp.float64, "float32": jnp.float32}

_newton = optx.Newton(1e-14, 1e-15, linear_solver=lx.LU())
TIGHT = dict(
    solver=eqi.RootAsFixedPoint(_newton, judge_step=True, refine=True),
    adjoint=eqi.ImplicitAdjoint(lx.LU()),
)


class Field(eqx.Module):
    """A random smooth field, whose numbers are the same in both precisions."""

    inner: jax.Array
    outer: jax.Array
    bias: jax.Array

    def __init__(self, key, size):
        shapes = (size, size), (size, size), (size,)
        draws = [jr.normal(k, s) for k, s in zip(jr.split(key, 3), shapes)]
        self.inner, self.outer, self.bias = in_single(
            (draws[0] / size**0.5, draws[1] / size**0.5, draws[2])
        )

    def __call__(self, t, y, args):
        return self.outer @ jnp.tanh(self.inner @ y + jnp.cos(t) * self.bias)


def in_single(tree):
    return jtu.tree_map(lambda x: x.astype(jnp.float32), tree)


def in_double(tree):
    return jtu.tree_map(lambda x: x.astype(jnp.float64), tree)


def max_distance(a, b):
    return jnp.max(jnp.abs(a - b))


NUM_STEPS = 8


def points(size, num_examples=6):
    """Fields, initial states, initial times and steps, in single precision."""

    def point(key):
        field = Field(jr.fold_in(key, 0), size)
        y0 = jr.normal(jr.fold_in(key, 1), (size,))
        t0 = jr.uniform(jr.fold_in(key, 2))
        # A power of two, so that half of it is half of it in both precisions.
        h = jnp.array(0.125)
        return in_single((field, y0, t0, h))

    return jax.vmap(point)(jr.split(jr.key(size), num_examples))


# The default solver is another one above 64 unknowns.
CASES = [
    pytest.param(
        name,
        5,
        marks=[] if name in ("theta 0.5, midpoint", "Radau 2") else pytest.mark.slow,
    )
    for name in SCHEMES
] + [
    ("theta 0.5, midpoint", 1),
    pytest.param("theta 0.5, trapezoid", 64, marks=pytest.mark.slow),
    pytest.param("Gauss 2", 64, marks=pytest.mark.slow),
    pytest.param("theta 0.5, midpoint", 100, marks=pytest.mark.slow),
    pytest.param("Gauss 2", 100, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, size", CASES)
def test_the_default_solver_is_as_good_as_a_tight_one(name, size):
    make, _ = SCHEMES[name]

    def last(point, num_steps, **kwargs):
        field, y0, t0, h = point
        layer = make(field, h * (NUM_STEPS / num_steps), **kwargs)
        return eqi.ODEBlock(layer, num_steps)(y0, t0)

    def gradient(point, **kwargs):
        weights = jnp.cos(jnp.arange(size, dtype=jnp.float64))
        loss = lambda point: weights @ jnp.sin(last(point, NUM_STEPS, **kwargs))
        return jax.grad(loss)(point)

    @jax.jit
    @jax.vmap
    def errors(single):
        double = in_double(single)
        exact = last(double, NUM_STEPS, **TIGHT)
        truncation = max_distance(exact, last(double, 2 * NUM_STEPS, **TIGHT))
        in_precision = {
            precision: max_distance(in_double(last(point, NUM_STEPS)), exact)
            for precision, point in (("float64", double), ("float32", single))
        }
        gradients = gradient(double), gradient(double, **TIGHT)
        # Each by itself, or those of the many parameters would hide the others.
        gradient_errors = jtu.tree_map(relative_error, *gradients)
        return in_precision, truncation, jnp.max(jnp.abs(exact)), gradient_errors

    in_precision, truncation, largest, gradient_errors = errors(points(size))
    assert jnp.max(in_precision["float64"]) < 1e-8
    assert all(jnp.max(error) < 1e-7 for error in jtu.tree_leaves(gradient_errors))
    for precision, dtype in PRECISIONS.items():
        eps = float(jnp.finfo(dtype).eps)
        rounding = eps * NUM_STEPS**0.5 * largest
        allowed = jnp.maximum(0.1 * truncation, 4 * rounding)
        assert jnp.all(in_precision[precision] <= allowed)


@pytest.mark.parametrize(
    "name", slow_but(SCHEMES, "theta 0.25, midpoint", "theta 0.5, midpoint", "Radau 2")
)
def test_order_in_the_step(name):
    make, order = SCHEMES[name]
    field = lambda t, y, args: y * jnp.cos(t) ** 2 - y**3

    def last(num_steps):
        block = eqi.ODEBlock(make(field, 2 / num_steps), num_steps)
        return eqx.filter_jit(block)(jnp.array([0.3]))[0]

    coarse, fine, finest = (last(num_steps) for num_steps in (32, 64, 128))
    measured = jnp.log2(jnp.abs((coarse - fine) / (fine - finest)))
    assert jnp.abs(measured - order) < 0.15


def pendulum(t, y, args):
    return y[1] ** 2 / 2 - jnp.cos(y[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_shorter_steps_keep_the_energy_of_a_pendulum_better(precision):
    dtype = PRECISIONS[precision]
    y0 = (jnp.array(1.5, dtype), jnp.array(0.0, dtype))
    field = eqi.HamiltonianField(pendulum)

    def energy_error(num_steps):
        block = eqi.ODEBlock(eqi.ThetaLayer(field, 0.5, 10 / num_steps), num_steps)
        states = in_double(eqx.filter_jit(block.trajectory)(y0))
        energies = jax.vmap(ft.partial(pendulum, 0.0), in_axes=(0, None))(states, None)
        return jnp.max(jnp.abs(energies - energies[0]))

    eps = float(jnp.finfo(dtype).eps)
    previous = energy_error(100)
    assert previous < 1e-2
    for num_steps in (1000, 10_000):
        error = energy_error(num_steps)
        # The scheme is of second order.
        assert error <= jnp.maximum(previous / 50, 4 * eps * num_steps**0.5)
        previous = error


def test_gauss_keeps_its_order_with_long_steps():
    make, _ = SCHEMES["Gauss 2"]
    field = eqi.HamiltonianField(pendulum)

    def last(num_steps):
        block = eqi.ODEBlock(make(field, 2 / num_steps), num_steps)
        return eqx.filter_jit(block)((jnp.array(1.5), jnp.array(0.0)))[0]

    exact = last(256)
    order = jnp.log2(jnp.abs((last(8) - exact) / (last(16) - exact)))
    assert jnp.abs(order - 4) < 0.1


def test_a_quadratic_invariant_is_kept_for_very_long():
    """That of a rigid body, which the midpoint rule conserves exactly."""
    inertia = jnp.array([1.0, 2.0, 3.0])
    field = lambda t, y, args: jnp.cross(y, y / inertia)
    block = eqi.ODEBlock(eqi.ThetaLayer(field, 0.5, 0.1), 50_000)
    states = eqx.filter_jit(block.trajectory)(jnp.array([0.6, 0.0, 0.8]))
    for weights in (jnp.ones(3), 1 / inertia):
        invariant = states**2 @ weights
        assert jnp.max(jnp.abs(invariant - invariant[0])) < 1e-10


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "drive, centre, width, expected",
    [(5.0, 0.0, 1e-7, 4.0), (5.0, 300.0, 5e-5, 304.0), (1.5, 300.0, 5e-5, 300.5)],
    ids=["from zero", "thermostat", "weak thermostat"],
)
def test_a_steep_switch_is_crossed(precision, drive, centre, width, expected):
    """A step to the new state, where the switch is open, starts in its middle."""
    dtype = PRECISIONS[precision]
    field = lambda t, y, args: drive - jnp.tanh((y - centre) / width)
    layer = eqi.ThetaLayer(field, 1.0, 1.0)
    solution = eqx.filter_jit(layer.solve)(jnp.array([centre], dtype))
    assert solution.result == optx.RESULTS.successful
    eps = float(jnp.finfo(dtype).eps)
    assert jnp.abs(solution.value[0] - expected) <= 4 * eps * expected


def robertson(t, y, args):
    slow, fast, burn = 0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
    return jnp.stack([fast - slow, slow - fast - burn, burn])


def test_a_small_unknown_is_as_right_as_the_large_ones_in_single_precision():
    def run(dtype):
        block = eqi.ODEBlock(eqi.ThetaLayer(robertson, 1.0, 0.5), 80)
        return in_double(eqx.filter_jit(block)(jnp.array([1, 0, 0], dtype)))

    single, double = run(jnp.float32), run(jnp.float64)
    assert 1e-6 < double[1] < 1e-4
    assert jnp.allclose(single, double, rtol=1e-5, atol=0)
