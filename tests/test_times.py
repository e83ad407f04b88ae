"""Blocks on the times of the data: steps of any length, of none, and bad ones."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import (
    directional_difference,
    random_like,
    relative_error,
    slow_but,
    tree_dot,
)
from .test_block_properties import Field, PRECISIONS, SCHEMES, TIGHT


class PartitionedField(eqx.Module):
    """Of two parts, each of which moves as the other one says."""

    field: Field

    def __call__(self, t, y, args):
        first, second = y
        return self.field(t, second, args), self.field(t + 1, first, args)


LAYERS = {
    **{name: make for name, (make, _) in SCHEMES.items()},
    "theta 0": lambda field, h, **_: eqi.ThetaLayer(field, 0.0, h),
    "Verlet": lambda field, h, **_: eqi.VerletLayer(PartitionedField(field), h),
    "RevNet": lambda field, h, **_: eqi.RevNetLayer(PartitionedField(field), h),
}
CORE = ("theta 0.5, midpoint", "Gauss 2")
SIZE = 3
# With a pair of equal times in the midst, and the last one repeated.
TIMES = [0.5, 0.53, 0.9, 0.9, 1.0, 1.5, 1.52, 1.7, 1.7, 1.7]
IS_STILL = np.diff(TIMES) == 0


def start(name, key):
    y0 = jr.normal(key, (2, SIZE)).at[0, 0].set(-0.0)
    return (y0[0], y0[1]) if name in ("Verlet", "RevNet") else y0[0]


def cast(tree, dtype):
    return jtu.tree_map(lambda x: jnp.asarray(x).astype(dtype), tree)


def make_field(key, dtype=jnp.float64):
    return cast(Field(key, SIZE), dtype)


def stack(tree):
    return jnp.concatenate(jtu.tree_leaves(tree), axis=-1)


def weighted_sum(tree):
    return jnp.sum(jnp.sin(3 * stack(tree)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", slow_but(LAYERS, *CORE))
def test_steps_go_from_one_time_to_the_next(name, precision, getkey):
    dtype = PRECISIONS[precision]
    field = make_field(getkey(), dtype)
    y0 = cast(start(name, getkey()), dtype)

    @jax.jit
    def run(field, y0, ts):
        block = eqi.ODEBlock(LAYERS[name](field, 0.1), 3)

        def step(y, between):
            t, h = between
            y = LAYERS[name](field, h, **TIGHT)(y, t)
            return y, y

        moving = ~IS_STILL
        _, one_by_one = jax.lax.scan(step, y0, (ts[:-1][moving], jnp.diff(ts)[moving]))
        return block.solve(y0, ts=ts), block(y0, ts=ts), one_by_one

    solution, last, one_by_one = run(field, y0, jnp.array(TIMES, dtype))
    states = np.asarray(stack(solution.value))
    assert jnp.all(solution.result == optx.RESULTS.successful)
    assert np.array_equal(states[-1], stack(last))
    assert np.all(states[0] == stack(y0)) and np.all(np.signbit(states[0, 0]))
    rounding = 1e-13 if precision == "float64" else 2e-6
    assert np.allclose(states[1:][~IS_STILL], stack(one_by_one), rounding, rounding)
    # To the bit.
    assert states[1:][IS_STILL].tobytes() == states[:-1][IS_STILL].tobytes()


@pytest.mark.parametrize("name", slow_but(LAYERS, *CORE))
def test_derivatives_by_finite_differences(name, getkey):
    field, y0 = make_field(getkey()), start(name, getkey())
    # What is padded moves with the time that it repeats.
    direction = jr.normal(getkey(), (len(TIMES),))
    direction = direction.at[3].set(direction[2]).at[7:].set(direction[7])

    @jax.jit
    def loss(point):
        field, y0, ts = point
        block = eqi.ODEBlock(LAYERS[name](field, 0.1, **TIGHT), 3)
        return weighted_sum(block.trajectory(y0, ts=ts))

    point = field, y0, jnp.array(TIMES)
    direction = (*random_like(getkey(), (field, y0)), direction)
    expected = directional_difference(loss, point, direction, step=1e-4)
    tangent = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,))[1])(point, direction)
    gradient = jax.jit(jax.grad(loss))(point)
    assert jnp.allclose(tangent, expected, rtol=1e-8)
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-8)


@pytest.mark.parametrize("name", slow_but(LAYERS, *CORE))
def test_a_step_of_nothing_has_the_derivative_of_a_step(name, getkey):
    """The state moves with the end of the step as the field says, were it to begin."""
    field, y0 = make_field(getkey()), start(name, getkey())
    block = eqi.ODEBlock(LAYERS[name](field, 0.1), 1)

    flat, unravel = jfu.ravel_pytree(y0)
    last = lambda y0, ts: jfu.ravel_pytree(block(unravel(y0), ts=ts))[0]
    times = jnp.array([0.4, 0.4])
    of_state, of_times = jax.jit(jax.jacobian(last, argnums=(0, 1)))(flat, times)
    slope, _ = jfu.ravel_pytree(block.vector_field(0.4, y0))
    assert jnp.allclose(of_times, jnp.stack([-slope, slope], 1), rtol=1e-9)
    assert jnp.allclose(of_state, jnp.eye(len(flat)), rtol=1e-12)


def midpoint_block(key, *, stacked=False, reversible=False):
    make = lambda key: eqi.ThetaLayer(make_field(key), 0.5, 0.125)
    if stacked:
        layers = eqx.filter_vmap(make)(jr.split(key, 8))
        return eqi.ODEBlock(layers, 8, stacked=True, reversible=reversible)
    return eqi.ODEBlock(make(key), 8, reversible=reversible)


@pytest.mark.parametrize("stacked", (False, True))
def test_equal_times_are_the_steps_of_the_layer(stacked, getkey):
    block = midpoint_block(getkey(), stacked=stacked)
    y0 = jr.normal(getkey(), (SIZE,))
    ts = block.times(0.5)
    assert jnp.array_equal(block.times(ts=ts), ts)
    assert jnp.array_equal(block.jump_times(ts=ts), block.jump_times(0.5))
    slope = block.vector_field(0.7, y0, None, 0.5)
    assert jnp.array_equal(block.vector_field(0.7, y0, ts=ts), slope)
    expected = eqx.filter_jit(block.solve)(y0, 0.5)
    solution = eqx.filter_jit(block.solve)(y0, ts=ts)
    assert jnp.allclose(solution.value, expected.value, rtol=1e-14, atol=1e-15)
    assert jnp.array_equal(solution.stats["num_steps"], expected.stats["num_steps"])


@pytest.mark.parametrize("stacked", (False, True))
def test_a_reversible_block_has_the_gradient_of_stored_states(stacked, getkey):
    key, y0 = getkey(), jr.normal(getkey(), (SIZE,))
    ts = jnp.array(TIMES[:9])

    def gradient(reversible):
        block = midpoint_block(key, stacked=stacked, reversible=reversible)

        def loss(point):
            block, y0, ts = point
            return weighted_sum(block(y0, ts=ts))

        gradient = eqx.filter_jit(eqx.filter_grad(loss))((block, y0, ts))
        return jtu.tree_leaves(gradient)

    assert relative_error(gradient(True), gradient(False)) < 1e-10


@pytest.mark.parametrize("reversible", (False, True))
def test_series_of_several_lengths_are_padded(reversible, getkey):
    block = midpoint_block(getkey(), reversible=reversible)
    y0 = jr.normal(getkey(), (3, SIZE))
    series = [jnp.sort(jr.uniform(getkey(), (length,))) for length in (4, 7, 9)]
    pad = lambda ts: jnp.concatenate([ts, jnp.full(9 - len(ts), ts[-1])])
    padded = jnp.stack([pad(ts) for ts in series])

    last, states, result = eqx.filter_jit(
        jax.vmap(lambda y, ts: (block(y, ts=ts), *whole(block.solve(y, ts=ts))))
    )(y0, padded)
    assert jnp.all(result == optx.RESULTS.successful)
    for k, ts in enumerate(series):
        alone = block.trajectory(y0[k], ts=ts)
        assert jnp.allclose(states[k, : len(ts)], alone, rtol=1e-13, atol=1e-14)
        assert jnp.array_equal(
            states[k, len(ts) :], states[k, [len(ts) - 1] * (9 - len(ts))]
        )
        assert jnp.array_equal(last[k], states[k, -1])


def whole(solution):
    return solution.value, solution.result


@pytest.mark.parametrize("bad", ("falls", "nan", "inf"))
@pytest.mark.parametrize(
    "name",
    slow_but(("theta 0", "theta 0.5, midpoint", "Gauss 2", "Verlet"), *CORE),
)
def test_bad_times_are_no_silent_numbers(name, bad, getkey):
    value, message = {
        "falls": (0.55, r"ts\[3\]`, which is 0.55, comes after `ts\[2\]"),
        "nan": (jnp.nan, r"must be finite, but `ts\[3\]` is nan"),
        "inf": (jnp.inf, r"must be finite, but `ts\[3\]` is inf"),
    }[bad]
    block = eqi.ODEBlock(LAYERS[name](make_field(getkey()), 0.1), 3)
    y0, ts = start(name, getkey()), jnp.array([0.5, 0.6, 0.7, value, 0.9])
    for method in (block, block.trajectory, block.solve, block.times):
        with pytest.raises(ValueError, match=message):
            method(ts=ts) if method == block.times else method(y0, ts=ts)

    @jax.jit
    def run(y0, ts):
        gradient = jax.grad(lambda y0, ts: weighted_sum(block(y0, ts=ts)), (0, 1))
        return block.solve(y0, ts=ts), block(y0, ts=ts), gradient(y0, ts)

    solution, last, gradient = run(y0, ts)
    successful = solution.result == optx.RESULTS.successful
    assert successful.tolist() == [True, True, False, False]
    states = stack(solution.value)
    assert jnp.all(jnp.isfinite(states[:3])) and jnp.all(jnp.isnan(states[3:]))
    assert jnp.all(jnp.isnan(stack(last)))
    assert jnp.all(jnp.isnan(stack(gradient[0])))


def test_a_reversible_block_with_bad_times_has_no_gradient(getkey):
    block = midpoint_block(getkey(), reversible=True)
    ts = jnp.array([0.5, 0.6, 0.4])
    gradient = jax.jit(jax.grad(lambda y, ts: jnp.sum(block(y, ts=ts)), (0, 1)))
    assert all(jnp.all(jnp.isnan(g)) for g in gradient(jnp.ones(SIZE), ts))


def test_misuse_is_named(getkey):
    block, y0 = midpoint_block(getkey()), jnp.ones(SIZE)
    ts = jnp.linspace(0.0, 1.0, 4)
    with pytest.raises(ValueError, match="leave `t0` out"):
        block(y0, 0.5, ts=ts)
    with pytest.raises(ValueError, match="in one axis"):
        block(y0, ts=jnp.stack([ts, ts]))
    with pytest.raises(ValueError, match="in one axis"):
        block(y0, ts=jnp.array([]))
    with pytest.raises(ValueError, match="must be real"):
        block(y0, ts=np.asarray(ts) + 1j)
    with pytest.raises(ValueError, match="must not decrease"):
        block.vector_field(0.5, y0, ts=jnp.array([1.0, 0.0]))

    class Fixed(eqi.AbstractResidualLayer):
        vector_field: Callable
        step_size: float = eqx.field(static=True, default=1.0)
        solve = eqi.ThetaLayer.solve
        invert = eqi.ThetaLayer.invert

    with pytest.raises((TypeError, ValueError)) as info:
        eqi.ODEBlock(Fixed(lambda t, y, args: -y), 3)(y0, ts=ts)
    assert "`step_size` of a Fixed" in str(info.value.__notes__)
    with pytest.raises(ValueError, match=r"num_steps \+ 1 = 9 times. Got 4"):
        midpoint_block(getkey(), stacked=True)(y0, ts=ts)
    field = lambda t, y, args: -y
    for layer in (eqi.LeapfrogLayer(field, 0.1), eqi.MidpointLayer(field, 0.1)):
        with pytest.raises(ValueError, match=f"{type(layer).__name__}.* equal steps"):
            eqi.ODEBlock(layer, 3).solve((y0, y0), ts=ts)
    # One time alone has no step.
    assert jnp.array_equal(block.trajectory(y0, ts=ts[:1]), y0[None])


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32, jnp.float64))
@pytest.mark.parametrize("times", (np.float64, np.float32, np.int64))
def test_times_of_any_kind_keep_the_dtype_of_the_state(times, dtype, getkey):
    field = lambda t, y, args: -y * (1 + t)
    block = eqi.ODEBlock(eqi.ThetaLayer(field), 2)
    ts = np.array([0, 1, 1, 3]).astype(times)
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        solution = block.solve(jnp.ones(2, dtype), ts=ts)
    assert solution.value.dtype == dtype
    assert jnp.all(solution.result == optx.RESULTS.successful)
    # The midpoint rule's factor is (1 - h s / 2) / (1 + h s / 2), with s in the middle.
    expected = jnp.array([1.0, 1 / 7, 1 / 7, -1 / 7 / 2])
    eps = float(jnp.finfo(dtype).eps)
    states = solution.value.astype(jnp.float64)
    assert jnp.allclose(states[:, 0], expected, rtol=8 * eps)


def test_the_guess_saves_evaluations_on_uneven_times(getkey):
    block = midpoint_block(getkey())
    y0 = jr.normal(getkey(), (SIZE,))
    ts = jnp.cumsum(jr.uniform(getkey(), (60,), minval=0.02, maxval=0.08))

    @eqx.filter_jit
    def from_the_state(y0):
        def step(y, between):
            t, h = between
            layer = eqx.tree_at(lambda layer: layer.step_size, block.layer, h)
            solution = layer.solve(y, t)
            return solution.value, solution.stats["num_steps"]

        return jax.lax.scan(step, y0, (ts[:-1], jnp.diff(ts)))[1]

    steps = eqx.filter_jit(block.solve)(y0, ts=ts).stats["num_steps"]
    assert 10 * jnp.sum(steps) < 9 * jnp.sum(from_the_state(y0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_may_be_of_very_different_lengths(precision):
    """Robertson's kinetics from microseconds to a day, ten times longer each time."""
    dtype = PRECISIONS[precision]

    def robertson(t, y, args):
        slow, fast, burn = 0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
        return jnp.stack([fast - slow, slow - fast - burn, burn])

    ts = np.concatenate([[0.0], np.geomspace(1e-6, 1e5, 100)])
    layer = eqi.RungeKuttaLayer(robertson, eqi.ButcherTableau.radau_iia(3))
    block, y0 = eqi.ODEBlock(layer, 1), jnp.array([1, 0, 0], dtype)
    solution = eqx.filter_jit(block.solve)(y0, ts=ts)
    assert jnp.all(solution.result == optx.RESULTS.successful)
    # The reference of the test set for initial value problems.
    expected = jnp.array([1.78659211e-2, 7.27475147e-8, 9.82134006e-1], dtype)
    assert jnp.allclose(solution.value[-1], expected, rtol=1e-3)


@pytest.mark.parametrize("name", slow_but(CORE, "Gauss 2"))
def test_second_derivatives_go_through_steps_of_nothing(name, getkey):
    """A step of nothing is the limit of a short one."""
    field, y0 = make_field(getkey()), start(name, getkey())
    block = eqi.ODEBlock(LAYERS[name](field, 0.1, **TIGHT), 1)

    @jax.jit
    def hessian(ts):
        return jax.hessian(lambda ts: weighted_sum(block(y0, ts=ts)))(ts)

    still = hessian(jnp.array([0.1, 0.3, 0.3, 0.6, 0.6]))
    short = hessian(jnp.array([0.1, 0.3, 0.3 + 1e-7, 0.6, 0.6 + 1e-7]))
    assert jnp.allclose(still, still.T, atol=1e-11)
    assert jnp.allclose(still, short, atol=1e-5)


def test_a_clock_that_counts_from_far_away(default_configuration):
    """NumPy's times keep their precision, also where JAX's have less."""
    block = eqi.ODEBlock(eqi.ThetaLayer(lambda t, y, args: -y), 1)
    near = 0.05 * np.arange(6.0)
    expected = block.trajectory(jnp.ones(1), ts=near)
    states = block.trajectory(jnp.ones(1), ts=1.7e9 + near)
    assert jnp.allclose(states, expected, rtol=1e-5)
    seconds = np.int64(1_700_000_000) + np.arange(6)
    states = block.trajectory(jnp.ones(1), ts=seconds)
    assert jnp.allclose(states[1:, 0], (1 / 3) ** jnp.arange(1.0, 6.0), rtol=1e-5)
    for penalty in (eqi.trajectory_penalty, eqi.kinetic_penalty):
        of = lambda ts: penalty(
            block, states, ts=ts, key=jr.key(0), jacobian_weight=1.0
        )
        assert jnp.allclose(of(seconds), of(np.arange(6.0)), rtol=1e-5)
        assert of(seconds) > 0


def test_penalties_of_padded_series(getkey):
    """They do not see the layers that make no step."""
    make = lambda rate: eqi.ThetaLayer(Scaled(rate), 0.5)
    rates = jnp.array([1.0, 2.0, 3.0, 1000.0])
    ts, y0, key = jnp.array([0.0, 0.1, 0.2, 0.3, 0.3]), jnp.ones(2), getkey()

    def penalties(num_steps):
        layers = eqx.filter_vmap(make)(rates[:num_steps])
        block = eqi.ODEBlock(layers, num_steps, stacked=True)
        times = ts[: num_steps + 1]
        states = block.trajectory(y0, ts=times)
        trajectory = eqi.trajectory_penalty(
            block, states, ts=times, key=key, divergence_weight=1.0
        )
        kinetic = eqi.kinetic_penalty(block, states, ts=times, key=key)
        return jnp.stack([trajectory, kinetic])

    assert jnp.allclose(penalties(4), penalties(3), rtol=1e-12)
    block = midpoint_block(getkey())
    times = jnp.ones(3)
    states = block.trajectory(jnp.ones(SIZE), ts=times)
    for penalty in (eqi.trajectory_penalty, eqi.kinetic_penalty):
        assert penalty(block, states, ts=times, key=key) == 0


class Scaled(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return -self.rate * y


def test_penalties_of_single_precision_on_times_of_double(getkey):
    field = lambda t, y, args: -y * (1 + t)
    block, ts = eqi.ODEBlock(eqi.ThetaLayer(field), 1), np.linspace(0.0, 1.0, 4)
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        states = block.trajectory(jnp.ones(2, jnp.float32), ts=ts)
        for penalty in (eqi.trajectory_penalty, eqi.kinetic_penalty):
            value = penalty(block, states, ts=ts, key=getkey(), jacobian_weight=1.0)
            assert value.dtype == jnp.float32


def test_an_adjoint_that_needs_iterations_is_refused():
    with pytest.warns(UserWarning, match="RecursiveCheckpointAdjoint"):
        layer = eqi.ThetaLayer(
            lambda t, y, args: -y, adjoint=optx.RecursiveCheckpointAdjoint()
        )
    with pytest.raises(ValueError, match="With `ts` the ThetaLayer must not"):
        eqi.ODEBlock(layer, 1)(jnp.ones(1), ts=jnp.array([0.0, 0.1]))


def test_times_in_the_place_of_the_first_are_refused():
    layer = eqi.ThetaLayer(lambda t, y, args: -y)
    block, times = eqi.ODEBlock(layer, 2), jnp.array([0.0, 0.1, 0.2])
    for call in (layer, block, block.trajectory, block.solve):
        with pytest.raises(ValueError, match="must be one number.*`ts=...`"):
            call(jnp.ones(3), times)
    with pytest.raises(ValueError, match="real numbers. Got dtype datetime64"):
        block(jnp.ones(3), ts=np.array(["2026-01-01", "2026-01-02"], "datetime64[s]"))
