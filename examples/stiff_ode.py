"""Learns the stiff equation z' = -20 (z - cos t) from a few points of its trajectories,
with a layer of its own for each step in time.

    python examples/stiff_ode.py
    python examples/stiff_ode.py --setting paper

The field is bounded to slopes between -25 and -15. At the step size 0.1 the explicit
Euler method (theta = 0) is not stable there, whatever it learns; the implicit layers
are, and the more points they see, the closer the field they learn.
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
from training import command_line, experiment, figures, results as results_file
from training.command_line import UserError

import eqimplicit as eqi


STEP, NUM_STEPS, LIMITS = 0.1, 20, (-25.0, -15.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Learn a stiff equation from few points.

    Takes about three minutes on two cores.
    """

    thetas: tuple[float, ...] = (0.0, 0.5, 1.0)
    """The thetas of the layers."""

    points: tuple[int, ...] = (2, 4, 10)
    """How many points of each trajectory are seen. Each must
    divide 20."""

    setting: Literal["code", "paper"] = "code"
    """The authors' code has 50 trajectories from times between
    0 and 2, and width 10; the paper 100 and width 4."""

    epochs: int | None = None
    """Passes over the trajectories: 30 (code), 50 (paper)."""

    learning_rate: float = 1e-2
    """Of Adam, at first. It falls by a fifth every four epochs."""

    seeds: int = 1
    """How many networks to train, all at once."""

    seed: int = 10
    """Decides the data and the initial weights."""

    out: pathlib.Path = pathlib.Path("runs/stiff-ode")
    """The folder for the figures and results.json."""


def equation(t, z, args):
    return -20.0 * (z - jnp.cos(t))


def closed_form(t, t0, z0):
    particular = lambda t: (400 * jnp.cos(t) + 20 * jnp.sin(t)) / 401
    return particular(t) + (z0 - particular(t0)) * jnp.exp(-20 * (t - t0))


@dataclasses.dataclass(frozen=True)
class Setting:
    trajectories: int
    epochs: int
    num_layers: int
    width: int


# With 40 layers, trajectories of 20 steps start at times from 0 to 2.
SETTINGS = {"code": Setting(50, 30, 40, 10), "paper": Setting(100, 50, 20, 4)}


def make_block(theta: float, setting: Setting, key) -> eqi.ODEBlock:
    def make_layer(key):
        network = dynamics.mlp(1, 1, setting.width, 3, jax.nn.relu, key)
        network = eqi.with_spectral_norm(network, num_steps=1, key=key)
        field = eqi.BoundedSpectrum(dynamics.NetworkField(network), *LIMITS)
        return eqi.ThetaLayer(field, theta, STEP)

    layers = eqx.filter_vmap(make_layer)(jr.split(key, setting.num_layers))
    return eqi.ODEBlock(layers, setting.num_layers, stacked=True)


def trajectory(block: eqi.ODEBlock, first, z0):
    """Through twenty layers of the block, from the first on."""
    own, shared = eqx.partition(block.layer, eqx.is_array)
    slice_of = lambda x: jax.lax.dynamic_slice_in_dim(x, first, NUM_STEPS)
    layers = eqx.combine(jax.tree.map(slice_of, own), shared)
    return eqi.ODEBlock(layers, NUM_STEPS, stacked=True).trajectory(z0, first * STEP)


def make_data(setting: Setting, num: int, key):
    """First layers, initial values, and trajectories at the ends of the layers."""
    key_first, key_value = jr.split(key)
    firsts = jr.randint(key_first, (num,), 0, setting.num_layers - NUM_STEPS + 1)
    z0s = jr.uniform(key_value, (num, 1), minval=-0.5, maxval=1.5)

    def solve(first, z0):
        times = STEP * (first + jnp.arange(NUM_STEPS + 1.0))
        return dynamics.integrate(equation, z0, times)

    return firsts, z0s, jax.jit(jax.vmap(solve))(firsts, z0s)


def train(theta: float, points: int, setting: Setting, data, config: Config):
    firsts, z0s, targets = data
    num = len(firsts)
    seen = jnp.arange(0, NUM_STEPS + 1, NUM_STEPS // points)
    keys = jr.split(jr.key(config.seed), config.seeds)
    epochs = setting.epochs if config.epochs is None else config.epochs
    # The order of the trajectories, anew each epoch.
    shuffle = jax.jit(jax.vmap(lambda key: jr.permutation(key, num)))
    order = shuffle(jr.split(keys[0], epochs))

    def loss(block, index):
        z = trajectory(block, firsts[index], z0s[index])
        error = jnp.mean(jnp.square(z[seen] - targets[index][seen]))
        variation = eqi.total_variation(block.layer.vector_field.vector_field)
        return error + 0.1 / NUM_STEPS * variation, {"loss": error}

    blocks = dynamics.make_models(lambda key: make_block(theta, setting, key), keys)
    rate = optax.exponential_decay(config.learning_rate, 4 * num, 0.8, staircase=True)
    return dynamics.fit(
        loss,
        blocks,
        optax.adam(rate),
        epochs * num,
        inputs=order.reshape(-1),
        name=f"theta {theta:g}, {points} points",
        after=advance,
    )


def advance(block: eqi.ODEBlock) -> eqi.ODEBlock:
    layers = eqx.filter_vmap(eqi.advance_spectral_norms)(block.layer)
    return eqx.tree_at(lambda b: b.layer, block, layers)


@eqx.filter_jit
def evaluate(block: eqi.ODEBlock, data):
    firsts, z0s, true = data
    discrete = jax.vmap(lambda first, z0: trajectory(block, first, z0))(firsts, z0s)

    def integrate(first, z0):
        times = STEP * (first + jnp.arange(NUM_STEPS + 1.0))
        jumps = block.jump_times()
        return dynamics.integrate(block.vector_field, z0, times, 1e-6, jump_times=jumps)

    continuous = jax.vmap(integrate)(firsts, z0s)
    transient = slice(1, 6)
    return {
        "rmse": dynamics.rmse(discrete, true),
        "transient_rmse": dynamics.rmse(discrete[:, transient], true[:, transient]),
        "continuous_rmse": dynamics.rmse(continuous, true),
    }, {"true": true, "discrete": discrete, "continuous": continuous, "first": firsts}


def run(config: Config):
    """Trains and evaluates every combination."""
    setting = SETTINGS[config.setting]
    for points in config.points:
        if points < 1 or NUM_STEPS % points != 0:
            raise UserError(f"--points: {points} does not divide {NUM_STEPS}")
    for theta in config.thetas:
        if not 0 <= theta <= 1:
            raise UserError(f"--thetas: {theta} is not between 0 and 1")
    if config.seeds < 1 or (config.epochs is not None and config.epochs < 1):
        raise UserError("--seeds and --epochs must be at least 1")
    key_train, key_validation = jr.split(jr.key(config.seed))
    data = make_data(setting, setting.trajectories, key_train)
    validation = make_data(setting, 20, key_validation)
    results, curves = {}, {}
    for theta in config.thetas:
        for points in config.points:
            start = time.perf_counter()
            blocks, history = train(theta, points, setting, data, config)
            seconds = time.perf_counter() - start
            scores, curves[theta, points] = eqx.filter_vmap(
                evaluate, in_axes=(eqx.if_array(0), None)
            )(blocks, validation)
            name = f"theta {theta:g}, {points} points"
            results[name] = {**scores, "loss": history["loss"][:, -50:].mean(1)}
            results[name]["seconds"] = seconds
    content = experiment.result(
        f"stiff equation, setting of the {config.setting}",
        config,
        rows(results),
        results,
    )
    return content, curves


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    known = {"theta 0.5, 10 points": ".026 (50 trajectories)"}
    return [
        results_file.row(
            f"{name}: RMSE on all points",
            one["rmse"],
            "figure only",
            known.get(name, "figure only"),
        )
        for name, one in results.items()
    ]


def report(results: dict[str, Any]) -> None:
    keys = ("rmse", "transient_rmse", "continuous_rmse")
    rows = [
        [
            name,
            *(results_file.spread(one[key]) for key in keys),
            f"{one['seconds']:.1f}",
        ]
        for name, one in results["results"].items()
    ]
    header = ["", "RMSE", "in the transient", "continuous time", "seconds"]
    results_file.print_table(header, rows)


def draw(config: Config, content, curves) -> None:
    size = len(config.points), len(config.thetas)
    figure, axes = figures.grid(*size, height=2.3, sharex=True, sharey=True)
    for column, theta in enumerate(config.thetas):
        for row, points in enumerate(config.points):
            axis = axes[row, column]
            one = jax.tree.map(lambda x: np.asarray(x[0]), curves[theta, points])
            figures.name(axis, f"theta = {theta:g}, {points} points")
            for k in range(4):
                times = STEP * (one["first"][k] + np.arange(NUM_STEPS + 1))
                draw = lambda key, style, **kwargs: axis.plot(
                    times, one[key][k, :, 0], style, **kwargs
                )
                draw("true", "-", color=figures.LIGHT, linewidth=3)
                draw("continuous", "-", color=figures.COLOURS[0], linewidth=1)
                draw("discrete", "o", color=figures.ACCENT, markersize=2.5)
            axis.set_ylim(-1.5, 2)
            if row == size[0] - 1:
                axis.set_xlabel("time")
    title = "Stiff equation: true (grey), layers (points), learned field (blue)"
    figures.save(figure, config.out, "trajectories.png", title)


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = tyro.cli(Config, args=args)
    jax.config.update("jax_enable_x64", True)
    return experiment.conclude(config, run, report, draw)


if __name__ == "__main__":
    command_line.run(main)
