import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import eqimplicit as eqi
from eqimplicit._layer.base import check_solve_arguments

from .helpers import slow_but


SIZE = 5


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x, *, key=None):
        if key is not None:
            x = x * jr.bernoulli(key, 0.5, x.shape).astype(x.dtype)
        return jnp.tanh(self.weight @ z + x)


def problem(norm=0.7, dtype=jnp.float64):
    weight = jr.normal(jr.key(0), (SIZE, SIZE))
    weight = norm / np.linalg.norm(weight, 2) * weight
    return Cell(weight.astype(dtype)), jr.normal(jr.key(1), (SIZE,)).astype(dtype)


def solution_of(cell, x, num_steps=300):
    z = jnp.zeros_like(x)
    for _ in range(num_steps):
        z = cell(z, x)
    return z


LAYER_SOLVERS = {
    "Picard": lambda tol: eqi.Picard(tol, tol),
    "Anderson": lambda tol: eqi.Anderson(tol, tol),
    "Broyden": lambda tol: eqi.Broyden(tol, tol),
    "Newton": lambda tol: eqi.RootAsFixedPoint(optx.Newton(tol, tol)),
    "stock": lambda tol: optx.FixedPointIteration(tol, tol),
    "best so far": lambda tol: optx.BestSoFarFixedPoint(eqi.Picard(tol, tol)),
}

EXACT_ADJOINTS = {
    "default": lambda: eqi.ImplicitAdjoint(),
    "LU": lambda: eqi.ImplicitAdjoint(lx.LU()),
    "Anderson": lambda: eqi.ImplicitAdjoint(
        eqi.FixedPointLinearSolver(eqi.Anderson(1e-10, 1e-10))
    ),
    "Neumann": lambda: eqi.NeumannAdjoint(60),
    "Phantom": lambda: eqi.PhantomAdjoint(60),
}

APPROXIMATE_ADJOINTS = {
    "JFB": lambda: eqi.JFBAdjoint(),
    "short Neumann": lambda: eqi.NeumannAdjoint(3, damping=0.8),
    "short Phantom": lambda: eqi.PhantomAdjoint(3, damping=0.8),
    "unrolled": lambda: optx.RecursiveCheckpointAdjoint(),
}

ADJOINTS = {**EXACT_ADJOINTS, **APPROXIMATE_ADJOINTS}


def directional_difference(loss, tree, seed=0, step=1e-5):
    """The derivative of `loss` along a random direction, by central differences, and
    the direction."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jr.split(jr.key(seed), len(leaves))
    direction = [jr.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)]
    move = lambda s: treedef.unflatten([a + s * d for a, d in zip(leaves, direction)])
    return (loss(move(step)) - loss(move(-step))) / (2 * step), direction


def assert_gradient(loss, tree, rtol=1e-5):
    """`jax.grad` agrees with finite differences."""
    loss = jax.jit(loss)
    difference, direction = directional_difference(loss, tree)
    gradient = jax.tree.leaves(jax.jit(jax.grad(loss))(tree))
    inner = sum(jnp.vdot(g, d) for g, d in zip(gradient, direction))
    assert abs(difference) > 1e-3
    assert jnp.allclose(inner, difference, rtol=rtol)


# The value


@pytest.mark.parametrize("name", LAYER_SOLVERS)
def test_the_value_solves_the_equation(name):
    cell, x = problem()
    deq = eqi.DEQ(cell, LAYER_SOLVERS[name](1e-11))
    z = eqx.filter_jit(deq)(x)
    assert jnp.max(jnp.abs(cell(z, x) - z)) < 1e-10
    assert jnp.max(jnp.abs(z - solution_of(cell, x))) < 1e-10


def test_the_initial_guess_is_the_argument_then_init_then_zeros():
    cell, x = problem()
    exact = solution_of(cell, x)
    solver = eqi.Picard(0.0, 1e-9)
    plain = eqi.DEQ(cell, solver)
    predicted = eqi.DEQ(cell, solver, init=lambda x: 2 * x)

    def residual(layer, *args):
        layer = eqx.tree_at(lambda d: d.solver, layer, eqi.Picard(0.0, jnp.array(1e9)))
        return layer.solve(x, *args).stats["residual"], layer(x, *args)

    # With a huge tolerance the guess itself is returned.
    for layer, args, guess in [
        (plain, (), 0 * x),
        (plain, (x,), x),
        (predicted, (), 2 * x),
        (predicted, (x,), x),
    ]:
        found, value = residual(layer, *args)
        assert jnp.array_equal(value, guess)
        assert jnp.allclose(found, jnp.max(jnp.abs(cell(guess, x) - guess)))
    assert plain.solve(x, exact).stats["num_evaluations"] == 1
    assert jnp.allclose(predicted(x), exact, atol=1e-8)


def test_solve_says_what_happened():
    cell, x = problem()
    deq = eqi.DEQ(cell, eqi.Picard(0.0, 1e-6))
    sol = deq.solve(x)
    assert isinstance(sol, optx.Solution)
    assert sol.result == optx.RESULTS.successful
    residuals = eqi.convergence_history(
        lambda z: cell(z, x), 0 * x, deq.solver, num_steps=60
    )
    count = int(jnp.argmax(residuals < 1e-6)) + 1
    assert sol.stats["num_steps"] == sol.stats["num_evaluations"] == count
    assert jnp.allclose(sol.stats["residual"], residuals[count - 1], rtol=1e-9)
    assert sol.aux is None


def test_an_unfinished_solve_raises_only_if_told():
    cell, x = problem()
    solver = eqi.Picard(1e-12, 1e-12)
    deq = eqi.DEQ(cell, solver, max_steps=4)
    sol = deq.solve(x)
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    assert sol.stats["num_steps"] == 4
    assert jnp.allclose(deq(x), solution_of(cell, x, 3), rtol=1e-14)
    deq = eqi.DEQ(cell, solver, max_steps=4, throw=True)
    with pytest.raises(eqx.EquinoxRuntimeError):
        jax.block_until_ready(eqx.filter_jit(deq)(x))
    diverging = eqi.DEQ(lambda z, x: 2.0 * z + x, solver, max_steps=5000)
    assert diverging.solve(x).result != optx.RESULTS.successful


@pytest.mark.parametrize("adjoint", ["default", "short Phantom"])
def test_states_may_be_pytrees(adjoint):
    cell, x = problem()

    def tree_cell(z, x):
        out = cell(jnp.concatenate([z["a"], z["b"][0]]), x)
        return {"a": out[:2], "b": (out[2:],)}

    z0 = {"a": jnp.zeros(2), "b": (jnp.zeros(3),)}
    make = lambda cell: eqi.DEQ(cell, eqi.Anderson(1e-12, 1e-12), ADJOINTS[adjoint]())
    flat = lambda z: jnp.concatenate([z["a"], z["b"][0]])
    tree = jax.jit(jax.value_and_grad(lambda x: jnp.sum(flat(make(tree_cell)(x, z0)))))
    plain = jax.jit(jax.value_and_grad(lambda x: jnp.sum(make(cell)(x))))
    assert eqx.tree_equal(tree(x), plain(x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_is_kept(dtype):
    cell, x = problem()
    exact = solution_of(cell, x)
    cell, x = problem(dtype=dtype)
    eps = float(jnp.finfo(dtype).eps)
    deq = eqi.DEQ(cell, eqi.Anderson(4 * eps, 4 * eps))
    value, gradient = (
        jax.jit(lambda x: jax.vjp(deq, x))(x)[0],
        jax.jit(jax.grad(lambda x: jnp.sum(deq(x))))(x),
    )
    assert value.dtype == gradient.dtype == dtype
    assert jnp.max(jnp.abs(value.astype(jnp.float64) - exact)) < 30 * eps
    jacobian = (1 - exact**2)[:, None] * problem()[0].weight
    w = jnp.linalg.solve(jnp.eye(SIZE) - jacobian.T, jnp.ones(SIZE))
    error = gradient.astype(jnp.float64) - (1 - exact**2) * w
    assert jnp.max(jnp.abs(error)) < 60 * eps


# Batches


@pytest.mark.parametrize("name", ["Picard", "Anderson", "Broyden"])
def test_examples_of_a_batch_stop_on_their_own(name):
    cell, x = problem(0.9)
    deq = eqi.DEQ(cell, LAYER_SOLVERS[name](1e-9), max_steps=60)

    @jax.jit
    def run(xs):
        def value_and_gradient(x):
            sol = deq.solve(x)
            stats = sol.stats["num_steps"], sol.result == optx.RESULTS.successful
            return sol.value, stats, jax.grad(lambda x: jnp.sum(deq(x) ** 2))(x)

        return jax.vmap(value_and_gradient)(xs)

    xs = jnp.stack([x, 4 * x, 30 * x, 0 * x])
    values, (num_steps, success), gradients = run(xs)
    assert num_steps[3] == 1
    assert len(set(num_steps[:3].tolist())) > 1
    for i in range(3):
        single, (count, _), gradient = run(jnp.stack([xs[i]] * 4))
        assert jnp.array_equal(single[0], values[i])
        assert jnp.array_equal(gradient[0], gradients[i])
        assert count[0] == num_steps[i]
    bad = xs.at[3].set(jnp.nan)
    values_beside_nan, (_, success), gradients_beside_nan = run(bad)
    assert jnp.array_equal(values_beside_nan[:3], values[:3])
    assert jnp.array_equal(gradients_beside_nan[:3], gradients[:3])
    assert success.tolist() == [True, True, True, False]


# Randomness


@pytest.mark.parametrize("adjoint", ["default", "JFB"])
def test_one_key_serves_all_evaluations(adjoint):
    cell, x = problem()
    deq = eqi.DEQ(cell, eqi.Anderson(1e-12, 1e-12), ADJOINTS[adjoint]())
    values = []
    for seed in range(4):
        key = jr.key(seed)
        z = eqx.filter_jit(deq)(x, key=key)
        assert jnp.max(jnp.abs(cell(z, x, key=key) - z)) < 1e-10
        values.append(z)
    assert jnp.max(jnp.abs(values[0] - values[1])) > 1e-3
    if adjoint == "default":
        assert_gradient(lambda x: jnp.sum(deq(x, key=jr.key(1)) ** 2), x)


# Equinox state


class Counting(eqx.Module):
    """Keeps a running mean of what it was applied to, and counts."""

    weight: jax.Array
    index: eqx.nn.StateIndex

    def __init__(self, weight):
        self.weight = weight
        self.index = eqx.nn.StateIndex((jnp.array(0), jnp.zeros(SIZE)))

    def __call__(self, z, x, state):
        count, mean = state.get(self.index)
        state = state.set(self.index, (count + 1, 0.9 * mean + 0.1 * z))
        return jnp.tanh(self.weight @ z + x + mean), state


@pytest.mark.parametrize("name", ["Picard", "Anderson", "Newton"])
def test_the_state_is_that_of_one_evaluation_at_the_solution(name):
    plain, x = problem()
    cell, state = eqx.nn.make_with_state(Counting)(plain.weight)
    deq = eqi.DEQ(cell, LAYER_SOLVERS[name](1e-12))

    @eqx.filter_jit
    def run(x, state):
        return deq(x, state=state)

    z, state = run(x, state)
    count, mean = state.get(cell.index)
    assert count == 1
    assert jnp.allclose(z, solution_of(plain, x), atol=1e-10)
    assert jnp.allclose(mean, 0.1 * z, atol=1e-11)
    old_mean = mean
    z, state = run(x, state)
    count, mean = state.get(cell.index)
    assert count == 2
    # The second solve saw the mean that the first one left.
    assert jnp.allclose(z, jnp.tanh(plain.weight @ z + x + old_mean), atol=1e-10)
    assert jnp.allclose(mean, 0.9 * old_mean + 0.1 * z, atol=1e-11)


class NormCell(eqx.Module):
    weight: jax.Array
    norm: eqx.nn.BatchNorm

    def __init__(self, weight):
        self.weight = weight
        self.norm = eqx.nn.BatchNorm(SIZE, "batch", momentum=0.9, mode="batch")

    def __call__(self, z, x, state):
        out, state = self.norm(self.weight @ z + x, state)
        return 0.5 * jnp.tanh(out), state


class BatchCell(eqx.Module):
    """The whole batch as one state."""

    cell: NormCell

    def __call__(self, z, x, state):
        batched = jax.vmap(
            self.cell, axis_name="batch", in_axes=(0, 0, None), out_axes=(0, None)
        )
        return batched(z, x, state)


def batch_problem():
    plain, _ = problem(0.8)
    cell, state = eqx.nn.make_with_state(NormCell)(plain.weight)
    return cell, state, jr.normal(jr.key(2), (4, SIZE))


def test_statistics_are_updated_once_and_only_in_training():
    cell, state, xs = batch_problem()
    deq = eqi.DEQ(BatchCell(cell), eqi.Anderson(1e-12, 1e-12))
    z, new_state = eqx.filter_jit(deq)(xs, state=state)
    again, expected = eqx.filter_jit(BatchCell(cell))(z, xs, state)
    assert jnp.allclose(again, z, atol=1e-10)
    leaves, expected = jax.tree.leaves(new_state), jax.tree.leaves(expected)
    assert len(leaves) == len(expected) > 0
    for new, right in zip(leaves, expected):
        assert jnp.allclose(new, right, atol=1e-10)
    assert not all(
        jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), leaves)
    )
    frozen = eqx.nn.inference_mode(deq)
    with jax.numpy_dtype_promotion("standard"):  # which the frozen layer relies on
        _, same = eqx.filter_jit(frozen)(xs, state=new_state)
    assert eqx.tree_equal(same, new_state)


def test_reductions_over_axes_of_a_state_do_not_couple_examples(getkey):
    """Attention reduces over axes that are NumPy integers."""
    attention = eqx.nn.MultiheadAttention(2, 2, key=getkey())
    cell = lambda z, x: 0.1 * attention(z, z, z) + x
    xs = jr.normal(getkey(), (3, 4, 2))
    zs = jax.vmap(eqi.DEQ(cell, eqi.Anderson(1e-10, 1e-10)))(xs)
    assert jnp.allclose(zs, jax.vmap(cell)(zs, xs), atol=1e-9)


def test_a_cell_that_couples_examples_is_refused_under_vmap():
    cell, state, xs = batch_problem()
    deq = eqi.DEQ(cell)

    def run(deq, state):
        one = lambda x, state: deq(x, state=state)
        return jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            xs, state
        )

    with pytest.raises(ValueError, match="batch.*one state"):
        run(deq, state)
    # Hidden inside other transformations.
    with pytest.raises(ValueError, match="coupled"):
        jax.vmap(
            eqi.DEQ(
                lambda z, x: jax.checkpoint(
                    lambda z: 0.1 * jax.lax.pmean(z, "batch") + x
                )(z)
            ),
            axis_name="batch",
        )(xs)


def test_a_batch_of_one_is_a_row_of_the_batch_when_statistics_are_frozen():
    cell, state, xs = batch_problem()
    _, state = eqx.filter_jit(eqi.DEQ(BatchCell(cell)))(xs, state=state)
    solver = eqi.Anderson(1e-12, 1e-12)
    single = eqx.nn.inference_mode(eqi.DEQ(cell, solver))
    whole = eqx.nn.inference_mode(eqi.DEQ(BatchCell(cell), solver))

    def run(xs, state):
        one = lambda x, state: single(x, state=state)
        return jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            xs, state
        )

    with jax.numpy_dtype_promotion("standard"):
        values, _ = eqx.filter_jit(run)(xs, state)
        together, _ = eqx.filter_jit(whole)(xs, state=state)
        alone, _ = eqx.filter_jit(whole)(xs[1:2], state=state)
    assert jnp.allclose(values, together, atol=1e-10)
    assert jnp.allclose(values[1], alone[0], rtol=1e-13)


@pytest.mark.parametrize(
    "solver, adjoint",
    [
        ("Picard", "LU"),
        ("Newton", "default"),
        pytest.param("Broyden", "Anderson", marks=pytest.mark.slow),
        pytest.param("Anderson", "Neumann", marks=pytest.mark.slow),
        ("Anderson", "Phantom"),
    ],
)
def test_the_gradient_of_a_batch_that_is_one_state(solver, adjoint):
    cell, state, xs = batch_problem()
    weights = jr.normal(jr.key(3), xs.shape)

    def loss(weight):
        new_cell = eqx.tree_at(lambda c: c.weight, cell, weight)
        deq = eqi.DEQ(
            BatchCell(new_cell), LAYER_SOLVERS[solver](1e-12), ADJOINTS[adjoint]()
        )
        return jnp.sum(weights * deq(xs, state=state)[0])

    assert_gradient(loss, cell.weight)


# Gradients


@pytest.mark.parametrize("adjoint", slow_but(["default", "LU", "Phantom"], "LU"))
def test_a_nested_layer_has_the_gradient_of_finite_differences(adjoint):
    cell, x = problem()
    inner_weight = 0.6 * jnp.roll(cell.weight, 1, 0)

    class Outer(eqx.Module):
        inner: eqi.DEQ
        weight: jax.Array

        def __call__(self, z, x):
            return jnp.tanh(self.weight @ self.inner(z) + x)

    def loss(weights):
        inner, outer = weights
        solver = eqi.Anderson(1e-12, 1e-12)
        layer = eqi.DEQ(Cell(inner), solver, ADJOINTS[adjoint]())
        layer = eqi.DEQ(Outer(layer, outer), solver, ADJOINTS[adjoint]())
        return jnp.sum(jnp.arange(1.0, 1 + SIZE) * layer(x))

    assert_gradient(loss, (inner_weight, cell.weight))


@pytest.mark.parametrize("adjoint", ["default", "JFB", "short Neumann"])
def test_checkpointing_does_not_change_the_gradient(adjoint):
    cell, x = problem()

    def gradient(wrap):
        def loss(weight):
            deq = eqi.DEQ(Cell(weight), eqi.Anderson(1e-10, 1e-10), ADJOINTS[adjoint]())
            return jnp.sum(wrap(deq)(x) ** 2)

        return jax.jit(jax.grad(loss))(cell.weight)

    plain = gradient(lambda deq: deq)
    assert jnp.allclose(gradient(eqx.filter_checkpoint), plain, rtol=1e-12)
    assert jnp.max(jnp.abs(plain)) > 0.1


@pytest.mark.parametrize("name", ["Picard", "Anderson", "Broyden"])
def test_the_unrolled_gradient_is_finite_at_a_fixed_point(name):
    # x = 0 gives z = 0 at once, where norms have no derivative.
    cell, x = problem()
    deq = eqi.DEQ(cell, LAYER_SOLVERS[name](1e-9), optx.RecursiveCheckpointAdjoint())
    gradient = jax.jit(jax.grad(lambda x, z0: jnp.sum(deq(x, z0)), argnums=(0, 1)))
    for start in (0 * x, solution_of(cell, x)):
        found = gradient(x if jnp.any(start) else 0 * x, start)
        assert jnp.all(jnp.isfinite(found[0]))
        # The one iterate that was evaluated is the guess.
        assert jnp.allclose(found[1], jnp.ones(SIZE))


# Training


def test_training_leaves_solver_and_adjoint_alone():
    cell, x = problem()
    model = eqi.DEQ(cell)
    optimiser = optax.adamw(1e-2, weight_decay=0.1)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def make_step(model, opt_state):
        loss, grads = eqx.filter_value_and_grad(lambda m: jnp.sum((m(x) - 0.1) ** 2))(
            model
        )
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, loss

    losses = []
    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        for _ in range(20):
            model, opt_state, loss = make_step(model, opt_state)
            losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert not jnp.allclose(model.cell.weight, cell.weight)
    fresh = eqi.DEQ(cell)
    assert eqx.tree_equal(model.solver, fresh.solver)
    assert eqx.tree_equal(model.adjoint, fresh.adjoint)


def test_hyperparameters_that_are_arrays_get_no_gradient():
    cell, x = problem()
    for adjoint in (
        eqi.NeumannAdjoint(3, damping=jnp.array(0.9)),
        eqi.PhantomAdjoint(3, damping=jnp.array(0.9)),
        eqi.ImplicitAdjoint(eqi.GMRES(jnp.array(1e-6), jnp.array(0.0))),
    ):
        solver = eqi.Anderson(jnp.array(1e-4), jnp.array(1e-4), damping=jnp.array(0.8))
        deq = eqi.DEQ(cell, solver, adjoint)
        grads = eqx.filter_jit(eqx.filter_grad(lambda d: jnp.sum(d(x))))(deq)
        # They are no floating-point arrays to begin with.
        assert jax.tree.leaves((grads.solver, grads.adjoint)) == []
        assert jnp.max(jnp.abs(grads.cell.weight)) > 0.01


def test_another_array_tolerance_does_not_recompile():
    cell, x = problem()
    num_traces = []

    class Traced(eqx.Module):
        cell: Cell

        def __call__(self, z, x):
            num_traces.append(1)
            return self.cell(z, x)

    def make(tol):
        solver = eqi.Picard(jnp.array(tol), jnp.array(tol))
        return eqi.DEQ(Traced(cell), solver)

    @eqx.filter_jit
    def run(deq, x):
        sol = deq.solve(x)
        return sol.value, sol.stats["num_steps"]

    _, few = run(make(1e-2), x)
    count = len(num_traces)
    _, many = run(make(1e-8), x)
    assert len(num_traces) == count > 0
    assert many > few


def test_checkpoints_round_trip(tmp_path):
    cell, x = problem()
    node = eqx.tree_at(lambda c: c.weight, cell, eqi.WeightNorm(cell.weight))
    solver = eqi.Anderson(jnp.array(1e-5), 1e-7)
    model = eqi.DEQ(node, solver, eqi.NeumannAdjoint(4, damping=0.5))
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", model)
    like = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if eqx.is_array(leaf) else leaf, model
    )
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like)
    assert eqx.tree_equal(loaded, model)
    assert jnp.array_equal(loaded(x), model(x))


# Bad input

OUTPUTS = {
    "structure": (lambda z, x: {"a": z["a"]}, "`cell` .*structure"),
    "shape": (lambda z, x: {"a": z["a"], "b": z["a"]}, r"state\['b'\].*\(3,\).*\(2,\)"),
    "dtype": (
        lambda z, x: {"a": z["a"], "b": z["b"].astype(jnp.float32)},
        r"state\['b'\].*float64.*float32",
    ),
    "None": (lambda z, x: None, "`cell` .*structure"),
    "a pair": (lambda z, x: (z, 0), "`cell` .*structure"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_cell_must_return_what_it_is_given(name):
    cell, message = OUTPUTS[name]
    z = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    with pytest.raises(ValueError, match=message):
        eqi.DEQ(cell)(z)


STATES = {
    "integer": (jnp.arange(SIZE), "state.*int"),
    "complex": (jnp.zeros(SIZE, complex), "state.*complex"),
    "empty": (jnp.zeros((0,)), "empty"),
    "nothing": ((), "empty"),
    "mixed": ({"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.float32)}, "dtype.*float32"),
}


@pytest.mark.parametrize("how", ["z0", "init", "x"])
@pytest.mark.parametrize("name", STATES)
def test_a_bad_state_is_named_before_the_cell_sees_it(name, how):
    state, message = STATES[name]

    def cell(z, x):
        raise AssertionError("unreachable")

    deq = eqi.DEQ(cell, init=(lambda x: state) if how == "init" else None)
    args = {"z0": (jnp.zeros(SIZE), state), "init": (None,), "x": (state,)}[how]
    with pytest.raises(ValueError, match=message):
        deq(*args)


def test_numbers_are_states_too():
    deq = eqi.DEQ(lambda z, x: 0.5 * z + x, eqi.Picard(1e-10, 1e-10))
    assert jnp.allclose(deq(0.5), 1.0, rtol=1e-9)
    deq = eqi.DEQ(deq.cell, deq.solver, init=lambda x: 3.0)
    assert jnp.allclose(deq(jnp.array(0.5)), 1.0, rtol=1e-9)


ARGUMENTS = {
    "cell": (TypeError, lambda c: eqi.DEQ(3)),
    "init": (TypeError, lambda c: eqi.DEQ(c, init=jnp.zeros(3))),
    "solver": (TypeError, lambda c: eqi.DEQ(c, optx.Newton(1e-3, 1e-3))),
    "adjoint": (TypeError, lambda c: eqi.DEQ(c, adjoint=lx.LU())),
    "`max_steps`.*0": (ValueError, lambda c: eqi.DEQ(c, max_steps=0)),
    "max_step": (TypeError, lambda c: eqi.DEQ(c, max_step=3)),
    "rtol": (ValueError, lambda c: eqi.DEQ(c, eqi.Anderson(-1e-3, 0.0))),
    "atol": (ValueError, lambda c: eqi.DEQ(c, eqi.Broyden(1e-3, -1.0))),
    "`rtol` and `atol`": (ValueError, lambda c: eqi.DEQ(c, eqi.Picard(0.0, 0.0))),
    "damping": (ValueError, lambda c: eqi.DEQ(c, eqi.Picard(1e-3, 0.0, damping=0.0))),
    "history_size": (
        ValueError,
        lambda c: eqi.DEQ(c, eqi.Anderson(1e-3, 0.0, history_size=0)),
    ),
    "num_terms": (ValueError, lambda c: eqi.DEQ(c, adjoint=eqi.NeumannAdjoint(0))),
    "num_steps": (ValueError, lambda c: eqi.DEQ(c, adjoint=eqi.PhantomAdjoint(0))),
    "`damping`.*-1": (
        ValueError,
        lambda c: eqi.DEQ(c, adjoint=eqi.PhantomAdjoint(2, damping=-1.0)),
    ),
    "linear_solver": (
        TypeError,
        lambda c: eqi.DEQ(c, adjoint=eqi.ImplicitAdjoint(eqi.Picard(1e-3, 0.0))),
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_named(name):
    kind, make = ARGUMENTS[name]
    with pytest.raises(kind, match=name):
        make(problem()[0])


# The checker of types, which the tests switch on, would be faster than these.
MISTAKES = {
    "`solver`.*RootAsFixedPoint": (TypeError, {"solver": optx.Newton(1e-3, 1e-3)}),
    "`solver`.*Anderson.*Levenberg": (
        TypeError,
        {"solver": optx.LevenbergMarquardt(1e-3, 1e-3)},
    ),
    "`solver`.*class": (TypeError, {"solver": eqi.Picard}),
    "`adjoint`.*LU": (TypeError, {"adjoint": lx.LU()}),
    "`adjoint`.*class": (TypeError, {"adjoint": eqi.JFBAdjoint}),
    "`max_steps`.*2.5": (ValueError, {"max_steps": 2.5}),
    "`max_steps`.*None": (ValueError, {"max_steps": None}),
    "`max_steps`.*True": (ValueError, {"max_steps": True}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(name):
    kind, mistake = MISTAKES[name]
    right = {
        "solver": eqi.Picard(1e-3, 0.0),
        "adjoint": eqi.JFBAdjoint(),
        "max_steps": 3,
    }
    check_solve_arguments(**right)
    with pytest.raises(kind, match=name):
        check_solve_arguments(**{**right, **mistake})


def test_a_cell_that_fails_on_its_state_is_told_of_the_initial_guess(getkey):
    linear = eqx.nn.Linear(7, 4, key=getkey())
    cell = lambda z, x: jnp.tanh(linear(jnp.concatenate([z, x])))
    with pytest.raises(TypeError) as error:
        eqi.DEQ(cell)(jnp.ones(3))
    notes = " ".join(error.value.__notes__)
    assert "state `z` of shape (3,)" in notes and "an `init`" in notes
    assert eqi.DEQ(cell, init=lambda x: jnp.zeros(4))(jnp.ones(3)).shape == (4,)
