"""What is traced and compiled, and how often."""

import equinox as eqx
import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

import eqimplicit as eqi

from .helpers import slow_but


@pytest.fixture(scope="module")
def compilations():
    """A list that grows by one with each compilation."""
    found = []

    def listen(event, duration, **kwargs):
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def cell(z, x):
    return jnp.tanh(0.5 * z + x)


def field(t, y, args):
    return -y * t


_heun = eqi.ButcherTableau(((0.0, 0.0), (1.0, 0.0)), (0.5, 0.5), (0.0, 1.0))
_gauss = eqi.ButcherTableau.gauss_legendre(2)
_theta = eqi.ThetaLayer(field, step_size=0.1)
_block = eqi.ODEBlock(_theta, 5)
_reversible = eqi.ODEBlock(_theta, 5, reversible=True)
_verlet = eqi.VerletLayer(lambda t, y, args: (y[1], -y[0]), step_size=0.1)


def gradient(layer):
    return lambda x: jax.grad(lambda x: jnp.sum(layer(x)))(x)


CALLS = {
    "DEQ": eqi.DEQ(cell),
    "DEQ.solve": eqi.DEQ(cell).solve,
    "DEQ, gradient": gradient(eqi.DEQ(cell)),
    "DEQ by JFB, gradient": gradient(eqi.DEQ(cell, adjoint=eqi.JFBAdjoint())),
    "DEQ, batch": jax.vmap(eqi.DEQ(cell)),
    "ThetaLayer": _theta,
    "ThetaLayer, backwards": lambda x: _theta.invert(x).value,
    "ThetaLayer, gradient": gradient(_theta),
    "RungeKuttaLayer": eqi.RungeKuttaLayer(field, _gauss, step_size=0.1),
    "RungeKuttaLayer, explicit": eqi.RungeKuttaLayer(field, _heun, step_size=0.1),
    "VerletLayer": lambda x: _verlet((x, x)),
    "ODEBlock": _block,
    "ODEBlock.trajectory": _block.trajectory,
    "ODEBlock, gradient": gradient(_block),
    "ODEBlock, reversible gradient": gradient(_reversible),
}


@pytest.mark.parametrize(
    "name", slow_but(CALLS, "DEQ", "ThetaLayer", "ODEBlock", "ODEBlock, gradient")
)
def test_a_second_eager_call_compiles_nothing(name, compilations):
    call, xs = CALLS[name], jnp.linspace(0.1, 1.0, 12).reshape(4, 3)
    others = xs + 1
    jax.block_until_ready(jax.tree.leaves(call(xs)))
    count = len(compilations)
    jax.block_until_ready(jax.tree.leaves(call(others)))
    assert len(compilations) == count > 0


def test_another_time_compiles_nothing(compilations):
    y = jnp.ones(2)
    _theta(y, 0.1), _block(y, 0.1)
    count = len(compilations)
    _theta(y, 0.2), _block(y, 0.3)
    assert len(compilations) == count


def nested(depth, traces):
    def innermost(z, x):
        traces.append(1)
        return cell(z, x)

    layer = eqi.DEQ(innermost)
    for _ in range(depth):
        layer = eqi.DEQ(
            lambda z, x, layer=layer: 0.3 * jnp.tanh(z) + 0.5 * layer(z + x)
        )
    return layer


@pytest.mark.parametrize(
    "wrap", (lambda layer: layer, pytest.param(gradient, marks=pytest.mark.slow))
)
def test_a_cell_is_traced_once_however_deep(wrap):
    for depth in range(5):
        traces = []
        jax.make_jaxpr(wrap(nested(depth, traces)))(jnp.ones(3))
        assert len(traces) == 1
    # Outside of a trace as well.
    traces = []
    jax.block_until_ready(wrap(nested(1, traces))(jnp.ones(3)))
    assert len(traces) == 1


class Sine(eqi.AbstractParametrisation):
    angle: jax.Array

    def resolve(self):
        return jnp.sin(self.angle)


class Decay(eqx.Module):
    rate: Sine

    def __call__(self, t, y, args):
        return -self.rate * y


def test_a_repeated_layer_is_resolved_outside_of_the_loop():
    layer = eqi.ThetaLayer(Decay(Sine(jnp.array(jnp.pi / 2))), step_size=0.1)
    block = eqi.ODEBlock(layer, 6)
    assert jnp.allclose(block(jnp.ones(2)), (0.95 / 1.05) ** 6)
    jaxpr = eqx.filter_make_jaxpr(block)(jnp.ones(2))[0].jaxpr
    assert " sin " in str(jaxpr)
    (scan,) = _scans(jaxpr)
    assert " sin " not in str(scan.params["jaxpr"])


def _scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
            continue
        for param in eqn.params.values():
            inner = getattr(param, "jaxpr", None)
            if inner is not None:
                yield from _scans(inner)
