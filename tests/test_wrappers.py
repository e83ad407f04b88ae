"""Solvers around solvers, in any order, around any solver, under every adjoint."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi
from eqimplicit._solver.wrapper import check_fixed_point_solver

from .helpers import (
    ADJOINTS,
    matrix_of_norm,
    relative_error,
    slow_but,
    solve,
    SOLVERS,
    tanh_map,
)


STEPS = 60
RESULTS = optx.RESULTS

# None of these changes a solve that succeeds.
WRAPPERS = {
    "Budget": lambda solver: eqi.Budget(solver, jnp.array(STEPS)),
    "Patience": lambda solver: eqi.Patience(solver, 20),
    "BestSoFar": lambda solver: eqi.BestSoFar(solver),
    "Recorded": lambda solver: eqi.Recorded(solver, STEPS),
}
INNER = {
    **SOLVERS,
    "Optimistix": lambda rtol, atol: optx.FixedPointIteration(rtol, atol),
    "Optimistix's best": lambda rtol, atol: optx.BestSoFarFixedPoint(
        optx.FixedPointIteration(rtol, atol)
    ),
    "refined Newton": lambda rtol, atol: eqi.RootAsFixedPoint(
        optx.Newton(rtol, atol), judge_step=True, refine=True
    ),
}


def problem(key, dtype=jnp.float64, norm=0.7):
    weight_key, x_key = jr.split(key)
    weight = matrix_of_norm(weight_key, 6, norm, dtype)
    return weight, jr.normal(x_key, (6,)).astype(dtype)


def successful(solution):
    return bool(solution.result == RESULTS.successful)


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(name, dtype, marks=[] if name == "Picard" else pytest.mark.slow)
        for name in INNER
        for dtype in (jnp.float64, jnp.float32)
        # Optimistix itself takes no single precision beside double precision.
        if not (name.startswith("Optimistix") and dtype == jnp.float32)
    ],
)
def test_every_pair_solves_as_the_solver_does(name, dtype, getkey):
    args = problem(getkey(), dtype)
    tolerance = 1e-9 if dtype == jnp.float64 else 1e-4
    solver = INNER[name](tolerance, tolerance)

    @jax.jit
    def run(args):
        pairs = [
            outer(inner(solver))
            for outer in WRAPPERS.values()
            for inner in WRAPPERS.values()
        ]
        solves = [solver, *(wrap(solver) for wrap in WRAPPERS.values()), *pairs]
        z0, outcomes = jnp.zeros(6, dtype), []
        for s in solves:
            solution = optx.fixed_point(
                tanh_map, s, z0, args, max_steps=STEPS, throw=False
            )
            found = solution.result == RESULTS.successful
            outcomes.append((solution.value, found, solution.stats))
        return outcomes

    (expected, found, bare), *wrapped = run(args)
    assert found
    num_steps = int(bare["num_steps"])
    for value, found, stats in wrapped:
        assert found and value.dtype == dtype
        assert jnp.allclose(value, expected, rtol=4 * jnp.finfo(dtype).eps)
        assert stats["num_steps"] == num_steps
        assert all(jnp.allclose(stats[key], bare[key]) for key in bare)
        if "residuals" in stats:
            residuals = np.asarray(stats["residuals"])
            assert np.all(np.isfinite(residuals[:num_steps]))
            assert np.all(np.isnan(residuals[num_steps:]))
            first = jnp.max(jnp.abs(tanh_map(jnp.zeros(6, dtype), args)))
            assert np.allclose(residuals[0], first)


def nest(solver):
    for wrap in WRAPPERS.values():
        solver = wrap(solver)
    return solver


@pytest.mark.parametrize("wrapper", slow_but([*WRAPPERS, "all"], "all"))
@pytest.mark.parametrize("adjoint", [*ADJOINTS, "unrolled"])
def test_every_adjoint_works_through_each(adjoint, wrapper, getkey):
    adjoints = {**ADJOINTS, "unrolled": optx.RecursiveCheckpointAdjoint}

    @jax.jit
    def gradients(args):
        def loss(args, solver):
            cell = lambda z, x: tanh_map(z, args)
            deq = eqi.DEQ(cell, solver, adjoints[adjoint](), max_steps=STEPS)
            return jnp.sum(deq(args[1]) ** 2)

        solver = eqi.Picard(1e-10, 1e-10)
        sides = solver, {**WRAPPERS, "all": nest}[wrapper](solver)
        return [jax.value_and_grad(loss)(args, side) for side in sides]

    (value, expected), (other, actual) = gradients(problem(getkey()))
    assert jnp.allclose(value, other, rtol=1e-14)
    assert relative_error(actual, expected) < 1e-12


def test_a_budget_for_each_example_and_each_step(getkey):
    args = problem(getkey())
    traces = []

    @jax.jit
    def run(budgets):
        traces.append(1)

        def at(num_steps):
            solver = eqi.Budget(eqi.Anderson(1e-9, 1e-9), num_steps)
            deq = eqi.DEQ(lambda z, x: tanh_map(z, args), solver)
            solution = deq.solve(args[1])
            reached = solution.result == RESULTS.nonlinear_max_steps_reached
            return solution, reached

        return jax.vmap(at)(budgets)

    for budgets in ([1, 4, 50, 2], [3, 0, -7, 50]):
        batch, reached = run(jnp.array(budgets))
        for k, num_steps in enumerate(budgets):
            alone = solve(
                tanh_map,
                eqi.Anderson(1e-9, 1e-9),
                jnp.zeros(6),
                args,
                max_steps=max(num_steps, 1),
            )
            assert jnp.allclose(batch.value[k], alone.value, rtol=1e-13)
            assert batch.stats["num_steps"][k] == alone.stats["num_steps"]
            assert bool(reached[k]) == (num_steps < 50)
    assert len(traces) == 1


def test_a_layer_takes_another_budget_without_recompilation(getkey):
    weight, x = problem(getkey())
    traces = []

    def cell(z, x):
        traces.append(1)
        return jnp.tanh(weight @ z + x)

    counts = []
    for num_steps in (2, 5):
        deq = eqi.DEQ(cell, eqi.Budget(eqi.Picard(1e-9, 1e-9), jnp.array(num_steps)))
        counts.append(int(deq.solve(x).stats["num_steps"]))
        if num_steps == 2:
            num_traces = len(traces)
    assert counts == [2, 5] and len(traces) == num_traces


def test_arrays_that_a_compiled_function_closes_over(getkey):
    weight, x = problem(getkey())
    solver, cell = eqi.Picard(1e-9, 1e-9), lambda z, x: jnp.tanh(weight @ z + x)
    for wrapped in (
        lambda: eqi.Budget(solver, jnp.array(3)),
        lambda: eqi.Budget(eqi.Patience(solver, 3, jnp.array(0.9)), 3),
    ):
        solution = jax.jit(lambda x: eqi.DEQ(cell, wrapped()).solve(x))(x)
        assert solution.stats["num_steps"] == 3


def test_the_backward_solve_takes_a_budget(getkey):
    matrix = jnp.eye(6) - matrix_of_norm(getkey(), 6, 0.7)
    operator, b = lx.MatrixLinearOperator(matrix), jr.normal(getkey(), (6,))
    for num_steps, found in ((3, False), (60, True)):
        solver = eqi.FixedPointLinearSolver(
            eqi.Budget(eqi.Anderson(1e-10, 1e-10), num_steps)
        )
        solution = lx.linear_solve(operator, b, solver, throw=False)
        assert bool(solution.result == lx.RESULTS.successful) == found
        assert (solution.stats["num_products"] == 3) != found
        if not found:
            assert solution.result == lx.RESULTS.max_steps_reached


@pytest.mark.parametrize("name", ("Picard", "Anderson", "Newton", "Optimistix"))
def test_patience_ends_a_solve_that_stagnates(name):
    """There is no solution; the residual is least at -1/2, and at first shrinks."""
    fn = lambda z, args: z + 0.1 + 0.5 * (z + 0.5) ** 2
    solver = eqi.Patience(INNER[name](1e-9, 1e-9), 4)
    recorded = eqi.Recorded(solver, STEPS)
    solution = solve(fn, recorded, jnp.array([-1.3]), max_steps=STEPS)
    residuals = np.asarray(solution.stats["residuals"])
    num_steps = int(solution.stats["num_steps"])
    assert solution.result == RESULTS.nonlinear_divergence
    assert np.nanmin(residuals) == residuals[np.isfinite(residuals)].min()
    # The last progress, and four steps without any.
    last, count = np.inf, 0
    for k, residual in enumerate(residuals[:num_steps]):
        last, count = (residual, 0) if residual <= 0.9 * last else (last, count + 1)
        assert (count == 4) == (k == num_steps - 1)
    assert jnp.allclose(solution.stats["residual"], np.nanmin(residuals))
    at_value = jnp.abs(fn(solution.value, None) - solution.value)
    assert jnp.allclose(at_value, np.nanmin(residuals), rtol=1e-6)


def test_a_layer_that_throws_says_that_patience_has_run_out():
    solver = eqi.Patience(eqi.Picard(1e-9, 1e-9), 4)
    deq = eqi.DEQ(lambda z, x: z + x, solver, throw=True)
    with pytest.raises(RuntimeError, match="ceased to shrink. The residual is about"):
        jax.block_until_ready(deq(jnp.ones(2)))


def test_the_best_iterate_is_returned(getkey):
    """Of an expansion, the first; never one that is not finite; and NaN if none is."""
    weight = 3 * jnp.eye(2)
    linear = lambda z, args: weight @ z + args
    start, x = jnp.array([1.0, 2.0]), jnp.ones(2)
    best = eqi.BestSoFar(eqi.Picard(1e-9, 1e-9))
    solution = solve(linear, best, start, x, max_steps=10)
    assert solution.result == RESULTS.nonlinear_max_steps_reached
    assert jnp.array_equal(solution.value, start)
    assert solution.stats["residual"] == 5 and solution.stats["num_evaluations"] == 10

    leaves = lambda z, args: jnp.where(z > args, jnp.nan, 3 * z + 1)
    solution = solve(leaves, best, jnp.array([1.0]), jnp.array(20.0))
    assert solution.result == RESULTS.nonfinite
    assert solution.value == 1 and solution.stats["residual"] == 3
    for solver in (best, eqi.BestSoFar(optx.FixedPointIteration(1e-9, 1e-9))):
        solution = solve(leaves, solver, jnp.array([1.0]), jnp.array(0.0))
        assert solution.result == RESULTS.nonfinite
        assert jnp.all(jnp.isnan(solution.value))
        assert jnp.isnan(solution.stats["residual"])


class Counter(eqx.Module):
    """A cell whose Equinox state holds what it has returned last."""

    weight: jax.Array
    last: eqx.nn.StateIndex

    def __init__(self, weight):
        self.weight = weight
        self.last = eqx.nn.StateIndex(jnp.zeros(6))

    def __call__(self, z, x, state):
        image = jnp.tanh(self.weight @ z + x)
        return image, state.set(self.last, image)


@pytest.mark.parametrize("name", [*WRAPPERS, "Noisy"])
def test_an_equinox_state_is_that_of_the_value(name, getkey):
    weight, x = problem(getkey(), norm=1.5)
    wrap = {**WRAPPERS, "Noisy": lambda s: eqi.Noisy(s, 0.1, jr.key(0))}[name]
    cell, state = eqx.nn.make_with_state(Counter)(weight)
    deq = eqi.DEQ(cell, wrap(eqi.Picard(1e-9, 1e-9)), max_steps=3)
    value, new_state = deq(x, state=state)
    image = jnp.tanh(weight @ value + x)
    assert jnp.allclose(new_state.get(cell.last), image, rtol=1e-12)


def test_noise_is_new_in_every_step_and_not_in_the_value(getkey):
    weight, x = args = problem(getkey())
    key, scale = getkey(), 0.05
    shape = jax.eval_shape(lambda: x)

    def noise(k):
        (own,) = jr.split(jr.fold_in(key, k), 1)
        return scale * jr.normal(own, shape.shape)

    z, residuals = jnp.zeros(6), []
    for k in range(8):
        point = z + noise(k)
        z = tanh_map(point, args)
        residuals.append(jnp.max(jnp.abs(z - point)))
    solver = eqi.Noisy(eqi.Picard(1e-9, 1e-9), scale, key)
    for wrapped in (eqi.Recorded(solver, 8), eqi.Budget(eqi.Recorded(solver, 8), 8)):
        solution = solve(tanh_map, wrapped, jnp.zeros(6), args, max_steps=8)
        assert jnp.allclose(solution.value, z, rtol=1e-12)
        assert jnp.allclose(solution.stats["residuals"], jnp.stack(residuals))
        own = jnp.max(jnp.abs(tanh_map(z, args) - z))
        assert jnp.allclose(solution.stats["residual"], own)
        assert solution.stats["num_evaluations"] == 9
        assert not successful(solution)
    # Around a record, it is in what is recorded; around the best, in none returned.
    for wrapped in (eqi.Noisy(eqi.Recorded(solver.solver, 8), scale, key),):
        solution = solve(tanh_map, wrapped, jnp.zeros(6), args, max_steps=8)
        assert jnp.allclose(solution.stats["residuals"], jnp.stack(residuals))
    best = solve(tanh_map, eqi.BestSoFar(solver), jnp.zeros(6), args, max_steps=8)
    assert jnp.allclose(best.stats["residual"], min(residuals))
    own = jnp.max(jnp.abs(tanh_map(best.value, args) - best.value))
    assert jnp.allclose(own, min(residuals))


def test_without_noise_the_value_is_one_step_further(getkey):
    args = problem(getkey())
    plain = eqi.Picard(1e-6, 1e-6)
    noisy = eqi.Noisy(plain, 0.0, getkey())
    a, b = (solve(tanh_map, s, jnp.zeros(6), args) for s in (plain, noisy))
    assert a.stats["num_steps"] == b.stats["num_steps"] and successful(b)
    assert jnp.allclose(b.value, tanh_map(a.value, args), rtol=1e-12)


def test_the_law_of_noisy_iterates():
    """Of z <- a (z + s e): the variance of z tends to (a s)^2 / (1 - a^2)."""
    fn = lambda z, args: 0.8 * z
    run = lambda key: (
        optx.fixed_point(
            fn,
            eqi.Noisy(eqi.Picard(1e-9, 1e-9), 0.1, key),
            jnp.ones(1),
            max_steps=60,
            throw=False,
        ).value
    )
    values = jax.jit(jax.vmap(run))(jr.split(jr.key(0), 4000))
    expected = 0.08 / (1 - 0.8**2) ** 0.5
    assert jnp.abs(jnp.std(values) / expected - 1) < 0.05
    assert jnp.abs(jnp.mean(values)) < 4 * expected / 4000**0.5


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_half_precision(dtype, getkey):
    args = problem(getkey(), dtype)
    solver = eqi.Noisy(nest(eqi.Picard(1e-2, 1e-2)), 1e-3, getkey())
    solution = solve(tanh_map, solver, jnp.zeros(6, dtype), args)
    assert solution.value.dtype == dtype and successful(solution)
    error = tanh_map(solution.value, args) - solution.value
    assert jnp.max(jnp.abs(error)) < 0.05


def test_residual_layers_take_them():
    layer = eqi.ThetaLayer(
        lambda t, y, args: -(y**3),
        step_size=0.1,
        solver=eqi.Recorded(eqi.Budget(eqi.Anderson(1e-10, 1e-10), 40), 5),
    )
    plain = eqi.ThetaLayer(
        lambda t, y, args: -(y**3), step_size=0.1, solver=eqi.Anderson(1e-10, 1e-10)
    )
    solution = eqx.filter_jit(eqi.ODEBlock(layer, 4).solve)(jnp.ones(2))
    assert solution.stats["residuals"].shape == (4, 5)
    assert jnp.allclose(solution.value, eqi.ODEBlock(plain, 4).trajectory(jnp.ones(2)))
    assert "0 % not found" in str(eqi.summarise(solution))


@pytest.mark.parametrize(
    "wrap, error, match",
    (
        (lambda s: eqi.Budget(s, 0), ValueError, "`num_steps` must be an integer of"),
        (lambda s: eqi.Budget(s, jnp.array(0)), ValueError, "at least 1. Got"),
        (lambda s: eqi.Budget(s, jnp.array(2.0)), TypeError, "."),
        (lambda s: eqi.Budget(s, 2.5), TypeError, "."),
        (lambda s: eqi.Patience(s, 0), ValueError, "`num_steps`"),
        (lambda s: eqi.Patience(s, 3, 0.0), ValueError, "`factor` must be positive"),
        (lambda s: eqi.Patience(s, 3, 1.5), ValueError, "`factor` must be at most 1"),
        (lambda s: eqi.Recorded(s, 0), ValueError, "`length`"),
        (lambda s: eqi.Noisy(s, -1.0, jr.key(0)), ValueError, "`scale`"),
        (lambda s: eqi.Noisy(s, 1.0, 0), TypeError, "."),
        *(
            (lambda s, wrap=wrap: wrap("Picard"), TypeError, ".")
            for wrap in WRAPPERS.values()
        ),
    ),
)
def test_bad_input(wrap, error, match):
    with pytest.raises(error, match=match):
        wrap(eqi.Picard(1e-6, 1e-6))


def test_what_is_no_solver_is_named():
    with pytest.raises(TypeError, match="Got 'Picard'"):
        check_fixed_point_solver("Picard")
    with pytest.raises(TypeError, match="wrap it as `eqimplicit.RootAsFixedPoint"):
        check_fixed_point_solver(optx.Newton(1e-6, 1e-6))


def test_a_budget_of_several_numbers_is_refused_where_it_is_used():
    solver = eqi.Budget(eqi.Picard(1e-6, 1e-6), jnp.array([3, 4]))
    with pytest.raises(ValueError, match="must be one number where it is used"):
        eqi.DEQ(lambda z, x: 0.5 * z + x, solver)(jnp.ones(2))


def test_a_budget_that_is_put_in_later_is_an_integer():
    deq = eqi.DEQ(lambda z, x: 0.5 * z + x, eqi.Budget(eqi.Picard(1e-6, 1e-6), 3))
    deq = eqx.tree_at(lambda deq: deq.solver.num_steps, deq, 4.5)
    with pytest.raises(TypeError, match="`num_steps` must be an integer. Got 4.5"):
        deq(jnp.ones(2))
