"""Neumann series of which the number of terms is not given: adaptive and random."""

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import eqimplicit as eqi
from eqimplicit._linear_solver.adaptive_neumann import AdaptiveNeumannSeries
from eqimplicit._linear_solver.randomised_neumann import RandomisedNeumannSeries

from .helpers import matrix_of_norm, orthogonal, relative_error


SIZE = 32


def symmetric(key, largest):
    basis = orthogonal(key, SIZE)
    return basis @ jnp.diag(jnp.linspace(0, largest, SIZE)) @ basis.T


MAPS = {
    "rotation": lambda key: 0.9 * orthogonal(key, SIZE),
    "symmetric": lambda key: symmetric(key, 0.95),
    "Gaussian": lambda key: matrix_of_norm(key, SIZE, 0.9),
}


def solve(solver, jacobian, g):
    operator = lx.MatrixLinearOperator(jnp.eye(len(g), dtype=g.dtype) - jacobian)
    return solver.solve(operator, g)


def cosine(a, b):
    return (a @ b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)


@pytest.mark.parametrize("name", MAPS)
def test_adaptive_series_take_what_a_map_needs(name, getkey):
    """A mean cosine above .99, where five terms have below .9 on the hard ones."""
    jacobian, g = MAPS[name](getkey()), jr.normal(getkey(), (8, SIZE))
    exact = jnp.linalg.solve(jnp.eye(SIZE) - jacobian, g.T).T

    @jax.jit
    @jax.vmap
    def run(g, exact):
        w, result, stats = solve(AdaptiveNeumannSeries(0.02, 100), jacobian, g)
        five, _, _ = solve(eqi.NeumannSeries(5), jacobian, g)
        found = result == lx.RESULTS.successful
        residual = jnp.linalg.norm(g - (w - jacobian @ w))
        return cosine(w, exact), cosine(five, exact), found, residual, stats

    ours, five, found, residual, stats = run(g, exact)
    assert jnp.all(found) and jnp.mean(ours) > 0.99
    assert jnp.allclose(residual, stats["residual"], rtol=1e-6)
    hard = name != "Gaussian"
    assert (jnp.mean(five) < 0.9) == hard
    assert (jnp.mean(stats["num_products"]) > 10) == hard


def test_adaptive_series_converge_where_plain_ones_do_not(getkey):
    """Eigenvalues of J at -3, and a pair of them beyond the unit circle."""
    jacobian = jnp.diag(jnp.array([-3.0, -1.5, 0.5])).at[1, 2].set(1.0)
    g = jr.normal(getkey(), (3,))
    w, result, _ = solve(AdaptiveNeumannSeries(1e-9, 500), jacobian, g)
    assert result == lx.RESULTS.successful
    assert relative_error(w, jnp.linalg.solve(jnp.eye(3) - jacobian, g)) < 1e-7


def test_adaptive_series_say_when_they_have_not_finished():
    g = jnp.array([1.0, 1.0])
    # The product with I - J is perpendicular to the vector: no damping helps.
    turned = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
    for jacobian, max_terms in ((turned, 50), (0.9 * jnp.eye(2), 1)):
        solver = AdaptiveNeumannSeries(0.01, max_terms)
        w, result, stats = solve(solver, jacobian, g)
        assert jnp.all(jnp.isfinite(w)) and stats["num_products"] <= max_terms
        assert result == lx.RESULTS.max_steps_reached or max_terms == 1
    for g in (jnp.zeros(2), jnp.array([jnp.nan, 1.0])):
        w, result, _ = solve(AdaptiveNeumannSeries(0.01, 50), turned, g)
        assert jnp.array_equal(w, g, equal_nan=True) or jnp.any(jnp.isnan(w))
        assert (result == lx.RESULTS.successful) == bool(jnp.all(g == 0))


def test_adaptive_series_of_tiny_cotangents_and_of_no_jacobian(getkey):
    jacobian = matrix_of_norm(getkey(), 6, 0.8, jnp.float32)
    g = jr.normal(getkey(), (6,), jnp.float32)
    solver = AdaptiveNeumannSeries(1e-5, 100)
    w, _, stats = solve(solver, jacobian, g)
    tiny, result, tiny_stats = solve(solver, jacobian, 1e-25 * g)
    assert result == lx.RESULTS.successful
    assert jnp.allclose(1e25 * tiny, w, rtol=1e-5)
    assert tiny_stats["num_products"] == stats["num_products"]
    # Found by the first term.
    w, result, _ = solve(solver, jnp.zeros((6, 6), jnp.float32), g)
    assert result == lx.RESULTS.successful and jnp.allclose(w, g, rtol=1e-6)


@pytest.mark.parametrize("mean_terms", (2, 4.5))
def test_the_roulette_takes_so_many_terms_on_average(mean_terms):
    count = lambda key: RandomisedNeumannSeries(mean_terms, key).num_terms()
    counts = np.asarray(jax.jit(jax.vmap(count))(jr.split(jr.key(0), 20_000)))
    survival = 1 - 1 / mean_terms
    spread = survival**0.5 * mean_terms
    assert abs(np.mean(counts) - mean_terms) < 4 * spread / 20_000**0.5
    for terms in (1, 2, 5):
        chance = survival ** (terms - 1)
        allowed = 4 * (chance * (1 - chance) / 20_000) ** 0.5
        assert abs(np.mean(counts >= terms) - chance) <= allowed
    assert RandomisedNeumannSeries(1, jr.key(3)).num_terms() == 1


def second_moment(jacobian, g, survival, num_terms=400):
    """Of the roulette's sum, by its definition."""
    term, total, moment, chance = g, g, jnp.zeros_like(g), 1.0
    for _ in range(num_terms):
        moment = moment + chance * (1 - survival) * total**2
        chance = chance * survival
        term = jacobian @ term
        total = total + term / chance
    return moment + chance * total**2


def test_the_mean_of_randomised_gradients_is_the_exact_one(getkey):
    weight, x = matrix_of_norm(getkey(), 6, 0.8), jr.normal(getkey(), (6,))
    g = jr.normal(getkey(), (6,))

    def gradient(key):
        adjoint = eqi.RandomisedNeumannAdjoint(4, key=key)
        deq = eqi.DEQ(lambda z, x: weight @ z + x, adjoint=adjoint)
        return jax.grad(lambda x: g @ deq(x))(x)

    keys = jr.split(jr.key(0), 20_000)
    draws = np.asarray(jax.jit(jax.vmap(gradient))(keys))
    exact = np.linalg.solve(np.eye(6) - weight.T, g)
    spread = np.std(draws, axis=0) / len(draws) ** 0.5
    assert np.all(np.abs(np.mean(draws, axis=0) - exact) < 4 * spread)
    # No bias that would hide in the spread of few draws.
    assert np.linalg.norm(np.mean(draws, axis=0) - exact) < 0.05 * np.linalg.norm(exact)
    variance = np.asarray(second_moment(weight.T, g, 0.75)) - exact**2
    assert np.allclose(np.var(draws, axis=0), variance, rtol=0.2)


def test_the_tails_are_heavy_where_the_variance_is_infinite():
    """For rho = .99 eight terms are far below 1 / (1 - rho^2) = 50: most draws are too
    small, and a few carry the mean.
    """
    solver = lambda key: RandomisedNeumannSeries(8, key)
    run = lambda key: solve(solver(key), jnp.array([[0.99]]), jnp.ones(1))[0][0]
    draws = np.sort(jax.jit(jax.vmap(run))(jr.split(jr.key(0), 20_000)))
    assert np.median(draws) < 0.1 * 100
    assert np.sum(draws[-200:]) > 0.4 * np.sum(draws)


def test_bad_input():
    for rtol in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="`rtol` must be between 0 and 1"):
            eqi.AdaptiveNeumannAdjoint(rtol)
    with pytest.raises(ValueError, match="`max_terms`"):
        eqi.AdaptiveNeumannAdjoint(0.1, 0)
    with pytest.raises(ValueError, match="`mean_terms` must be at least 1"):
        eqi.RandomisedNeumannAdjoint(0.5, key=jr.key(0))
    with pytest.raises(TypeError):
        eqi.RandomisedNeumannAdjoint(3, key=0)
