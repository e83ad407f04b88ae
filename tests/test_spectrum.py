import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi
from eqimplicit.models.base import Conv2d

from .helpers import directional_difference, random_like


class Field(eqx.Module):
    network: eqx.Module

    def __call__(self, t, y, args):
        return self.network(y)


def _matrix_of(layer, shape):
    """The matrix of an affine layer, column by column."""
    layer = eqi.resolve(layer)
    zero = jnp.zeros(shape)
    eye = jnp.eye(zero.size).reshape(-1, *shape)
    columns = jax.vmap(lambda x: (layer(x) - layer(zero)).reshape(-1))(eye)
    return columns.T


def _mlp(key):
    return eqi.with_spectral_norm(
        eqx.nn.MLP(3, 3, 8, 2, jnp.tanh, key=key), num_steps=20, key=key
    )


@pytest.mark.parametrize("bound", (0.5, 1.0, 100.0))
def test_a_matrix_is_scaled_to_its_bound_only_if_it_is_above(bound, getkey):
    weight = 3 * jr.normal(getkey(), (4, 6))
    node = eqi.SpectralNorm(weight, bound, key=getkey())
    norm = np.linalg.norm(weight, 2)
    expected = weight / max(1, norm / bound)
    assert jnp.allclose(node.resolve(), expected, rtol=1e-10)
    if bound == 100.0:
        assert jnp.array_equal(node.resolve(), weight)


_CONVOLUTIONS = {
    "Equinox": lambda key: (
        eqx.nn.Conv2d(2, 3, 3, padding=1, key=key),
        (2, 5, 4),
    ),
    "strided": lambda key: (
        eqx.nn.Conv2d(2, 3, 3, stride=2, padding=1, key=key),
        (2, 5, 4),
    ),
    "transposed": lambda key: (
        eqx.nn.ConvTranspose2d(2, 3, 3, stride=2, key=key),
        (2, 4, 3),
    ),
    "channels last": lambda key: (Conv2d(2, 3, 3, padding=1, key=key), (5, 4, 2)),
}


@pytest.mark.parametrize("name", _CONVOLUTIONS)
def test_a_convolution_has_the_norm_of_its_operator(name, getkey):
    layer, shape = _CONVOLUTIONS[name](getkey())
    layer = eqx.tree_at(lambda c: c.weight, layer, 5 * layer.weight)
    expected = np.linalg.norm(_matrix_of(layer, shape), 2)
    assert expected > 1
    normed = eqi.with_spectral_norm(
        layer, 0.7, input_shape=shape, num_steps=50, key=getkey()
    )
    actual = np.linalg.norm(eqx.filter_jit(_matrix_of)(normed, shape), 2)
    assert np.isclose(actual, 0.7, rtol=1e-6)
    # The kernel as a matrix has another norm.
    kernel = eqi.resolve(normed).weight
    assert not np.isclose(np.linalg.norm(kernel.reshape(3, -1), 2), 0.7, rtol=0.01)


def test_the_gradient_passes_through_the_norm_and_not_the_vector(getkey):
    weight, probe = 2 * jr.normal(getkey(), (3, 5)), jr.normal(getkey(), (3, 5))
    node = eqi.SpectralNorm(weight, key=getkey())

    @eqx.filter_jit
    def loss(weight):
        return jnp.sum(probe * eqi.SpectralNorm(weight, key=jr.key(0)).resolve())

    of_node = lambda node: jnp.sum(probe * node.resolve())
    gradient = eqx.filter_jit(eqx.filter_grad(of_node))(node)
    direction = random_like(getkey(), weight)
    # As the vector has converged, it is stationary for the norm.
    expected = directional_difference(loss, weight, direction, step=1e-3)
    assert jnp.allclose(jnp.vdot(gradient.weight, direction), expected, rtol=1e-7)
    assert jnp.all(gradient.vector == 0)
    assert gradient.bound is None


def test_the_vector_follows_a_weight_that_is_trained(getkey):
    node = eqi.SpectralNorm(
        jr.normal(getkey(), (10, 10)), 0.1, num_steps=1, key=getkey()
    )
    change = 0.02 * jr.normal(getkey(), (10, 10))
    advance = eqx.filter_jit(eqi.advance_spectral_norms)
    for _ in range(100):
        node = eqx.tree_at(lambda n: n.weight, node, node.weight + change)
        node = advance(node)
    assert np.isclose(np.linalg.norm(node.resolve(), 2), 0.1, rtol=1e-3)
    # Resolving is a function of the node: inference advances nothing.
    assert jnp.array_equal(node.resolve(), node.resolve())


def test_stacked_norms_are_advanced_each(getkey):
    keys = jr.split(getkey(), 3)
    make = lambda key: eqi.SpectralNorm(jr.normal(key, (4, 4)), key=key)
    stacked = eqx.filter_vmap(make)(keys)
    advanced = eqx.filter_vmap(eqi.advance_spectral_norms)(stacked)
    for k, key in enumerate(keys):
        expected = eqi.advance_spectral_norms(make(key)).vector
        assert jnp.allclose(advanced.vector[k], expected, rtol=1e-10)


@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("limits", ((-25.0, -15.0), (-1.0, 1.0), (-3.0, 0.5)))
def test_every_eigenvalue_lies_in_its_disc(limits, scaled, getkey):
    alpha, beta = limits
    scale = 4 + jr.normal(getkey(), (3,)) if scaled else None
    field = eqi.BoundedSpectrum(Field(_mlp(getkey())), alpha, beta, scale)
    ys = jr.normal(getkey(), (50, 3))

    @eqx.filter_jit
    def jacobians(field):
        field = eqi.resolve(field)
        return jax.vmap(jax.jacfwd(lambda y: field(0.0, y)))(ys)

    matrices = np.asarray(jacobians(field))
    centre, radius = (alpha + beta) / 2, (beta - alpha) / 2
    distance = np.abs(np.linalg.eigvals(matrices) - centre)
    assert np.all(distance <= radius * (1 + 1e-6))
    # Not in a much smaller one, either.
    assert np.max(distance) > 0.1 * radius
    symmetric = np.linalg.eigvalsh((matrices + matrices.transpose(0, 2, 1)) / 2)
    assert np.all((alpha - 1e-5 <= symmetric) & (symmetric <= beta + 1e-5))
    norms = np.linalg.norm(matrices, 2, axis=(1, 2))
    assert np.all(norms <= max(abs(alpha), abs(beta)) * (1 + 1e-6))


@pytest.mark.parametrize("theta", (0.5, 1.0))
def test_a_large_stiff_field_is_solved_by_damped_picard(theta, getkey):
    """Where plain Picard iteration diverges."""
    size = 80
    mlp = eqx.nn.MLP(size, size, 20, 1, jnp.tanh, key=getkey())
    field = Field(eqi.with_spectral_norm(mlp, key=getkey()))
    field = eqi.BoundedSpectrum(field, -25.0, -15.0)
    y = jr.normal(getkey(), (size,))

    @eqx.filter_jit
    def run(layer, y):
        solution = layer.solve(y)
        return solution, jax.grad(lambda y: jnp.sum(jnp.sin(layer(y))))(y)

    damped = eqi.Picard(1e-6, 1e-6, damping=field.damping(theta * 0.1))
    adjoint = eqi.ImplicitAdjoint(eqi.FixedPointLinearSolver(damped))
    layer = eqi.ThetaLayer(field, theta, 0.1, solver=damped, adjoint=adjoint)
    solution, gradient = run(layer, y)
    newton = eqi.RootAsFixedPoint(optx.Newton(1e-12, 1e-12))
    exact, exact_gradient = run(eqi.ThetaLayer(field, theta, 0.1, solver=newton), y)
    assert solution.result == optx.RESULTS.successful
    # The a-priori factor is at most 1 / 6.
    assert solution.stats["num_evaluations"] <= 10
    assert jnp.allclose(solution.value, exact.value, atol=1e-6)
    assert jnp.allclose(gradient, exact_gradient, atol=1e-5)
    picard = eqi.ThetaLayer(field, theta, 0.1, solver=eqi.Picard(1e-6, 1e-6))
    plain = eqx.filter_jit(picard.solve)(y)
    assert plain.result != optx.RESULTS.successful


def test_bad_arguments_are_named(getkey):
    with pytest.raises(ValueError, match="bound"):
        eqi.SpectralNorm(jnp.eye(2), 0.0, key=getkey())
    with pytest.raises(ValueError, match="num_steps"):
        eqi.SpectralNorm(jnp.eye(2), num_steps=0, key=getkey())
    with pytest.raises(ValueError, match=r"operator.*\(2, 2, 2\)"):
        eqi.SpectralNorm(jnp.ones((2, 2, 2)), key=getkey())
    with pytest.raises(ValueError, match="input_shape.*Conv2d"):
        eqi.with_spectral_norm(eqx.nn.Conv2d(1, 1, 3, key=getkey()), key=getkey())
    with pytest.raises(TypeError, match="vector_field"):
        eqi.BoundedSpectrum(3, -1.0, 1.0)
    with pytest.raises(ValueError, match="alpha"):
        eqi.BoundedSpectrum(lambda t, y, args: y, 1.0, -1.0)


def test_a_field_whose_iteration_may_not_contract_is_solved_otherwise(getkey):
    size = 70
    mlp = eqx.nn.MLP(size, size, 20, 1, jnp.tanh, key=getkey())
    field = Field(eqi.with_spectral_norm(mlp, key=getkey()))
    y = jr.normal(getkey(), (size,))
    for alpha, beta, h in ((-100.0, 0.0, 1.0), (0.0, 5.0, 0.5)):
        layer = eqi.ThetaLayer(eqi.BoundedSpectrum(field, alpha, beta), 1.0, h)
        solution = eqx.filter_jit(layer.solve)(y)
        slope = eqi.resolve(layer.vector_field)(0.0, solution.value, None)
        solved = solution.result == optx.RESULTS.successful
        found = jnp.allclose(solution.value, y + h * slope, atol=1e-4)
        assert found or not solved
        assert solved or beta > 0
    layer = eqi.ThetaLayer(eqi.BoundedSpectrum(field, -5.0, -3.0), 0.5, 0.1)
    back = eqx.filter_jit(lambda y: layer.invert(layer(y)))(y)
    assert back.result == optx.RESULTS.successful
    assert jnp.allclose(back.value, y, atol=1e-4)
