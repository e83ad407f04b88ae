import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import eqimplicit as eqi
from eqimplicit import models

from .helpers import directional_difference, random_like, tree_dot


_tight = ft.partial(
    eqi.DEQ, solver=eqi.Picard(0.0, 1e-8), adjoint=eqi.JFBAdjoint(), max_steps=200
)
# 8 x 8 images, as small as the head allows after pooling is left out.
_small = ft.partial(models.jfb_mnist, (8, 8, 1), channels=4, pool=1, layer=_tight)


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _make_small(key, **kwargs) -> tuple[Any, eqx.nn.State]:
    return eqx.nn.make_with_state(_small)(key=key, **kwargs)


def _copy(state):
    return jax.tree.map(lambda leaf: leaf, state)


def _is_state_equal(a, b):
    return eqx.tree_equal(jax.tree.leaves(a), jax.tree.leaves(b))


@pytest.mark.parametrize("norm", (models.BatchNorm, models.GroupNorm))
def test_parameters_are_as_many_as_in_the_paper(norm, getkey):
    make = eqx.nn.make_with_state(models.jfb_mnist)
    net, _ = eqx.filter_eval_shape(make, norm=norm, key=getkey())
    is_parameter = lambda x: jnp.issubdtype(getattr(x, "dtype", int), jnp.inexact)
    parameters = eqx.filter(net, is_parameter)
    assert _count(parameters.encoder) == 4896
    assert _count(parameters.layer.cell) == 36992
    assert _count(parameters.head) == 12464
    assert _count(parameters) == 54352


@pytest.mark.parametrize(
    "in_shape, pool", (((28, 28, 1), 3), ((8, 8, 1), 1), ((32, 32, 3), 3))
)
def test_shapes(in_shape, pool, getkey):
    make = eqx.nn.make_with_state(ft.partial(models.jfb_mnist, num_classes=7))
    net, state = eqx.filter_eval_shape(make, in_shape, pool=pool, key=getkey())
    x = jax.ShapeDtypeStruct((5, *in_shape), jnp.float64)
    run = lambda net, x, state: net(x, state, key=jr.key(0))
    logits, _ = eqx.filter_eval_shape(run, net, x, state)
    assert (logits.shape, logits.dtype) == ((5, 7), jnp.float64)


def test_too_small_images_are_refused(getkey):
    with pytest.raises(ValueError, match="smaller `pool`"):
        models.jfb_mnist((8, 8, 1), key=getkey())
    with pytest.raises(ValueError, match="`channels` must be even"):
        models.jfb_mnist(channels=5, key=getkey())
    with pytest.raises(ValueError, match="`groups` must divide `channels`"):
        models.GroupNorm(6, groups=4)


def test_cell_is_the_papers(getkey):
    # Written with the library's operations on a whole batch, channels first.
    cell, state = eqx.nn.make_with_state(models.ResidualCell)(4, key=getkey())
    z, x = jr.normal(getkey(), (2, 3, 5, 6, 4))

    def convolve(conv, w):
        out = jax.lax.conv_general_dilated(
            w,
            jnp.transpose(conv.weight, (3, 2, 0, 1)),
            (1, 1),
            "SAME",
        )
        return out + conv.bias[None, :, None, None]

    @eqx.filter_jit
    def by_hand(cell, z, x):
        w = jnp.moveaxis(z + x, -1, 1)
        leaky = lambda y: jnp.where(y > 0, y, 0.1 * y)
        for block in cell.blocks:
            hidden = leaky(convolve(block.convs[0], w))
            w = w + leaky(leaky(convolve(block.convs[1], hidden)))
            mean = w.mean((0, 2, 3), keepdims=True)
            w = (w - mean) / jnp.sqrt(w.var((0, 2, 3), keepdims=True) + 1e-5)
        return 0.5 * jnp.moveaxis(w, 1, -1)

    value, _ = eqx.filter_jit(cell)(z, x, state)
    assert jnp.allclose(value, by_hand(cell, z, x), rtol=1e-12, atol=1e-12)


def test_solution_is_a_fixed_point_of_the_cell(getkey):
    net, state = _make_small(getkey())
    x = jr.normal(getkey(), (6, 8, 8, 1))

    @eqx.filter_jit
    def run(net, state):
        features, state = net.encoder(x, state)
        solution = net.layer.solve(features, state=_copy(state))
        image, _ = net.layer.cell(solution.value, features, state)
        return solution, image

    solution, image = run(net, state)
    assert jnp.allclose(solution.value, image, atol=1e-11)
    assert solution.stats["num_steps"] < 200


def test_explicit_network_is_one_application(getkey):
    key = getkey()
    explicit, state = _make_small(key, layer=models.OneStep)
    net, _ = _make_small(key)
    x = jr.normal(getkey(), (6, 8, 8, 1))

    @eqx.filter_jit
    def by_hand(net, state):
        features, state = net.encoder(x, state)
        z, state = net.layer.cell(jnp.zeros_like(features), features, state)
        return net.head(z, key=key), state

    expected, expected_state = by_hand(net, state)
    swapped = eqx.tree_at(lambda n: n.layer, net, models.OneStep(net.layer.cell))
    for twin in (explicit, swapped):
        logits, new_state = eqx.filter_jit(twin)(x, state, key=key)
        assert jnp.allclose(logits, expected, rtol=1e-12)
        assert _is_state_equal(new_state, expected_state)


def test_statistics_are_updated_once_a_call(getkey):
    net, state = _make_small(getkey())
    x = jr.normal(getkey(), (6, 8, 8, 1))

    @eqx.filter_jit
    def run(net, state):
        features, after_encoder = net.encoder(x, _copy(state))
        # JFB would return the image of the iterate at which it was evaluated.
        layer = eqx.tree_at(lambda d: d.adjoint, net.layer, eqi.ImplicitAdjoint())
        z = layer.solve(features, state=_copy(after_encoder)).value
        _, expected = net.layer.cell(z, features, after_encoder)
        _, actual = net(x, state, key=jr.key(0))
        w = net.encoder.convs[0](x)
        return expected, actual, jnp.mean(w, (0, 1, 2)), jnp.var(w, (0, 1, 2), ddof=1)

    expected, actual, mean, variance = run(net, state)
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(actual))
    assert all(jnp.allclose(a, b, rtol=1e-13, atol=1e-13) for a, b in pairs)
    running_mean, running_variance = actual.get(net.encoder.norms[0].statistics)
    assert jnp.allclose(running_mean, 0.1 * mean, rtol=1e-12)
    assert jnp.allclose(running_variance, 0.9 + 0.1 * variance, rtol=1e-12)


def test_inference_mode_leaves_the_state_and_the_examples_alone(getkey):
    net, state = _make_small(getkey())
    x = jr.normal(getkey(), (6, 8, 8, 1))
    _, state = eqx.filter_jit(net)(x, state, key=getkey())
    run = eqx.filter_jit(eqx.nn.inference_mode(net))
    logits, new_state = run(x, state)
    assert _is_state_equal(new_state, state)
    alone, _ = run(x[2:3], state)
    assert jnp.allclose(alone[0], logits[2], atol=1e-10)


def test_group_norm_takes_single_examples(getkey):
    net = _small(norm=ft.partial(models.GroupNorm, groups=2), key=getkey())
    x, keys = jr.normal(getkey(), (3, 8, 8, 1)), jr.split(getkey(), 3)
    run = lambda x, key: net(x, key=key)
    logits = jax.jit(jax.vmap(run))(x, keys)
    assert logits.shape == (3, 10)
    one = jax.jit(run)(x[1], keys[1])
    assert jnp.allclose(logits[1], one, atol=1e-10)


@pytest.mark.parametrize("affine", (True, False))
def test_group_norm_is_equinoxs(affine, getkey):
    ours = models.GroupNorm(6, affine, groups=3)
    theirs = eqx.nn.GroupNorm(3, 6, channelwise_affine=affine)
    if affine:
        values = jr.normal(getkey(), (2, 6))
        where = lambda n: (n.weight, n.bias)
        ours = eqx.tree_at(where, ours, tuple(values))
        theirs = eqx.tree_at(where, theirs, tuple(values))
    x = jr.normal(getkey(), (2, 5, 4, 6))
    expected = jax.vmap(lambda y: jnp.moveaxis(theirs(jnp.moveaxis(y, -1, 0)), 0, -1))
    assert jnp.allclose(ours(x)[0], expected(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", (models.BatchNorm, models.GroupNorm))
def test_normalisation_keeps_a_low_precision(norm, getkey):
    layer, state = eqx.nn.make_with_state(norm)(8, dtype=jnp.bfloat16)
    x = (5 + jr.normal(getkey(), (4, 9, 9, 8))).astype(jnp.bfloat16)
    y, _ = layer(x, state)
    assert y.dtype == jnp.bfloat16
    exact, state = eqx.nn.make_with_state(norm)(8)
    expected, _ = exact(x.astype(jnp.float64), state)
    assert jnp.max(jnp.abs(y.astype(jnp.float64) - expected)) < 0.02


def test_jfb_gradient_by_finite_differences(getkey):
    # With the iterate that goes into the attached application held constant.
    net, state = _make_small(getkey())
    net = eqx.tree_at(lambda n: n.head.dropout.inference, net, True)
    x = jr.normal(getkey(), (6, 8, 8, 1))
    labels = jnp.arange(6)
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def loss(logits):
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), labels])

    @jax.jit
    def through_layer(params):
        return loss(eqx.combine(params, static)(x, _copy(state))[0])

    @jax.jit
    def root(params):
        net = eqx.combine(params, static)
        features, after_encoder = net.encoder(x, _copy(state))
        return net.layer(features, state=after_encoder)[0]

    @jax.jit
    def attached(params, z):
        net = eqx.combine(params, static)
        features, after_encoder = net.encoder(x, _copy(state))
        z, _ = net.layer.cell(z, features, after_encoder)
        return loss(net.head(z))

    direction = random_like(getkey(), params)
    fixed = root(params)
    expected = directional_difference(
        lambda params: attached(params, fixed), params, direction, step=1e-7
    )
    gradient = jax.jit(jax.grad(through_layer))(params)
    tangent = jax.jit(lambda p, d: jax.jvp(through_layer, (p,), (d,))[1])
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-6)
    assert jnp.allclose(tangent(params, direction), expected, rtol=1e-6)


def test_exact_gradient_of_a_coupled_batch(getkey):
    adjoint = eqi.ImplicitAdjoint(eqi.GMRES(1e-10, 0.0))
    layer = ft.partial(_tight, adjoint=adjoint)
    net, state = _make_small(getkey(), layer=layer)
    net = eqx.tree_at(lambda n: n.head.dropout.inference, net, True)
    x = jr.normal(getkey(), (3, 8, 8, 1))
    weights = jr.normal(getkey(), (3, 10))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    @jax.jit
    def loss(params):
        logits, _ = eqx.combine(params, static)(x, _copy(state))
        return jnp.sum(weights * logits)

    direction = random_like(getkey(), params)
    gradient = jax.jit(jax.grad(loss))(params)
    expected = directional_difference(loss, params, direction, step=1e-5)
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-6)


def test_drop_out_drops_whole_channels(getkey):
    head = models.ConvHead((5, 5, 4), 8, dropout=0.5, key=getkey())
    # Classes that count the features of each channel.
    weight = jnp.tile(jnp.eye(8, 10), (9, 1))
    conv = eqx.tree_at(
        lambda c: (c.weight, c.bias), head.conv, (jnp.zeros((3, 3, 4, 8)), jnp.ones(8))
    )
    head = eqx.tree_at(lambda h: (h.conv, h.weight), head, (conv, weight))
    z = jr.normal(getkey(), (50, 5, 5, 4))
    counts = eqx.filter_jit(head)(z, key=getkey())[:, :8]
    assert jnp.all((counts == 0) | (counts == 18))
    assert 0.3 < jnp.mean(counts == 0) < 0.7
    assert jnp.all(eqx.filter_jit(eqx.nn.inference_mode(head))(z)[:, :8] == 9)


def test_batch_norm_refuses_one_image_and_a_missing_state():
    norm, state = eqx.nn.make_with_state(models.BatchNorm)(3)
    for images, given in ((jnp.ones((4, 4, 3)), state), (jnp.ones((2, 4, 4, 3)), None)):
        with pytest.raises(ValueError, match="takes a batch of images"):
            norm(images, given)
