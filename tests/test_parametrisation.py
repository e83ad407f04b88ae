import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import eqimplicit as eqi


class Scaled(eqi.AbstractParametrisation):
    """`factor * inner`, which notes how often, and on what, it was resolved."""

    inner: jax.Array | eqi.AbstractParametrisation
    factor: float
    seen: list = eqx.field(static=True)

    def resolve(self):
        self.seen.append(type(self.inner))
        return self.factor * self.inner


class Cell(eqx.Module):
    weight: jax.Array | eqi.AbstractParametrisation
    num_calls: list = eqx.field(static=True)

    def __call__(self, z, x):
        self.num_calls.append(1)
        return jnp.tanh(self.weight @ z + x)


def weights():
    weight = 0.3 * jr.normal(jr.key(0), (4, 4))
    return weight, jr.normal(jr.key(1), (4,))


def test_nested_nodes_are_resolved_innermost_first():
    weight, _ = weights()
    seen = []
    tree = {
        "twice": Scaled(Scaled(weight, 2.0, seen), 3.0, seen),
        "norm": Scaled(eqi.WeightNorm(weight), 5.0, seen),
        "inside": eqi.WeightNorm(Scaled(weight, 7.0, seen).resolve()),
        "plain": weight,
        "other": ("text", None, 3),
    }
    seen.clear()
    resolved = eqi.resolve(tree)
    assert jnp.array_equal(resolved["twice"], 3.0 * (2.0 * weight))
    assert jnp.allclose(resolved["norm"], 5.0 * weight, rtol=1e-14)
    assert jnp.allclose(resolved["inside"], 7.0 * weight, rtol=1e-14)
    assert resolved["plain"] is weight
    assert resolved["other"] == ("text", None, 3)
    # No node ever saw another one that was not resolved.
    assert len(seen) == 3
    assert all(issubclass(kind, jax.Array) for kind in seen)


def test_a_tree_without_nodes_is_left_alone():
    weight, _ = weights()
    tree = [weight, {"a": None, "b": "text"}, Cell(weight, [])]
    assert eqx.tree_equal(eqi.resolve(tree), tree)
    node = eqi.WeightNorm(weight)
    assert jnp.allclose(eqi.resolve(node), weight, rtol=1e-14)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 2, 2)])
def test_weight_norm_separates_length_from_direction(shape):
    weight = jr.normal(jr.key(2), shape)
    node = eqi.WeightNorm(weight)
    assert node.length.shape == shape[:1]
    assert jnp.allclose(node.resolve(), weight, rtol=1e-14)
    lengths = jnp.linalg.norm(weight.reshape(shape[0], -1), axis=1)
    assert jnp.allclose(node.length, lengths, rtol=1e-14)
    new = jnp.arange(1.0, 1 + shape[0])
    node = eqx.tree_at(lambda n: (n.length, n.direction), node, (new, -7 * weight))
    flat = node.resolve().reshape(shape[0], -1)
    assert jnp.allclose(jnp.linalg.norm(flat, axis=1), new, rtol=1e-14)
    expected = -new[:, None] * weight.reshape(shape[0], -1) / lengths[:, None]
    assert jnp.allclose(flat, expected, rtol=1e-14)


def test_weight_norm_has_the_gradient_of_finite_differences():
    weight, _ = weights()
    node = eqi.WeightNorm(weight)
    node = eqx.tree_at(lambda n: n.length, node, 1.3 * node.length)
    loss = jax.jit(lambda node: jnp.sum(jnp.sin(node.resolve() + 0.3 * weight)))
    gradient = jax.grad(loss)(node)
    step = 1e-6
    for seed in range(3):
        direction = jax.tree.map(
            lambda leaf: jr.normal(jr.key(seed), leaf.shape), gradient
        )
        move = lambda s: jax.tree.map(lambda a, d: a + s * d, node, direction)
        difference = (loss(move(step)) - loss(move(-step))) / (2 * step)
        inner = sum(
            jnp.vdot(g, d)
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction))
        )
        assert jnp.allclose(inner, difference, rtol=1e-7)
    # A row does not change with the length of its direction.
    radial = jnp.sum(gradient.direction * node.direction, axis=1)
    assert jnp.allclose(radial, 0, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_weight_norm_keeps_the_dtype(dtype):
    weight = weights()[0].astype(dtype)
    node = eqi.WeightNorm(weight)
    assert node.length.dtype == dtype
    resolved = node.resolve()
    assert resolved.dtype == dtype
    assert jnp.array_equal(resolved, weight)


def test_a_weight_without_axes_is_refused():
    with pytest.raises(Exception, match="weight"):
        eqi.WeightNorm(jnp.array(1.0))


ADJOINTS = {
    "Implicit": lambda: eqi.ImplicitAdjoint(),
    "JFB": lambda: eqi.JFBAdjoint(),
    "Neumann": lambda: eqi.NeumannAdjoint(3),
    "Phantom": lambda: eqi.PhantomAdjoint(3),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_deq_resolves_its_cell_once_per_solve(name):
    weight, x = weights()
    seen, num_calls = [], []
    cell = Cell(Scaled(Scaled(weight, 2.0, seen), 0.5, seen), num_calls)
    deq = eqi.DEQ(cell, adjoint=ADJOINTS[name]())

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(deq):
        return jnp.sum(deq(x) ** 2)

    gradient(deq)
    # Two nodes, each traced once, as the cell is.
    assert len(seen) == 2
    assert len(num_calls) == 1
    # The loop gets the product, and computes none of its own.
    jaxpr = eqx.filter_make_jaxpr(deq)(x)[0]
    loops = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "while"]
    assert len(loops) > 0
    factors = [
        eqn
        for loop in loops
        for eqn in _equations(loop.params["body_jaxpr"].jaxpr)
        if eqn.primitive.name == "mul" and eqn.outvars[0].aval.shape == (4, 4)
    ]
    assert factors == []


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for param in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_gradients_reach_the_arrays_inside():
    weight, x = weights()
    solver, adjoint = eqi.Anderson(1e-13, 1e-13), eqi.ImplicitAdjoint()
    node = eqi.WeightNorm(weight)

    @eqx.filter_jit
    def loss(weight):
        return jnp.sum(eqi.DEQ(Cell(weight, []), solver, adjoint)(x) ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(loss))(node)
    with_respect_to_weight = eqx.filter_jit(eqx.filter_grad(loss))(weight)
    (expected,) = jax.vjp(lambda n: n.resolve(), node)[1](with_respect_to_weight)
    assert eqx.tree_equal(gradient, expected, rtol=1e-5, atol=1e-8)
    step = 1e-5
    move = lambda s: eqx.tree_at(lambda n: n.length, node, node.length.at[1].add(s))
    difference = (loss(move(step)) - loss(move(-step))) / (2 * step)
    assert jnp.allclose(gradient.length[1], difference, rtol=1e-5)


def test_nodes_in_a_nested_layer_are_resolved():
    weight, x = weights()

    class Outer(eqx.Module):
        inner: eqi.DEQ

        def __call__(self, z, x):
            return 0.5 * self.inner(z) + x

    def outer(weight):
        return eqi.DEQ(Outer(eqi.DEQ(Cell(weight, []))))

    assert jnp.allclose(outer(eqi.WeightNorm(weight))(x), outer(weight)(x), rtol=1e-12)


@pytest.mark.parametrize("axis", (2, -3))
def test_an_axis_that_a_weight_has_not_is_refused(axis):
    with pytest.raises(ValueError, match="one of the 2 axes"):
        eqi.WeightNorm(jnp.ones((2, 3)), axis=axis)


def test_weight_norm_takes_the_axis_of_the_output_units(getkey):
    weight = jr.normal(getkey(), (3, 2, 4))
    node = eqi.WeightNorm(weight, axis=-1)
    assert jnp.allclose(node.resolve(), weight)
    assert jnp.allclose(node.length, jnp.linalg.norm(weight.reshape(-1, 4), axis=0))
