import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest

import eqimplicit as eqi


class Field(eqx.Module):
    network: eqx.Module

    def __call__(self, t, y, args):
        return self.network(y)


def _field(key):
    mlp = eqx.nn.MLP(3, 3, 8, 1, jax.nn.relu, key=key)
    mlp = jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, mlp)
    return Field(eqi.with_spectral_norm(mlp, num_steps=20, key=key))


@pytest.mark.parametrize("theta, step_size", ((0.0, 1.0), (0.5, 1.8), (1.0, 0.5)))
def test_the_bound_on_the_evaluations_holds(theta, step_size, getkey):
    net = eqi.FPResNet(_field(getkey()), 4, theta, step_size, tolerance=1e-8)
    assert net.contraction == theta * step_size

    @eqx.filter_jit
    def solve(net, y):
        # From the old state, to know the first residual.
        solution = net.block.layer.solve(y)
        first = step_size * eqi.resolve(net.block.layer.vector_field)(0.0, y, None)
        return solution, jnp.linalg.norm(first)

    for y in jr.normal(getkey(), (5, 3)):
        solution, first = solve(net, y)
        assert solution.result == optx.RESULTS.successful
        if theta == 0:
            continue
        bound = net.max_evaluations(float(first))
        assert solution.stats["num_evaluations"] <= bound
        assert solution.stats["residual"] <= 1e-8


def test_the_bound_is_attained_by_an_isometry(getkey):
    net = eqi.FPResNet(lambda t, y, args: -y, 1, 0.5, 1.6, tolerance=1e-8)
    y = jr.normal(getkey(), (3,))
    solution = net.block.layer.solve(y)
    bound = net.max_evaluations(float(1.6 * jnp.sqrt(jnp.mean(y**2))))
    assert bound - 2 <= solution.stats["num_evaluations"] <= bound


@pytest.mark.parametrize("theta", (0.5, 1.0))
def test_is_the_block_of_theta_layers_solved_to_the_end(theta, getkey):
    net = eqi.FPResNet(_field(getkey()), 4, theta, 0.8, tolerance=1e-10)
    solver = eqi.RootAsFixedPoint(optx.Newton(1e-8, 1e-8))
    layer = eqi.ThetaLayer(net.block.layer.vector_field, theta, 0.8, solver=solver)
    exact = eqi.ODEBlock(layer, 4)
    y = jr.normal(getkey(), (3,))

    @eqx.filter_jit
    def run(field, y, block):
        def loss(point):
            field, y = point
            of_field = eqx.tree_at(lambda b: b.layer.vector_field, block, field)
            return jnp.sum(jnp.sin(of_field(y)))

        return eqx.filter_value_and_grad(loss)((field, y))

    field = net.block.layer.vector_field
    value, gradient = run(field, y, net.block)
    expected, expected_gradient = run(field, y, exact)
    assert jnp.allclose(value, expected, rtol=1e-8)
    assert eqx.tree_equal(gradient, expected_gradient, rtol=1e-7, atol=1e-9)
    assert jnp.allclose(eqx.filter_jit(net)(y), net.block(y), rtol=1e-12)


def test_no_contraction_is_refused(getkey):
    field = _field(getkey())
    with pytest.raises(ValueError, match="below 1. Got 1.0"):
        eqi.FPResNet(field, 3, theta=1.0, step_size=1.0)
    bounded = eqi.BoundedSpectrum(field, -3.0, 1.0)
    with pytest.raises(ValueError, match="below 1. Got 1.5"):
        eqi.FPResNet(bounded, 3)
    assert eqi.FPResNet(bounded, 3, step_size=0.5).contraction == 0.75
    assert eqi.FPResNet(field, 3, 1.0, lipschitz=0.5).contraction == 0.5
    with pytest.raises(ValueError, match="tolerance"):
        eqi.FPResNet(field, 3, tolerance=0.0)


@pytest.mark.slow
def test_layers_of_their_own(getkey):
    fields = eqx.filter_vmap(_field)(jr.split(getkey(), 3))
    net = eqi.FPResNet(fields, 3, tolerance=1e-10, stacked=True)
    y = jr.normal(getkey(), (3,))

    @eqx.filter_jit
    def one_by_one(fields, y):
        for k in range(3):
            field = jax.tree.map(lambda x: x[k] if eqx.is_array(x) else x, fields)
            y = eqi.ThetaLayer(field)(y, float(k))
        return y

    expected = one_by_one(fields, y)
    assert jnp.allclose(eqx.filter_jit(net)(y), expected, atol=1e-6)


def test_bounds_may_be_arrays(getkey):
    bounded = lambda alpha: eqi.BoundedSpectrum(lambda t, y, args: y, alpha, 0.5)
    fields = eqx.filter_vmap(bounded)(jnp.array([-1.0, -1.5]))
    assert eqi.FPResNet(fields, 2, stacked=True).contraction == 0.75
