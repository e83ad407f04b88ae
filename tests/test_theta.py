import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import (
    compiled_text,
    directional_difference,
    random_like,
    slow_but,
    tree_dot,
)


THETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FORMS = ("midpoint", "trapezoid")


class Linear(eqx.Module):
    matrix: jax.Array

    def __call__(self, t, y, args):
        return self.matrix @ y


class Field(eqx.Module):
    """Depends on everything that a field may depend on, on a pytree."""

    weight: jax.Array

    def __call__(self, t, y, args):
        a, b = y["a"], y["b"]
        return {
            "a": jnp.tanh(self.weight @ a + args * b[0]) * jnp.cos(t),
            "b": -b * b + t * jnp.sum(a),
        }


def _field(key):
    key_weight, key_a, key_b = jr.split(key, 3)
    y = {"a": jr.normal(key_a, (3,)), "b": jr.uniform(key_b, (2,))}
    return Field(jr.normal(key_weight, (3, 3))), y


def _tight(theta, form="midpoint", field=None, step_size=0.3):
    solver = eqi.RootAsFixedPoint(optx.Newton(1e-13, 1e-13))
    return eqi.ThetaLayer(field, theta, step_size, form, solver)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("theta", THETAS)
def test_linear_steps_have_a_closed_form_however_stiff(theta, form, getkey):
    matrix = jnp.diag(jnp.array([-2000.0, -50.0, 0.3])) + jr.normal(getkey(), (3, 3))
    y, h, eye = jr.normal(getkey(), (3,)), 0.1, jnp.eye(3)
    layer = eqi.ThetaLayer(Linear(matrix), theta, h, form)
    solution = eqx.filter_jit(layer.solve)(y)
    expected = jnp.linalg.solve(
        eye - h * theta * matrix, (eye + h * (1 - theta) * matrix) @ y
    )
    assert solution.result == optx.RESULTS.successful
    assert jnp.allclose(solution.value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", (1e3, 1e5))
@pytest.mark.parametrize("theta", (0.5, 1.0))
@pytest.mark.parametrize("form", FORMS)
def test_stiff_steps_are_found_in_single_precision(form, theta, rate, getkey):
    """Where rounding leaves a residual far above the tolerance."""
    y0 = jnp.concatenate([jnp.array([2.0]), jr.normal(getkey(), (3,))])
    rates = jnp.array([1.0, 0.7, 0.01, 0.0]) * rate

    def run(dtype):
        field = lambda t, y, args: -rates.astype(dtype) * (y - jnp.cos(t).astype(dtype))
        block = eqi.ODEBlock(eqi.ThetaLayer(field, theta, 0.1, form), 50)
        return eqx.filter_jit(block.solve)(y0.astype(dtype), jnp.zeros((), dtype))

    single, double = run(jnp.float32), run(jnp.float64)
    assert jnp.all(single.result == optx.RESULTS.successful)
    assert jnp.max(single.stats["num_steps"]) <= 5
    difference = single.value.astype(jnp.float64) - double.value
    # The midpoint rule hardly damps, so that the error of each step stays.
    assert jnp.max(jnp.abs(difference)) < (1e-3 if theta == 0.5 else 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("theta", slow_but(THETAS, 0.5))
def test_derivatives_by_finite_differences(theta, form, getkey):
    field, y = _field(getkey())
    weights = random_like(getkey(), y)

    @eqx.filter_jit
    def loss(point):
        field, y, t, args, h = point
        out = _tight(theta, form, field, h)(y, t, args)
        return tree_dot(weights, jax.tree.map(jnp.sin, out))

    point = field, y, jnp.array(0.2), jnp.array(0.7), jnp.array(0.3)
    direction = random_like(getkey(), point)
    tangent = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,))[1])(point, direction)
    gradient = jax.jit(jax.grad(loss))(point)
    expected = directional_difference(loss, point, direction, step=1e-3)
    assert jnp.allclose(tangent, expected, rtol=1e-8)
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("theta", THETAS)
def test_order_under_halving(theta, form):
    logistic = lambda t, y, args: y * (1 - y)
    exact = 1 / (1 + 9 * jnp.exp(-2.0))

    def error(num_steps):
        layer = _tight(theta, form, logistic, 2.0 / num_steps)
        block = eqi.ODEBlock(layer, num_steps)
        return abs(eqx.filter_jit(block)(jnp.array([0.1]))[0] - exact)

    order = jnp.log2(error(40) / error(80))
    assert abs(order - (2 if theta == 0.5 else 1)) < 0.1


@pytest.mark.parametrize("theta", THETAS)
def test_rotations_grow_as_the_stability_function_says(theta):
    frequency, h, num_steps = 1.3, 0.2, 50
    field = Linear(frequency * jnp.array([[0.0, 1.0], [-1.0, 0.0]]))
    block = eqi.ODEBlock(eqi.ThetaLayer(field, theta, h), num_steps)
    y = eqx.filter_jit(block)(jnp.array([1.0, 0.0]))
    factor = jnp.abs(eqi.stability_function(1j * h * frequency, theta))
    assert jnp.allclose(jnp.linalg.norm(y), factor**num_steps, rtol=1e-12)
    if theta == 0.5:
        assert jnp.allclose(factor, 1, rtol=1e-15)


@pytest.mark.parametrize("theta", THETAS[1:])
def test_stability_function_has_its_pole_and_its_limits(theta):
    assert jnp.isinf(eqi.stability_function(1 / theta, theta))
    assert eqi.stability_function(0.0, theta) == 1
    limit = eqi.stability_function(-1e12, theta)
    assert jnp.allclose(limit, -(1 - theta) / theta, atol=1e-10)


def _diffusion(n, key):
    laplacian = n**2 * (jnp.eye(n, k=1) + jnp.eye(n, k=-1) - 2 * jnp.eye(n))
    scale = 1 + jr.uniform(key, (n,))

    # As shifts, so that no matrix is in the program.
    def field(t, y, args):
        neighbours = jnp.pad(y[1:], (0, 1)) + jnp.pad(y[:-1], (1, 0))
        return scale * args * n**2 * (neighbours - 2 * y) - y**3

    dense = lambda t, y, args: scale * args * (laplacian @ y) - y**3
    return field, dense


@pytest.mark.usefixtures("all_optimisations")
@pytest.mark.slow
def test_large_stiff_states_are_solved_without_a_matrix(getkey):
    n = 100
    field, dense = _diffusion(n, getkey())
    y = jnp.sin(3 * jnp.linspace(0, 3.0, n))

    def run(layer, y, diffusivity):
        loss = lambda y, a: jnp.sum(jnp.cos(layer(y, 0.0, a)))
        return layer.solve(y, 0.0, diffusivity), jax.grad(loss, (0, 1))(y, diffusivity)

    layer = eqi.ThetaLayer(field, 1.0, 0.005)
    solution, gradient = eqx.filter_jit(run)(layer, y, jnp.array(1.0))
    expected, expected_gradient = eqx.filter_jit(run)(
        _tight(1.0, "midpoint", dense, 0.005), y, jnp.array(1.0)
    )
    assert solution.result == optx.RESULTS.successful
    assert jnp.allclose(solution.value, expected.value, atol=1e-6)
    assert eqx.tree_equal(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    text = compiled_text(ft.partial(run, layer), y, jnp.array(1.0))
    assert text is not None
    assert f"[{n},{n}]" not in text and f"[{n},1,{n}]" not in text


@pytest.mark.parametrize("size", (2, 100))
@pytest.mark.parametrize("form", FORMS)
def test_a_pole_is_never_a_success(form, size, getkey):
    """With a dense factorisation, and with a Krylov method."""
    rates = jnp.ones(size).at[0].set(2.0)
    layer = eqi.ThetaLayer(lambda t, y, args: rates * y, 1.0, 0.5, form)
    solution = eqx.filter_jit(layer.solve)(1 + jr.uniform(getkey(), (size,)))
    assert solution.result != optx.RESULTS.successful


@pytest.mark.parametrize("theta", (0.0, 0.5))
def test_a_bad_example_is_flagged_and_stays_alone(theta, getkey):
    field = Linear(jr.normal(getkey(), (3, 3)))
    layer = eqi.ThetaLayer(field, theta, 0.1)
    ys = jr.normal(getkey(), (3, 3)).at[1, 0].set(jnp.nan)
    solve = lambda y: layer.solve(y)
    solution = eqx.filter_jit(jax.vmap(solve))(ys)
    alone = eqx.filter_jit(solve)(ys[2])
    successful = solution.result == optx.RESULTS.successful
    assert successful.tolist() == [True, False, True]
    assert jnp.allclose(solution.value[2], alone.value, rtol=1e-13)


_OTHERS = {
    "Picard and JFB": (eqi.Picard(0.0, 1e-12), eqi.JFBAdjoint()),
    "Anderson and exact": (eqi.Anderson(0.0, 1e-12), eqi.ImplicitAdjoint()),
    "Picard and Neumann": (eqi.Picard(0.0, 1e-12), eqi.NeumannAdjoint(40)),
    "Picard and unrolled": (eqi.Picard(0.0, 1e-12), optx.RecursiveCheckpointAdjoint()),
    "L-BFGS and exact": (
        eqi.MinimiserAsFixedPoint(optx.LBFGS(1e-12, 1e-12)),
        eqi.ImplicitAdjoint(),
    ),
    "conjugate gradients and exact": (
        eqi.MinimiserAsFixedPoint(optx.NonlinearCG(1e-12, 1e-12)),
        eqi.ImplicitAdjoint(),
    ),
    "gradient descent and exact": (
        eqi.MinimiserAsFixedPoint(optx.GradientDescent(0.3, 1e-12, 1e-12)),
        eqi.ImplicitAdjoint(),
    ),
    "Newton and stock": (
        eqi.RootAsFixedPoint(optx.Newton(1e-12, 1e-12)),
        optx.ImplicitAdjoint(),
    ),
}


def test_differentiating_few_iterations_is_warned_of():
    with pytest.warns(UserWarning, match="RecursiveCheckpointAdjoint.*zero"):
        eqi.ThetaLayer(jnp.sin, adjoint=optx.RecursiveCheckpointAdjoint())


@pytest.mark.filterwarnings("ignore:.*RecursiveCheckpointAdjoint")
@pytest.mark.parametrize("name", _OTHERS)
def test_other_solvers_and_adjoints(name, getkey):
    field, y = _field(getkey())
    field = Field(0.3 * field.weight)
    solver, adjoint = _OTHERS[name]

    @eqx.filter_jit
    def run(layer, y):
        loss = lambda y: tree_dot(y, layer(y, 0.1, 0.5))
        return layer(y, 0.1, 0.5), jax.grad(loss)(y)

    other = eqi.ThetaLayer(field, 0.5, 0.2, "midpoint", solver, adjoint, max_steps=256)
    value, gradient = run(other, y)
    expected, expected_gradient = run(_tight(0.5, "midpoint", field, 0.2), y)
    assert eqx.tree_equal(value, expected, rtol=1e-9, atol=1e-9)
    # A first-order approximation drops terms of the order of h squared.
    tolerance = 0.05 if "JFB" in name else 1e-5
    assert eqx.tree_equal(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


def test_a_minimum_that_is_no_solution_is_not_a_success():
    """`y = 1 + y + y^2` has no real solution."""
    solver = eqi.MinimiserAsFixedPoint(optx.BFGS(1e-6, 1e-6))
    layer = eqi.ThetaLayer(lambda t, y, args: y**2 + 1, 1.0, 1.0, solver=solver)
    solution = eqx.filter_jit(layer.solve)(jnp.array([0.5]))
    assert solution.result != optx.RESULTS.successful
    # But it is a minimum, of `|1 + y^2|`, so that nothing was found that is better.
    assert solution.stats["residual"] > 0.9


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
def test_keeps_the_dtype(dtype, getkey):
    field = Linear(jr.normal(getkey(), (3, 3)).astype(dtype))
    y = jr.normal(getkey(), (3,)).astype(dtype)
    layer = eqi.ThetaLayer(field, 0.5, 0.1)
    solution = eqx.filter_jit(layer.solve)(y)
    exact = eqi.ThetaLayer(Linear(field.matrix.astype(jnp.float64)), 0.5, 0.1)
    expected = eqx.filter_jit(exact)(y.astype(jnp.float64))
    assert solution.value.dtype == dtype
    assert solution.result == optx.RESULTS.successful
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    assert jnp.allclose(solution.value.astype(jnp.float64), expected, atol=tolerance)


_BAD = {
    "theta above": (dict(theta=1.5), ValueError, "theta.*1.5"),
    "theta NaN": (dict(theta=float("nan")), ValueError, "theta"),
    "theta array": (dict(theta=jnp.array(0.5)), (TypeError, ValueError), "theta"),
    "step": (dict(step_size=0.0), ValueError, "step_size.*positive"),
    "form": (dict(form="euler"), (TypeError, ValueError), "form"),
    "solver": (dict(solver=optx.Newton(1e-3, 1e-3)), TypeError, "solver"),
    "adjoint": (dict(adjoint="exact"), TypeError, "adjoint"),
    "max_steps": (dict(max_steps=0), ValueError, "max_steps"),
    "field": (dict(vector_field=3), TypeError, "vector_field"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_arguments_are_named(name):
    kwargs, error, message = _BAD[name]
    with pytest.raises(error, match=message):
        eqi.ThetaLayer(**(dict(vector_field=lambda t, y, args: y) | kwargs))


@pytest.mark.parametrize("theta", (0.0, 0.5))
def test_a_field_that_does_not_match_its_state_is_named(theta):
    layer = eqi.ThetaLayer(lambda t, y, args: {"a": y["a"][:2]}, theta)
    with pytest.raises(ValueError, match=r"vector_field.*state\['a'\].*\(3,\).*\(2,\)"):
        layer({"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="int"):
        layer({"a": jnp.arange(3)})


def test_an_inexact_step_is_no_measure_of_the_error():
    """Of one that a Krylov method has left short for half of the unknowns."""
    rates = jnp.concatenate([jnp.full(50, 1e6), jnp.full(50, 0.5)])
    y = jnp.concatenate([jnp.full(50, 5e-7), jnp.full(50, 4e-3)])
    layer = eqi.ThetaLayer(lambda t, y, args: -rates * y, 1.0, 1.0)
    solution = eqx.filter_jit(layer.solve)(y)
    right = jnp.allclose(solution.value, y / (1 + rates), atol=1e-5)
    assert right or solution.result != optx.RESULTS.successful


def test_args_may_hold_anything():
    layer = eqi.ThetaLayer(lambda t, y, args: args["fn"](y) * args["a"], 0.5, 0.1)
    args = {"fn": jnp.tanh, "a": jnp.array(0.3), "name": "x"}
    y = jnp.array([0.5])
    expected = eqi.ThetaLayer(lambda t, y, args: jnp.tanh(y) * 0.3, 0.5, 0.1)(y)
    assert jnp.allclose(layer(y, 0.0, args), expected, rtol=1e-12)


def test_an_explicit_step_can_throw_as_well():
    layer = eqi.ThetaLayer(lambda t, y, args: y / 0.0, 0.0, 0.1, throw=True)
    with pytest.raises(eqx.EquinoxRuntimeError, match="ThetaLayer.*not finite"):
        layer(jnp.ones(2))


def test_stability_functions_take_integers():
    assert eqi.stability_function(-2, 0.5) == 0
    tableau = eqi.ButcherTableau.gauss_legendre(2)
    expected = tableau.stability_function(-2.0)
    assert jnp.allclose(tableau.stability_function(-2), expected, rtol=1e-14)
