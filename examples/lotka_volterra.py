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
from lotka_volterra_models import (
    energy,
    evaluate,
    FAR,
    initial_states,
    law,
    lotka_volterra,
    make_model,
    STEP,
    TRAINED,
)
from training import command_line, experiment, figures, results as results_file
from training.command_line import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Learn the Lotka-Volterra equations.

    Takes about two minutes on two cores.
    """

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
    content = experiment.result(
        f"Lotka-Volterra, setting of the {config.setting}",
        config,
        rows(results),
        results,
    )
    return content, (curves, histories)


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


def report(content: dict[str, Any]) -> None:
    rows = []
    for layer, one in content["results"].items():
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


def draw(config: Config, content, more) -> None:
    curves, histories = more
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
    return experiment.conclude(config, run, report, draw)


if __name__ == "__main__":
    command_line.run(main)
