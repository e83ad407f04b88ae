"""Whole training steps of real cells: the forward solve, the gradient and the update.

python benchmarks/cells.py
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from adjoints import loss_fn, make_problem
from bench import draw_lines, Row, run, take_turns
from jaxtyping import Array, PyTree

import eqimplicit as eqi
from eqimplicit import models


NUM_STEPS = 10
ADJOINTS = {
    "JFB": eqi.JFBAdjoint(),
    "Phantom, 5 steps": eqi.PhantomAdjoint(5, damping=0.5),
    "Implicit": eqi.ImplicitAdjoint(),
}


class Transformer(eqx.Module):
    """A block of attention and perceptron, with post-normalisation and the input
    injected.
    """

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, width, key):
        key1, key2 = jr.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, width, key=key1)
        mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=key2)
        # So weak that the block has a fixed point.
        self.mlp = jax.tree.map(lambda w: 0.5 * w if eqx.is_array(w) else w, mlp)
        self.norms = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)

    def __call__(self, z, x):
        z = jax.vmap(self.norms[0])(0.3 * (z + self.attention(z, z, z)) + x)
        return 0.5 * jax.vmap(self.norms[1])(z + jax.vmap(self.mlp)(z))


class Dense(eqx.Module):
    weight: Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


def _layer(adjoint, cell):
    return eqi.DEQ(cell, eqi.Picard(0.0, 1e-15), adjoint, max_steps=NUM_STEPS)


def dense(adjoint: Any, small: bool) -> tuple[Any, Callable, Array]:
    size, batch = (16, 4) if small else (256, 64)
    weight = 0.45 * jr.normal(jr.key(0), (size, size)) / size**0.5
    net = _layer(adjoint, Dense(weight))
    loss = lambda net, x: jnp.mean(jax.vmap(net)(x) ** 2)
    return net, loss, jr.normal(jr.key(1), (batch, size))


def transformer(adjoint: Any, small: bool) -> tuple[Any, Callable, Array]:
    width, length, batch = (8, 4, 2) if small else (64, 32, 16)
    net = _layer(adjoint, Transformer(width, jr.key(0)))
    loss = lambda net, x: jnp.mean(jax.vmap(net)(x) ** 2)
    return net, loss, jr.normal(jr.key(1), (batch, length, width))


def mnist(adjoint: Any, small: bool) -> tuple[Any, Callable, Array]:
    net, state = eqx.nn.make_with_state(models.jfb_mnist)(
        layer=ft.partial(_layer, adjoint), key=jr.key(0)
    )
    labels = jr.randint(jr.key(1), (4 if small else 100,), 0, 10)

    def loss(net, x):
        cast = lambda s: s.astype(x.dtype) if eqx.is_inexact_array(s) else s
        logits, _ = net(x, jax.tree.map(cast, state), key=jr.key(2))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    return net, loss, jr.normal(jr.key(3), (len(labels), 28, 28, 1))


def ode_block(adjoint: Any, small: bool) -> tuple[Any, Callable, Array]:
    field = Field(eqx.nn.MLP(2, 2, 20, 1, jnp.tanh, key=jr.key(0)))
    layer = eqi.ThetaLayer(field, 0.5, 0.2, adjoint=adjoint)
    net = eqi.ODEBlock(layer, num_steps=3 if small else 50)
    loss = lambda net, y: jnp.mean(jax.vmap(net.trajectory)(y) ** 2)
    return net, loss, jr.normal(jr.key(1), (2 if small else 8, 2))


CELLS = {
    "dense tanh, 64 x 256": dense,
    "MNIST network, batch 100": mnist,
    "transformer block, 16 x 32 x 64": transformer,
    "ODE block, 50 steps of 8 x 2": ode_block,
}


def make_step(
    net: PyTree, loss: Callable, x: Array
) -> Callable[[], tuple[PyTree, PyTree, Array]]:
    """A training step with Adam, from the same parameters each time."""
    optimiser = optax.adam(1e-3)
    opt_state = optimiser.init(eqx.filter(net, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(net, opt_state, x):
        value, grads = eqx.filter_value_and_grad(loss)(net, x)
        updates, opt_state = optimiser.update(grads, opt_state)
        return eqx.apply_updates(net, updates), opt_state, value

    return ft.partial(step, net, opt_state, x)


def training_steps(small: bool) -> list[Row]:
    rows = []
    for name, make in CELLS.items():
        for dtype in (jnp.float32, jnp.bfloat16)[: 1 if small else None]:
            cast = lambda a, to=dtype: a.astype(to) if eqx.is_inexact_array(a) else a
            sides, forward, evaluations = {}, None, None
            for adjoint_name, adjoint in ADJOINTS.items():
                net, loss, x = make(adjoint, small)
                net, x = jax.tree.map(cast, (net, x))
                is_block = isinstance(net, eqi.ODEBlock)
                evaluations = None if is_block else NUM_STEPS
                sides[adjoint_name] = make_step(net, loss, x)
                forward = ft.partial(eqx.filter_jit(loss), net, x)
            assert forward is not None
            times = take_turns({"forward": forward, **sides}, 2 if small else 9)
            for adjoint_name in sides:
                rows.append(
                    {
                        "cell": name,
                        "dtype": dtype.__name__,
                        "adjoint": adjoint_name,
                        "evaluations a solve": evaluations,
                        "step, ms": times.median(adjoint_name),
                        "spread": times.spread(adjoint_name),
                        "loss alone, ms": times.median("forward"),
                        "to JFB": times.ratio(adjoint_name, "JFB"),
                    }
                )
    return rows


def with_defaults(small: bool) -> list[Row]:
    """A gradient of the dense layer with its defaults, the batch as one state."""
    rows = []
    for gain in (0.45, 0.8):
        cell, x = make_problem(gain, *((16, 4) if small else (256, 64)))
        layers = {name: eqi.DEQ(cell, adjoint=a) for name, a in ADJOINTS.items()}
        gradient = eqx.filter_jit(eqx.filter_grad(loss_fn))
        z0 = jnp.zeros_like(x)
        sides = {k: ft.partial(gradient, layer, x, z0) for k, layer in layers.items()}
        solution = eqx.filter_jit(layers["JFB"].solve)(x)
        half_square = lambda z: jnp.sum(z**2) / 2
        _, *reports = eqx.filter_jit(eqi.gradient_report)(
            layers["JFB"], half_square, x, adjoints=list(ADJOINTS.values())
        )
        times = take_turns(sides, 2 if small else 15)
        for (name, _), report in zip(sides.items(), reports):
            rows.append(
                {
                    "gain": gain,
                    "adjoint": name,
                    "evaluations": int(solution.stats["num_evaluations"]),
                    "products with J": int(report.num_products),
                    "relative error": float(report.relative_error),
                    "ms": times.median(name),
                    "spread": times.spread(name),
                    "to JFB": times.ratio(name, "JFB"),
                }
            )
    return rows


TABLES = {"training steps": training_steps, "defaults": with_defaults}


def draw(results, figure):
    rows = results.get("training steps", [])
    group = lambda row: f"{row['cell']}, {row['dtype']}"
    if rows:
        draw_lines(figure.subplots(), rows, "loss alone, ms", "step, ms", group)


if __name__ == "__main__":
    run(__doc__, TABLES, draw)
