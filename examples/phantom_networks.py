"""The network of the phantom-gradient paper, and the methods that train it."""

import functools as ft
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from training import classifiers, loop

import eqimplicit as eqi


class Method(NamedTuple):
    """How the network is trained, and its accuracy in the paper's Table 1."""

    adjoint: Any
    pretrained: bool = False
    dropout: float = 0.0
    optimiser: Literal["adam", "sgd"] = "sgd"
    jacobian_weight: float = 0.0
    paper: str = "not stated"


# As the paper's: 24 steps of Broyden's method.
_exact = eqi.ImplicitAdjoint(
    eqi.FixedPointLinearSolver(eqi.Broyden(1e-2, 1e-6, history_size=24), max_steps=24)
)
METHODS = {
    "implicit": Method(_exact, True, 0.25, "adam", paper="85.0 +- 0.2"),
    "implicit, no pretraining": Method(
        _exact, False, 0.25, "adam", paper="82.3 +- 1.3"
    ),
    "implicit, no drop-out": Method(_exact, True, 0.0, "adam", paper="83.7 +- 0.1"),
    "implicit, SGD": Method(_exact, True, 0.25, "sgd", paper="84.5 +- 0.3"),
    "implicit, SGD, no pretraining": Method(
        _exact, False, 0.25, "sgd", paper="82.9 +- 1.5"
    ),
    "implicit, Jacobian penalty": Method(
        _exact, True, 0.25, "adam", jacobian_weight=1.0
    ),
    "UPG(5, .5)": Method(eqi.PhantomAdjoint(5, 0.5), paper="85.8 +- 0.5"),
    "NPG(5, .5)": Method(eqi.NeumannAdjoint(5, 0.5), paper="85.6 +- 0.5"),
    "UPG(9, .5), drop-out": Method(
        eqi.PhantomAdjoint(9, 0.5), dropout=0.25, paper="86.1 +- 0.5"
    ),
}
SWEEP = {
    f"{form}({k}, {damping:g})".replace("0.", "."): Method(kind(k, damping))
    for form, kind in (("UPG", eqi.PhantomAdjoint), ("NPG", eqi.NeumannAdjoint))
    for damping in (0.5, 1.0)
    for k in (1, 5, 15)
}

SMALL = ("implicit, SGD", "UPG(5, .5)", "NPG(5, .5)", "NPG(15, 1)")


def make_model(method: Method, config: Any, shape, seed: int):
    solver = eqi.Broyden(rtol=1e-3, atol=1e-5, history_size=config.max_steps)
    sizes: dict[str, Any] = {}
    if config.small:
        sizes = {
            "channels": 8,
            "expansion": 2,
            "head_channels": 4,
            "final_channels": 32,
            "groups": 4,
        }
    layer = ft.partial(
        eqi.DEQ, solver=solver, adjoint=method.adjoint, max_steps=config.max_steps
    )
    return eqi.models.mdeq(
        shape, dropout=method.dropout, layer=layer, **sizes, key=jr.key(seed)
    )


def forward(jacobian_weight, model, state, images, key=None) -> classifiers.Output:
    """With one key for drop-out in each image's solve, and the penalty on the
    Jacobian."""

    def one(image, key):
        features, _ = model.encoder(image)
        solution = model.layer.solve(features, key=key)
        penalty = jnp.zeros(())
        if jacobian_weight > 0 and key is not None:
            z, cell = solution.value, eqi.resolve(model.layer.cell)
            square = eqi.jacobian_frobenius(
                lambda z: cell(z, features, key=key), z, key=key
            )
            penalty = jacobian_weight * square / sum(x.size for x in z)
        logits = model.head(solution.value)
        return logits, classifiers.Solve.of(solution), penalty

    keys = None if key is None else jr.split(key, len(images))
    in_axes = 0, None if key is None else 0
    logits, solve, penalty = jax.vmap(one, in_axes)(images, keys)
    return classifiers.Output(logits, state, {"layer": solve}, penalty)


@ft.cache  # One object for equal weights, for which a step is compiled once.
def make_forward(jacobian_weight):
    return ft.partial(forward, jacobian_weight)


@ft.cache
def make_optimiser(kind, learning_rate, num_steps):
    if kind == "adam":
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
        return optax.chain(optax.add_decayed_weights(2.5e-6), optax.adam(schedule))
    schedule = optax.cosine_decay_schedule(100 * learning_rate, num_steps)
    decay = optax.add_decayed_weights(1e-4)
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9))


def at_step(pretrain_steps: int, step: int) -> Any:
    return classifiers.unroll(10) if step < pretrain_steps else loop.as_it_is


def without_adjoint(model: Any, max_steps: int | None = None) -> Any:
    """The solve alone, and so the same program for every method."""
    old = model.layer
    steps = old.max_steps if max_steps is None else max_steps
    layer = eqi.DEQ(old.cell, old.solver, max_steps=steps, init=old.init)
    return eqx.tree_at(lambda m: m.layer, model, layer)


PHANTOMS = (eqi.PhantomAdjoint(5, 0.5), eqi.NeumannAdjoint(5, 0.5), eqi.JFBAdjoint())


@eqx.filter_jit
def _diagnose(model, images, labels):
    model = eqx.nn.inference_mode(model)

    def radius(image):
        features, _ = model.encoder(image)
        z = model.layer(features)
        cell = eqi.resolve(model.layer.cell)
        map_of_z = lambda z: cell(z, features)
        return eqi.spectral_radius(map_of_z, z, key=jr.key(0), num_steps=50)

    cosines = classifiers.gradient_cosines(model, None, images, labels, PHANTOMS)
    return cosines, jnp.mean(jax.vmap(radius)(images))


def diagnose(model, state, images, labels):
    """The cosines of phantom gradients with the exact one, whatever the network is
    trained with, and the spectral radius, as means over a few images."""
    del state
    model = without_adjoint(model, max_steps=50)
    (upg, npg, jfb), radius = _diagnose(model, images[:8], labels[:8])
    return {
        "cosine_upg": float(upg),
        "cosine_npg": float(npg),
        "cosine_jfb": float(jfb),
        "spectral_radius": float(radius),
    }
