import math
import re

import equinox as eqx
import evaluations
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import ITERATIONS, matrix_of_norm, orthogonal, solve, SOLVERS, tanh_map


DTYPES = {
    # dtype, tolerance
    "float64": (jnp.float64, 1e-10),
    "float32": (jnp.float32, 1e-5),
    "bfloat16": (jnp.bfloat16, 3e-2),
    "float16": (jnp.float16, 3e-3),
}


def contraction(dtype=jnp.float64, size=8):
    weight = matrix_of_norm(jr.key(0), size, 0.8, dtype)
    return (
        tanh_map,
        jnp.zeros(size, dtype),
        (weight, jr.normal(jr.key(1), (size,), dtype)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOLVERS)
def test_solution_meets_the_tolerance_in_every_dtype(name, dtype):
    if name not in ITERATIONS and dtype.endswith("16"):
        pytest.skip("a dense factorisation needs at least float32")
    dtype, tol = DTYPES[dtype]
    f, z0, args = contraction(dtype)
    sol = solve(f, SOLVERS[name](tol, tol), z0, args)
    assert sol.result == optx.RESULTS.successful
    assert sol.value.dtype == dtype
    assert jnp.finfo(sol.stats["residual"].dtype).bits >= 32
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    image = f(sol.value, args).astype(wide)
    difference = jnp.abs(image - sol.value.astype(wide))
    # Outside the loop the image may be rounded otherwise, in the last place.
    slack = 2 * float(jnp.finfo(dtype).eps)
    assert jnp.all(difference <= tol * (1 + jnp.abs(image)) + slack)


@pytest.mark.parametrize("max_steps", [7, 300])
@pytest.mark.parametrize("name", SOLVERS)
def test_stats_describe_the_iterate_that_is_returned(name, max_steps):
    f, z0, args = contraction()
    tol = 1e-10 if max_steps == 300 else 1e-15
    sol = solve(f, SOLVERS[name](tol, tol), z0, args, max_steps=max_steps)
    residual = jnp.max(jnp.abs(f(sol.value, args) - sol.value))
    assert jnp.allclose(sol.stats["residual"], residual, rtol=1e-4, atol=1e-15)
    if name in ITERATIONS:
        assert sol.stats["num_evaluations"] == sol.stats["num_steps"]
        if max_steps == 7:
            assert sol.stats["num_evaluations"] == 7
            assert sol.result == optx.RESULTS.nonlinear_max_steps_reached


@pytest.mark.parametrize("name", SOLVERS)
def test_auxiliary_output_is_that_of_the_returned_iterate(name):
    f, z0, args = contraction()
    sol = solve(
        lambda z, a: (f(z, a), {"twice": 2 * z}),
        SOLVERS[name](1e-10, 1e-10),
        z0,
        args,
        has_aux=True,
    )
    assert jnp.array_equal(sol.aux["twice"], 2 * sol.value)


@pytest.mark.parametrize("name", ["Picard", "Anderson", "Broyden", "Newton"])
def test_pytree_state_gives_the_iterates_of_the_flat_one(name):
    f, z0, args = contraction()

    def split(z):
        return {"a": z[:2], "b": (z[2:5].reshape(3, 1), z[5:])}

    def join(tree):
        return jnp.concatenate([tree["a"], tree["b"][0].reshape(-1), tree["b"][1]])

    solver = SOLVERS[name](1e-10, 1e-10)
    flat = solve(f, solver, z0, args)
    tree = solve(lambda z, a: split(f(join(z), a)), solver, split(z0), args)
    assert flat.stats["num_steps"] == tree.stats["num_steps"]
    assert jnp.allclose(join(tree.value), flat.value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["Picard", "Anderson", "Broyden", "Newton"])
def test_examples_of_a_batch_are_independent_bit_for_bit(name):
    f, z0, (weight, x) = contraction()
    easy, hard = jnp.zeros_like(x), jnp.full_like(x, 0.1)
    solver = SOLVERS[name](1e-9, 1e-9)

    @jax.jit
    def steps(xs):
        one = lambda x: optx.fixed_point(f, solver, z0, (weight, x)).stats["num_steps"]
        return jax.vmap(one)(xs)

    with_easy = jnp.stack([x, easy, hard])
    with_nan = jnp.stack([x, jnp.full_like(x, jnp.nan), -x])
    solve_batch = jax.jit(
        jax.vmap(
            lambda x: optx.fixed_point(f, solver, z0, (weight, x), throw=False).value
        )
    )
    first, second = solve_batch(with_easy), solve_batch(with_nan)
    assert jnp.array_equal(first[0], second[0])
    assert jnp.all(jnp.isnan(second[1]) | (second[1] == z0))
    counts = steps(with_easy)
    alone = solve(f, solver, z0, (weight, x)).stats["num_steps"]
    assert counts[0] == alone
    assert counts[1] < counts[0]


def expansive(z, args):
    return 2 * z + 1


def rootless(z, args):
    return z * z + 1


@pytest.mark.parametrize("max_steps", [100, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["Picard", "Anderson", "Broyden"])
def test_divergence_never_reads_as_convergence(name, dtype, max_steps):
    dtype, tol = DTYPES[dtype]
    solver = SOLVERS[name](tol, tol)
    sol = solve(rootless, solver, jnp.ones(3, dtype), max_steps=max_steps)
    assert sol.result != optx.RESULTS.successful
    sol = solve(expansive, solver, jnp.ones(3, dtype), max_steps=max_steps)
    if "Picard" in name:
        assert sol.result != optx.RESULTS.successful
    elif sol.result == optx.RESULTS.successful:  # these may find the true root, -1
        assert jnp.allclose(sol.value.astype(jnp.float32), -1, rtol=0, atol=5 * tol)


@pytest.mark.parametrize("norm", [optx.max_norm, optx.rms_norm, optx.two_norm])
def test_norm_that_overflows_never_reads_as_convergence(norm):
    solver = eqi.Picard(1e-5, 1e-5, norm)
    sol = solve(expansive, solver, jnp.ones(3, jnp.float32), max_steps=1000)
    assert sol.result == optx.RESULTS.nonfinite


@pytest.mark.parametrize("name", SOLVERS)
def test_nan_is_flagged(name):
    f = lambda z, _: jnp.where(z > 0.6, jnp.nan, jnp.cos(z) + 0.5)
    sol = solve(f, SOLVERS[name](1e-8, 1e-8), jnp.zeros(3))
    assert sol.result == optx.RESULTS.nonfinite


@pytest.mark.parametrize("name", ITERATIONS)
def test_best_so_far_survives_a_nan(name):
    # Approaches 0.5, from where f(z) - z is smallest, and then falls off a cliff.
    f = lambda z, _: jnp.where(z > 0.45, jnp.nan, 0.9 * z + 0.05)
    solver = optx.BestSoFarFixedPoint(SOLVERS[name](1e-8, 1e-8))
    sol = solve(f, solver, jnp.array([0.0]))
    assert sol.result == optx.RESULTS.nonfinite
    assert jnp.isfinite(sol.value[0])
    assert 0 <= sol.value[0] <= 0.45


def test_best_so_far_returns_the_best_iterate_of_a_diverging_solve():
    f = lambda z, _: jnp.array([[0.0, -1.2], [1.2, 0.0]]) @ z + 1
    solver = optx.BestSoFarFixedPoint(eqi.Picard(1e-8, 1e-8))
    sol = solve(f, solver, jnp.zeros(2), max_steps=20)
    assert jnp.array_equal(sol.value, jnp.zeros(2))


def test_damped_picard_takes_the_documented_steps():
    f, z0, args = contraction()
    sol = solve(f, eqi.Picard(1e-15, 1e-15, damping=0.3), z0, args, max_steps=4)
    z = z0
    for _ in range(3):
        z = 0.3 * f(z, args) + 0.7 * z
    assert jnp.allclose(sol.value, z, rtol=1e-14)


def anderson_reference(f, z, num_evaluations, history_size, damping):
    """Anderson's method as its least-squares problem, solved by SVD."""
    steps, changes, g = [], [], f(z) - z
    for _ in range(num_evaluations - 1):
        step = damping * g
        if steps:
            S, Y = np.stack(steps, 1), np.stack(changes, 1)
            step = step - (S + damping * Y) @ np.linalg.lstsq(Y, g, rcond=None)[0]
        z = z + step
        steps.append(step)
        changes.append(f(z) - z - g)
        g = f(z) - z
        steps, changes = steps[-history_size:], changes[-history_size:]
    return z


def broyden_reference(f, z, num_evaluations, damping=1.0, memory=None):
    """Broyden's method with a dense Jacobian, rebuilt from the remembered steps."""
    pairs, g = [], f(z) - z
    for _ in range(num_evaluations - 1):
        B = -np.eye(len(z)) / damping
        for s, y in pairs:
            B = B + np.outer(y - B @ s, s) / (s @ s)
        step = -np.linalg.solve(B, g)
        z = z + step
        pairs.append((step, f(z) - z - g))
        g = f(z) - z
        pairs = pairs if memory is None else pairs[-memory:]
    return z


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("num_evaluations", [2, 3, 6, 12])
def test_anderson_and_broyden_take_the_steps_of_their_definitions(
    num_evaluations, damping
):
    f, z0, args = contraction()
    g = lambda z: np.asarray(f(jnp.asarray(z), args))
    start = np.full(8, 0.3)
    anderson = eqi.Anderson(1e-15, 1e-15, history_size=4, damping=damping)
    broyden = eqi.Broyden(1e-15, 1e-15, history_size=4, damping=damping)
    for solver, expected in (
        (anderson, anderson_reference(g, start, num_evaluations, 4, damping)),
        (broyden, broyden_reference(g, start, num_evaluations, damping, memory=4)),
    ):
        sol = solve(f, solver, jnp.asarray(start), args, max_steps=num_evaluations)
        assert np.allclose(sol.value, expected, rtol=0, atol=1e-9)


def affine_map(z, args):
    weight, x = args
    return weight @ z + x


@pytest.mark.parametrize("seed", range(5))
def test_evaluations_to_tolerance_against_full_memory_broyden(seed):
    for name, problem in evaluations.make_problems(seed).items():
        counts = {
            k: evaluations.count(s, problem) for k, s in evaluations.SOLVERS.items()
        }
        reference = evaluations.count_full_memory_broyden(problem)
        best = lambda *names: min(counts[name] or 500 for name in names)
        long = best("`Anderson`, history 100", "`Broyden`, history 100")
        assert long <= reference, name
        if name != "symmetric, radius 0.99":
            assert best("`Anderson`", "`Broyden`") <= 1.5 * reference, name


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_anderson_needs_as_many_evaluations_at_every_scale(scale):
    # An absolute ridge would drown the differences of a small problem.
    f, z0, (weight, x) = contraction()
    weight = 0.95 * orthogonal(jr.key(3), 8)
    solver = lambda s: eqi.Anderson(0.0, 1e-8 * s)
    counts = [
        int(solve(affine_map, solver(s), z0, (weight, s * x)).stats["num_evaluations"])
        for s in (1.0, scale)
    ]
    assert counts[0] == counts[1] < 200


@pytest.mark.parametrize("history_size", [1, 3])
def test_broyden_survives_a_singular_step_and_a_full_history(history_size, getkey):
    # f(z) - z is constant far out and singular at its root: many starts end in a cycle.
    f = lambda z, _: jnp.where(z > 0, z - z**3, z + 1)
    solver = eqi.Broyden(0.0, 1e-6, history_size=history_size)
    starts = 3 * jr.normal(getkey(), (50, 3))
    sol = jax.vmap(lambda z: solve(f, solver, z, max_steps=400))(starts)
    residual = jnp.max(jnp.abs(f(sol.value, None) - sol.value), axis=1)
    # A start that diverges ends in an infinite image, and says so.
    finite = jnp.all(jnp.isfinite(sol.value), axis=1)
    assert jnp.array_equal(finite, sol.result != optx.RESULTS.nonfinite)
    assert jnp.array_equal(sol.result == optx.RESULTS.successful, residual < 1e-6)
    assert jnp.mean(residual < 1e-6) > 0.5


def test_broyden_runs_long_after_its_history_is_full():
    weight = jnp.asarray(evaluations.make_problems(0)["symmetric, radius 0.99"].weight)
    args = (weight, jnp.ones(100))
    for dtype, tol in ((jnp.float64, 1e-11), (jnp.float32, 1e-4)):
        args = jtu.tree_map(lambda a: a.astype(dtype), args)
        solver = eqi.Broyden(0.0, tol, history_size=5)
        sol = solve(affine_map, solver, jnp.zeros(100, dtype), args, max_steps=2000)
        assert sol.result == optx.RESULTS.successful
        assert sol.stats["num_evaluations"] > 50


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solution_as_initial_guess_takes_one_evaluation(name):
    f = lambda z, _: 0.5 * z
    sol = solve(f, SOLVERS[name](1e-6, 1e-6), jnp.zeros(3))
    assert sol.stats["num_steps"] == 1
    assert jnp.array_equal(sol.value, jnp.zeros(3))


def test_zero_is_found_with_a_relative_tolerance_only():
    sol = solve(lambda z, _: jnp.zeros_like(z), eqi.Anderson(1e-3, 0.0), jnp.ones(3))
    assert sol.result == optx.RESULTS.successful
    assert jnp.array_equal(sol.value, jnp.zeros(3))


@pytest.mark.parametrize("d", [0.1, -0.3, 1 / 3, 0.5])
@pytest.mark.parametrize("name", SOLVERS)
def test_toy_root_of_the_jfb_paper(name, d):
    root = {
        0.1: 0.10001000500350286,
        -0.3: -0.30253439183032693,
        1 / 3: 0.3377270195403583,
        0.5: 0.5506065793341345,
    }[d]
    sol = solve(lambda y, d: d + y**5, SOLVERS[name](0.0, 1e-15), jnp.array(0.0), d)
    assert abs(float(sol.value) - root) < 3e-15
    series = sum(
        math.comb(5 * n, n) / (4 * n + 1) * d ** (4 * n + 1) for n in range(60)
    )
    assert abs(float(sol.value) - series) < (1e-10 if abs(d) == 0.5 else 1e-14)


def test_toy_root_takes_the_expected_number_of_picard_steps():
    f = lambda y, d: d + y**5
    for d, steps in ((0.5, 42), (1 / 3, 13), (0.1, 6), (-0.3, 11)):
        sol = solve(f, eqi.Picard(0.0, 1e-15), jnp.array(0.0), d)
        assert abs(int(sol.stats["num_evaluations"]) - steps) <= 1


def test_changing_an_array_tolerance_does_not_recompile():
    traces = []

    @eqx.filter_jit
    def run(solver, z0):
        traces.append(None)
        return optx.fixed_point(lambda z, _: jnp.cos(z), solver, z0).stats["num_steps"]

    for cls in (eqi.Picard, eqi.Anderson, eqi.Broyden):
        traces.clear()
        loose = run(cls(jnp.array(1e-2), jnp.array(1e-2)), jnp.zeros(2))
        tight = run(cls(jnp.array(1e-9), jnp.array(1e-9)), jnp.zeros(2))
        assert len(traces) == 1
        assert loose < tight


@pytest.mark.parametrize("cls", [eqi.Picard, eqi.Anderson, eqi.Broyden])
def test_bad_tolerances_and_dampings_are_refused(cls):
    with pytest.raises(ValueError, match="`rtol` must not be negative or.*-0.1"):
        cls(-0.1, 1e-3)
    with pytest.raises(ValueError, match="`atol` must not be negative"):
        cls(1e-3, -1.0)
    with pytest.raises(ValueError, match="must not be negative or NaN. Got nan"):
        cls(float("nan"), 1e-3)
    with pytest.raises(ValueError, match="must not both be zero"):
        cls(0.0, 0.0)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`damping` must be positive"):
            cls(1e-3, 1e-3, damping=damping)
    with pytest.raises(TypeError, match="dampng"):
        cls(1e-3, 1e-3, dampng=0.5)
    with pytest.raises(ValueError, match=r"accepts no `options`. Got \['lower'\]"):
        solver = cls(1e-3, 1e-3)
        optx.fixed_point(
            lambda z, _: jnp.cos(z), solver, jnp.ones(2), options={"lower": 0}
        )


@pytest.mark.parametrize("cls", [eqi.Anderson, eqi.Broyden])
@pytest.mark.parametrize("history_size", [0, -1, 2.0, True])
def test_bad_history_sizes_are_refused(cls, history_size):
    with pytest.raises((ValueError, TypeError), match="history_size"):
        cls(1e-3, 1e-3, history_size=history_size)


def test_as_fixed_point_refuses_anything_but_a_root_finder():
    with pytest.raises(TypeError, match="root_finder"):
        eqi.RootAsFixedPoint(optx.BFGS(1e-3, 1e-3))  # pyright: ignore


@pytest.mark.parametrize("name", ITERATIONS)
def test_mixed_and_complex_states_are_refused(name):
    solver = SOLVERS[name](1e-3, 1e-3)
    identity = lambda z, _: z
    with pytest.raises(ValueError, match=r"leaf `state\[1\]` has dtype float32"):
        optx.fixed_point(identity, solver, (jnp.ones(2), jnp.ones(2, jnp.float32)))
    with pytest.raises(ValueError, match="must not be empty"):
        optx.fixed_point(identity, solver, jnp.zeros(0))
    with pytest.warns(UserWarning, match="Complex"):
        with pytest.raises(ValueError, match="complex128"):
            optx.fixed_point(identity, solver, jnp.ones(2, jnp.complex128))


def lowered(solver, batch=False):
    f = lambda z, a: jnp.tanh(a * z + 1)
    solve_one = lambda a: optx.fixed_point(f, solver, jnp.zeros(50), a).value
    solve_all = jax.vmap(solve_one) if batch else solve_one
    return jax.jit(solve_all).lower(jnp.ones((3, 50)) if batch else jnp.ones(50))


@pytest.mark.usefixtures("all_optimisations")
@pytest.mark.parametrize("cls", [eqi.Anderson, eqi.Broyden])
def test_history_is_updated_in_place(cls):
    text = lowered(cls(1e-3, 1e-3, history_size=7)).compile().as_text()
    assert "f64[7,50]" in text
    body = text[text.index("while/body") :] if "while/body" in text else text
    assert not re.search(r"f64\[7,50\]\S* copy\(%(?!(?:wrapped_)?broadcast)", body)


@pytest.mark.usefixtures("all_optimisations")
@pytest.mark.parametrize("cls", [eqi.Anderson, eqi.Broyden])
def test_batched_history_is_never_scattered_into(cls):
    text = lowered(cls(1e-3, 1e-3, history_size=7), batch=True).compile().as_text()
    assert not re.search(r" (scatter|gather)\(", text)


@pytest.mark.usefixtures("all_optimisations")
@pytest.mark.parametrize("cls", [eqi.Anderson, eqi.Broyden])
def test_program_does_not_grow_with_the_history_nor_call_lapack(cls):
    short, long = (lowered(cls(1e-3, 1e-3, history_size=m)) for m in (3, 100))
    assert short.as_text().count("\n") == long.as_text().count("\n")
    assert "lapack" not in long.as_text()


@pytest.mark.parametrize("name", ITERATIONS)
def test_map_is_compiled_once(name):
    text = lowered(SOLVERS[name](1e-3, 1e-3)).as_text()
    assert text.count("stablehlo.tanh") == 1


@pytest.mark.parametrize("cls", [eqi.Anderson, eqi.Broyden])
def test_tiny_steps_do_not_overflow_half_precision(cls):
    # The reciprocal of a step below 1.5e-5 is infinite in float16.
    f = lambda z, _: 1e-5 * jnp.array([0.9, -0.5, 0.3], jnp.float16) + 0.9 * z[::-1]
    sol = solve(f, cls(0.0, 1e-6), jnp.zeros(3, jnp.float16))
    assert jnp.all(jnp.isfinite(sol.value))
    assert sol.result == optx.RESULTS.successful


def test_arrays_and_other_types_are_validated_too():
    with pytest.raises(ValueError, match="`rtol` must not be negative"):
        eqi.Picard(jnp.array(-1.0), jnp.array(1e-3))
    with pytest.raises(ValueError, match="must not both be zero"):
        eqi.Anderson(jnp.array(0.0), 0.0)
    with pytest.raises(ValueError, match="`damping` must be positive"):
        eqi.Broyden(1e-3, 1e-3, damping=jnp.array(-1.0))
    with pytest.raises(ValueError, match="`rtol` must be finite"):
        eqi.Picard(float("inf"), 1e-3)
    # Jitted, values are not known; nothing is refused.
    jax.jit(lambda tol: eqi.Picard(tol, tol).rtol)(jnp.array(-1.0))


@pytest.mark.parametrize("rtol", [0.0, jnp.array(0.0)], ids=["number", "array"])
@pytest.mark.parametrize("norm", [optx.two_norm, optx.rms_norm, optx.max_norm])
def test_a_residual_whose_square_underflows_is_not_zero(norm, rtol):
    f = lambda z, _: 0.5 * z + jnp.full(3, 1e-22, jnp.float32)
    sol = solve(f, eqi.Picard(rtol, 1e-30, norm), jnp.zeros(3, jnp.float32))
    assert jnp.allclose(sol.value, 2e-22, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("cls", [eqi.Anderson, eqi.Broyden])
def test_steps_beyond_rounding_do_no_harm(cls, dtype):
    # All that a secant sees then is noise, and a long history is full of it.
    solver = cls(0.0, 1e-30, history_size=100)
    for name in ("non-symmetric, norm 0.9", "tanh, gain 1", "rotations, radius 1"):
        nonlinear, weight, x = evaluations.make_problems(0)[name]
        weight, x = jnp.asarray(weight, dtype), jnp.asarray(x, dtype)
        image = lambda z: weight @ z + x
        fn = lambda z: jnp.tanh(image(z)) if nonlinear else image(z)
        history = jax.jit(
            lambda z: eqi.convergence_history(fn, z, solver, num_steps=400)
        )(jnp.zeros_like(x))
        best = jnp.argmin(history)
        assert history[best] < 10 * jnp.finfo(dtype).eps
        assert jnp.max(history[best:]) < 1e-5, name


@pytest.mark.parametrize("cls", [eqi.Anderson, eqi.Broyden])
def test_the_scale_of_a_problem_does_not_matter(cls, getkey):
    rotation = orthogonal(getkey(), 50)
    matrix = rotation @ jnp.diag(jnp.linspace(1, 4, 50)) @ rotation.T
    counts = []
    for scale in (1.0, 1e4):
        a = (scale * matrix).astype(jnp.float32)
        b = a @ jnp.ones(50, jnp.float32)
        solver = cls(0.0, 1e-4 * scale, history_size=20, damping=1 / (2.5 * scale))
        y0 = jnp.zeros(50, jnp.float32)
        sol = optx.fixed_point(lambda z, _: z - (a @ z - b), solver, y0)
        counts.append(int(sol.stats["num_evaluations"]))
    assert abs(counts[0] - counts[1]) <= 1
