"""What a user gets who changes nothing, in every precision."""

import functools as ft
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import optax
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import matrix_of_norm, relative_error, slow_but, SOLVERS


DTYPES = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)
SLOW_DTYPES = [
    pytest.param(dtype, marks=pytest.mark.slow if jnp.finfo(dtype).bits < 32 else ())
    for dtype in DTYPES
]


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


def cast(tree, dtype):
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def eps_of(dtype):
    return float(jnp.finfo(dtype).eps)


# Tolerances


@pytest.mark.parametrize("dtype", SLOW_DTYPES)
def test_a_layer_with_defaults_is_right_to_its_precision(dtype, getkey):
    """Value and gradient, of most of a batch of contractions, against float64."""
    weight = matrix_of_norm(getkey(), 20, 0.8)
    xs = jr.normal(getkey(), (30, 20))
    g = jr.normal(getkey(), (20,))

    @eqx.filter_jit
    def run(weight, xs, g):
        cell = Cell(weight)
        solve = jax.vmap(eqi.DEQ(cell).solve)
        loss = lambda cell, x: g @ eqi.DEQ(cell)(x)
        gradients = jax.vmap(eqx.filter_grad(loss), (None, 0))(cell, xs)
        return solve(xs), gradients.weight

    solution, gradients = run(*cast((weight, xs, g), dtype))
    # The same numbers, without the rounding of the solve.
    exact = cast(cast((weight, xs, g), dtype), jnp.float64)
    tight, exact_gradients = run(*exact)
    assert solution.value.dtype == dtype
    assert jnp.mean(solution.result == optx.RESULTS.successful) > 0.95
    tolerance = {jnp.float64: 1e-8, jnp.float32: 1e-4}.get(dtype, 4 * eps_of(dtype))
    # By a norm of .8 the residual counts at most fivefold.
    assert jnp.max(solution.stats["residual"]) <= 2 * tolerance
    error = jnp.abs(cast(solution.value, jnp.float64) - tight.value)
    assert jnp.max(error) < 5 * 2 * tolerance
    assert (
        relative_error(cast(gradients, jnp.float64), exact_gradients) < 10 * tolerance
    )


@pytest.mark.parametrize("dtype", SLOW_DTYPES)
@pytest.mark.parametrize("size", (3, pytest.param(100, marks=pytest.mark.slow)))
def test_a_residual_layer_with_defaults_is_right_to_its_precision(dtype, size, getkey):
    matrix = matrix_of_norm(getkey(), size, 2.0)
    field = lambda t, y, matrix: jnp.sin(matrix @ y) * jnp.cos(t).astype(y.dtype)

    @eqx.filter_jit
    def run(matrix, y):
        block = eqi.ODEBlock(eqi.ThetaLayer(field, step_size=0.1), 20)
        loss = lambda matrix: jnp.sum(block(y, 0.0, matrix))
        return block.solve(y, 0.0, matrix), jax.grad(loss)(matrix)

    point = cast((matrix, jr.normal(getkey(), (size,))), dtype)
    solution, gradient = run(*point)
    tight, exact_gradient = run(*cast(point, jnp.float64))
    assert jnp.all(solution.result == optx.RESULTS.successful)
    error = jnp.max(jnp.abs(cast(solution.value, jnp.float64) - tight.value))
    # Twenty steps, each of which rounds the state and a field of 2-norm up to 2.
    rounding = 20 * eps_of(dtype)
    assert error < (1e-12 if dtype == jnp.float64 else rounding)
    assert relative_error(cast(gradient, jnp.float64), exact_gradient) < 4 * rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp_resnet_with_defaults_finds_its_solves(dtype, getkey):
    size = 784
    matrix = matrix_of_norm(getkey(), size, 1.0).astype(dtype)

    class Field(eqx.Module):
        matrix: jax.Array

        def __call__(self, t, y, args):
            return jnp.sin(self.matrix @ y)

    net = eqi.FPResNet(Field(matrix), 3)
    ys = jr.normal(getkey(), (10, size)).astype(dtype)
    solution = eqx.filter_jit(lambda ys: jax.vmap(net.block.solve)(ys))(ys)
    assert jnp.all(solution.result == optx.RESULTS.successful)


def test_the_choice_depends_on_precision_and_size_alone():
    state = jnp.ones(5)
    for dtype, tolerance in zip(DTYPES, (1e-8, 1e-4, 2.0**-5, 2.0**-8)):
        solver, adjoint = eqi.default_solver(state.astype(dtype))
        assert isinstance(solver, eqi.Anderson)
        assert (solver.rtol, solver.atol) == (tolerance, tolerance)
        assert isinstance(adjoint, eqi.ImplicitAdjoint)
    dense, _ = eqi.default_solver(jnp.ones(64), jnp.ones(64))
    assert not isinstance(dense.root_finder.linear_solver, eqi.GMRES)
    krylov, _ = eqi.default_solver(jnp.ones(65), jnp.ones(65))
    assert isinstance(krylov.root_finder.linear_solver, eqi.GMRES)


def test_an_array_for_a_step_size_changes_nothing(getkey):
    field = eqi.BoundedSpectrum(lambda t, y, args: jnp.sin(y), -3.0, 0.5)
    y = jr.normal(getkey(), (80,))
    number, array = (
        eqx.filter_jit(eqi.ThetaLayer(field, 0.5, h).solve)(y)
        for h in (0.1, jnp.array(0.1))
    )
    assert number.stats["num_steps"] == array.stats["num_steps"]
    assert jnp.allclose(number.value, array.value, rtol=1e-15)


@pytest.mark.parametrize("dtype", (jnp.float64, jnp.float32))
def test_a_small_unknown_beside_a_large_one_is_right(dtype):
    """Robertson's kinetics: 3e-5 of one species beside 1 of the others."""

    def field(t, y, args):
        a, b, c = y
        slow, fast, back = 0.04 * a, 3e7 * b * b, 1e4 * b * c
        return jnp.stack([back - slow, slow - back - fast, fast])

    @eqx.filter_jit
    def run(y):
        return eqi.ODEBlock(eqi.ThetaLayer(field, 1.0, 0.1), 40).solve(y)

    y = jnp.array([1.0, 0.0, 0.0])
    solution, tight = run(y.astype(dtype)), run(y)
    assert jnp.all(solution.result == optx.RESULTS.successful)
    value = cast(solution.value, jnp.float64)
    assert jnp.allclose(value, tight.value, rtol=50 * eps_of(dtype), atol=0)


@pytest.mark.parametrize("solver", (eqi.Picard, eqi.Anderson, eqi.Broyden))
def test_a_tolerance_for_each_unknown(solver):
    """In groups, and one by one."""
    f = lambda z, x: {k: 0.5 * jnp.tanh(z[k]) + x[k] for k in z}
    x = {"large": jnp.array([1e3, 2e3]), "small": jnp.array([1e-6, 2e-6])}
    exact = eqi.DEQ(f, solver(1e-14, 0.0))(x)
    for atol in (
        {"large": 1.0, "small": 1e-9},
        {"large": jnp.array([1.0, 1.0]), "small": jnp.array([1e-9, 1e-3])},
    ):
        # Newton's method, whose own stopping rule takes one number, understands it too.
        newton = eqi.RootAsFixedPoint(optx.Newton(0.0, atol))
        for chosen in (solver(1e-15, atol), newton):
            value = eqi.DEQ(f, chosen)(x)
            error = jax.tree.map(lambda a, b: jnp.abs(a - b), value, exact)
            assert jnp.all(error["large"] < 2.0)
            assert error["small"][0] < 3e-9
    assert error["small"][1] < 3e-3


# NaN in, NaN out


ADJOINTS = {
    "JFB": eqi.JFBAdjoint(),
    "Neumann": eqi.NeumannAdjoint(3),
    "Phantom": eqi.PhantomAdjoint(3),
    "Implicit": eqi.ImplicitAdjoint(),
}


@pytest.mark.parametrize("adjoint", slow_but(ADJOINTS, "Implicit"))
@pytest.mark.parametrize("name", SOLVERS)
def test_an_input_that_is_not_a_number_has_no_answer(name, adjoint, getkey):
    weight = matrix_of_norm(getkey(), 4, 0.5)
    xs = jr.normal(getkey(), (3, 4)).at[1, 2].set(jnp.nan)
    solver = SOLVERS[name](1e-6, 1e-6)
    layer = eqi.DEQ(Cell(weight), solver, ADJOINTS[adjoint])
    plain = lambda x: (
        optx.fixed_point(
            layer.cell, solver, jnp.zeros(4), x, adjoint=ADJOINTS[adjoint], throw=False
        ).value
    )

    @eqx.filter_jit
    def run(xs):
        return jax.vmap(layer.solve)(xs), jax.vmap(plain)(xs)

    solution, values = run(xs)
    others = jnp.array([0, 2])
    alone, _ = run(xs[others])
    for value in (solution.value, values):
        # What one evaluation of the cell makes of it, as an ordinary layer would.
        assert jnp.isnan(value[1, 2])
        assert jnp.all(jnp.isfinite(value[others]))
    assert (solution.result == optx.RESULTS.nonfinite)[1]
    assert jnp.array_equal(solution.value[others], alone.value)


RESIDUAL_LAYERS = {
    "theta": lambda field: eqi.ThetaLayer(field, step_size=0.1),
    "explicit": lambda field: eqi.ThetaLayer(field, 0.0, 0.1),
    "trapezoid": lambda field: eqi.ThetaLayer(field, 0.5, 0.1, "trapezoid"),
    "Gauss": lambda field: eqi.RungeKuttaLayer(
        field, eqi.ButcherTableau.gauss_legendre(2), step_size=0.1
    ),
    "Heun": lambda field: eqi.RungeKuttaLayer(field, HEUN, step_size=0.1),
    "Verlet": lambda field: eqi.VerletLayer(field, step_size=0.1),
    "RevNet": lambda field: eqi.RevNetLayer(field, step_size=0.1),
}
HEUN = eqi.ButcherTableau(((0.0, 0.0), (1.0, 0.0)), (0.5, 0.5), (0.0, 1.0))


def oscillator(t, y, args):
    a, b = y
    return b, -jnp.sin(a)


@pytest.mark.parametrize("bad", (jnp.nan, jnp.inf, 1e308))
@pytest.mark.parametrize("name", RESIDUAL_LAYERS)
def test_a_step_that_is_not_finite_is_never_found(name, bad, getkey):
    """An overflow of the last sum included."""
    field = oscillator
    if bad == 1e308:
        field = lambda t, y, args: jax.tree.map(lambda x: 30 * x, y)
    layer = RESIDUAL_LAYERS[name](field)
    y = tuple(jr.uniform(getkey(), (2, 3), minval=0.5).at[:, 1].set(bad))
    solution = eqx.filter_jit(lambda y: jax.vmap(layer.solve)(y))(y)
    value = jnp.stack(solution.value)
    assert not jnp.any(jnp.isfinite(value[:, 1]).all())
    assert (solution.result != optx.RESULTS.successful)[1]
    assert jnp.all(jnp.isfinite(value[:, jnp.array([0, 2])]))


# The Equinox state


def test_a_state_that_stores_the_iterate_holds_the_last_one(getkey):
    class Storing(eqx.Module):
        cell: Cell
        index: eqx.nn.StateIndex

        def __call__(self, z, x, state):
            return self.cell(z, x), state.set(self.index, z)

    cell = Cell(matrix_of_norm(getkey(), 4, 0.5))
    storing, state = eqx.nn.make_with_state(
        lambda: Storing(cell, eqx.nn.StateIndex(jnp.zeros(4)))
    )()
    x = jr.normal(getkey(), (4,))
    for solver in (None, eqi.Picard(1e-9, 1e-9)):
        layer = eqi.DEQ(storing, solver, eqi.ImplicitAdjoint())
        z, new = eqx.filter_jit(layer)(x, state=state)
        assert jnp.allclose(new.get(storing.index), z, rtol=1e-12)


# Hyperparameters


def hyperparameters(dtype=None):
    a = lambda x: jnp.array(x, dtype)
    newton = eqi.RootAsFixedPoint(optx.Newton(a(1e-6), a(1e-6)))
    krylov = eqi.NeumannKrylov(a(1e-6), a(0.0), eqi.GMRES(a(1e-6), a(0.0)))
    field = eqi.BoundedSpectrum(lambda t, y, args: jnp.sin(y), a(-2.0), a(0.5))
    return {
        "Picard": eqi.DEQ(
            Cell(jnp.eye(3) / 2), eqi.Picard(a(1e-6), a(1e-6), damping=a(1.0))
        ),
        "Anderson": eqi.DEQ(
            Cell(jnp.eye(3) / 2),
            eqi.Anderson(a(1e-6), a(1e-6), damping=a(1.0), ridge=a(1e-9)),
            eqi.NeumannAdjoint(4, damping=a(0.9)),
        ),
        "stock": eqi.DEQ(
            Cell(jnp.eye(3) / 2),
            optx.FixedPointIteration(a(1e-6), a(1e-6)),
            eqi.ImplicitAdjoint(lx.BiCGStab(a(1e-6), a(1e-6))),
        ),
        "theta": eqi.ThetaLayer(
            field, solver=newton, adjoint=eqi.ImplicitAdjoint(krylov)
        ),
        "Runge-Kutta": eqi.RungeKuttaLayer(
            field,
            eqi.ButcherTableau.radau_iia(2),
            solver=newton,
            adjoint=eqi.PhantomAdjoint(2, damping=a(0.9)),
        ),
    }


@pytest.mark.parametrize("name", hyperparameters())
def test_weight_decay_leaves_array_hyperparameters_alone(name):
    """An optimiser over all floating-point arrays, with a large decay."""
    layer = hyperparameters()[name]
    optimiser = optax.adamw(1e-2, weight_decay=0.1)

    @eqx.filter_jit
    def train(layer):
        params, static = eqx.partition(layer, eqx.is_inexact_array)

        def step(carry, _):
            params, opt_state = carry
            loss = lambda p: jnp.sum(eqx.combine(p, static)(jnp.ones(3)) ** 2)
            updates, opt_state = optimiser.update(
                jax.grad(loss)(params), opt_state, params
            )
            return (eqx.apply_updates(params, updates), opt_state), None

        start = params, optimiser.init(params)
        (params, _), _ = jax.lax.scan(step, start, length=20)
        return eqx.combine(params, static)

    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        trained = train(layer)
    cut = lambda x: eqx.filter(eqi.resolve(x), eqx.is_array)
    for part in ("solver", "adjoint"):
        assert eqx.tree_equal(cut(getattr(trained, part)), cut(getattr(layer, part)))
    if name in ("theta", "Runge-Kutta"):
        field = eqi.resolve(trained.vector_field)
        assert (field.alpha, field.beta) == (-2.0, 0.5)
    else:
        assert not jnp.allclose(trained.cell.weight, layer.cell.weight)
        # And as numbers, they make the same layer.
        assert jnp.allclose(layer(jnp.ones(3)), trained_like(layer)(jnp.ones(3)))


def trained_like(layer):
    """The same hyperparameters as NumPy scalars turned to Python numbers."""
    to_number = lambda x: float(x) if eqx.is_inexact_array(x) else x
    solver, adjoint = (
        jax.tree.map(to_number, eqi.resolve(x)) for x in (layer.solver, layer.adjoint)
    )
    return eqi.DEQ(layer.cell, solver, adjoint)


def test_an_untrained_array_is_what_it_was(getkey):
    for dtype in DTYPES:
        array = jr.normal(getkey(), (3, 2)).astype(dtype)
        node = eqi.Untrained(array)
        assert jnp.array_equal(eqi.resolve(node), array)
        assert jnp.asarray(node).dtype == dtype
        assert not jax.tree.leaves(eqx.filter(node, eqx.is_inexact_array))
    # As a weight, it has no gradient.
    weight = matrix_of_norm(getkey(), 3, 0.5)
    layer = eqi.DEQ(Cell(eqi.Untrained(weight)))
    grads = eqx.filter_jit(eqx.filter_grad(lambda l: jnp.sum(l(jnp.ones(3)))))(layer)
    assert jax.tree.leaves(grads) == []
    assert jnp.allclose(layer(jnp.ones(3)), eqi.DEQ(Cell(weight))(jnp.ones(3)))


def test_parameters_are_loaded_into_a_layer_with_a_tighter_solver(tmp_path, getkey):
    make = lambda key: Cell(matrix_of_norm(key, 3, 0.5))
    rough = eqi.DEQ(make(getkey()), eqi.Anderson(jnp.array(1e-2), 1e-2))
    params = eqx.filter(rough, eqx.is_inexact_array)
    eqx.tree_serialise_leaves(tmp_path / "parameters.eqx", params)
    newton = eqi.RootAsFixedPoint(optx.Newton(1e-12, 1e-12))
    skeleton = eqi.DEQ(make(getkey()), newton, eqi.JFBAdjoint())
    like, rest = eqx.partition(skeleton, eqx.is_inexact_array)
    params = eqx.tree_deserialise_leaves(tmp_path / "parameters.eqx", like)
    loaded = eqx.combine(params, rest)
    assert jnp.array_equal(loaded.cell.weight, rough.cell.weight)
    assert loaded.solver.rtol == 1e-12
    assert loaded.solve(jnp.ones(3)).stats["residual"] < 1e-12


# States of every kind


@pytest.mark.slow
def test_an_empty_batch_is_a_batch(getkey):
    matrix = matrix_of_norm(getkey(), 3, 0.5)
    field = lambda t, y, args: matrix @ y
    layers = [
        *(eqi.DEQ(Cell(matrix), SOLVERS[name](1e-6, 1e-6)) for name in SOLVERS),
        eqi.ThetaLayer(field, step_size=0.1),
        eqi.ThetaLayer(
            field,
            step_size=0.1,
            solver=eqi.RootAsFixedPoint(
                optx.Newton(1e-6, 1e-6, linear_solver=eqi.GMRES(1e-3, 0.0))
            ),
        ),
        eqi.ODEBlock(eqi.ThetaLayer(field, step_size=0.1), 3),
    ]

    @eqx.filter_jit
    def run(layers, xs):
        batch = lambda layer: lambda xs: jnp.sum(jax.vmap(layer)(xs) ** 2)
        return [jax.value_and_grad(batch(layer))(xs) for layer in layers]

    for value, gradient in run(layers, jnp.zeros((0, 3))):
        assert value == 0
        assert gradient.shape == (0, 3)


def test_python_numbers_are_states(getkey):
    f = lambda z: 0.5 * jnp.sin(z)
    key, slope = getkey(), 0.5 * jnp.cos(1.0)
    decay = lambda t, y, args=None: -y
    block = eqi.ODEBlock(eqi.ThetaLayer(decay, step_size=0.1), 3)
    factor = 0.95 / 1.05
    assert jnp.allclose(block(1.0), factor**3)
    assert jnp.allclose(block.trajectory(1.0), factor ** jnp.arange(4.0))
    assert jnp.allclose(eqi.ThetaLayer(decay, step_size=0.1)(1.0), factor)
    assert jnp.allclose(eqi.spectral_norm(f, 1.0, key=key), slope)
    assert jnp.allclose(eqi.spectral_radius(f, 1.0, key=key), slope)
    assert jnp.allclose(eqi.divergence(f, 1.0, key=key), slope)
    assert jnp.allclose(eqi.jacobian_frobenius(f, 1.0, key=key), slope**2)
    assert jnp.allclose(eqi.jacobian_diagonal(f, 1.0, key=key), slope)
    assert jnp.isfinite(eqi.contraction_factor(f, 1.0, key=key))
    history = eqi.convergence_history(
        lambda z: 0.5 * z, 1.0, eqi.Picard(1e-3, 1e-3), num_steps=3
    )
    assert jnp.allclose(history, jnp.array([0.5, 0.25, 0.125]))
    assert jnp.allclose(eqi.total_derivative(decay, 2)(0.0, 2.0), 2.0)


def test_a_bracketing_root_finder_is_a_solver():
    solver = eqi.RootAsFixedPoint(optx.Bisection(0.0, 1e-9))
    options = dict(lower=0.0, upper=1.0)
    solution = optx.fixed_point(
        lambda z, _: jnp.cos(z), solver, jnp.array(0.5), options=options
    )
    assert jnp.allclose(solution.value, 0.7390851332151607, rtol=1e-8)


def test_a_layer_of_any_size_is_exported(getkey):
    """A program for all sizes of the state."""
    (n,) = jax.export.symbolic_shape("n")
    x = jr.normal(getkey(), (7,))
    layers = (
        eqi.DEQ(lambda z, x: 0.5 * jnp.sin(z) + x),
        eqi.ThetaLayer(lambda t, y, args: -y, step_size=0.1),
    )
    for layer in layers:
        struct = jax.ShapeDtypeStruct((n,), x.dtype)
        exported = jax.export.export(jax.jit(lambda x: layer(x)))(struct)
        assert jnp.allclose(exported.call(x), layer(x), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_time_has_enough_digits_in_every_precision(dtype):
    """400 steps, of which bfloat16 could tell 329 apart."""
    layer = eqi.ThetaLayer(lambda t, y, args: -y * t, step_size=1e-3)
    block = eqi.ODEBlock(layer, 400)
    for t0 in (0.0, jnp.zeros((), dtype)):
        assert len(set(block.times(t0).tolist())) == 401
    with jax.numpy_dtype_promotion("standard"):
        solution = eqx.filter_jit(block.solve)(jnp.ones(2, dtype))
        steps = eqi.ODEBlock(eqi.ThetaLayer(lambda t, y, args: -t * y, 0.5, 1.0), 2)
        assert steps(jnp.ones(2, dtype)).dtype == dtype
    assert solution.value.dtype == dtype
    assert jnp.all(solution.result == optx.RESULTS.successful)


# What a solve returns, and what it says


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solution_can_be_mapped_and_scanned(name, getkey):
    layer = eqi.DEQ(Cell(matrix_of_norm(getkey(), 3, 0.5)), SOLVERS[name](1e-6, 1e-6))
    xs = jr.normal(getkey(), (4, 3))
    mapped = jax.vmap(layer.solve)(xs)
    _, scanned = jax.lax.scan(lambda _, x: (None, layer.solve(x)), None, xs)
    assert jnp.allclose(mapped.value, scanned.value, atol=1e-5)
    assert mapped.stats["num_steps"].shape == (4,)
    assert mapped.state is None


def test_a_summary_of_solves(getkey):
    xs = jr.normal(getkey(), (4, 3)).at[2].set(jnp.nan)
    layer = eqi.DEQ(Cell(matrix_of_norm(getkey(), 3, 0.5)), eqi.Picard(1e-3, 0.0))
    solution = jax.vmap(layer.solve)(xs[:2])
    summary = eqx.filter_jit(eqi.summarise)(solution)
    counts, residuals = solution.stats["num_evaluations"], solution.stats["residual"]
    assert summary.num_solves == 2
    assert summary.share_not_found == 0
    assert summary.mean_evaluations == jnp.mean(counts)
    assert summary.max_evaluations == jnp.max(counts)
    assert summary.max_residual == jnp.max(residuals)
    assert str(summary) == (
        f"2 solves, 0 % not found, {jnp.mean(counts):.1f} evaluations (at most "
        f"{jnp.max(counts)}), residual at most {jnp.max(residuals):.0e}"
    )
    assert str(eqi.summarise(jax.vmap(layer.solve)(xs))).startswith(
        "4 solves, 25 % not found"
    )
    block = eqi.ODEBlock(eqi.ThetaLayer(lambda t, y, args: -y, step_size=0.1), 5)
    ys = jnp.ones((3, 2))
    assert eqi.summarise(jax.vmap(block.solve)(ys)).num_solves == 15
    assert "0 solves" in str(eqi.summarise(jax.vmap(layer.solve)(xs[:0])))


def needs_key(z, x, *, key=None):
    return eqx.nn.Dropout(0.5)(z, key=key) + x


MISTAKES = {
    "a batch": (
        lambda: eqi.DEQ(Cell(jnp.eye(3)))(jnp.ones((5, 3))),
        r"cell\(z, x\).*\(5, 3\).*jax.vmap\(layer\)",
    ),
    "another signature": (
        lambda: eqi.DEQ(lambda z: z)(jnp.ones(3)),
        r"cell\(z, x\).*signature is `\(z\)`",
    ),
    "a key that is not taken": (
        lambda: eqi.DEQ(lambda z, x: x)(jnp.ones(3), key=jr.key(0)),
        r"key=key\).*takes no `key`",
    ),
    "no key for drop-out": (
        lambda: eqi.DEQ(needs_key)(jnp.ones(3)),
        r"layer\(x, key=key\).*inference_mode",
    ),
    "a batch of states": (
        lambda: eqi.ThetaLayer(lambda t, y, args: jnp.eye(3) @ y)(jnp.ones((5, 3))),
        r"vector_field\(t, y, args\).*jax.vmap\(layer\)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_note_on_an_error_fits_it(name):
    call, pattern = MISTAKES[name]
    with pytest.raises(Exception) as error:
        call()
    assert re.search(pattern, " ".join(error.value.__notes__))


@pytest.mark.parametrize("under_jit", (False, True))
def test_a_failure_names_the_layer_and_the_residual(under_jit):
    deq = eqi.DEQ(lambda z, x: -3.0 * z + x, eqi.Picard(1e-6, 1e-6), throw=True)
    deq = eqi.DEQ(deq.cell, deq.solver, max_steps=5, throw=True)
    # The residual is 4 |z - 1|, that is 4 * 3^4 = 324 after five evaluations.
    call = eqx.filter_jit(deq) if under_jit else deq
    with pytest.raises(Exception, match="`DEQ`.*maximum number of steps.*1e2"):
        call(jnp.array([4.0]))


def test_a_step_size_for_each_unknown_is_refused():
    decay = lambda t, y, args: -y
    layer = eqi.ThetaLayer(decay, step_size=jnp.array(1.0))
    layer = eqx.tree_at(lambda l: l.step_size, layer, jnp.ones(3))
    for call in (layer, eqi.ODEBlock(layer, 3)):
        with pytest.raises(ValueError, match=r"`step_size`.*stacked.*\(3,\)"):
            call(jnp.ones(3))


# Explicit tableaux


def test_an_explicit_tableau_solves_nothing(getkey):
    evaluations = []

    def field(t, y, args):
        evaluations.append(1)
        return jnp.sin(y) * t

    rk4 = eqi.ButcherTableau(
        ((0.0,) * 4, (0.5, 0.0, 0.0, 0.0), (0.0, 0.5, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
        (0.0, 0.5, 0.5, 1.0),
    )
    assert rk4.is_explicit and not eqi.ButcherTableau.sdirk().is_explicit
    layer = eqi.RungeKuttaLayer(field, rk4, step_size=0.1)
    y, t = jr.normal(getkey(), (3,)), jnp.array(0.2)
    solution = eqx.filter_jit(layer.solve)(y, t)
    # One for the check of its structure, and four for the step.
    assert len(evaluations) == 5
    assert solution.stats["num_steps"] == 0
    k1 = field(t, y, None)
    k2 = field(t + 0.05, y + 0.05 * k1, None)
    k3 = field(t + 0.05, y + 0.05 * k2, None)
    k4 = field(t + 0.1, y + 0.1 * k3, None)
    expected = y + 0.1 * (k1 + 2 * k2 + 2 * k3 + k4) / 6
    assert jnp.allclose(solution.value, expected, rtol=1e-14)


# The way back of a reversible block


@pytest.mark.parametrize("dtype", (jnp.float64, jnp.float32))
def test_a_small_unknown_that_is_lost_gives_nan(dtype):
    """Beside a large one that is not; also where all unknowns are mixtures of both."""
    turn = jnp.array([[0.8, -0.6], [0.6, 0.8]], dtype)
    layer = eqi.ThetaLayer(lambda t, y, k: -turn @ (k * (turn.T @ y)), 1.0, 0.1)
    y = turn @ jnp.array([1000.0, 2.0], dtype)

    @ft.partial(jax.jit, static_argnums=1)
    def gradient(rate, reversible):
        block = eqi.ODEBlock(layer, 60, reversible=reversible)
        k = jnp.stack([jnp.asarray(0.01, dtype), rate])
        last = lambda k: turn.T @ block(y, 0.0, k)
        return jax.grad(lambda k: jnp.sum(jnp.log(last(k))))(k)

    for rate in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
        rate = jnp.asarray(rate, dtype)
        found, exact = gradient(rate, True), gradient(rate, False)
        lost = jnp.any(jnp.isnan(found))
        assert lost or jnp.allclose(found, exact, rtol=0.03)
    assert lost
