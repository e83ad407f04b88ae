"""What backward solves say of themselves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import compiled_text, matrix_of_norm, relative_error, slow_but


EXACT = {
    "default": eqi.ImplicitAdjoint(),
    "GMRES": eqi.ImplicitAdjoint(eqi.GMRES(1e-9, 0.0)),
    "Anderson": eqi.ImplicitAdjoint(
        eqi.FixedPointLinearSolver(eqi.Anderson(1e-9, 1e-9))
    ),
    "LU": eqi.ImplicitAdjoint(lx.LU()),
    "Lineax's GMRES": eqi.ImplicitAdjoint(lx.GMRES(1e-9, 1e-9)),
}
APPROXIMATE = {
    "Neumann": eqi.NeumannAdjoint(4, 0.8),
    "rough": eqi.ImplicitAdjoint(eqi.GMRES(1e-2, 0.0)),
}
# Without a backward solve, or with one that is not ours.
SILENT = {
    "JFB": eqi.JFBAdjoint(),
    "Phantom": eqi.PhantomAdjoint(3),
    "unrolled": optx.RecursiveCheckpointAdjoint(),
    "Optimistix": optx.ImplicitAdjoint(),
}


class Affine(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return self.weight @ z + x


def make(key, adjoint, size=6, norm=0.7, dtype=jnp.float64):
    cell = Affine(matrix_of_norm(key, size, norm, dtype))
    tolerance = 1e-12 if dtype == jnp.float64 else 1e-5
    return eqi.DEQ(cell, eqi.Anderson(tolerance, tolerance), adjoint)


def gradients(loss, *args):
    """Without a probe, and with one and its status."""

    @eqx.filter_jit
    def both(args):
        plain = eqx.filter_grad(lambda args: loss(*args, None))(args)
        pair = args, eqi.backward_probe()
        return plain, *eqx.filter_grad(lambda pair: loss(*pair[0], pair[1]))(pair)

    return both(args)


@pytest.mark.parametrize(
    "name", slow_but([*EXACT, *APPROXIMATE], "default", "LU", "Neumann")
)
def test_the_residual_is_that_of_the_gradient(name, getkey):
    """For an affine cell the gradient of `g @ z` by `x` is what the solver returned."""
    adjoint = {**EXACT, **APPROXIMATE}[name]
    deq, (x, g) = make(getkey(), adjoint), jr.normal(getkey(), (2, 6))
    plain, actual, status = gradients(lambda deq, x, p: g @ deq(x, probe=p), deq, x)
    assert relative_error(actual, plain) < 1e-14
    w = actual[1]
    residual = g - (jnp.eye(6) - deq.cell.weight).T @ w
    expected = jnp.linalg.norm(residual) / jnp.linalg.norm(g)
    assert jnp.allclose(status.residual, expected, rtol=1e-6, atol=1e-14)
    assert (status.residual < 1e-8) == (name in EXACT)
    assert status.num_solves == 1 and status.num_failed == 0 and status.found
    if name == "Lineax's GMRES":
        assert jnp.isnan(status.num_products)
    elif name in ("LU", "Neumann", "Anderson"):
        # The product that measures the residual.
        products = {"LU": 6, "Neumann": 3}.get(name)
        products = status.num_products - 1 if products is None else products
        assert status.num_products == products + 1
    else:
        transposed = lambda w: w - deq.cell.weight.T @ w
        assert status.num_products == adjoint.count_products(transposed, g)


@pytest.mark.parametrize("name", slow_but(SILENT, "JFB"))
def test_adjoints_without_a_backward_solve_say_nothing(name, getkey):
    deq, x = make(getkey(), SILENT[name]), jr.normal(getkey(), (6,))
    plain, actual, status = gradients(
        lambda deq, x, p: jnp.sum(deq(x, probe=p) ** 2), deq, x
    )
    assert relative_error(actual, plain) < 1e-14
    assert all(leaf == 0 for leaf in jtu.tree_leaves(status)) and not status.found


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_lower_precision_with_the_defaults(dtype, getkey):
    cell = Affine(matrix_of_norm(getkey(), 6, 0.5, dtype))
    deq, x = eqi.DEQ(cell), jr.normal(getkey(), (6,)).astype(dtype)
    _, _, status = gradients(
        lambda deq, x, p: jnp.sum(deq(x, probe=p) ** 2).astype(float), deq, x
    )
    assert status.found
    assert 0 < status.residual < max(1e-6, 4 * float(jnp.finfo(dtype).eps))


class TwoLayers(eqx.Module):
    first: eqi.DEQ
    second: eqi.ThetaLayer
    block: eqi.ODEBlock

    def __call__(self, x, probe=None):
        z = self.second(self.first(x, probe=probe), probe=probe)
        return self.block(z, probe=probe)


@pytest.mark.slow
def test_sums_over_layers_examples_and_steps(getkey):
    field = lambda t, y, args: -jnp.sinh(y)
    block = eqi.ODEBlock(eqi.ThetaLayer(field, step_size=0.1), 3)
    model = TwoLayers(make(getkey(), None), eqi.ThetaLayer(field), block)
    xs = jr.normal(getkey(), (4, 6))

    def loss(model, xs, probe):
        return jnp.sum(jax.vmap(lambda x: model(x, probe))(xs) ** 2)

    plain, actual, status = gradients(loss, model, xs)
    assert relative_error(actual, plain) < 1e-14
    assert status.num_solves == 4 * (1 + 1 + 3) and status.found

    def loss_of_probed(model, xs, probe):
        model = model if probe is None else eqi.with_probe(model, probe)
        return loss(model, xs, None)

    _, again, other = gradients(loss_of_probed, model, xs)
    assert relative_error(again, plain) < 1e-14
    assert jtu.tree_all(jtu.tree_map(jnp.allclose, other, status))

    # A probe for each example.
    def of_each(probe, x):
        return jnp.sum(model(x, probe) ** 2)

    each = jax.jit(jax.vmap(jax.grad(of_each)))(eqi.backward_probe((4,)), xs)
    assert each.num_solves.tolist() == [5.0] * 4
    total = jtu.tree_map(jnp.sum, each)
    assert jtu.tree_all(jtu.tree_map(jnp.allclose, total, status))


class Outer(eqx.Module):
    """A cell that solves an equation itself."""

    inner: eqi.DEQ

    def __call__(self, z, x):
        return 0.3 * jnp.tanh(self.inner(0.5 * z + x))


@pytest.mark.slow
def test_a_probe_is_that_of_one_layer(getkey):
    """Not of the one around it, nor of one that is among its arguments; and it counts
    each example also where that is all that is differentiated.
    """
    x = jr.normal(getkey(), (4, 6))
    weight = matrix_of_norm(getkey(), 6, 0.2)
    layer = eqi.DEQ(lambda z, x: jnp.tanh(weight @ z + x))
    field = eqi.ThetaLayer(lambda t, y, deq: -deq(y), step_size=0.1)

    def outer(probe):
        deq = eqi.DEQ(Outer(layer))
        return jnp.sum(jax.vmap(lambda x: deq(x, probe=probe))(x) ** 2)

    def inner(probe):
        deq = eqi.DEQ(Outer(eqi.with_probe(layer, probe)))
        return jnp.sum(jax.vmap(deq)(x) ** 2)

    def argument(probe):
        probed = eqi.with_probe(layer, probe)
        step = lambda x: field(x, args=probed)
        return jnp.sum(jax.vmap(step)(x) ** 2)

    around, within, beside = jax.jit(
        lambda p: [jax.grad(loss)(p) for loss in (outer, inner, argument)]
    )(eqi.backward_probe())
    assert around.num_solves == 4 and around.found
    assert within.num_solves == 4 and beside.num_solves == 4


class Closed(eqi.AbstractImplicitLayer):
    """The implicit Euler method, with an equation that closes over everything."""

    vector_field: eqx.Module
    step_size: float = 0.1

    is_explicit = False

    @property
    def options(self):
        return eqi.SolveOptions(None, None, 50, False, "Closed")

    def equation(self, y, t=0.0, args=None, z0=None):
        cell = lambda z, x: y + self.step_size * self.vector_field(t, z, args)
        same = lambda size: size
        return eqi.StepEquation(cell, None, y, new_state=same, scale=same)

    def solve(self, y, t=0.0, args=None, z0=None):
        return self.solve_equation(self.equation(y, t, args, z0), y)


def test_layers_of_others_report(getkey):
    class Field(eqx.Module):
        weight: jax.Array

        def __call__(self, t, y, args):
            return jnp.tanh(self.weight @ y)

    field, y = Field(matrix_of_norm(getkey(), 3, 2.0)), jr.normal(getkey(), (3,))
    loss = lambda layer, y, p: jnp.sum(layer(y, probe=p) ** 2)
    expected, _, _ = gradients(loss, eqi.ThetaLayer(field, 1.0, 0.1), y)
    plain, actual, status = gradients(loss, Closed(field), y)
    assert relative_error(actual[0].vector_field, expected[0].vector_field) < 1e-9
    assert relative_error(plain[1], expected[1]) < 1e-9
    assert status.num_solves == 1 and status.found

    network = eqi.FPResNet(field, 3, step_size=0.1, lipschitz=2.0)
    _, _, status = gradients(loss, network, y)
    assert status.num_solves == 3 and status.found


def test_solves_that_fail_are_counted(getkey):
    """A singular one, one of too few steps, one of NaN, and one of a zero cotangent."""
    gmres = eqi.GMRES(1e-9, 0.0, max_steps=5)
    weights = jnp.stack(
        [
            jnp.eye(6).at[5, 5].set(0.5),
            matrix_of_norm(getkey(), 6, 0.9),
            0.5 * jnp.eye(6),
            0.5 * jnp.eye(6),
        ]
    )
    cotangents = jnp.ones((4, 6)).at[2, 0].set(jnp.nan).at[3].set(0)

    def loss(probe, weight, g):
        solver = eqi.Picard(1e-6, 1e-6)
        deq = eqi.DEQ(Affine(weight), solver, eqi.ImplicitAdjoint(gmres), max_steps=5)
        return g @ deq(jnp.ones(6), probe=probe)

    run = jax.jit(jax.vmap(jax.grad(loss)))
    status = run(eqi.backward_probe((4,)), weights, cotangents)
    assert status.num_solves.tolist() == [1, 1, 1, 1]
    assert status.num_failed.tolist() == [1, 1, 1, 0]
    assert status.found.tolist() == [False, False, False, True]
    assert np.all(status.residual[:2] > 1e-9) and status.residual[3] == 0


@pytest.mark.parametrize("size", (2, pytest.param(70, marks=pytest.mark.slow)))
@pytest.mark.parametrize("kind", ("sequential", "stacked", "reversible", "parallel"))
def test_blocks(kind, size, getkey):
    keys = jr.split(getkey(), 3)
    stacked = kind == "stacked"

    class Field(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, t, y, args):
            return jnp.tanh(self.linear(y))

    def make_layer(key):
        field = Field(eqx.nn.Linear(size, size, key=key))
        return eqi.ThetaLayer(field, step_size=0.1)

    layer = eqx.filter_vmap(make_layer)(keys) if stacked else make_layer(keys[0])
    flags = {} if kind == "sequential" else {kind: True}
    block, y0 = eqi.ODEBlock(layer, 3, **flags), jr.normal(getkey(), (size,))
    ts = jnp.array([0.0, 0.1, 0.1, 0.3])

    def loss(block, y0, p):
        return jnp.sum(block(y0, ts=ts, probe=p) ** 2)

    plain, actual, status = gradients(loss, block, y0)
    assert relative_error(actual, plain) < 1e-14
    assert status.found and status.num_solves == (1 if kind == "parallel" else 3)
    assert status.residual < 1e-8 and status.num_products > 0


def test_nothing_is_paid_without_a_derivative(getkey):
    """With a probe that is not differentiated the compiled program is the same."""
    deq, x = make(getkey(), None), jr.normal(getkey(), (6,))

    def gradient(x, probe):
        return jax.grad(lambda x: jnp.sum(deq(x, probe=probe) ** 2))(x)

    without = compiled_text(lambda x: gradient(x, None), x)
    beside = compiled_text(lambda x: gradient(x, eqi.backward_probe()), x)
    count = lambda text: [text.count(op) for op in (" dot(", " while(", " fusion(")]
    assert count(without) == count(beside)
    watched = compiled_text(
        lambda x: jax.grad(lambda x, p: jnp.sum(deq(x, probe=p) ** 2), (0, 1))(
            x, eqi.backward_probe()
        ),
        x,
    )
    for text in (without, watched):
        assert "custom-call" not in text or "callback" not in text


@pytest.mark.slow
def test_other_derivatives_are_as_without(getkey):
    deq, x = make(getkey(), None), jr.normal(getkey(), (6,))
    probe = eqi.backward_probe()
    loss = lambda x, p: jnp.sum(jnp.sin(deq(x, probe=p)))

    @jax.jit
    def run(x):
        forwards = [jax.jacfwd(loss)(x, p) for p in (None, probe)]
        second = [jax.hessian(loss)(x, p) for p in (None, probe)]
        tangent = jax.jvp(lambda p: loss(x, p), (probe,), (probe,))[1]
        # The first derivative watched, and the second taken through it.
        through = jax.jacfwd(lambda x: jax.grad(loss, (0, 1))(x, probe)[0])(x)
        return forwards, [*second, through], tangent

    forwards, second, tangent = run(x)
    assert jnp.array_equal(*forwards) and tangent == 0
    assert jnp.allclose(second[0], second[1]) and jnp.allclose(second[0], second[2])


def test_throwing_adjoints_throw(getkey):
    adjoint = eqi.ImplicitAdjoint(eqi.GMRES(1e-9, 0.0, max_steps=2), throw=True)
    deq, x = make(getkey(), adjoint), jr.normal(getkey(), (6,))
    with pytest.raises(RuntimeError, match="maximum number of"):
        gradients(lambda deq, x, p: jnp.sum(deq(x, probe=p) ** 2), deq, x)


def test_errors_of_a_cell_are_explained_as_before(getkey):
    deq = eqi.DEQ(lambda z: z)
    with pytest.raises(TypeError) as info:
        deq(jnp.ones(3), probe=eqi.backward_probe())
    assert "Its signature is `(z)`" in "".join(info.value.__notes__)


def test_what_is_no_probe_is_refused(getkey):
    deq, x = make(getkey(), None), jnp.ones(6)
    for wrong in (True, eqi.backward_probe):
        with pytest.raises(TypeError):
            deq(x, probe=wrong)
    with pytest.raises(TypeError):
        eqi.with_probe(eqi.backward_probe(), deq)


def test_a_status_is_printed_in_a_line(getkey):
    deq, x = make(getkey(), None), jnp.ones(6)
    probe = eqi.backward_probe()
    assert str(probe) == "no backward solves"
    status = jax.grad(lambda p: jnp.sum(deq(x, probe=p) ** 2))(probe)
    assert str(status).startswith("1 backward solves, 0 % failed, residual ")
