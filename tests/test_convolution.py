import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import pytest

import eqimplicit as eqi
from eqimplicit.models import Conv2d

from .helpers import compiled_text, directional_difference, random_like, tree_dot


# stride, padding, kernel size, shape of the image; the last covers what a stride
# leaves over.
CASES = {
    "same": (1, 1, 3, (6, 5, 2)),
    "pointwise": (1, 0, 1, (4, 4, 3)),
    "wide padding": (1, 3, 3, (4, 5, 2)),
    "strided with a rest": (3, 0, 2, (7, 9, 2)),
    # With as many channels as these it is a product of matrices on the CPU.
    "matmul": (1, 2, 3, (4, 5, 16)),
}


def _library(conv, x):
    out = lax.conv_general_dilated(
        x[None],
        conv.weight,
        (conv.stride, conv.stride),
        [(conv.padding, conv.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]
    return out + conv.bias[None, None]


def _make(name, getkey, dtype=None):
    stride, padding, size, shape = CASES[name]
    conv = Conv2d(shape[-1], 4, size, stride, padding, dtype=dtype, key=getkey())
    return conv, jr.normal(getkey(), shape, dtype)


def _loss(convolve, conv, x):
    # Not linear in its output, so that its second derivative says something.
    return jnp.sum(jnp.sin(convolve(conv, x)))


def _ours(conv, x):
    return conv(x)


@pytest.mark.parametrize("name", CASES)
def test_value_and_derivatives_are_the_librarys(name, getkey):
    conv, x = _make(name, getkey)
    direction = random_like(getkey(), (conv, x))

    @eqx.filter_jit
    def everything(convolve, conv, x, direction):
        loss = lambda point: _loss(convolve, *point)
        grad = jax.grad(loss)
        gradient, hessian_product = jax.jvp(grad, ((conv, x),), (direction,))
        return {
            "value": convolve(conv, x),
            "tangent": jax.jvp(convolve, (conv, x), direction)[1],
            "gradient": gradient,
            "forward over reverse": hessian_product,
            "in the image": jax.jacfwd(convolve, 1)(conv, x),
        }

    ours = everything(_ours, conv, x, direction)
    library = everything(_library, conv, x, direction)
    for which in ours:
        assert eqx.tree_equal(ours[which], library[which], rtol=1e-12, atol=1e-13), (
            which
        )


def test_derivatives_by_finite_differences(getkey):
    conv, x = _make("strided with a rest", getkey)
    point, direction = (conv, x), random_like(getkey(), (conv, x))
    loss = eqx.filter_jit(lambda point: _loss(_ours, *point))
    expected = directional_difference(loss, point, direction, step=1e-3)
    tangent = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,))[1])(point, direction)
    gradient = jax.jit(jax.grad(loss))(point)
    assert jnp.allclose(tangent, expected, rtol=1e-8)
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_products_in_both_modes_are_adjoint(name, getkey):
    conv, x = _make(name, getkey)

    @jax.jit
    def products(t_x, key):
        y, linear = jax.linearize(conv, x)
        ct = jr.normal(key, y.shape)
        (pulled,) = jax.linear_transpose(linear, x)(ct)
        return jnp.vdot(linear(t_x), ct), jnp.vdot(t_x, pulled)

    forward, backward = products(jr.normal(getkey(), x.shape), getkey())
    assert jnp.allclose(forward, backward, rtol=1e-12)


def test_batches_are_examples(getkey):
    conv, _ = _make("same", getkey)
    x = jr.normal(getkey(), (3, 6, 5, 2))
    ct = jr.normal(getkey(), (3, 6, 5, 4))
    make = eqx.filter_vmap(lambda key: Conv2d(2, 4, 3, padding=1, key=key))
    convs = make(jr.split(getkey(), 3))
    vjp = lambda conv, x, ct: jax.vjp(_ours, conv, x)[1](ct)

    @jax.jit
    def mapped(convs, x, ct):
        return (
            jax.vmap(conv)(x),
            jax.vmap(vjp, (None, 0, 0))(conv, x, ct),
            jax.vmap(vjp)(convs, x, ct),
            jax.vmap(lambda x, ct: jax.jvp(conv, (x,), (x,))[1])(x, ct),
        )

    batched, shared, own, tangents = mapped(convs, x, ct)
    assert jnp.allclose(conv(x), batched, rtol=1e-12)
    assert jnp.allclose(conv(x[:, None])[:, 0], batched, rtol=1e-12)
    total = jax.tree.map(lambda g: g.sum(0), shared[0])
    of_batch, of_x = jax.jit(vjp)(conv, x, ct)
    assert eqx.tree_equal(total, of_batch, rtol=1e-12, atol=1e-12)
    assert jnp.allclose(shared[1], of_x, rtol=1e-12)
    for i in range(3):
        single = jax.tree.map(lambda leaf: leaf[i], convs)
        expected = jax.jit(vjp)(single, x[i], ct[i])
        actual = jax.tree.map(lambda leaf: leaf[i], own)
        assert eqx.tree_equal(actual, expected, rtol=1e-12, atol=1e-12)
    assert conv.bias is not None
    assert jnp.allclose(tangents, batched - conv.bias[None, None, None], rtol=1e-12)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
def test_keeps_the_dtype(dtype, getkey):
    conv, x = _make("same", getkey, dtype)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda p: jnp.sum(jnp.square(p[0](p[1]))))
    )((conv, x))
    leaves = [value, *jax.tree.leaves(gradient)]
    assert all(leaf.dtype == dtype for leaf in leaves)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (conv, x))
    expected = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(p[0](p[1])))))(exact)
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
        error = jnp.max(jnp.abs(a.astype(jnp.float64) - b))
        assert error <= tolerance * jnp.max(jnp.abs(b))


@pytest.mark.slow
@pytest.mark.usefixtures("all_optimisations")
def test_keeps_its_fast_form_inside_loops(getkey):
    # XLA's CPU backend is slow on any other form there.
    conv = Conv2d(8, 8, 3, padding=1, dtype=jnp.float32, key=getkey())
    x = jr.normal(getkey(), (4, 9, 9, 8), jnp.float32)

    def loop(x, weight):
        of_weight = eqx.tree_at(lambda c: c.weight, conv, weight)
        _, transpose = jax.vjp(of_weight, x)
        _, forward = jax.linearize(of_weight, x)
        return lax.fori_loop(0, 15, lambda _, z: forward(transpose(of_weight(z))[0]), x)

    text = compiled_text(loop, x, conv.weight)
    assert text is not None
    forms = [line for line in text.splitlines() if " convolution(" in line]
    assert len(forms) >= 3
    assert all("dim_labels=b01f_01io->b01f" in line for line in forms)


@pytest.mark.slow
@pytest.mark.usefixtures("all_optimisations")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form on the CPU")
def test_a_product_of_matrices_is_in_the_loop(getkey):
    conv = Conv2d(16, 16, 3, padding=1, dtype=jnp.float32, key=getkey())
    x = jr.normal(getkey(), (4, 9, 9, 16), jnp.float32)

    def loop(x):
        _, transpose = jax.vjp(conv, x)
        return lax.fori_loop(0, 15, lambda _, z: transpose(conv(z))[0], x)

    text = compiled_text(loop, x)
    assert text is not None
    assert text.count(" dot(") == 2
    assert " convolution(" not in text and " conditional(" not in text


def test_parameters_are_uniform_in_the_fan_in(getkey):
    conv = Conv2d(3, 500, 5, key=getkey())
    bound = 75**-0.5
    for leaf in (conv.weight, conv.bias):
        assert leaf is not None
        assert jnp.max(jnp.abs(leaf)) <= bound
        assert jnp.allclose(jnp.std(leaf), bound / 3**0.5, rtol=0.1)
    assert Conv2d(3, 5, 5, use_bias=False, key=getkey()).bias is None


def test_is_transposed_in_any_way(getkey):
    # Twice as by conjugate gradients on the normal equations of a backward solve.
    conv = Conv2d(16, 16, 3, padding=1, use_bias=False, key=getkey())
    x = jr.normal(getkey(), (2, 5, 5, 16))
    _, pull_back = jax.vjp(conv, x)
    push_forward = jax.linear_transpose(lambda y: pull_back(y)[0], x)
    assert jnp.allclose(jax.jit(push_forward)(x)[0], conv(x), rtol=1e-12)

    of_weight = lambda w: eqx.tree_at(lambda c: c.weight, conv, w)(x)
    (gradient,) = jax.jit(jax.linear_transpose(of_weight, conv.weight))(x)
    assert jnp.allclose(tree_dot(gradient, conv.weight), tree_dot(x, conv(x)))


@pytest.mark.parametrize("channels", (4, 16))
def test_its_products_are_differentiated(channels, getkey):
    # Of the kernel through its norm, and of both through a product with the transpose.
    conv = Conv2d(channels, channels, 3, padding=1, key=getkey())
    shape = 5, 4, channels
    # To the end, since the gradient takes the singular vector for a constant.
    conv = eqi.with_spectral_norm(
        conv, 0.5, input_shape=shape, num_steps=100, key=getkey()
    )
    x = jr.normal(getkey(), shape)
    key = getkey()

    def loss(weight, x):
        normed = eqx.tree_at(lambda c: c.weight.weight, conv, weight)
        layer = eqx.tree_at(lambda c: c.weight, normed, normed.weight.resolve())
        return eqi.jacobian_frobenius(lambda x: jnp.sin(layer(x)), x, key=key)

    point = conv.weight.weight, x
    direction = random_like(getkey(), point)
    compiled = jax.jit(lambda point: loss(*point))
    expected = directional_difference(compiled, point, direction, step=1e-4)
    gradient = jax.jit(jax.grad(lambda point: loss(*point)))(point)
    assert jnp.allclose(tree_dot(gradient, direction), expected, rtol=1e-6)
