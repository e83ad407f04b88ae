import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import orthogonal


TIGHT = 1e-12

# Each solves I - J for a contractive J.
LINEAR_SOLVERS = {
    "GMRES": lambda: eqi.GMRES(TIGHT, 0.0),
    "GMRES with a short cycle": lambda: eqi.GMRES(TIGHT, 0.0, restart=3),
    "NeumannKrylov": lambda: eqi.NeumannKrylov(TIGHT, 0.0, eqi.GMRES(TIGHT, 0.0)),
    "NeumannKrylov on LU": lambda: eqi.NeumannKrylov(TIGHT, 0.0, lx.LU(), rate=0.1),
    "Picard": lambda: eqi.FixedPointLinearSolver(eqi.Picard(TIGHT, TIGHT)),
    "Anderson": lambda: eqi.FixedPointLinearSolver(eqi.Anderson(TIGHT, TIGHT)),
    "Broyden": lambda: eqi.FixedPointLinearSolver(eqi.Broyden(TIGHT, TIGHT)),
    "stock iteration": lambda: eqi.FixedPointLinearSolver(
        optx.FixedPointIteration(TIGHT, TIGHT)
    ),
    "NeumannSeries": lambda: eqi.NeumannSeries(80),
    "damped NeumannSeries": lambda: eqi.NeumannSeries(160, damping=0.7),
}

TO_A_TOLERANCE = [name for name in LINEAR_SOLVERS if "Series" not in name]

# A few that stand for all where compilation is what takes the time.
FEW = ["GMRES", "NeumannKrylov", "Anderson", "damped NeumannSeries"]


def gmres(rtol, atol=0.0, **kwargs):
    """With tolerances that do not ask for another compilation."""
    return eqi.GMRES(jnp.array(rtol), jnp.array(atol), **kwargs)


def neumann_krylov(rtol):
    return eqi.NeumannKrylov(jnp.array(rtol), jnp.array(0.0), gmres(rtol))


KRYLOV = {"GMRES": gmres, "NeumannKrylov": neumann_krylov}

# Jacobians on which the Neumann iteration is slow or diverges.
HARD = {
    "radius 0.99": lambda: symmetric(jnp.linspace(-0.99, 0.99, 8)),
    "rotation of radius 1": lambda: rotations(jnp.linspace(0.5, 3.0, 4)),
    "not contractive": lambda: symmetric(jnp.linspace(-3.0, 0.8, 8)),
    "nonnormal": lambda: 0.5 * jnp.eye(8) + 0.7 * jnp.eye(8, k=1),
}


def symmetric(eigenvalues):
    basis = jr.orthogonal(jr.key(0), len(eigenvalues))
    return basis @ jnp.diag(eigenvalues) @ basis.T


def rotations(angles):
    blocks = [
        jnp.array([[jnp.cos(a), -jnp.sin(a)], [jnp.sin(a), jnp.cos(a)]]) for a in angles
    ]
    return jax.scipy.linalg.block_diag(*blocks)


def matrix_of_norm(key, size, norm, dtype=jnp.float64):
    matrix = jr.normal(key, (size, size))
    return (norm / jnp.linalg.norm(matrix, 2) * matrix).astype(dtype)


def contraction(size=8):
    """`I - J` with `||J|| = 0.7`, and a right-hand side."""
    jacobian = matrix_of_norm(jr.key(1), size, 0.7)
    return jnp.eye(size) - jacobian, jr.normal(jr.key(2), (size,))


@eqx.filter_jit
def solve(solver, matrix, vector):
    """The solution, whether it was found, and statistics."""
    operator = lx.MatrixLinearOperator(matrix)
    x, result, stats = solver.solve(operator, vector)
    return x, result == lx.RESULTS.successful, stats


@eqx.filter_jit
def solve_batch(solver, matrices, vectors):
    def solve_one(matrix, vector):
        x, result, stats = solver.solve(lx.MatrixLinearOperator(matrix), vector)
        return x, result == lx.RESULTS.successful, stats["num_products"]

    return jax.vmap(solve_one)(matrices, vectors)


def relative_error(x, y):
    return jnp.linalg.norm(x - y) / jnp.linalg.norm(y)


def relative_residual(matrix, x, b):
    return jnp.linalg.norm(b - matrix @ x) / jnp.linalg.norm(b)


def neumann_sum(matrix, vector, num_terms, damping=1.0):
    term = total = damping * vector
    for _ in range(num_terms - 1):
        term = term - damping * matrix @ term
        total = total + term
    return total


def neumann_count(matrix, vector, rtol):
    """After how many products the residual of Neumann's iteration meets `rtol`."""
    residual, count = np.asarray(vector), 0
    while np.linalg.norm(residual) > rtol * np.linalg.norm(vector):
        residual, count = residual - np.asarray(matrix) @ residual, count + 1
    return count


def gmres_count(matrix, vector, rtol, restart=None):
    """Products until the residual is small enough, by dense least squares over the
    Krylov spaces, and one for each of these that measures its residual."""
    matrix, residual = np.asarray(matrix), np.asarray(vector)
    goal, count = rtol * np.linalg.norm(residual), 0
    while True:
        basis = np.zeros((len(residual), 0))
        count += 1
        start = direction = residual
        for _ in range(restart or len(residual)):
            direction = direction - basis @ (basis.T @ direction)
            direction = direction - basis @ (basis.T @ direction)
            direction = direction / np.linalg.norm(direction)
            basis = np.column_stack([basis, direction])
            image = matrix @ basis
            weights = np.linalg.lstsq(image, start, rcond=None)[0]
            residual = start - image @ weights
            count += 1
            if np.linalg.norm(residual) <= goal:
                return count
            direction = image[:, -1]


def counting_operator(matrix):
    """Counts its products, with `jax.disable_jit`, under which loops run in Python."""
    counts = []

    def product(vector):
        if not isinstance(vector, jax.core.Tracer):
            counts.append(1)
        return matrix @ vector

    structure = jax.eval_shape(lambda: matrix[0])
    operator = lx.FunctionLinearOperator(product, structure, closure_convert=False)
    return operator, counts


# All solvers


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_solution_is_that_of_a_dense_solve(name):
    matrix, b = contraction()
    x, success, _ = solve(LINEAR_SOLVERS[name](), matrix, b)
    assert success
    assert relative_error(x, jnp.linalg.solve(matrix, b)) < 1e-10


@pytest.mark.parametrize("name", FEW)
def test_derivatives_of_a_plain_lineax_solve_are_those_of_a_dense_one(name):
    solver = LINEAR_SOLVERS[name]()

    def ours(matrix, b):
        return lx.linear_solve(lx.MatrixLinearOperator(matrix), b, solver).value

    @jax.jit
    def derivatives(primals, tangents):
        def of(fn):
            _, tangent = jax.jvp(fn, primals, tangents)
            gradient = jax.grad(lambda *p: jnp.sum(fn(*p) ** 3), argnums=(0, 1))
            return tangent, gradient(*primals)

        matrix, b = primals
        (transposed,) = jax.linear_transpose(lambda b: ours(matrix, b), b)(b)
        return of(ours), of(jnp.linalg.solve), transposed

    primals = contraction()
    tangents = tuple(jr.normal(jr.key(3), p.shape) for p in primals)
    found, expected, transposed = derivatives(primals, tangents)
    matrix, b = primals
    assert eqx.tree_equal(found, expected, rtol=1e-9, atol=1e-10)
    assert relative_error(transposed, jnp.linalg.solve(matrix.T, b)) < 1e-9


@pytest.mark.parametrize("name", FEW)
def test_operators_on_pytrees_are_solved(name):
    def fn(y, args):
        del args
        a, b = y["a"], y["b"]
        return {"a": a - 0.3 * jnp.sum(b, 1), "b": b + 0.2 * jnp.sum(a) - 0.1 * b}

    y = {"a": jnp.arange(2.0), "b": jnp.ones((2, 3))}
    operator = lx.JacobianLinearOperator(fn, y)
    found = eqx.filter_jit(lx.linear_solve)(operator, y, LINEAR_SOLVERS[name]()).value
    expected = lx.linear_solve(operator, y, lx.LU()).value
    assert eqx.tree_equal(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_a_zero_right_hand_side_gives_zero(name):
    matrix, b = contraction()
    x, success, _ = solve(LINEAR_SOLVERS[name](), matrix, jnp.zeros_like(b))
    assert success
    assert jnp.all(x == 0)


@pytest.mark.parametrize("name", KRYLOV)
def test_a_zero_right_hand_side_takes_no_products(name):
    matrix, b = contraction()
    _, _, stats = solve(KRYLOV[name](1e-6), matrix, jnp.zeros_like(b))
    assert stats["num_products"] == 0


@pytest.mark.parametrize("name", TO_A_TOLERANCE)
def test_a_nan_is_flagged(name):
    matrix, b = contraction()
    _, success, _ = solve(LINEAR_SOLVERS[name](), matrix, b.at[3].set(jnp.nan))
    assert not success
    _, success, _ = solve(LINEAR_SOLVERS[name](), matrix.at[2, 3].set(jnp.nan), b)
    assert not success


@pytest.mark.parametrize("name", FEW)
def test_examples_of_a_batch_do_not_touch_each_other(name):
    _, b = contraction()
    if name in TO_A_TOLERANCE:
        jacobians = [0.1, -0.7, 0.95, 0.99, 0.5, 0.3]
    else:
        jacobians = [0.1, -0.7, 0.3, 0.2, 0.5, 0.3]
    identity = jnp.eye(8)
    base = matrix_of_norm(jr.key(1), 8, 1.0)
    matrices = jnp.stack([identity - scale * base for scale in jacobians])
    ordinary = jnp.stack([b, -b, 1e3 * b, 1e-3 * b, b, b])
    nan = ordinary.at[4, 0].set(jnp.nan)
    zero = ordinary.at[4].set(0).at[5].set(0)
    huge = ordinary.at[4].set(1e12 * b)
    runs = [solve_batch(LINEAR_SOLVERS[name](), matrices, v) for v in (nan, zero, huge)]
    for solution, success, num_products in runs:
        assert jnp.array_equal(solution[:4], runs[0][0][:4])
        assert jnp.array_equal(num_products[:4], runs[0][2][:4])
        assert jnp.all(success[:3])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", KRYLOV)
def test_half_precision_is_kept(name, dtype):
    eps = float(jnp.finfo(dtype).eps)
    solver = KRYLOV[name](2 * eps)
    matrix, b = (a.astype(dtype) for a in contraction())
    x, _, _ = solve(solver, matrix, b)
    assert x.dtype == dtype
    matrix, b = matrix.astype(jnp.float64), b.astype(jnp.float64)
    expected = jnp.linalg.solve(matrix, b)
    assert relative_error(x.astype(jnp.float64), expected) < 20 * eps


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("name", [*KRYLOV, "NeumannSeries"])
def test_the_solution_scales_with_the_right_hand_side(name, dtype):
    solver = KRYLOV[name](1e-5) if name in KRYLOV else eqi.NeumannSeries(40)
    matrix, b = (a.astype(dtype) for a in contraction())
    expected = jnp.linalg.solve(matrix, b)
    exponents = (-220, -180, 180, 220) if dtype == jnp.float64 else (-30, -22, 22, 30)
    for exponent in exponents:
        scale = jnp.array(10.0**exponent, dtype)
        x, success, _ = solve(solver, matrix, scale * b)
        assert success
        assert x.dtype == dtype
        assert relative_error(x / scale, expected) < 1e-4


@pytest.mark.parametrize("name", FEW)
def test_systems_with_one_unknown_are_solved(name):
    for a in (1.0, 0.6, 1.4):
        x, success, _ = solve(
            LINEAR_SOLVERS[name](), jnp.array([[a]]), jnp.array([-3.0])
        )
        assert success
        assert jnp.allclose(x, -3.0 / a, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_rectangular_operators_and_options_are_refused(name):
    solver = LINEAR_SOLVERS[name]()
    operator = lx.MatrixLinearOperator(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(operator, jnp.ones(3), solver)
    operator = lx.MatrixLinearOperator(jnp.eye(2))
    with pytest.raises(ValueError, match="options"):
        lx.linear_solve(operator, jnp.ones(2), solver, options={"y0": jnp.ones(2)})


BAD_ARGUMENTS = {
    "num_terms": lambda: eqi.NeumannSeries(0),
    "damping": lambda: eqi.NeumannSeries(3, damping=0.0),
    "rtol": lambda: eqi.GMRES(-1e-3, 0.0),
    "`rtol` and `atol`": lambda: eqi.GMRES(0.0, 0.0),
    "restart": lambda: eqi.GMRES(1e-3, 0.0, restart=0),
    "max_steps": lambda: eqi.GMRES(1e-3, 0.0, max_steps=0),
    "`max_steps` must": lambda: eqi.FixedPointLinearSolver(eqi.Picard(1e-3, 0.0), 0),
    "solver": lambda: eqi.FixedPointLinearSolver(optx.Newton(1e-3, 1e-3)),
    "atol": lambda: eqi.NeumannKrylov(1e-3, -1.0, eqi.GMRES(1e-3, 0.0)),
    "rate": lambda: eqi.NeumannKrylov(1e-3, 0.0, eqi.GMRES(1e-3, 0.0), rate=1.0),
    "patience": lambda: eqi.NeumannKrylov(1e-3, 0.0, lx.LU(), patience=0),
    "fallback": lambda: eqi.NeumannKrylov(1e-3, 0.0, eqi.Picard(1e-3, 0.0)),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name):
    with pytest.raises((ValueError, TypeError), match=name):
        BAD_ARGUMENTS[name]()


# NeumannSeries


@pytest.mark.parametrize("damping", [1.0, 0.6, 1.3])
@pytest.mark.parametrize("num_terms", [1, 2, 7])
def test_neumann_series_is_the_partial_sum(num_terms, damping):
    matrix, b = contraction()
    x, success, stats = solve(eqi.NeumannSeries(num_terms, damping), matrix, b)
    assert success
    assert stats["num_products"] == num_terms - 1
    assert jnp.allclose(x, neumann_sum(matrix, b, num_terms, damping), rtol=1e-13)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_neumann_series_leaves_out_the_powers_that_it_should(damping):
    # Not contractive: an identity of matrices, not a limit.
    matrix = jnp.eye(8) - matrix_of_norm(jr.key(4), 8, 1.8)
    _, b = contraction()
    x, _, _ = solve(eqi.NeumannSeries(6, damping), matrix, b)
    exact = jnp.linalg.solve(matrix, b)
    power = jnp.linalg.matrix_power(jnp.eye(8) - damping * matrix, 6)
    assert jnp.allclose(exact - x, power @ exact, rtol=1e-11, atol=1e-12)


def test_neumann_series_takes_its_damping_from_an_array():
    matrix, b = contraction()
    for damping in (0.4, 0.9):
        x, _, _ = solve(eqi.NeumannSeries(3, jnp.array(damping)), matrix, b)
        assert jnp.allclose(x, neumann_sum(matrix, b, 3, damping), rtol=1e-13)


# GMRES


@pytest.mark.parametrize("restart", [20, 4, 1])
@pytest.mark.parametrize("rtol", [1e-3, 1e-8])
def test_gmres_takes_the_fewest_products_and_meets_its_tolerance(rtol, restart):
    matrix = jnp.eye(8) - matrix_of_norm(jr.key(5), 8, 0.7)
    b = jr.normal(jr.key(6), (8,))
    x, success, stats = solve(gmres(rtol, restart=restart), matrix, b)
    assert success
    assert stats["num_products"] == gmres_count(matrix, b, rtol, min(restart, 8))
    residual = relative_residual(matrix, x, b)
    assert residual <= rtol * (1 + 1e-6)
    assert jnp.allclose(stats["residual"], residual * jnp.linalg.norm(b), rtol=1e-4)


def test_gmres_stops_inside_a_cycle():
    # Three distinct eigenvalues: exact after three products.
    matrix = symmetric(jnp.array([1.0, 1.0, 2.0, 2.0, 5.0, 5.0, 5.0, 1.0]))
    b = jr.normal(jr.key(7), (8,))
    x, success, stats = solve(gmres(1e-10), matrix, b)
    assert success
    assert stats["num_products"] == 3 + 1
    assert relative_error(x, jnp.linalg.solve(matrix, b)) < 1e-12


@pytest.mark.parametrize("name", HARD)
def test_gmres_solves_hard_systems(name):
    matrix = jnp.eye(8) - HARD[name]()
    b = jr.normal(jr.key(8), (8,))
    x, success, stats = solve(gmres(1e-9), matrix, b)
    assert success
    assert relative_residual(matrix, x, b) < 1.01e-9
    assert stats["num_products"] == gmres_count(matrix, b, 1e-9)


def test_gmres_honours_its_absolute_tolerance_and_its_limit():
    matrix, b = contraction()
    x, success, stats = solve(gmres(0.0, 2.0 * jnp.linalg.norm(b)), matrix, b)
    assert success
    assert stats["num_products"] == 0
    assert jnp.all(x == 0)
    x, success, stats = solve(eqi.GMRES(1e-12, 0.0, max_steps=4), matrix, b)
    assert not success
    assert stats["num_products"] == 4
    residual = jnp.linalg.norm(b - matrix @ x)
    assert jnp.allclose(stats["residual"], residual, rtol=1e-10)
    # The best of its Krylov space.
    space = jnp.stack([b, matrix @ b, matrix @ matrix @ b])
    weights = jnp.linalg.lstsq((space @ matrix.T).T, b)[0]
    assert jnp.allclose(x, weights @ space, rtol=1e-8)


@pytest.mark.parametrize("name", KRYLOV)
def test_a_singular_system_never_reads_as_solved(name):
    solver = KRYLOV[name](1e-8)
    systems = [
        (jnp.zeros((8, 8)), jnp.ones(8)),
        (jnp.eye(8, k=1), jnp.zeros(8).at[7].set(1)),
        (jnp.diag(jnp.arange(8.0)), jnp.ones(8)),
        (jnp.diag(jnp.arange(8.0) > 0).astype(jnp.float64), jnp.ones(8)),
        *(
            (jr.normal(jr.key(seed), (8, 8)).at[0].set(0), jnp.ones(8))
            for seed in range(8)
        ),
    ]
    for matrix, b in systems:
        x, success, _ = solve(solver, matrix, b)
        assert not success
        # Whatever it is, not an explosion.
        assert relative_residual(matrix, x, b) <= 1 + 1e-6


@pytest.mark.parametrize("name", KRYLOV)
def test_a_consistent_singular_system_is_solved(name):
    matrix = symmetric(jnp.array([0.0, 0.0, 0.5, 1.0, 1.5, 1.2, 0.9, 1.99]))
    b = matrix @ jr.normal(jr.key(9), (8,))
    x, success, _ = solve(KRYLOV[name](1e-9), matrix, b)
    assert success
    assert relative_residual(matrix, x, b) < 1.01e-9


@pytest.mark.parametrize("name", KRYLOV)
def test_non_symmetric_systems_are_solved_in_single_precision(name):
    keys = jr.split(jr.key(10), 200)
    draw = jax.vmap(lambda key: matrix_of_norm(key, 20, 0.9, jnp.float32))
    b = jr.normal(jr.key(11), (200, 20), jnp.float32)
    # The second is the sign that other packages' breakdown tests stumble over.
    for sign in (1, -1):
        matrices = sign * (jnp.eye(20, dtype=jnp.float32)[None] - draw(keys))
        x, success, _ = solve_batch(KRYLOV[name](1e-6), matrices, b)
        residuals = jax.vmap(relative_residual)(matrices, x, b)
        assert jnp.sum(residuals < 5e-3) == 200
        assert jnp.sum(success) == 200
        assert jnp.max(residuals) < 1e-5


@pytest.mark.parametrize(
    "solver, jacobian",
    [
        (eqi.NeumannSeries(6), 0.7),
        (eqi.GMRES(1e-4, 0.0, restart=3), 0.7),
        (eqi.NeumannKrylov(1e-3, 0.0, eqi.GMRES(1e-3, 0.0)), 1.5),
    ],
)
def test_the_count_of_products_is_true(solver, jacobian):
    matrix = jnp.eye(6) - matrix_of_norm(jr.key(8), 6, jacobian)
    operator, counts = counting_operator(matrix)
    with jax.disable_jit():
        _, _, stats = solver.solve(operator, jr.normal(jr.key(13), (6,)))
    assert len(counts) == stats["num_products"]
    assert len(counts) > 4


# NeumannKrylov


@pytest.mark.parametrize("norm", [0.0, 0.3, 0.7])
def test_neumann_krylov_is_neumann_on_a_contraction(norm):
    jacobian = matrix_of_norm(jr.key(14), 8, 1.0)
    matrix, b = jnp.eye(8) - norm * jacobian, jr.normal(jr.key(15), (8,))
    # A fallback that would show: one term only.
    solver = eqi.NeumannKrylov(1e-7, 0.0, eqi.NeumannSeries(1))
    x, success, stats = solve(solver, matrix, b)
    assert success
    count = neumann_count(matrix, b, 1e-7)
    assert stats["num_products"] == count
    # The residual is known, but the sum with it would not have been measured.
    assert jnp.allclose(x, neumann_sum(matrix, b, count), rtol=1e-12)
    assert relative_residual(matrix, x, b) <= 1e-7
    # One term less misses the tolerance, unless that has none.
    fewer = neumann_sum(matrix, b, max(count - 1, 1))
    assert count == 1 or relative_residual(matrix, fewer, b) > 1e-7


@pytest.mark.parametrize("name", HARD)
def test_neumann_krylov_falls_back_where_neumann_is_slow(name):
    matrix = jnp.eye(8) - HARD[name]()
    b = jr.normal(jr.key(16), (8,))
    solver = neumann_krylov(1e-9)
    x, success, stats = solve(solver, matrix, b)
    assert success
    assert relative_residual(matrix, x, b) < 1.01e-9
    num_wasted = stats["num_products"] - gmres_count(matrix, b, 1e-9)
    assert 4 <= num_wasted <= 6


def test_neumann_krylov_decides_for_each_example_of_a_batch():
    jacobian = matrix_of_norm(jr.key(14), 8, 0.5)
    jacobians = [jacobian, HARD["not contractive"](), 0 * jacobian, jacobian]
    matrices = jnp.stack([jnp.eye(8) - j for j in jacobians])
    b = jr.normal(jr.key(16), (4, 8)).at[3].set(0)
    solver = neumann_krylov(1e-9)
    x, success, num_products = solve_batch(solver, matrices, b)
    assert jnp.all(success)
    expected = [
        neumann_count(matrices[0], b[0], 1e-9),
        4 + gmres_count(matrices[1], b[1], 1e-9),
        1,
        0,
    ]
    assert num_products.tolist() == expected
    assert jnp.allclose(x, jnp.linalg.solve(matrices, b[..., None])[..., 0], atol=1e-7)


def test_neumann_krylov_survives_overflow_before_it_gives_up():
    matrix = jnp.array([[1.0, -1e12], [1e12, 1.0]], jnp.float32)
    b = jnp.ones(2, jnp.float32)
    x, success, _ = solve(KRYLOV["NeumannKrylov"](1e-5), matrix, b)
    assert success
    assert relative_error(x, jnp.linalg.solve(matrix, b)) < 1e-4


@pytest.mark.parametrize("condition", (1e4, 1e5, 1e6))
@pytest.mark.parametrize("size", (8, 50))
@pytest.mark.parametrize("name", ["GMRES", "NeumannKrylov"])
def test_success_is_measured_on_ill_conditioned_systems(name, size, condition):
    """In single precision, where recurrences promise residuals that are not there."""
    values = jnp.logspace(0, -jnp.log10(condition), size)
    keys = jr.split(jr.key(21), 10)

    def system(key):
        left, right = orthogonal(key, size), orthogonal(jr.fold_in(key, 1), size)
        return left @ jnp.diag(values) @ right, jr.normal(key, (size,))

    matrices, bs = (x.astype(jnp.float32) for x in jax.vmap(system)(keys))
    solver = KRYLOV[name](1e-6)
    x, success, num_products = solve_batch(solver, matrices, bs)
    matrices, x, bs = (a.astype(jnp.float64) for a in (matrices, x, bs))
    residuals = jax.vmap(relative_residual)(matrices, x, bs)
    # Up to the rounding of the residual that is measured.
    sizes = jnp.linalg.norm(x, axis=1) / jnp.linalg.norm(bs, axis=1)
    rounding = float(jnp.finfo(jnp.float32).eps) * sizes
    assert jnp.all(~success | (residuals <= 1e-6 + rounding))
    # A hopeless solve keeps the best that it found, and of few unknowns gives up.
    assert jnp.all(residuals < 1)
    if size == 8:
        assert jnp.all(num_products < 200)


def test_an_exact_gradient_that_is_not_there_raises_on_demand():
    values = jnp.logspace(0, -6, 8)
    matrix = orthogonal(jr.key(22), 8) @ jnp.diag(values) @ orthogonal(jr.key(23), 8)
    matrix = matrix.astype(jnp.float32)
    adjoint = eqi.ImplicitAdjoint(throw=True)
    root_finder = eqi.RootAsFixedPoint(optx.Newton(1e-3, 1e-3))

    def loss(x):
        fn = lambda z, x: z - matrix @ z + x
        z0 = jnp.zeros(8, jnp.float32)
        return jnp.sum(
            optx.fixed_point(fn, root_finder, z0, x, adjoint=adjoint, throw=False).value
        )

    with pytest.raises(Exception, match="breakdown|maximum number"):
        jax.block_until_ready(jax.grad(loss)(matrix @ jnp.ones(8, jnp.float32)))


def test_neumann_krylov_returns_what_it_has_measured():
    """Badly scaled: the residual falls at first, and the next one is far larger."""
    jacobian = jnp.zeros((3, 3)).at[1, 0].set(1e-8).at[2, 1].set(1e8)
    b = jnp.array([1.0, 0.0, 0.0])
    solver = eqi.NeumannKrylov(1e-6, 0.0, eqi.GMRES(1e-6, 0.0))
    x, success, _ = solve(solver, jnp.eye(3) - jacobian, b)
    assert success
    assert relative_residual(jnp.eye(3) - jacobian, x, b) <= 1e-6


# FixedPointLinearSolver


@pytest.mark.parametrize("size", (100, 10_000))
@pytest.mark.parametrize("inner", (eqi.Picard, eqi.Anderson))
def test_a_tolerance_means_the_same_for_any_number_of_unknowns(inner, size):
    gains = jnp.linspace(-0.5, 0.5, size)
    operator = lx.DiagonalLinearOperator(1 - gains)
    b = jr.normal(jr.key(24), (size,))
    solver = eqi.FixedPointLinearSolver(inner(0.0, 1e-6))
    sol = lx.linear_solve(operator, b, solver, throw=False)
    assert sol.result == lx.RESULTS.successful
    residual = b - (1 - gains) * sol.value
    assert jnp.linalg.norm(residual) <= 1e-6 * jnp.linalg.norm(b)


def test_picard_is_neumann_to_a_tolerance():
    matrix, b = contraction()
    solver = eqi.FixedPointLinearSolver(eqi.Picard(0.0, 1e-9), max_steps=200)
    x, success, stats = solve(solver, matrix, b)
    assert success
    # Starting from b, the k-th evaluation is at the sum of k terms.
    count = int(stats["num_products"])
    assert jnp.allclose(x, neumann_sum(matrix, b, count), rtol=1e-12)
    assert jnp.max(jnp.abs(b - matrix @ x)) < 1e-9
    earlier = neumann_sum(matrix, b, count - 1)
    assert jnp.max(jnp.abs(b - matrix @ earlier)) > 1e-9


def test_a_fixed_point_linear_solver_reports_why_it_stopped():
    _, b = contraction()
    solver = eqi.FixedPointLinearSolver(eqi.Picard(0.0, 1e-9), max_steps=5)
    operator = lx.MatrixLinearOperator(contraction()[0])
    _, result, stats = solver.solve(operator, b)
    assert result == lx.RESULTS.max_steps_reached
    assert stats["num_products"] == 5
    solver = eqi.FixedPointLinearSolver(eqi.Picard(0.0, 1e-9), max_steps=5000)
    operator = lx.MatrixLinearOperator(3.5 * jnp.eye(8))
    _, result, _ = solver.solve(operator, b)
    assert result == lx.RESULTS.breakdown


@pytest.mark.parametrize("name", HARD)
def test_accelerated_solvers_solve_hard_systems(name):
    matrix = jnp.eye(8) - HARD[name]()
    b = jr.normal(jr.key(17), (8,))
    for solver in (
        eqi.Anderson(0.0, 1e-9, history_size=8),
        eqi.Broyden(0.0, 1e-9, history_size=30),
    ):
        x, success, _ = solve(eqi.FixedPointLinearSolver(solver), matrix, b)
        assert success
        assert jnp.max(jnp.abs(b - matrix @ x)) < 1.01e-9 * jnp.linalg.norm(b)


# The default of ImplicitAdjoint


@eqx.filter_jit
def pull_back(adjoint, matrix, gradient):
    """The cotangent that the adjoint finds for `z = matrix @ z + b`."""

    def solution(b):
        fn = lambda z, b: matrix @ z + b
        return optx.fixed_point(fn, eqi.Picard(1e-2, 1e-2), b, b, adjoint=adjoint).value

    return jax.vjp(solution, jnp.zeros_like(gradient))[1](gradient)[0]


def cotangent_of(matrix, dtype, gradient, linear_solver=None):
    adjoint = eqi.ImplicitAdjoint()
    if linear_solver is not None:
        adjoint = eqi.ImplicitAdjoint(linear_solver)
    return pull_back(adjoint, matrix.astype(dtype), gradient.astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_the_default_gradient_of_a_well_conditioned_map_is_right(dtype):
    weight = matrix_of_norm(jr.key(18), 20, 0.7, dtype)
    x = jr.normal(jr.key(19), (20,), dtype)
    tol = 1e-13 if dtype == jnp.float64 else 1e-6

    def fn(z, args):
        weight, x = args
        return jnp.tanh(weight @ z + x)

    @jax.jit
    def gradient(args):
        solver = eqi.Anderson(tol, tol)
        solution = lambda args: (
            optx.fixed_point(
                fn, solver, jnp.zeros_like(x), args, adjoint=eqi.ImplicitAdjoint()
            ).value
        )
        return solution(args), jax.grad(lambda a: jnp.sum(solution(a) ** 2))(args)

    z, (weight_grad, x_grad) = gradient((weight, x))
    z, slope = z.astype(jnp.float64), 1 - z.astype(jnp.float64) ** 2
    jacobian = slope[:, None] * weight.astype(jnp.float64)
    w = slope * jnp.linalg.solve(jnp.eye(20) - jacobian.T, 2 * z)
    limit = 1e-5 if dtype == jnp.float64 else 2e-5
    assert relative_error(x_grad.astype(jnp.float64), w) < limit
    error = relative_error(weight_grad.astype(jnp.float64), jnp.outer(w, z))
    assert error < limit


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("name", HARD)
def test_the_default_backward_solve_gets_hard_maps_right(name, dtype):
    jacobian, gradient = HARD[name](), jr.normal(jr.key(20), (8,))
    w = cotangent_of(jacobian, dtype, gradient)
    expected = jnp.linalg.solve(jnp.eye(8) - jacobian.T, gradient)
    assert relative_error(w.astype(jnp.float64), expected) < 1e-3


def test_the_default_backward_solve_gets_radius_99_right_in_100_unknowns():
    jacobian = symmetric(jnp.linspace(-0.99, 0.99, 100))
    gradient = jr.normal(jr.key(21), (100,))
    w = cotangent_of(jacobian, jnp.float32, gradient)
    expected = jnp.linalg.solve(jnp.eye(100) - jacobian, gradient)
    assert relative_error(w.astype(jnp.float64), expected) < 1e-2


LINEAX_SOLVERS = {
    "LU": (lambda: lx.LU(), 1e-12),
    "SVD": (lambda: lx.SVD(), 1e-12),
    "BiCGStab": (lambda: lx.BiCGStab(1e-11, 1e-11), 1e-8),
    "GMRES": (lambda: lx.GMRES(1e-11, 1e-11), 1e-8),
    "normal CG": (lambda: lx.Normal(lx.CG(1e-13, 1e-13)), 1e-8),
}


@pytest.mark.parametrize("name", LINEAX_SOLVERS)
def test_lineax_solvers_work_backwards_also_on_zero_cotangents(name):
    make, limit = LINEAX_SOLVERS[name]
    jacobian = matrix_of_norm(jr.key(22), 6, 0.8)
    gradient = jr.normal(jr.key(23), (6,))
    expected = jnp.linalg.solve(jnp.eye(6) - jacobian.T, gradient)
    found = cotangent_of(jacobian, jnp.float64, gradient, make())
    assert relative_error(found, expected) < limit
    found = cotangent_of(jacobian, jnp.float64, jnp.zeros(6), make())
    assert jnp.all(found == 0)


TAGS = {
    "CG": (lx.CG(1e-12, 1e-12), {lx.negative_semidefinite_tag}),
    "Cholesky": (lx.Cholesky(), {lx.negative_semidefinite_tag}),
    "Auto": (lx.AutoLinearSolver(well_posed=True), {lx.negative_semidefinite_tag}),
    "Auto, symmetric": (lx.AutoLinearSolver(well_posed=True), {lx.symmetric_tag}),
    "Triangular": (lx.Triangular(), {lx.lower_triangular_tag}),
}


@pytest.mark.parametrize("name", TAGS)
def test_tags_describe_the_jacobian_less_the_identity(name):
    solver, tags = TAGS[name]
    jacobian = symmetric(jnp.linspace(-0.8, 0.8, 6))
    if lx.lower_triangular_tag in tags:
        jacobian = jnp.tril(jacobian)
    gradient = jr.normal(jr.key(24), (6,))
    adjoint = eqi.ImplicitAdjoint(solver)

    @jax.jit
    def both(b):
        def solution(b):
            fn = lambda z, b: jacobian @ z + b
            picard = eqi.Picard(1e-2, 1e-2)
            return optx.fixed_point(
                fn, picard, b, b, adjoint=adjoint, tags=frozenset(tags)
            ).value

        return jax.vjp(solution, b)[1](gradient)[0], jax.jvp(solution, (b,), (b,))[1]

    b = jr.normal(jr.key(25), (6,))
    backward, forward = both(b)
    matrix = jnp.eye(6) - jacobian
    assert jnp.allclose(backward, jnp.linalg.solve(matrix.T, gradient), rtol=1e-9)
    assert jnp.allclose(forward, jnp.linalg.solve(matrix, b), rtol=1e-9)


@pytest.mark.parametrize("name", ["default", "Anderson", "NeumannSeries"])
def test_a_nan_cotangent_never_becomes_a_finite_gradient(name):
    solver = None if name == "default" else LINEAR_SOLVERS[name]()
    jacobian = matrix_of_norm(jr.key(22), 6, 0.6)
    gradient = jnp.ones(6).at[2].set(jnp.nan)
    found = cotangent_of(jacobian, jnp.float64, gradient, solver)
    assert jnp.any(jnp.isnan(found))
