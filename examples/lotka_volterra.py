"""Learns the Lotka-Volterra equations from trajectories, with implicit residual layers
of several kinds, and forecasts twenty times further than it was trained.

    python examples/lotka_volterra.py
    python examples/lotka_volterra.py --setting paper --seeds 3

A scheme that is not symmetric bends the field it learns: fitted by the explicit Euler
method (theta = 0) it is too dissipative, by the implicit one (theta = 1) too expansive,
by an amount that theory predicts. The implicit midpoint rule (theta = 1/2) learns a
field that keeps its amplitude in continuous time, and a symplectic method its energy.
"""

import dataclasses
import functools as ft
import pathlib
import time
from typing import Any, Literal

import dynamics
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from training import command_line, figures, files, results as results_file
from training.command_line import UserError

import eqimplicit as eqi


STEP, TRAINED, FAR = 0.2, 10.0, 200.0
EQUILIBRIUM = np.array([1.0, 0.5])
FREQUENCY = np.sqrt(2 / 3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Learn the Lotka-Volterra equations."""

    layers: tuple[str, ...] = ("0", "0.5", "1")
    """Thetas, or gauss (Gauss-Legendre), or verlet (which
    learns a separable field of the logarithms)."""

    setting: Literal["code", "paper"] = "code"
    """The authors' code has 7 trajectories, tanh of width 10
    and L-BFGS after Adam, the paper 5, ReLU of width 20 and
    Adam alone."""

    adam_steps: int = 3000
    """Steps of Adam."""

    lbfgs_steps: int = 1300
    """Steps of L-BFGS after them, with --setting code."""

    seeds: int = 1
    """How many networks to train, all at once."""

    seed: int = 0
    """Decides their initial weights."""

    out: pathlib.Path = pathlib.Path("runs/lotka-volterra")
    """The folder for the figures and results.json."""


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
        return eqi.ODEBlock(
            eqi.RungeKuttaLayer(field, tableau=tableau, step_size=STEP), num_steps
        )
    return eqi.ODEBlock(eqi.ThetaLayer(field, float(layer), STEP), num_steps)


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


def train(layer: str, config: Config):
    num_steps = round(TRAINED / STEP)
    times = jnp.linspace(0, TRAINED, num_steps + 1)
    y0s, _ = initial_states(config.setting)
    solve = lambda y: dynamics.integrate(lotka_volterra, y, times)
    target = jax.jit(jax.vmap(solve))(y0s)

    def loss(model, _):
        value = jnp.mean(jnp.square(jax.vmap(model.trajectory)(y0s) - target))
        return value, {"loss": value}

    keys = jr.split(jr.key(config.seed), config.seeds)
    make = lambda key: make_model(layer, config.setting, num_steps, key)
    models = dynamics.make_models(make, keys)
    decay = max(1, round(0.096 * config.adam_steps))
    rate = optax.exponential_decay(1e-2, decay, 0.8, staircase=True)
    stages = [("Adam", optax.adam(rate), config.adam_steps)]
    if config.setting == "code" and config.lbfgs_steps > 0:
        stages.append(("L-BFGS", optax.lbfgs(memory_size=100), config.lbfgs_steps))
    histories, seconds = [], []
    for name, optimiser, steps in stages:
        start = time.perf_counter()
        models, record = dynamics.fit(
            loss, models, optimiser, steps, name=f"{layer}: {name}"
        )
        seconds.append(time.perf_counter() - start)
        histories.append(record["loss"])
    values = eqx.filter_jit(eqx.filter_vmap(lambda model: loss(model, None)[0]))(models)
    return models, jnp.concatenate(histories, axis=1), values, seconds


def run(config: Config):
    """Trains with every layer, evaluates, and returns the results."""
    for layer in config.layers:
        try:
            known = layer in ("gauss", "verlet") or 0 <= float(layer) <= 1
        except ValueError:
            known = False
        if not known:
            raise UserError(f"--layers: {layer} is no theta, and not gauss or verlet")
    if min(config.adam_steps, config.seeds, config.lbfgs_steps + 1) < 1:
        raise UserError("--adam-steps and --seeds must be at least 1")
    y0s, validation = initial_states(config.setting)
    results, curves, histories = {}, {}, {}
    for layer in config.layers:
        models, histories[layer], losses, seconds = train(layer, config)
        scores, curves[layer] = eqx.filter_vmap(
            evaluate, in_axes=(eqx.if_array(0), None)
        )(models, jnp.concatenate([y0s, validation]))
        expected = law(layer)
        results[layer] = {
            "train_loss": losses,
            **scores,
            "law": None if expected is None else [expected.real, expected.imag],
            "seconds": seconds,
        }
    content = {
        "experiment": f"Lotka-Volterra, setting of the {config.setting}",
        "config": dataclasses.asdict(config),
        "rows": rows(results),
        "results": results,
    }
    return content, curves, histories


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    names = {
        "train_loss": "train loss",
        "rmse_50": "RMSE in steps to time 50",
        "rmse_200": "RMSE in steps to time 200",
        "amplitude": "amplitude in continuous time at 200, over the true one",
    }
    lines = []
    for layer, one in results.items():
        name = f"theta {layer}" if layer[0].isdigit() else layer
        for key, quantity in names.items():
            text = f"{name}: {quantity}"
            lines.append(results_file.row(text, one[key], "figure only", "figure only"))
        if one["law"] is not None:
            distance = np.hypot(*(np.asarray(one["eigenvalue"]) - one["law"]).T)
            text = f"{name}: distance of the eigenvalue from the law"
            lines.append(results_file.row(text, distance))
    return lines


def report(results: dict[str, Any]) -> None:
    rows = []
    for layer, one in results["results"].items():
        real, imaginary = one["eigenvalue"].T
        rows.append(
            [
                layer,
                results_file.spread(one["train_loss"]),
                results_file.spread(one["rmse_50"]),
                results_file.spread(one["rmse_200"]),
                results_file.spread(one["amplitude"]),
                results_file.spread(one["reach"]),
                f"{float(jnp.mean(real)):+.4f} {float(jnp.mean(imaginary)):+.4f}i",
                "" if one["law"] is None else "{:+.4f} {:+.4f}i".format(*one["law"]),
                results_file.spread(one["energy_drift"]),
                " + ".join(f"{s:.0f}" for s in one["seconds"]),
            ]
        )
    header = [
        "layer",
        "train loss",
        "RMSE to 50",
        "to 200",
        "amplitude at 200",
        "reach",
    ]
    header += ["eigenvalue", "law", "energy drift", "seconds"]
    results_file.print_table(header, rows)


def draw(config: Config, curves, histories) -> None:
    layers = list(curves)
    figure, axes = figures.grid(3, len(layers), height=2.5)
    for column, layer in zip(axes.T, layers):
        one = jax.tree.map(lambda x: np.asarray(x[0]), curves[layer])
        phase, discrete, continuous = column
        figures.name(phase, f"{layer}: continuous time to {FAR:g}")
        phase.plot(*one["true"][3, :60].T, color=figures.LIGHT, linewidth=3)
        finite = np.isfinite(one["continuous"][3]).all(axis=1)
        phase.plot(*one["continuous"][3][finite].T, color=figures.ACCENT, linewidth=0.7)
        phase.set(xlim=(0, 3), ylim=(0, 2), xlabel="prey", ylabel="predators")
        for one_axes, key in ((discrete, "discrete"), (continuous, "continuous")):
            figures.name(one_axes, f"{layer}: prey, {key}")
            for until, colour in (("true", figures.LIGHT), (key, figures.ACCENT)):
                line = one[until][3, :, 0]
                one_axes.plot(one["times"], line, color=colour, linewidth=0.8)
            one_axes.axvspan(0, TRAINED, color=figures.GRID)
            one_axes.set(ylim=(0, 3), xlabel="time")
    title = f"Lotka-Volterra: learned on [0, {TRAINED:g}], forecast to {FAR:g}"
    figures.save(figure, config.out, "forecasts.png", title)

    figure, axes = figures.grid(1, 2, width=5, height=3.2)
    left, right = axes[0]
    for layer, colour in zip(layers, figures.COLOURS):
        one = jax.tree.map(lambda x: np.asarray(x[0]), curves[layer])
        left.semilogy(histories[layer][0], color=colour, linewidth=0.8, label=layer)
        drift = np.abs(energy(one["discrete"][3]) - energy(one["true"][3, 0]))
        right.semilogy(one["times"][1:], drift[1:], color=colour, linewidth=0.8)
    figures.name(left, "training loss")
    left.set_xlabel("step")
    figures.legend(left)
    figures.name(right, "error of the energy, discrete")
    right.set_xlabel("time")
    figures.save(figure, config.out, "training.png", "Lotka-Volterra: training")


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = tyro.cli(Config, args=args)
    jax.config.update("jax_enable_x64", True)
    with files.claim(config.out):
        results, curves, histories = run(config)
        report(results)
        results_file.save(config.out, results)
        draw(config, curves, histories)
        print(f"Figures and results.json are in {config.out}")
        return results


if __name__ == "__main__":
    command_line.run(main)
