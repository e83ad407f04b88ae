"""The Lotka-Volterra equations, and the networks that learn them."""

import dataclasses
import functools as ft
from typing import Any

import dynamics
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import eqimplicit as eqi


STEP = 0.2
TRAINED, FAR = 10.0, 200.0
EQUILIBRIUM = np.array([1.0, 0.5])
FREQUENCY = np.sqrt(2 / 3)


def lotka_volterra(t, y, args):
    prey, predators = y
    return jnp.stack(
        [2 / 3 * prey - 4 / 3 * prey * predators, prey * predators - predators]
    )


def energy(y):
    """What the true flow conserves."""
    prey, predators = y[..., 0], y[..., 1]
    potential = prey - jnp.log(prey)
    return potential + 4 / 3 * predators - 2 / 3 * jnp.log(predators)


class SeparableField(eqx.Module):
    """A field of the logarithms, each part of which depends on the other part only."""

    prey: eqx.nn.MLP
    predators: eqx.nn.MLP

    def __call__(self, t, y, args):
        prey, predators = y
        return self.prey(predators), self.predators(prey)


class LogarithmicBlock(eqx.Module):
    """A block whose states are the logarithms of the populations, in two parts."""

    block: eqi.ODEBlock

    def trajectory(self, y0):
        prey, predators = self.block.trajectory(tuple(jnp.log(y0)[:, None]))
        return jnp.exp(jnp.concatenate([prey, predators], axis=-1))

    def vector_field(self, t, y, args):
        derivative = self.block.vector_field(t, tuple(jnp.log(y)[:, None]), args)
        return y * jnp.concatenate(derivative)


def make_model(layer: str, setting: str, num_steps: int, key) -> Any:
    tanh = setting == "code"
    network = ft.partial(
        dynamics.mlp,
        width=10 if tanh else 20,
        depth=4,
        activation=jnp.tanh if tanh else jax.nn.relu,
    )
    if layer == "verlet":
        keys = jr.split(key)
        field = SeparableField(network(1, 1, key=keys[0]), network(1, 1, key=keys[1]))
        return LogarithmicBlock(eqi.ODEBlock(eqi.VerletLayer(field, STEP), num_steps))
    field = dynamics.NetworkField(network(2, 2, key=key))
    if layer == "gauss":
        tableau = eqi.ButcherTableau.gauss_legendre(2)
        scheme = eqi.RungeKuttaLayer(field, tableau=tableau, step_size=STEP)
    else:
        scheme = eqi.ThetaLayer(field, float(layer), STEP)
    # All steps at once, if there are equations to solve.
    return eqi.ODEBlock(scheme, num_steps, parallel=not scheme.is_explicit)


def lengthen(model, num_steps: int):
    """The same model with another number of steps."""
    if isinstance(model, LogarithmicBlock):
        return LogarithmicBlock(lengthen(model.block, num_steps))
    return dataclasses.replace(model, num_steps=num_steps)


def initial_states(setting: str):
    """Those for training and those for validation."""
    if setting == "paper":
        second = jnp.linspace(0.6, 1.8, 5)
        return jnp.stack([jnp.ones(5), second], 1), jnp.array([[1.0, 0.9], [1.0, 1.4]])
    second = 0.5 + 0.1 * jnp.arange(1, 14)
    states = jnp.stack([jnp.ones(13), second], 1)
    return states[::2], states[1::2]


@eqx.filter_jit
def evaluate(model, y0s):
    """A learned model on the training window and far beyond it, of trajectories that it
    was trained on and others.
    """
    far_steps = round(FAR / STEP)
    times = jnp.linspace(0, FAR, far_steps + 1)
    true = jax.vmap(lambda y: dynamics.integrate(lotka_volterra, y, times))(y0s)
    discrete = jax.vmap(lengthen(model, far_steps).trajectory)(y0s)
    continuous = jax.vmap(
        lambda y: dynamics.integrate(
            model.vector_field, y, times, 1e-6, max_steps=20_000
        )
    )(y0s)

    # A fit with another step in time bends the eigenvalues at the equilibrium.
    field = lambda y: model.vector_field(0.0, y, None)
    jacobian = jax.jacfwd(field)(jnp.asarray(EQUILIBRIUM))
    trace, determinant = jnp.trace(jacobian), jnp.linalg.det(jacobian)
    root = jnp.sqrt(jnp.maximum(determinant - trace**2 / 4, 0))

    def window(until, states):
        return states[:, : round(until / STEP) + 1]

    def amplitude(states):
        last = states[:, -round(TRAINED / STEP) :, 0]
        return jnp.max(last, axis=1) - jnp.min(last, axis=1)

    def reach(states):
        return jnp.max(jnp.linalg.norm(states - EQUILIBRIUM, axis=-1), axis=1)

    drift = energy(discrete) - energy(discrete[:, :1])
    return {
        "train_rmse": dynamics.rmse(window(TRAINED, discrete), window(TRAINED, true)),
        "rmse_50": dynamics.rmse(window(50.0, discrete), window(50.0, true)),
        "rmse_200": dynamics.rmse(discrete, true),
        "eigenvalue": jnp.stack([trace / 2, root]),
        "amplitude": jnp.mean(amplitude(continuous) / amplitude(true)),
        "reach": jnp.max(reach(continuous) / reach(true)),
        "energy_drift": jnp.max(jnp.abs(drift)),
    }, {"times": times, "true": true, "discrete": discrete, "continuous": continuous}


def law(layer: str):
    """The eigenvalue that a theta scheme learns for `i w`: the one which a step of the
    scheme multiplies by `exp(i w h)`.
    """
    if layer in ("gauss", "verlet"):
        return None
    turn = np.exp(1j * FREQUENCY * STEP)
    return (turn - 1) / (STEP * (1 - float(layer) + float(layer) * turn))
