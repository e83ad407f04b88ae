"""Learns a stiff partial differential equation with hundreds of unknowns, and forecasts
far past the training window.

    python examples/allen_cahn.py

The Allen-Cahn equation u_t = D u_xx + u - u^3 on a grid: diffusion makes it stiff, so
that the explicit layer (theta = 0) cannot use the steps that the data have. The model
knows that there is diffusion, but not how much, and learns the reaction as a network
that every grid point shares. Each implicit step is solved by Newton's method with GMRES
and differentiated by a Krylov method: no matrix is ever built.
"""

import dataclasses
import pathlib
import time
from typing import Any

import dynamics
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import tyro
from training import command_line, experiment, figures, results as results_file
from training.command_line import UserError

import eqimplicit as eqi


DIFFUSIVITY = 0.005


@dataclasses.dataclass(frozen=True)
class Config:
    """Learn the Allen-Cahn equation on a grid.

    Takes about six minutes on two cores.
    """

    thetas: tuple[float, ...] = (0.0, 0.5, 1.0)
    """The thetas of the layers."""

    size: int = 128
    """Grid points, the unknowns, on a periodic interval."""

    trajectories: int = 8
    """How many trajectories to train on."""

    num_steps: int = 10
    """Layers in the training window. A forecast has ten times
    as many."""

    step_size: float = 0.2
    """The step in time, of the data and of the layers."""

    steps: int = 600
    """Steps of Adam, each with all trajectories."""

    seeds: int = 1
    """How many networks to train, all at once."""

    seed: int = 0
    """Decides the data and the initial weights."""

    out: pathlib.Path = pathlib.Path("runs/allen-cahn")
    """The folder for the figures and results.json."""


def laplacian(u):
    """The second difference on the unit interval, periodic."""
    return len(u) ** 2 * (jnp.roll(u, 1) + jnp.roll(u, -1) - 2 * u)


def allen_cahn(t, u, args):
    return DIFFUSIVITY * laplacian(u) + u - u**3


class DiffusionReaction(eqx.Module):
    """Diffusion of unknown size, and an unknown reaction."""

    log_diffusivity: jax.Array
    reaction: eqx.nn.MLP

    def __call__(self, t, u, args):
        return jnp.exp(self.log_diffusivity) * laplacian(u) + self.react(u)

    def react(self, u):
        return jax.vmap(self.reaction)(u[:, None])[:, 0]


def make_block(theta: float, config: Config, key) -> eqi.ODEBlock:
    network = dynamics.mlp(1, 1, 16, 2, jnp.tanh, key)
    # Half of the true one.
    field = DiffusionReaction(jnp.log(jnp.array(DIFFUSIVITY / 2)), network)
    layer = eqi.ThetaLayer(field, theta, config.step_size)
    return eqi.ODEBlock(layer, config.num_steps)


def make_data(config: Config, num: int, num_steps: int, key):
    """Trajectories from smooth random states of both phases."""
    x = jnp.arange(config.size) / config.size
    waves = jnp.arange(1, 6)

    def initial(key):
        key_size, key_phase = jr.split(key)
        size = jr.normal(key_size, (5,)) / jnp.sqrt(waves)
        phase = jr.uniform(key_phase, (5,), maxval=2 * jnp.pi)
        angle = 2 * jnp.pi * waves * x[:, None] + phase
        return jnp.tanh(jnp.sum(size * jnp.sin(angle), axis=1))

    times = config.step_size * jnp.arange(num_steps + 1.0)
    solve = lambda u: dynamics.integrate(allen_cahn, u, times, 1e-6)
    make = jax.jit(jax.vmap(lambda key: solve(initial(key))))
    return make(jr.split(key, num))


def train(theta: float, config: Config, data):
    def loss(block, _):
        states = jax.vmap(block.trajectory)(data[:, 0])
        value = jnp.mean(jnp.square(states - data))
        return value, {"loss": value}

    keys = jr.split(jr.key(config.seed), config.seeds)
    blocks = dynamics.make_models(lambda key: make_block(theta, config, key), keys)
    rate = optax.cosine_decay_schedule(2e-2, config.steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return dynamics.fit(loss, blocks, optimiser, config.steps, name=f"theta {theta:g}")


@eqx.filter_jit
def evaluate(block: eqi.ODEBlock, true):
    """A forecast from states that were not seen, as far as the true trajectories go."""
    long = dataclasses.replace(block, num_steps=true.shape[1] - 1)
    solutions = jax.vmap(long.solve)(true[:, 0])
    states, window = solutions.value, block.num_steps + 1
    times = block.layer.step_size * jnp.arange(float(true.shape[1]))
    continuous = jax.vmap(
        lambda u: dynamics.integrate(block.vector_field, u, times, 1e-4)
    )(true[:, 0])
    field: Any = block.layer.vector_field
    u = jnp.linspace(-1.0, 1.0, 41)
    return {
        "window_rmse": dynamics.rmse(states[:, :window], true[:, :window]),
        "forecast_rmse": dynamics.rmse(states, true),
        "continuous_rmse": dynamics.rmse(continuous, true),
        "diffusivity": jnp.exp(field.log_diffusivity) / DIFFUSIVITY,
        "reaction_rmse": dynamics.rmse(field.react(u), u - u**3),
        "newton_steps": jnp.mean(solutions.stats["num_steps"]),
        "solved": jnp.mean(solutions.result == optx.RESULTS.successful),
    }, states


def run(config: Config):
    for theta in config.thetas:
        if not 0 <= theta <= 1:
            raise UserError(f"--thetas: {theta} is not between 0 and 1")
    numbers = config.size, config.trajectories, config.num_steps, config.steps
    if min(*numbers, config.seeds) < 1 or config.step_size <= 0:
        raise UserError("All sizes and numbers of steps must be positive")
    key_train, key_test = jr.split(jr.key(config.seed))
    data = make_data(config, config.trajectories, config.num_steps, key_train)
    test = make_data(config, 4, 10 * config.num_steps, key_test)
    results, states, histories = {}, {}, {}
    for theta in config.thetas:
        start = time.perf_counter()
        try:
            blocks, history = train(theta, config, data)
        except UserError as error:
            print(error)
            results[f"theta {theta:g}"] = {"diverged": True}
            continue
        seconds = time.perf_counter() - start
        scores, states[theta] = eqx.filter_vmap(
            evaluate, in_axes=(eqx.if_array(0), None)
        )(blocks, test)
        histories[theta] = np.asarray(history["loss"])
        results[f"theta {theta:g}"] = {
            **scores,
            "loss": history["loss"][:, -1],
            "seconds": seconds,
        }
    shapes = {"true": test, "states": states, "histories": histories}
    content = experiment.result("Allen-Cahn equation", config, rows(results), results)
    return content, shapes


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        results_file.row(
            f"{name}: RMSE to ten windows", one["forecast_rmse"], "not in the paper"
        )
        for name, one in results.items()
        if not one.get("diverged")
    ]


def report(results: dict[str, Any]) -> None:
    keys = ("window_rmse", "forecast_rmse", "continuous_rmse", "diffusivity")
    keys += ("reaction_rmse", "newton_steps", "solved")
    rows = []
    for name, one in results["results"].items():
        if one.get("diverged"):
            rows.append([name, "diverged", *[""] * 7])
        else:
            cells = [results_file.spread(one[key]) for key in keys]
            rows.append([name, *cells, f"{one['seconds']:.0f}"])
    header = ["", "RMSE", "forecast", "continuous", "diffusivity (true: 1)"]
    header += ["reaction", "Newton", "solved", "seconds"]
    results_file.print_table(header, rows)


def draw(config: Config, content, shapes) -> None:
    true = np.asarray(shapes["true"][0])
    pictures = {"true": true}
    for theta, states in shapes["states"].items():
        pictures[f"theta = {theta:g}"] = np.asarray(states[0, 0])
    figure, axes = figures.grid(1, len(pictures), 2.8, 3, sharex=True, sharey=True)
    duration = config.step_size * (len(true) - 1)
    for axis, (name, picture) in zip(axes[0], pictures.items()):
        figures.name(axis, name)
        axis.imshow(
            np.clip(np.nan_to_num(picture), -1.2, 1.2),
            aspect="auto",
            origin="lower",
            extent=(0, 1, 0, duration),
            cmap="coolwarm",
            vmin=-1.2,
            vmax=1.2,
        )
        seen = config.step_size * config.num_steps
        axis.axhline(seen, color="black", linewidth=1)
        axis.set_xlabel("x")
    axes[0, 0].set_ylabel("time (trained below the line)")
    title = f"Allen-Cahn, {config.size} unknowns: an unseen initial state"
    figures.save(figure, config.out, "forecasts.png", title)


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = tyro.cli(Config, args=args)
    jax.config.update("jax_enable_x64", True)
    return experiment.conclude(config, run, report, draw)


if __name__ == "__main__":
    command_line.run(main)
