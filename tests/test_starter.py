"""The cells to start from: contractions by construction, which train with defaults."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import pytest
from sklearn.datasets import load_digits

import eqimplicit as eqi
from eqimplicit import models

from .helpers import directional_difference, EXACT_ADJOINTS, random_like, tree_dot


# A cell, the shape of its state, and that of its input.
CELLS = {
    "dense": (lambda key: models.DenseCell(3, 5, key=key), (5,), (3,)),
    "convolutional": (
        lambda key: models.ConvCell(2, 3, key=key),
        (4, 5, 3),
        (4, 5, 2),
    ),
}
cells = pytest.mark.parametrize("name", CELLS)


def make(name, key, scale=1.0):
    """A cell with parameters that have grown by a factor, a state and an input."""
    make_cell, *shapes = CELLS[name]
    keys = jr.split(key, 3)
    grow = lambda leaf: scale * leaf if eqx.is_inexact_array(leaf) else leaf
    cell = jax.tree.map(grow, make_cell(keys[0]))
    return cell, *(jr.normal(k, s) for k, s in zip(keys[1:], shapes))


@cells
def test_contraction_by_nine_tenths_whatever_the_weight(name, getkey):
    cell, z, x = make(name, getkey(), scale=100.0)
    # With all units active the Jacobian is the weight, and the bound is attained.
    cell = eqx.tree_at(lambda cell: cell.norm.bias, cell, 1e4 + cell.norm.bias)
    jacobian = jax.jit(jax.jacobian(cell))(z, x).reshape(z.size, z.size)
    sums = jnp.sum(jnp.abs(jacobian), axis=1)
    assert jnp.allclose(jnp.max(sums), 0.9, rtol=1e-12)


@cells
def test_a_weight_within_the_bound_is_the_operator(name, getkey):
    cell, z, x = make(name, getkey(), scale=0.01)
    injected = cell.norm(cell.inject(x))
    injected = injected if name == "dense" else injected[0]
    expected = jax.nn.relu(cell.recurrent(z) + injected)
    assert jnp.any(expected > 0)
    assert jnp.allclose(cell(z, x), expected, rtol=1e-12)


@cells
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_a_batch_is_solved_in_the_default_steps(name, dtype, getkey):
    cell, z, x = make(name, getkey(), scale=100.0)
    cast = lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf
    cell, xs = jax.tree.map(cast, (cell, jr.normal(getkey(), (4, *x.shape))))
    # Picard, for which 0.9 suffices; bfloat16 resolves no more than 1e-2.
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-4
    for solver in (
        eqi.Picard(tolerance, tolerance),
        eqi.Anderson(tolerance, tolerance),
    ):
        layer = eqi.DEQ(cell, solver, init=lambda x: jnp.zeros(z.shape, dtype))
        solution = eqx.filter_jit(eqx.filter_vmap(layer.solve))(xs)
        assert solution.value.dtype == dtype
        assert jnp.all(solution.result == optx.RESULTS.successful)


@cells
def test_gradient_by_finite_differences(name, getkey):
    cell, z, x = make(name, getkey(), scale=2.0)
    weights = jr.normal(getkey(), z.shape)
    params, static = eqx.partition(cell, eqx.is_inexact_array)

    @jax.jit
    def loss(params):
        layer = eqi.DEQ(
            eqx.combine(params, static),
            eqi.Anderson(0.0, 1e-8),
            EXACT_ADJOINTS["Implicit"](),
            init=lambda x: jnp.zeros(z.shape),
        )
        return jnp.sum(weights * layer(x))

    direction = random_like(getkey(), params)
    # Short: there are kinks, where an activation changes its sign.
    expected = directional_difference(loss, params, direction, step=1e-6)
    assert abs(expected) > 1e-3
    actual = tree_dot(jax.jit(jax.grad(loss))(params), direction)
    assert jnp.allclose(actual, expected, rtol=1e-6)


class Classifier(eqx.Module):
    deq: eqi.DEQ
    head: eqx.nn.Linear


def loss_fn(net, images, labels):
    solution = jax.vmap(net.deq.solve)(images)
    logits = jax.vmap(lambda z: net.head(z.reshape(-1)))(solution.value)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    converged = jnp.mean(solution.result == optx.RESULTS.successful)
    accuracy = jnp.mean(jnp.argmax(logits, 1) == labels)
    return jnp.mean(losses), (converged, accuracy)


@pytest.mark.usefixtures("default_configuration")
@pytest.mark.parametrize("adjoint", [eqi.ImplicitAdjoint(), eqi.JFBAdjoint()])
@pytest.mark.slow
def test_the_digits_are_learned_with_all_defaults(adjoint):
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16), jnp.asarray(labels)
    rng = np.random.default_rng(0)
    train, test = np.split(rng.permutation(len(labels)), [1500])
    keys = jr.split(jr.key(0))
    cell = models.DenseCell(64, 128, key=keys[0])
    deq = eqi.DEQ(cell, adjoint=adjoint, init=lambda x: jnp.zeros(128))
    net = Classifier(deq, eqx.nn.Linear(128, 10, key=keys[1]))
    optimiser = optax.adam(3e-3)

    @eqx.filter_jit
    def make_step(net, opt_state, images, labels):
        value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
        (_, (converged, _)), grads = value_and_grad(net, images, labels)
        updates, opt_state = optimiser.update(grads, opt_state)
        return eqx.apply_updates(net, updates), opt_state, converged

    opt_state = optimiser.init(eqx.filter(net, eqx.is_inexact_array))
    for _ in range(5):
        shares = []
        for batch in rng.permutation(train).reshape(-1, 50):
            net, opt_state, converged = make_step(
                net, opt_state, images[batch], labels[batch]
            )
            shares.append(converged)
        assert np.mean(shares) >= 0.99
    _, (converged, accuracy) = eqx.filter_jit(loss_fn)(net, images[test], labels[test])
    assert converged >= 0.99 and accuracy >= 0.97
