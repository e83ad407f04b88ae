"""The networks of the papers: their sizes, their solves and their gradients."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest

import eqimplicit as eqi
from eqimplicit import models

from .helpers import directional_difference, random_like, slow_but, tree_dot


_exact = ft.partial(
    eqi.DEQ,
    solver=eqi.Anderson(0.0, 1e-12),
    adjoint=eqi.ImplicitAdjoint(eqi.GMRES(1e-12, 1e-12)),
    max_steps=300,
)


def count(tree):
    """How many trained numbers there are, without the vectors of power iterations."""
    is_norm = lambda x: isinstance(x, eqi.SpectralNorm)
    leaves = jax.tree.leaves(tree, is_leaf=is_norm)
    leaves = [x.weight if is_norm(x) else x for x in leaves]
    leaves = [x for x in leaves if hasattr(x, "dtype")]
    return sum(x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))


def shapes_of(make, *args, **kwargs):
    return eqx.filter(
        eqx.filter_eval_shape(make, *args, **kwargs, key=jr.key(0)),
        lambda x: hasattr(x, "dtype"),
    )


@pytest.mark.parametrize(
    "make, encoder, cell, head",
    [
        (models.jfb_mnist, 4_896, 36_992, 12_464),
        # The paper's 163,744 count 256 numbers that its code never uses.
        (models.jfb_svhn, 163_744 - 256 - 73_856 - 14_992, 73_856, 14_992),
        (models.jfb_cifar10, 713_020, 110_600, 19_810),
    ],
)
def test_parameters_of_the_jfb_networks(make, encoder, cell, head):
    net, _ = shapes_of(eqx.nn.make_with_state(make))
    assert count(net.encoder) == encoder
    assert count(net.layer.cell) == cell
    assert count(net.head) == head
    explicit, _ = shapes_of(eqx.nn.make_with_state(make), layer=models.OneStep)
    assert count(explicit) == encoder + cell + head


@pytest.mark.slow
def test_parameters_of_the_other_networks():
    assert count(shapes_of(models.mdeq)) == 159_274
    resnet = models.ImplicitResNet((8, 8, 1), key=jr.key(0))
    assert count(resnet) == 220_754


def assert_gradient(loss, tree, key):
    params, static = eqx.partition(tree, eqx.is_inexact_array)
    compiled = jax.jit(lambda params: loss(eqx.combine(params, static)))
    direction = random_like(key, params)
    # Short: there are kinks, where an activation changes its sign.
    expected = directional_difference(compiled, params, direction, step=1e-7)
    gradient = jax.jit(jax.grad(compiled))(params)
    assert abs(expected) > 1e-4
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        ft.partial(models.jfb_svhn, (12, 12, 3), channels=(4, 4, 8)),
        ft.partial(models.jfb_cifar10, (6, 6, 3), channels=4, num_blocks=1),
    ],
)
@pytest.mark.slow
def test_the_jfb_networks_and_their_exact_gradient(make, getkey):
    norm = lambda channels, affine: models.GroupNorm(channels, affine, 2)
    # Without drop-out: a group of dropped channels has no variance.
    net = eqx.nn.inference_mode(make(norm=norm, layer=_exact, key=getkey()))
    x = jr.normal(getkey(), make.args[0])
    loss = lambda net: jnp.sum(jnp.arange(10.0) * net(x))
    features, _ = net.encoder(x)
    solution = net.layer.solve(features)
    assert solution.result == optx.RESULTS.successful
    assert_gradient(loss, net, getkey())
    training = eqx.nn.inference_mode(net, False)
    assert not jnp.allclose(training(x, key=getkey()), net(x))


@pytest.mark.parametrize(
    "make", slow_but([models.jfb_svhn, models.jfb_cifar10], models.jfb_svhn)
)
def test_batch_norm_takes_the_batch_as_one_state(make, getkey):
    small = {"channels": (2, 2, 4)} if make is models.jfb_svhn else {"channels": 4}
    net, state = eqx.nn.make_with_state(make)((12, 12, 3), **small, key=getkey())
    x = jr.normal(getkey(), (3, 12, 12, 3))
    run = eqx.filter_jit(lambda net, state: net(x, state, key=jr.key(0)))
    logits, new = run(net, state)
    assert logits.shape == (3, 10)
    old, new = jax.tree.leaves(state), jax.tree.leaves(new)
    assert not any(jnp.array_equal(a, b) for a, b in zip(old, new))


def test_a_cell_without_normalisation(getkey):
    make = eqx.nn.make_with_state(models.jfb_mnist)
    net, _ = make((8, 8, 1), pool=1, channels=4, cell_norm=models.NoNorm, key=getkey())
    assert isinstance(net.layer.cell.blocks[0].norm, models.NoNorm)
    assert isinstance(net.encoder.norms[0], models.BatchNorm)


_mdeq = ft.partial(
    models.mdeq, channels=4, expansion=2, head_channels=2, final_channels=4, groups=2
)


@pytest.mark.parametrize("branches, size", [(2, 4), (3, 8)])
@pytest.mark.slow
def test_a_multiscale_network(branches, size):
    # A chance of the weights: no norm bounds this cell.
    layer = ft.partial(
        eqi.DEQ, solver=eqi.Anderson(1e-8, 1e-8, history_size=20), max_steps=300
    )
    net = _mdeq((size, size, 3), num_branches=branches, layer=layer, key=jr.key(2))
    images = jr.normal(jr.key(102), (2, size, size, 3))
    features, _ = jax.vmap(net.encoder)(images)
    solution = eqx.filter_jit(lambda net, x: jax.vmap(net.layer.solve)(x))(
        net, features
    )
    assert jnp.all(solution.result == optx.RESULTS.successful)
    features, z = jax.tree.map(lambda x: x[0], (features, solution.value))
    assert [x.shape[0] for x in z] == [size // 2**i for i in range(branches)]
    # Every image on its own, and as parts of one batch.
    one = eqx.filter_jit(net)(images[1])
    many = eqx.filter_jit(lambda net, x: jax.vmap(net)(x))(net, images)
    assert jnp.allclose(many[1], one, atol=1e-6)
    cell = eqi.resolve(net.layer.cell)
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), z)
    batch = cell(both, jnp.stack([features, features]))
    for a, b in zip(batch, cell(z, features)):
        assert jnp.allclose(a[0], b)


@pytest.mark.slow
def test_the_exact_gradient_of_a_multiscale_network(getkey):
    net = _mdeq((4, 4, 3), layer=_exact, key=getkey())
    x = jr.normal(getkey(), (4, 4, 3))
    features, _ = net.encoder(x)
    assert net.layer.solve(features).result == optx.RESULTS.successful
    assert_gradient(lambda net: jnp.sum(jnp.arange(10.0) * net(x)), net, getkey())


def test_images_that_cannot_be_halved_are_refused(getkey):
    with pytest.raises(ValueError, match="cannot be halved"):
        models.mdeq((6, 6, 3), num_branches=3, key=getkey())


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
@pytest.mark.slow
def test_an_implicit_resnet(theta, getkey):
    layer = ft.partial(
        eqi.ThetaLayer,
        theta=theta,
        solver=eqi.Anderson(0.0, 1e-12),
        adjoint=eqi.ImplicitAdjoint(eqi.GMRES(1e-12, 1e-12)),
        max_steps=200,
    )
    shape = 6, 5, 2
    net = models.ImplicitResNet(shape, channels=(2, 4), layer=layer, key=getkey())
    x = jr.normal(getkey(), shape)
    logits, solutions = eqx.filter_jit(lambda net: net.solve(x))(net)
    assert logits.shape == (10,)
    for solution in solutions:
        assert jnp.all(solution.result == optx.RESULTS.successful)
    # Each block solves its own equation, with its own field.
    first = jax.tree.map(lambda x: x[1] if eqx.is_array(x) else x, net.stages[1].layer)
    y0, y1 = solutions[1].value[1:]
    field = eqi.resolve(first.vector_field)
    assert jnp.allclose(y1, y0 + field(0.0, (1 - theta) * y0 + theta * y1), atol=1e-9)
    # Of the trained parameters alone: that of the vectors is zero.
    weights = lambda net: net.linear.weight
    gradient = jax.jit(
        jax.grad(lambda w: jnp.sum(eqx.tree_at(weights, net, w)(x) ** 2))
    )(weights(net))
    assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient != 0)


@pytest.mark.slow
def test_the_gradient_of_an_implicit_resnet(getkey):
    layer = ft.partial(
        eqi.ThetaLayer,
        theta=0.75,
        solver=eqi.Anderson(0.0, 1e-12),
        adjoint=eqi.ImplicitAdjoint(eqi.GMRES(1e-12, 1e-12)),
        max_steps=200,
    )
    net = models.ImplicitResNet((5, 5, 1), channels=(2, 3), layer=layer, key=getkey())
    x = jr.normal(getkey(), (5, 5, 1))
    stem = lambda net: net.stem.weight
    loss = lambda w: jnp.sum(jnp.arange(10.0) * eqx.tree_at(stem, net, w)(x))
    assert_gradient(loss, stem(net), getkey())
