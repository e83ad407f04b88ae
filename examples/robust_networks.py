"""Implicit residual networks with a penalty on the divergence of their fields."""

import functools as ft
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import optimistix as optx
from training import classifiers

import eqimplicit as eqi


SKIP = "skip"


def make_layer(network: str, field: Any) -> eqi.ThetaLayer:
    if network == SKIP:
        solver = eqi.MinimiserAsFixedPoint(optx.GradientDescent(0.1, 0.0, 0.0))
        with warnings.catch_warnings():
            # These steps are the layer, so it is they that are to be differentiated.
            warnings.simplefilter("ignore")
            return eqi.ThetaLayer(
                field,
                theta=1.0,
                solver=solver,
                adjoint=optx.RecursiveCheckpointAdjoint(),
                max_steps=5,
            )
    theta = float(network)
    solver = eqi.Anderson(1e-3, 1e-4, damping=field.damping(theta))
    # The default for few unknowns is a factorisation, which in jaxlib never ends where
    # a batch is divided among several devices of one CPU.
    adjoint = eqi.ImplicitAdjoint()
    return eqi.ThetaLayer(
        field, theta=theta, solver=solver, adjoint=adjoint, max_steps=100
    )


def make_model(network: str, config: Any, shape, seed: int):
    sizes: dict[str, Any] = {}
    if config.small:
        sizes = {"channels": (4, 8, 16), "stem_stride": 2 if shape[0] > 20 else 1}
    return eqi.models.ImplicitResNet(
        shape,
        alpha=config.alpha,
        beta=config.beta,
        layer=ft.partial(make_layer, network),
        **sizes,
        key=jr.key(seed),
    )


def divergence(stage: eqi.ODEBlock, solution: optx.Solution, key) -> jax.Array:
    """The mean of each block's, per unknown, at the state that it returned."""
    total = jnp.zeros(())
    for k in range(stage.num_steps):
        layer = jax.tree.map(lambda x: x[k] if eqx.is_array(x) else x, stage.layer)
        field = eqi.resolve(layer.vector_field)
        y = jax.lax.stop_gradient(solution.value[k + 1])
        estimate = eqi.divergence(
            lambda y: field(0.0, y, None), y, key=jr.fold_in(key, k)
        )
        total += estimate / y.size
    return total / stage.num_steps


def forward(divergence_weight, model, state, images, key=None) -> classifiers.Output:
    """With the penalty of each stage, if there is a key for it."""

    def one(image, key):
        logits, solutions = model.solve(image)
        solves = {
            f"stage {i}": classifiers.Solve(
                jnp.sum(jnp.asarray(solution.stats.get("num_evaluations", 0))),
                jnp.any(solution.result != optx.RESULTS.successful),
                jnp.any(solution.result == optx.RESULTS.nonfinite),
            )
            for i, solution in enumerate(solutions)
        }
        penalty = jnp.zeros(())
        if key is not None and divergence_weight > 0:
            for i, (stage, solution) in enumerate(zip(model.stages, solutions)):
                stage_key = jr.fold_in(key, i)
                penalty += divergence_weight * divergence(stage, solution, stage_key)
        return logits, solves, penalty

    keys = None if key is None else jr.split(key, len(images))
    logits, solves, penalty = jax.vmap(one, (0, None if key is None else 0))(
        images, keys
    )
    return classifiers.Output(logits, state, solves, penalty)


def advance(model: eqi.models.ImplicitResNet) -> eqi.models.ImplicitResNet:
    """Keeps the spectral norms up with the kernels."""
    layers = lambda model: [stage.layer for stage in model.stages]
    new = [eqx.filter_vmap(eqi.advance_spectral_norms)(one) for one in layers(model)]
    return eqx.tree_at(layers, model, new)


@ft.cache
def make_optimiser(learning_rate, num_steps):
    return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))


@ft.cache  # One object for equal weights, for which a step is compiled once.
def make_forward(divergence_weight):
    return ft.partial(forward, divergence_weight)
