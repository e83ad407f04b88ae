"""Schemes of residual layers as solvers of Diffrax."""

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import directional_difference, slow_but


Tableau = eqi.ButcherTableau
RK4 = Tableau(
    (
        (0.0, 0.0, 0.0, 0.0),
        (0.5, 0.0, 0.0, 0.0),
        (0.0, 0.5, 0.0, 0.0),
        (0.0, 0.0, 1.0, 0.0),
    ),
    (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    (0.0, 0.5, 0.5, 1.0),
)
LOBATTO = Tableau(((0.0, 0.0), (0.5, 0.5)), (0.5, 0.5), (0.0, 1.0))

# How a layer is made, and the order of its error estimate.
SCHEMES = {
    "theta 0": (lambda f, **k: eqi.ThetaLayer(f, 0.0, **k), 2),
    "theta 0.75": (lambda f, **k: eqi.ThetaLayer(f, 0.75, **k), 2),
    "theta 1": (lambda f, **k: eqi.ThetaLayer(f, 1.0, **k), 2),
    "midpoint": (lambda f, **k: eqi.ThetaLayer(f, 0.5, **k), 3),
    "trapezoid": (lambda f, **k: eqi.ThetaLayer(f, 0.5, form="trapezoid", **k), 3),
    "Gauss 1": (lambda f, **k: runge_kutta(f, Tableau.gauss_legendre(1), **k), 2),
    "Gauss 2": (lambda f, **k: runge_kutta(f, Tableau.gauss_legendre(2), **k), 3),
    "Gauss 3": (lambda f, **k: runge_kutta(f, Tableau.gauss_legendre(3), **k), 4),
    "Radau 1": (lambda f, **k: runge_kutta(f, Tableau.radau_iia(1), **k), 2),
    "Radau 2": (lambda f, **k: runge_kutta(f, Tableau.radau_iia(2), **k), 3),
    "Radau 3": (lambda f, **k: runge_kutta(f, Tableau.radau_iia(3), **k), 4),
    "SDIRK": (lambda f, **k: runge_kutta(f, Tableau.sdirk(), **k), 3),
    "Lobatto": (lambda f, **k: runge_kutta(f, LOBATTO, **k), 3),
    "RK4": (lambda f, **k: runge_kutta(f, RK4, **k), 5),
}
STIFF = ("theta 1", "Radau 1", "Radau 2", "Radau 3", "SDIRK")
NEWTON = eqi.RootAsFixedPoint(optx.Newton(1e-13, 1e-13), True, True)


def runge_kutta(field, tableau, **kwargs):
    return eqi.RungeKuttaLayer(field, tableau, **kwargs)


def unused(t, y, args):
    raise AssertionError("The field is that of the term.")


def pendulum(t, y, args):
    length = 1.0 if args is None else args
    return jnp.stack([y[1], -jnp.sin(y[0]) / length + 0.3 * jnp.cos(t)])


def integrate(solver, field, ts, y0, args=None, controller=None, **kwargs):
    if controller is None:
        controller = diffrax.PIDController(rtol=1e-6, atol=1e-9)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        ts[0],
        ts[-1],
        1e-3 * (ts[-1] - ts[0]),
        y0,
        args,
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts)),
        stepsize_controller=controller,
        max_steps=20_000,
        **kwargs,
    )


@pytest.fixture(autouse=True)
def promotion_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", slow_but(SCHEMES, "trapezoid", "Radau 3"))
def test_constant_steps_are_those_of_a_block(name):
    make, _ = SCHEMES[name]
    solver = {} if name in ("theta 0", "RK4") else {"solver": NEWTON}
    y0, ts = jnp.array([1.2, 0.0]), jnp.linspace(0.5, 1.5, 11)
    block = eqi.ODEBlock(make(pendulum, step_size=0.1, **solver), 10)

    @jax.jit
    def run(y0):
        controller = diffrax.StepTo(ts=ts)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(pendulum),
            eqi.diffrax_solver(make(unused, **solver)),
            ts[0],
            ts[-1],
            None,
            y0,
            saveat=diffrax.SaveAt(t0=True, steps=True),
            stepsize_controller=controller,
            max_steps=10,
        )
        return solution.ys, block.trajectory(y0, 0.5)

    ys, expected = run(y0)
    assert jnp.allclose(ys, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", slow_but(SCHEMES, "trapezoid", "Radau 3"))
def test_the_error_estimate_shrinks_as_it_says(name):
    make, order = SCHEMES[name]
    layer = make(unused)
    explicit = name in ("theta 0", "RK4")
    solver = eqi.diffrax_solver(layer if explicit else make(unused, solver=NEWTON))
    term, y0 = diffrax.ODETerm(pendulum), jnp.array([1.2, 0.4])
    assert solver.error_order(term) == order

    @jax.jit
    def errors(h):
        state = solver.init(term, 0.3, 0.3 + h, y0, None)
        y1, estimate, dense, _, _ = solver.step(
            term, 0.3, 0.3 + h, y0, None, state, False
        )
        interpolation = solver.interpolation_cls(t0=0.3, t1=0.3 + h, **dense)
        ends = interpolation.evaluate(0.3), interpolation.evaluate(0.3 + h)
        middle = interpolation.evaluate(0.3, 0.3 + h / 2)
        return y1, estimate, ends, y0 + middle

    def exact(t1):
        return integrate(
            diffrax.Dopri8(),
            pendulum,
            [0.3, t1],
            y0,
            controller=diffrax.PIDController(rtol=1e-13, atol=1e-13),
        ).ys[-1]

    h = 0.2 if order < 5 else 0.4
    estimates, misses = [], []
    for length in (h, h / 2):
        y1, estimate, ends, middle = errors(length)
        assert jnp.allclose(ends[0], y0, atol=1e-14)
        assert jnp.allclose(ends[1], y1, atol=1e-14)
        estimates.append(jnp.linalg.norm(estimate))
        misses.append(jnp.linalg.norm(middle - exact(0.3 + length / 2)))
        # It is no smaller than half of the error.
        assert jnp.linalg.norm(exact(0.3 + length) - y1) < 2 * estimates[-1]
    assert abs(np.log2(estimates[0] / estimates[1]) - order) < 0.5
    # Between the steps the states are as right as the estimate is.
    assert np.log2(misses[0] / misses[1]) > min(order, 4) - 0.5


def robertson(t, y, args):
    slow, fast, burn = 0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
    return jnp.stack([fast - slow, slow - fast - burn, burn])


@pytest.mark.parametrize("name", slow_but(STIFF, "Radau 3"))
def test_stiff_kinetics_with_adaptive_steps(name):
    """A component of 7e-8, which a fixed tolerance of 1e-6 would lose."""
    make, order = SCHEMES[name]
    rtol = 1e-4 if order == 2 else 1e-6
    controller = diffrax.PIDController(rtol=rtol, atol=rtol * 1e-5)
    ts = np.array([0.0, 40.0, 1e5])
    solve = eqx.filter_jit(integrate)
    solution = solve(
        eqi.diffrax_solver(make(unused)),
        robertson,
        ts,
        jnp.array([1.0, 0.0, 0.0]),
        controller=controller,
    )
    expected = jnp.array([1.78659211e-2, 7.27475147e-8, 9.82134006e-1])
    assert jnp.allclose(solution.ys[-1], expected, rtol=300 * rtol)
    assert solution.stats["num_rejected_steps"] < 20
    if name == "Radau 3":
        assert solution.stats["num_steps"] < 200
        assert jnp.allclose(solution.ys[-1], expected, rtol=1e-8)


def test_single_precision_with_the_defaults():
    solver = eqi.diffrax_solver(SCHEMES["Radau 3"][0](unused))
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-8)
    y0 = jnp.array([1.0, 0.0, 0.0], jnp.float32)
    ts = jnp.array([0.0, 1e5], jnp.float32)
    solution = eqx.filter_jit(integrate)(
        solver, robertson, ts, y0, controller=controller
    )
    assert solution.ys.dtype == jnp.float32
    expected = jnp.array([1.78659211e-2, 7.27475147e-8, 9.82134006e-1])
    assert jnp.allclose(solution.ys[-1], expected, rtol=1e-3)
    assert solution.stats["num_steps"] < 100


@pytest.mark.parametrize("name", slow_but(("trapezoid", "Gauss 2", "Radau 3", "RK4")))
def test_derivatives_through_the_adjoints_of_diffrax(name):
    make, _ = SCHEMES[name]
    controller = diffrax.PIDController(rtol=1e-8, atol=1e-10)
    ts = np.array([0.0, 0.7, 1.5])

    def loss(point, adjoint):
        y0, length = point
        solver = eqi.diffrax_solver(make(unused))
        solution = integrate(
            solver, pendulum, ts, y0, length, controller, adjoint=adjoint
        )
        return jnp.sum(jnp.sin(3 * solution.ys))

    point = jnp.array([1.2, 0.0]), jnp.array(1.3)
    direction = jnp.array([0.3, -0.5]), jnp.array(0.7)
    direct = diffrax.RecursiveCheckpointAdjoint()
    run = jax.jit(lambda point: loss(point, direct))
    expected = directional_difference(run, point, direction, step=1e-3)
    for adjoint in (direct, diffrax.BacksolveAdjoint()):
        if adjoint is not direct and name != "Radau 3":
            continue
        gradient = jax.jit(jax.grad(lambda point: loss(point, adjoint)))(point)
        flat, _ = jfu.ravel_pytree(gradient)
        actual = flat @ jfu.ravel_pytree(direction)[0]
        assert jnp.allclose(actual, expected, rtol=1e-5)
    forward = lambda point: loss(point, diffrax.ForwardMode())
    tangent = jax.jit(lambda p, d: jax.jvp(forward, (p,), (d,))[1])(point, direction)
    assert jnp.allclose(tangent, expected, rtol=1e-5)


def test_backwards_in_time_and_events():
    solver = eqi.diffrax_solver(SCHEMES["Radau 3"][0](unused))
    y0 = jnp.array([1.2, 0.0])
    there = integrate(solver, pendulum, [0.0, 2.0], y0).ys[-1]
    back = integrate(solver, pendulum, [2.0, 0.0], there).ys[-1]
    assert jnp.allclose(back, y0, atol=1e-5)

    def falls(t, y, args, **kwargs):
        return y[0]

    event = diffrax.Event(falls, optx.Newton(1e-8, 1e-8))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]])),
        solver,
        0.0,
        5.0,
        0.01,
        jnp.array([1.0, 0.0]),
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
        event=event,
    )
    assert jnp.allclose(solution.ts[-1], jnp.pi / 2, atol=1e-5)


@pytest.mark.slow
def test_many_unknowns_need_no_matrix():
    size = 100
    points = jnp.linspace(0, 1, size + 2)[1:-1]

    def heat(t, y, args):
        padded = jnp.pad(y, 1)
        return (size + 1) ** 2 * (padded[2:] - 2 * y + padded[:-2])

    y0 = jnp.sin(jnp.pi * points)
    solver = eqi.diffrax_solver(SCHEMES["Radau 2"][0](unused))
    solution = eqx.filter_jit(integrate)(solver, heat, [0.0, 0.1], y0)
    rate = 4 * (size + 1) ** 2 * jnp.sin(jnp.pi / 2 / (size + 1)) ** 2
    assert jnp.allclose(solution.ys[-1], y0 * jnp.exp(-0.1 * rate), atol=1e-4)
    assert solution.stats["num_steps"] < 200


@pytest.mark.slow
def test_partitioned_schemes_and_parametrised_fields(getkey):
    field = eqi.HamiltonianField(lambda t, y, args: (y[0] ** 2 + y[1] ** 2) / 2)
    for layer in (eqi.VerletLayer(unused), eqi.RevNetLayer(unused)):
        solver = eqi.diffrax_solver(layer)
        y0 = jnp.array(1.0), jnp.array(0.0)
        controller = diffrax.PIDController(rtol=1e-4, atol=1e-6)
        solution = integrate(solver, field, [0.0, 1.0], y0, controller=controller)
        assert jnp.allclose(solution.ys[0][-1], jnp.cos(1.0), atol=1e-2)

    class Bounded(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, t, y, args):
            return self.linear(y)

    linear = eqx.nn.Linear(2, 2, use_bias=False, key=getkey())
    bounded = eqi.with_spectral_norm(Bounded(linear), 0.5, key=getkey())
    solver = eqi.diffrax_solver(SCHEMES["Radau 3"][0](unused))
    y0 = jnp.array([1.0, -1.0])
    solution = integrate(solver, eqi.resolve(bounded), [0.0, 1.0], y0)
    weight = eqi.resolve(bounded).linear.weight
    assert jnp.allclose(solution.ys[-1], jax.scipy.linalg.expm(weight) @ y0, atol=1e-6)


@pytest.mark.slow
def test_each_trajectory_of_a_batch_has_its_own_steps():
    solver = eqi.diffrax_solver(SCHEMES["Radau 3"][0](unused))
    rates = jnp.array([1.0, 1e3])

    def run(rate):
        field = lambda t, y, args: -rate * (y - jnp.cos(t))
        return integrate(solver, field, [0.0, 1.0], jnp.array([2.0]))

    batch = jax.jit(jax.vmap(run))(rates)
    alone = [jax.jit(run)(rate) for rate in rates]
    for k, solution in enumerate(alone):
        assert jnp.allclose(batch.ys[k], solution.ys, rtol=1e-10)
        assert batch.stats["num_steps"][k] == solution.stats["num_steps"]


def test_what_is_refused():
    y0, controller = jnp.ones(2), diffrax.PIDController(rtol=1e-3, atol=1e-3)
    solver = eqi.diffrax_solver(SCHEMES["Radau 3"][0](unused))
    field = lambda t, y, args: -y
    drift = diffrax.ODETerm(field)
    path = diffrax.LinearInterpolation(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]))
    for terms in (
        diffrax.MultiTerm(drift, drift),
        diffrax.ControlTerm(lambda t, y, args: y, path),
    ):
        with pytest.raises(ValueError, match="single `diffrax.ODETerm`"):
            diffrax.diffeqsolve(
                terms, solver, 0.0, 1.0, 0.1, y0, stepsize_controller=controller
            )
    with pytest.raises(ValueError, match="tolerances for the implicit solver"):
        diffrax.diffeqsolve(drift, solver, 0.0, 1.0, 0.1, y0)
    for layer in (eqi.LeapfrogLayer(field), eqi.MidpointLayer(field)):
        with pytest.raises(ValueError, match=f"{type(layer).__name__} is no solver"):
            eqi.diffrax_solver(layer)
    with pytest.raises(TypeError, match="AbstractResidualLayer"):
        eqi.diffrax_solver(diffrax.Tsit5())  # pyright: ignore


@pytest.mark.parametrize("throw", (False, True))
def test_a_step_that_is_not_found_is_made_again(throw):
    """The field has no value beyond one, where the first step would lead."""
    field = lambda t, y, args: jnp.sqrt(1 - y) + 0 * t
    solver = eqi.diffrax_solver(SCHEMES["Radau 3"][0](unused, throw=throw))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        0.0,
        1.5,
        1.5,
        jnp.zeros(1),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-9),
    )
    # y = 1 - (1 - t / 2)^2
    assert jnp.allclose(solution.ys[-1], 1 - 0.25**2, atol=1e-6)
