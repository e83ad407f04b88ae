import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi


def block_diag(*blocks):
    return jax.scipy.linalg.block_diag(*[jnp.array(b, dtype=float) for b in blocks])


ROTATION = [[0.0, -1.0], [1.0, 0.0]]

MATRICES = {
    "real": lambda: jnp.diag(jnp.array([0.9, -0.5, 0.2, 0.1])),
    "negative": lambda: jnp.diag(jnp.array([0.3, -0.8, 0.2, 0.1])),
    "complex pair": lambda: block_diag([[0.3, -0.9], [0.8, 0.2]], [[0.4]], [[-0.2]]),
    "rotation": lambda: block_diag(ROTATION, [[0.5]], [[0.1]]),
    "plus and minus": lambda: jnp.diag(jnp.array([0.7, -0.7, 0.2, 0.1])),
    "zero": lambda: jnp.zeros((4, 4)),
    "rank one": lambda: jnp.outer(
        jnp.array([1.0, 2.0, 3.0, 0.0]), jnp.array([1.0, 0.0, 1.0, 0.0])
    ),
    "rank one, integers": lambda: jnp.outer(jnp.ones(4), jnp.array([1.0, 2, 3, 4])),
    "nilpotent": lambda: jnp.eye(4, k=1),
    "nonnormal": lambda: jnp.array(
        [[0.9, 5.0, 0, 0], [0, 0.3, 2, 0], [0, 0, -0.2, 1], [0, 0, 0, 0.1]]
    ),
    "dense": lambda: jr.normal(jr.key(3), (4, 4)),
}


@eqx.filter_jit
def spectrum(matrix, key):
    fn, y = lambda y: matrix @ y, jnp.zeros(len(matrix), matrix.dtype)
    norm = eqi.spectral_norm(fn, y, key=key, num_steps=60)
    return norm, eqi.spectral_radius(fn, y, key=key, num_steps=200)


spectra = eqx.filter_jit(jax.vmap(spectrum, in_axes=(None, 0)))


@pytest.mark.parametrize("name", MATRICES)
def test_spectral_norm_and_radius_are_those_of_dense_algebra(name):
    matrix = MATRICES[name]()
    norms, radii = spectra(matrix, jr.split(jr.key(0), 50))
    assert jnp.allclose(norms, np.linalg.norm(matrix, 2), rtol=1e-6, atol=1e-12)
    expected = np.max(np.abs(np.linalg.eigvals(matrix)))
    assert jnp.allclose(radii, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_spectral_estimates_are_at_least_single_precision(dtype):
    eps = float(jnp.finfo(dtype).eps)
    for name in ("real", "complex pair", "plus and minus", "rank one"):
        matrix = MATRICES[name]().astype(dtype)
        norm, radius = spectrum(matrix, jr.key(0))
        assert norm.dtype == radius.dtype == jnp.float32
        wide = np.asarray(matrix.astype(jnp.float64))
        expected = np.linalg.norm(wide, 2)
        assert abs(float(norm) - expected) < 20 * eps * expected
        expected = np.max(np.abs(np.linalg.eigvals(wide)))
        assert abs(float(radius) - expected) < 20 * eps * expected


def test_spectra_of_one_unknown():
    fn = lambda y: -3.0 * y + 1
    assert eqi.spectral_norm(fn, jnp.ones(1), key=jr.key(0)) == 3.0
    assert eqi.spectral_radius(fn, jnp.ones(1), key=jr.key(0)) == 3.0
    assert eqi.spectral_radius(fn, jnp.array(1.0), key=jr.key(0)) == 3.0


def test_spectra_are_taken_at_the_point_and_on_pytrees():
    weight = jr.normal(jr.key(1), (5, 5))

    def fn(y):
        out = jnp.tanh(weight @ jnp.concatenate([y["a"], y["b"].reshape(-1)]))
        return {"a": out[:1], "b": out[1:].reshape(2, 2)}

    y = {"a": jnp.array([0.3]), "b": 0.1 * jnp.arange(4.0).reshape(2, 2)}
    flat = jnp.array([0.3, 0.0, 0.1, 0.2, 0.3])
    jacobian = jax.jacobian(lambda v: jnp.tanh(weight @ v))(flat)
    estimate = lambda fun, n: eqx.filter_jit(fun)(fn, y, key=jr.key(2), num_steps=n)
    norm, radius = estimate(eqi.spectral_norm, 200), estimate(eqi.spectral_radius, 900)
    assert jnp.allclose(norm, np.linalg.norm(jacobian, 2), rtol=1e-8)
    expected = np.max(np.abs(np.linalg.eigvals(jacobian)))
    assert jnp.allclose(radius, expected, rtol=1e-6)


def test_spectra_work_under_vmap_each_example_by_itself():
    matrices = jnp.stack([MATRICES[name]() for name in ("real", "rotation", "zero")])
    norms, radii = jax.vmap(spectrum, in_axes=(0, None))(matrices, jr.key(4))
    assert jnp.allclose(norms, jnp.array([0.9, 1.0, 0.0]), atol=1e-8)
    assert jnp.allclose(radii, jnp.array([0.9, 1.0, 0.0]), atol=1e-8)


# convergence_history


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x, *, key=None):
        if key is not None:
            x = x * jr.bernoulli(key, 0.5, x.shape).astype(x.dtype)
        return jnp.tanh(self.weight @ z + x)


def problem(dtype=jnp.float64, norm=0.8):
    weight = jr.normal(jr.key(5), (6, 6))
    weight = norm / np.linalg.norm(weight, 2) * weight
    x = jnp.sin(1.0 + jnp.arange(6.0))
    return Cell(weight.astype(dtype)), x.astype(dtype)


HISTORIES = {
    "Picard": lambda tol: eqi.Picard(tol, tol),
    "Anderson": lambda tol: eqi.Anderson(tol, tol),
    "Broyden": lambda tol: eqi.Broyden(tol, tol, norm=optx.two_norm),
    "Newton": lambda tol: eqi.RootAsFixedPoint(optx.Newton(tol, tol)),
    "stock": lambda tol: optx.FixedPointIteration(tol, tol, damp=0.2),
    "best so far": lambda tol: optx.BestSoFarFixedPoint(eqi.Picard(tol, tol)),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_convergence_history_is_that_of_the_solver(name):
    cell, x = problem()
    fn, solver = lambda z: cell(z, x), HISTORIES[name](1e-8)

    @eqx.filter_jit
    def run(max_steps):
        y0 = jnp.zeros(6)
        sol = optx.fixed_point(
            lambda z, _: fn(z), solver, y0, max_steps=max_steps, throw=False
        )
        return sol.value, sol.stats.get("residual")

    history = eqx.filter_jit(eqi.convergence_history)(
        fn, jnp.zeros(6), solver, num_steps=4
    )
    assert history.shape == (4,)
    assert jnp.allclose(history[0], solver.norm(jnp.tanh(x)), rtol=1e-14)
    for num_steps in (2, 4):
        value, residual = run(num_steps)
        if residual is not None:
            assert jnp.allclose(history[num_steps - 1], residual, rtol=1e-10)
        elif name == "stock" and num_steps < 4:
            # It returns the iterate after the last that it evaluated.
            residual = solver.norm(fn(value) - value)
            assert jnp.allclose(history[num_steps], residual, rtol=1e-12)


def test_convergence_history_goes_on_after_convergence_and_divergence():
    solver = eqi.Picard(1e-1, 1e-1)
    history = eqi.convergence_history(
        lambda y: 0.5 * y, jnp.array(8.0), solver, num_steps=9
    )
    assert jnp.array_equal(history, 4 * 0.5 ** jnp.arange(9.0))
    history = eqi.convergence_history(
        lambda y: 2.0 * y, jnp.array(1.0), solver, num_steps=9
    )
    assert jnp.array_equal(history, 2.0 ** jnp.arange(9.0))


@pytest.mark.parametrize("name", ["Anderson", "stock", "Newton"])
def test_convergence_history_works_under_vmap_on_pytrees_in_single_precision(name):
    cell, x = problem(jnp.float32)

    def history(x):
        def fn(z):
            out = cell(jnp.concatenate([z["a"], z["b"].reshape(-1)]), x)
            return {"a": out[:2], "b": out[2:].reshape(2, 2)}

        z = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros((2, 2), jnp.float32)}
        return eqi.convergence_history(fn, z, HISTORIES[name](1e-6), num_steps=3)

    batch = jax.jit(jax.vmap(history))(jnp.stack([x, -x, 0 * x]))
    assert batch.dtype == jnp.float32
    single = eqi.convergence_history(
        lambda z: cell(z, x), jnp.zeros_like(x), HISTORIES[name](1e-6), num_steps=3
    )
    assert jnp.allclose(batch[0], single, rtol=1e-4)
    assert jnp.allclose(batch[1], single, rtol=1e-4)
    assert jnp.all(batch[2] == 0)


def test_convergence_history_refuses_what_is_no_fixed_point_problem():
    cell, x = problem()
    with pytest.raises(ValueError, match="num_steps"):
        eqi.convergence_history(
            lambda z: cell(z, x), x, eqi.Picard(1e-3, 0.0), num_steps=0
        )
    with pytest.raises(ValueError, match="fn"):
        eqi.convergence_history(jnp.sum, x, eqi.Picard(1e-3, 0.0), num_steps=2)
    with pytest.raises(TypeError, match="solver"):
        eqi.convergence_history(
            lambda z: cell(z, x), x, optx.Newton(1e-3, 1e-3), num_steps=2
        )


# gradient_report


def loss(z):
    return jnp.sum(jnp.cos(z) * jnp.arange(1.0, 7).astype(z.dtype))


def dense(cell, x, inverse):
    """The gradient with respect to the weight, and the cotangent, by dense algebra,
    where `inverse` maps the Jacobian to what stands for `(I - J)^-1`."""
    z = x
    for _ in range(400):
        z = cell(z, x)
    jacobian = (1 - z**2)[:, None] * cell.weight
    g = jax.grad(loss)(z)
    w = inverse(jacobian).T @ g
    residual = jnp.linalg.norm(g - w + jacobian.T @ w) / jnp.linalg.norm(g)
    return jnp.outer((1 - z**2) * w, z), residual


def exact_inverse(jacobian):
    return jnp.linalg.inv(jnp.eye(6) - jacobian)


def series(num_terms, damping):
    def inverse(jacobian):
        matrix = damping * jacobian + (1 - damping) * jnp.eye(6)
        powers = [jnp.linalg.matrix_power(matrix, i) for i in range(num_terms)]
        return damping * sum(powers)

    return inverse


REPORTED = {
    "JFB": (lambda: eqi.JFBAdjoint(), series(1, 1.0), 0),
    "Neumann": (lambda: eqi.NeumannAdjoint(4, damping=0.7), series(4, 0.7), 3),
    "Phantom": (lambda: eqi.PhantomAdjoint(4, damping=0.7), series(4, 0.7), 3),
}


def tight(cell, adjoint=eqi.ImplicitAdjoint()):
    return eqi.DEQ(cell, eqi.Anderson(1e-8, 1e-8), adjoint)


def test_gradient_report_agrees_with_dense_algebra():
    cell, x = problem()
    adjoints = [make() for make, _, _ in REPORTED.values()]
    run = eqx.filter_jit(
        lambda cell, x: eqi.gradient_report(tight(cell), loss, x, adjoints=adjoints)
    )
    reference, *reports = run(cell, x)
    exact, _ = dense(cell, x, exact_inverse)
    assert reference.relative_error == 0
    assert jnp.allclose(reference.cosine, 1, rtol=1e-12)
    assert reference.residual < 1e-13
    assert 1 <= reference.num_products <= 6 + 1
    for report, (_, inverse, num_products) in zip(reports, REPORTED.values()):
        gradient, residual = dense(cell, x, inverse)
        size = jnp.linalg.norm(gradient) * jnp.linalg.norm(exact)
        cosine = jnp.vdot(gradient, exact) / size
        error = jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)
        assert jnp.allclose(report.cosine, cosine, rtol=1e-8)
        assert jnp.allclose(report.relative_error, error, rtol=1e-7)
        assert jnp.allclose(report.residual, residual, rtol=1e-7)
        assert report.num_products == num_products


@pytest.mark.slow
@pytest.mark.parametrize("name", ["JFB", "unrolled"])
def test_gradient_report_begins_with_the_layers_own_adjoint(name):
    cell, x = problem()
    if name in REPORTED:
        adjoint = REPORTED[name][0]()
    else:
        adjoint = optx.RecursiveCheckpointAdjoint()
    run = eqx.filter_jit(lambda x: eqi.gradient_report(tight(cell, adjoint), loss, x))
    reports = run(x)
    kinds = [type(report.adjoint) for report in reports]
    others = [
        eqi.JFBAdjoint,
        eqi.NeumannAdjoint,
        eqi.PhantomAdjoint,
        eqi.ImplicitAdjoint,
    ]
    others = [kind for kind in others if kind is not type(adjoint)]
    assert kinds == [eqi.ImplicitAdjoint, type(adjoint), *others]
    assert reports[0].relative_error == 0
    line = str(reports[0])
    assert line.startswith("ImplicitAdjoint(): cosine 1.000000, relative error 0.0e+00")
    if name not in REPORTED:
        assert reports[1].relative_error < 1e-4
        assert reports[1].num_products == -1


@pytest.mark.slow
def test_the_reference_is_that_of_the_solution_not_of_the_steps_after_it():
    # A loose solve, which the steps of these adjoints would change.
    cell, x = problem()
    reports = [
        eqx.filter_jit(eqi.gradient_report)(
            eqi.DEQ(cell, eqi.Picard(1e-1, 1e-1), adjoint), loss, x
        )
        for adjoint in (eqi.ImplicitAdjoint(), eqi.JFBAdjoint(), eqi.PhantomAdjoint(3))
    ]
    for report in reports:
        assert report[0].residual < 1e-13
        assert jnp.allclose(report[0].residual, reports[0][0].residual, atol=1e-14)


def test_gradient_report_names_what_is_not_a_layer_or_a_loss():
    cell, x = problem()
    with pytest.raises(TypeError, match="`?layer`? .*DEQ|'layer'"):
        eqi.gradient_report(cell, loss, x)
    with pytest.raises(TypeError, match="`?loss`? must|'loss'"):
        eqi.gradient_report(tight(cell, eqi.JFBAdjoint()), x, loss)


def test_gradient_report_shows_an_unfinished_backward_solve():
    cell, x = problem(norm=0.95)
    jacobian_inverse = series(3, 1.0)
    _, expected = dense(cell, x, jacobian_inverse)
    unfinished = eqi.ImplicitAdjoint(eqi.NeumannSeries(3))
    out_of_steps = eqi.ImplicitAdjoint(eqi.GMRES(1e-10, 0.0, max_steps=2))
    adjoints = [unfinished, out_of_steps]
    run = eqx.filter_jit(
        lambda x: eqi.gradient_report(tight(cell), loss, x, adjoints=adjoints)
    )
    _, series_report, gmres_report = run(x)
    assert jnp.allclose(series_report.residual, expected, rtol=1e-6)
    assert series_report.num_products == 2
    assert 1e-3 < gmres_report.residual < 1
    assert gmres_report.num_products == 2


@pytest.mark.slow
def test_gradient_report_works_under_vmap_and_with_a_key():
    cell, x = problem()
    adjoints = [eqi.JFBAdjoint()]

    def errors(x, key):
        _, report = eqi.gradient_report(
            tight(cell), loss, x, adjoints=adjoints, key=key
        )
        return report.relative_error, report.residual

    xs, keys = jnp.stack([x, 0.3 * x]), jr.split(jr.key(6))
    found = jax.jit(jax.vmap(errors))(xs, keys)
    for i in range(2):
        masked = xs[i] * jr.bernoulli(keys[i], 0.5, (6,)).astype(jnp.float64)
        exact, _ = dense(cell, masked, exact_inverse)
        gradient, residual = dense(cell, masked, series(1, 1.0))
        error = jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)
        assert jnp.allclose(found[0][i], error, rtol=1e-7)
        assert jnp.allclose(found[1][i], residual, rtol=1e-7)


@pytest.mark.slow
def test_gradient_report_takes_an_equinox_state():
    cell, x = problem()

    class WithState(eqx.Module):
        cell: Cell
        index: eqx.nn.StateIndex

        def __call__(self, z, x, state):
            out = self.cell(z, state.get(self.index) * x)
            return out, state.set(self.index, state.get(self.index) + 1)

    make = lambda: WithState(cell, eqx.nn.StateIndex(jnp.array(0.5)))
    stateful, state = eqx.nn.make_with_state(make)()
    adjoints = [eqi.JFBAdjoint()]
    report = eqx.filter_jit(eqi.gradient_report)
    _, found = report(tight(stateful), loss, x, state=state, adjoints=adjoints)
    # The state is as good as new.
    assert state.get(stateful.index) == 0.5
    _, expected = report(tight(cell), loss, 0.5 * x, adjoints=adjoints)
    assert jnp.allclose(found.relative_error, expected.relative_error, rtol=1e-8)
    assert jnp.allclose(found.residual, expected.residual, rtol=1e-8)


def test_gradient_report_takes_parametrised_cells():
    cell, x = problem()
    node = eqx.tree_at(lambda c: c.weight, cell, eqi.WeightNorm(cell.weight))
    adjoints = [eqi.JFBAdjoint()]
    report = eqx.filter_jit(eqi.gradient_report)
    _, found = report(tight(node), loss, x, adjoints=adjoints)
    _, expected = report(tight(cell), loss, x, adjoints=adjoints)
    assert jnp.allclose(found.residual, expected.residual, rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_report_keeps_to_low_precision(dtype):
    cell, x = problem()
    exact, _ = dense(cell, x, exact_inverse)
    gradient, _ = dense(cell, x, series(1, 1.0))
    error = jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)
    cell, x = problem(dtype)
    eps = float(jnp.finfo(dtype).eps)
    deq = eqi.DEQ(cell, eqi.Picard(4 * eps, 4 * eps))
    run = eqx.filter_jit(
        lambda x: eqi.gradient_report(deq, loss, x, adjoints=[eqi.JFBAdjoint()])
    )
    reference, found = run(x)
    assert reference.residual < 20 * eps
    assert abs(float(found.relative_error) - float(error)) < 20 * eps
    assert found.cosine <= 1 + 1e-3


# The contraction monitor


def test_contraction_factor_of_a_multiple_is_the_multiple():
    y = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
    fn = lambda y: jax.tree.map(lambda leaf: 1 - 0.7 * leaf, y)
    for num_samples in (1, 4):
        factor = eqi.contraction_factor(
            fn, y, key=jr.key(7), num_samples=num_samples, scale=1e-2
        )
        assert jnp.allclose(factor, 0.7, rtol=1e-12)


def test_contraction_factor_is_the_ratio_of_its_definition():
    cell, x = problem()
    fn, noise_seen = lambda z: cell(z, x), []

    def spy(z):
        noise_seen.append(z - x)
        return fn(z)

    with jax.disable_jit():
        factor = eqi.contraction_factor(spy, x, key=jr.key(8), num_samples=3, scale=0.5)
    noise = jnp.stack(noise_seen[-3:])
    assert len(noise_seen) == 4
    assert jnp.all(noise_seen[0] == 0)
    assert jnp.linalg.norm(noise[0] - noise[1]) > 0.1
    moved = jax.vmap(lambda n: jnp.linalg.norm(fn(x + n) - fn(x)))(noise)
    expected = jnp.sum(moved) / jnp.sum(jnp.linalg.norm(noise, axis=1))
    assert jnp.allclose(factor, expected, rtol=1e-12)
    scale = jnp.sqrt(jnp.mean(noise**2))
    assert 0.25 < scale < 1.0
    assert factor <= jnp.linalg.norm(cell.weight, 2)


class Linear(eqx.Module):
    weight: jax.Array
    scale: jax.Array

    def __call__(self, z, x):
        return self.scale * (self.weight * z) + x


def test_monitor_is_silent_on_a_contraction():
    cell, x = Linear(jnp.array(0.5), jnp.array(1.5)), jnp.ones(4)
    monitor = eqi.ContractionMonitor(rescale=lambda c: c.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same, factor = monitor(cell, x, x, key=jr.key(9))
    assert jnp.allclose(factor, 0.75, rtol=1e-12)
    assert same is cell


def test_monitor_warns_and_leaves_the_cell_alone():
    cell, x = Linear(jnp.array(2.0), jnp.array(1.5)), jnp.ones(4)
    with pytest.warns(UserWarning, match="contraction"):
        same, factor = eqi.ContractionMonitor()(cell, x, x, key=jr.key(9))
    assert jnp.allclose(factor, 3.0, rtol=1e-12)
    assert same is cell


def test_monitor_rescales_by_its_factor_only_if_told():
    cell, x = Linear(jnp.array(2.0), jnp.array(1.5)), jnp.ones(4)
    monitor = eqi.ContractionMonitor(0.6, rescale=lambda c: c.weight)
    with pytest.warns(UserWarning, match="contraction"):
        shrunk, _ = monitor(cell, x, x, key=jr.key(9))
    assert jnp.allclose(shrunk.weight, 2.0 * 0.6 / 3.0, rtol=1e-12)
    assert shrunk.scale == 1.5
    monitor = eqi.ContractionMonitor(0.6, rescale=lambda c: (c.weight, c.scale))
    with pytest.warns(UserWarning, match="contraction"):
        shrunk, _ = monitor(cell, x, x, key=jr.key(9))
    assert jnp.allclose(shrunk.weight, 2.0 * 0.2**0.5, rtol=1e-12)
    assert jnp.allclose(shrunk.scale, 1.5 * 0.2**0.5, rtol=1e-12)
    assert jnp.allclose(shrunk(x, x) - x, 0.6 * x, rtol=1e-12)


def test_monitor_warns_of_nan():
    with pytest.warns(UserWarning):
        eqi.ContractionMonitor()(
            lambda z, x: jnp.nan * z, jnp.ones(3), jnp.ones(3), key=jr.key(9)
        )


def test_monitor_takes_parametrised_cells():
    cell, x = problem()
    node = eqx.tree_at(lambda c: c.weight, cell, eqi.WeightNorm(cell.weight))
    monitor = eqi.ContractionMonitor()
    _, found = monitor(node, x, x, key=jr.key(9))
    _, expected = monitor(cell, x, x, key=jr.key(9))
    assert jnp.allclose(found, expected, rtol=1e-10)


def test_monitor_refuses_tracers_and_bad_arguments():
    monitor, x = eqi.ContractionMonitor(), jnp.ones(3)
    cell = lambda z, x: 0.5 * z + x
    with pytest.raises(ValueError, match="jit"):
        jax.jit(lambda x: monitor(cell, x, x, key=jr.key(0))[1])(x)
    with pytest.raises(ValueError, match="bound"):
        eqi.ContractionMonitor(0.0)
    with pytest.raises(ValueError, match="num_samples"):
        eqi.ContractionMonitor(num_samples=0)
    with pytest.raises(ValueError, match="scale"):
        eqi.contraction_factor(lambda y: y, x, key=jr.key(0), scale=0.0)
    with pytest.raises(ValueError, match="num_steps"):
        eqi.spectral_norm(lambda y: y, x, key=jr.key(0), num_steps=0)
    with pytest.raises(ValueError, match="num_steps"):
        eqi.spectral_radius(lambda y: y, x, key=jr.key(0), num_steps=0)
