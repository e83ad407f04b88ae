"""Blocks that make all steps at once, against those that make one after the other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optimistix as optx
import pytest

import eqimplicit as eqi
from eqimplicit._linear_solver.recurrence import recur
from eqimplicit._linear_solver.small import solve

from .helpers import directional_difference, relative_error, slow_but
from .test_block_properties import PRECISIONS, SCHEMES, TIGHT
from .test_times import cast, IS_STILL, make_field, SIZE, TIMES, weighted_sum


def blocks(layer, num_steps, **kwargs):
    return [
        eqi.ODEBlock(layer, num_steps, parallel=parallel, **kwargs)
        for parallel in (False, True)
    ]


def make(name, field, h=0.1, **kwargs):
    layer, _ = SCHEMES[name]
    return layer(field, h, **kwargs)


@pytest.mark.parametrize("size", (1, 2, 3, 5))
def test_small_systems(size, getkey):
    a = jr.normal(getkey(), (20, size, size))
    b = jr.normal(getkey(), (20, size, 4))
    expected = jnp.linalg.solve(a, b)
    assert jnp.allclose(solve(a, b), expected, rtol=1e-9)
    # Rows of very different sizes, as stiff fields have them.
    sizes = 10.0 ** jnp.linspace(-200, 200, 20)[:, None, None]
    assert jnp.allclose(solve(a * sizes, b * sizes), expected, rtol=1e-9)
    singular = a.at[:, -1].set(a[:, 0] if size > 1 else 0)
    assert not jnp.any(jnp.abs(solve(singular, b)) < 1e6)


@pytest.mark.parametrize("reverse", (False, True))
def test_a_recurrence_is_a_loop(reverse, getkey):
    matrices = jr.normal(getkey(), (7, 3, 3)) / 2
    vectors = jr.normal(getkey(), (7, 3))

    def step(y, x):
        matrix, vector = x
        y = matrix @ y + vector
        return y, y

    _, expected = jax.lax.scan(step, jnp.zeros(3), (matrices, vectors), reverse=reverse)
    actual = recur(matrices, vectors, reverse)
    assert jnp.allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", slow_but(SCHEMES, "Radau 2"))
def test_values_and_gradients_are_those_of_steps_in_turn(name, precision, getkey):
    dtype = PRECISIONS[precision]
    field = make_field(getkey(), dtype)
    y0 = cast(jr.normal(getkey(), (SIZE,)), dtype)

    @jax.jit
    def run(point):
        field, y0, ts = point

        def loss(point, block):
            field, y0, ts = point
            layer = eqx.tree_at(lambda l: l.vector_field, block.layer, field)
            block = eqx.tree_at(lambda b: b.layer, block, layer)
            solution = block.solve(y0, ts=ts)
            return weighted_sum(solution.value), solution

        return [
            jax.value_and_grad(loss, has_aux=True)(point, block)
            for block in blocks(make(name, field), 3)
        ]

    ts = jnp.array(TIMES, dtype)
    in_turn, at_once = run((field, y0, ts))
    (_, solution), gradient = at_once
    assert jnp.all(solution.stats["in_parallel"])
    assert jnp.all(solution.result == optx.RESULTS.successful)
    rounding = 1e-7 if precision == "float64" else 1e-4
    assert jnp.allclose(solution.value, in_turn[0][1].value, rtol=rounding)
    for actual, expected in zip(*(jtu.tree_leaves(g) for g in (gradient, in_turn[1]))):
        assert relative_error(actual, expected) < 10 * rounding
    states = jnp.asarray(solution.value)
    # To the bit.
    still = states[1:][IS_STILL].tobytes(), states[:-1][IS_STILL].tobytes()
    assert still[0] == still[1]


@pytest.mark.parametrize("name", slow_but(("theta 0.5, midpoint", "Gauss 2")))
def test_all_derivatives_of_stacked_layers(name, getkey):
    keys = jr.split(getkey(), 4)
    layers = eqx.filter_vmap(lambda key: make(name, make_field(key), **TIGHT))(keys)
    y0 = jr.normal(getkey(), (SIZE,))
    direction = jr.normal(getkey(), (SIZE,))

    @jax.jit
    def run(y0):
        results = []
        for block in blocks(layers, 4, stacked=True):
            loss = lambda y0, block=block: weighted_sum(block.trajectory(y0, 0.3))
            tangent = jax.jvp(loss, (y0,), (direction,))[1]
            results.append(
                (loss(y0), tangent, jax.grad(loss)(y0), jax.hessian(loss)(y0))
            )
        return results

    for actual, expected in zip(*run(y0)):
        assert jnp.allclose(actual, expected, rtol=1e-9, atol=1e-11)


def test_each_trajectory_of_a_batch_by_itself(getkey):
    field = make_field(getkey())
    block = blocks(make("theta 0.5, midpoint", field), 20)[1]
    y0 = jr.normal(getkey(), (4, SIZE)) * jnp.array([[0.1], [1.0], [5.0], [jnp.nan]])

    def run(y):
        solution = block.solve(y)
        return solution, solution.result == optx.RESULTS.successful

    batch, successful = jax.jit(jax.vmap(run))(y0)
    for k in range(3):
        alone = eqx.filter_jit(block.solve)(y0[k])
        assert jnp.allclose(batch.value[k], alone.value, rtol=1e-12)
        assert jnp.array_equal(batch.stats["num_steps"][k], alone.stats["num_steps"])
    assert jnp.all(jnp.isnan(batch.value[3]))
    assert jnp.all(successful[:3]) and not jnp.any(successful[3])


def test_iterations_do_not_grow_with_the_length(getkey):
    field = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0]) - 0.3 * y[1]])
    y0, counts = jnp.array([2.0, 0.0]), []
    for num_steps in (10, 100, 1000):
        layer = make("theta 0.5, midpoint", field, 10 / num_steps)
        solution = eqx.filter_jit(blocks(layer, num_steps)[1].solve)(y0)
        assert jnp.all(solution.stats["in_parallel"])
        counts.append(int(solution.stats["num_steps"][0]))
    assert max(counts) <= min(counts) + 2


def lorenz(t, y, args):
    u, v, w = y
    return jnp.stack([10 * (v - u), u * (28 - w) - v, u * v - 8 / 3 * w])


def test_what_newton_does_not_find_is_found_step_by_step():
    """A chaotic field, of which small perturbations become large ones."""
    y0 = jnp.array([1.0, 1.0, 1.0])
    in_turn, at_once = blocks(make("theta 0.5, midpoint", lorenz, 0.02), 2000)
    solution = eqx.filter_jit(at_once.solve)(y0)
    assert not jnp.any(solution.stats["in_parallel"])
    assert jnp.all(solution.result == optx.RESULTS.successful)
    expected = eqx.filter_jit(in_turn.trajectory)(y0)
    assert jnp.allclose(solution.value[:500], expected[:500], rtol=1e-6)


@pytest.mark.parametrize("parallel", (False, True))
def test_a_singular_step_is_no_silent_number(parallel):
    """`I - h J` is zero in the second step."""
    field = lambda t, y, args: jnp.where(t > 0.5, y + 1, -y)
    layer = eqi.ThetaLayer(field, 1.0, 1.0)
    block = eqi.ODEBlock(layer, 3, parallel=parallel)
    solution = eqx.filter_jit(block.solve)(jnp.array([1.0]), -1.0)
    successful = solution.result == optx.RESULTS.successful
    assert successful.tolist() == [True, False, False]
    gradient = jax.jit(jax.grad(lambda y: jnp.sum(block(y, -1.0))))(jnp.array([1.0]))
    assert not jnp.all(jnp.isfinite(gradient))


def test_times_that_decrease_give_nan(getkey):
    block = blocks(make("theta 0.5, midpoint", make_field(getkey())), 3)[1]
    solution = eqx.filter_jit(block.solve)(
        jnp.ones(SIZE), ts=jnp.array([0.0, 0.1, 0.05, 0.2])
    )
    successful = solution.result == optx.RESULTS.successful
    assert successful.tolist() == [True, False, False]
    assert jnp.all(jnp.isfinite(solution.value[:2]))
    assert jnp.all(jnp.isnan(solution.value[2:]))


def test_throw_raises():
    field = lambda t, y, args: jnp.where(t > 0.15, jnp.nan, -y)
    block = eqi.ODEBlock(
        eqi.ThetaLayer(field, step_size=0.1, throw=True), 3, parallel=True
    )
    with pytest.raises(RuntimeError, match="ThetaLayer"):
        jax.block_until_ready(eqx.filter_jit(block)(jnp.ones(1)))


def test_what_is_refused():
    field = lambda t, y, args: -y
    for layer in (eqi.VerletLayer(field), eqi.MidpointLayer(field)):
        with pytest.raises(ValueError, match=f"A {type(layer).__name__} has no"):
            eqi.ODEBlock(layer, 3, parallel=True)
    for adjoint in (
        eqi.JFBAdjoint(),
        eqi.NeumannAdjoint(3),
        eqi.PhantomAdjoint(3),
        eqi.ImplicitAdjoint(eqi.NeumannSeries(3)),
    ):
        layer = eqi.ThetaLayer(field, adjoint=adjoint)
        with pytest.raises(ValueError, match="is exact"):
            eqi.ODEBlock(layer, 3, parallel=True)
    with pytest.raises(ValueError, match="either `reversible`"):
        eqi.ODEBlock(eqi.ThetaLayer(field), 3, reversible=True, parallel=True)


@pytest.mark.parametrize("parallel", slow_but((False, True), True))
def test_a_field_may_close_over_what_is_differentiated(parallel):
    def loss(rate):
        layer = eqi.ThetaLayer(lambda t, y, args: -rate * jnp.sin(y), step_size=0.1)
        return jnp.sum(eqi.ODEBlock(layer, 10, parallel=parallel)(jnp.ones(2)))

    rate = jnp.array(0.7)
    gradient, second = jax.jit(lambda p: (jax.grad(loss)(p), jax.hessian(loss)(p)))(
        rate
    )
    expected = directional_difference(jax.jit(loss), rate, jnp.ones(()), step=1e-3)
    assert jnp.allclose(gradient, expected, rtol=1e-9)
    assert jnp.allclose(jax.grad(loss)(rate), gradient, rtol=1e-12)
    assert jnp.allclose(jax.jacfwd(loss)(rate), gradient, rtol=1e-12)
    difference = directional_difference(
        jax.jit(jax.grad(loss)), rate, jnp.ones(()), 1e-3
    )
    assert jnp.allclose(second, difference, rtol=1e-8)


def test_a_loose_tolerance_is_not_met_by_the_first_guess():
    """From one state for all steps, each step may look short."""
    solver = eqi.RootAsFixedPoint(optx.Newton(1e-2, 1e-2), True, True)
    field = lambda t, y, args: 1e-3 * y * (1 - y)
    layer = make("Gauss 2", field, 10.0, solver=solver)
    in_turn, at_once = (
        eqx.filter_jit(block)(jnp.array([0.1])) for block in blocks(layer, 500)
    )
    assert jnp.allclose(in_turn, at_once, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", (2, 5, 65))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_half_precision(dtype, size):
    layer = eqi.ThetaLayer(lambda t, y, args: -y, step_size=0.1)
    solution = eqx.filter_jit(blocks(layer, 10)[1].solve)(jnp.ones(size, dtype))
    assert solution.value.dtype == dtype
    expected = (0.95 / 1.05) ** jnp.arange(11.0)
    eps = float(jnp.finfo(dtype).eps)
    states = solution.value.astype(jnp.float64)
    assert jnp.allclose(states, expected[:, None], atol=8 * eps)


def test_one_time_and_solvers_without_a_residual():
    layer = eqi.ThetaLayer(
        lambda t, y, args: -y,
        solver=optx.FixedPointIteration(1e-6, 1e-6),
        step_size=0.1,
    )
    block = blocks(layer, 10)[1]
    y0 = jnp.ones(2)
    assert jnp.array_equal(block.trajectory(y0, ts=jnp.array([0.3])), y0[None])
    assert jnp.allclose(block(y0), (0.95 / 1.05) ** 10, rtol=1e-5)


def test_states_of_numbers():
    layer = eqi.ThetaLayer(lambda t, y, a: jax.tree.map(jnp.negative, y), step_size=0.1)
    y0 = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
    in_turn, at_once = (block(y0) for block in blocks(layer, 5))
    assert jnp.allclose(at_once["b"], in_turn["b"], rtol=1e-9)
    assert jnp.allclose(at_once["a"], (0.95 / 1.05) ** 5, rtol=1e-9)


def test_a_step_of_nothing_where_the_field_has_no_value():
    field = lambda t, y, args: -y + jnp.where(t == 0.2, jnp.nan, 0.0)
    ts = jnp.array([0.0, 0.1, 0.2, 0.2, 0.35])
    values = [
        block.solve(jnp.ones(1), ts=ts).value
        for block in blocks(eqi.ThetaLayer(field), 1)
    ]
    assert jnp.all(jnp.isfinite(values[0]))
    assert jnp.allclose(values[0], values[1], rtol=1e-6)
