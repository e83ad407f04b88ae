"""Fits the sine on twenty points with five implicit residual layers in the plane, and
looks at the vector fields and eigenvalues that a penalty on the divergence gives.

    python examples/sine_regression.py
    python examples/sine_regression.py --setting paper --thetas 0 0.5 1

The input is the first coordinate of the initial state, the output the second one of the
last. Rewarding dissipation pulls the states to a curve: implicit layers follow, at the
price of the fit and of more iterations, and the explicit ones (theta = 0) become
unstable.
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
import optimistix as optx
import tyro
from jaxtyping import Array
from training import command_line, experiment, figures, results as results_file
from training.command_line import UserError

import eqimplicit as eqi


NUM_LAYERS = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """Fit the sine with implicit residual layers.

    Takes about four minutes on two cores.
    """

    thetas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """The thetas of the layers."""

    divergence_weights: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0)
    """Weights of the penalty on the divergence."""

    setting: Literal["code", "paper"] = "code"
    """The authors' code takes a sigmoid of the mean divergence,
    and the states as given; the paper neither."""

    steps: int = 3000
    """Steps of Adam, each with all points."""

    seeds: int = 1
    """How many networks to train for each, all at once."""

    seed: int = 0
    """Decides the initial weights and the probes."""

    out: pathlib.Path = pathlib.Path("runs/sine-regression")
    """The folder for the figures and results.json."""


class Task(eqx.Module):
    """A block and the weight with which its divergence is penalised."""

    block: eqi.ODEBlock
    weight: Array


def data():
    x = jnp.linspace(-5.0, 5.0, 20)
    return x, jnp.sin(x)


def lift(x):
    return jnp.stack([x, jnp.zeros_like(x)], axis=-1)


def make_task(theta: float, weight, key) -> Task:
    network = dynamics.mlp(2, 2, 10, 4, jax.nn.gelu, key)
    layer = eqi.ThetaLayer(dynamics.NetworkField(network), theta)
    return Task(eqi.ODEBlock(layer, NUM_LAYERS), weight)


def make_loss(setting: str):
    x, y = data()

    def loss(task: Task, key):
        weight = jax.lax.stop_gradient(task.weight)
        trajectories = jax.vmap(task.block.trajectory)(lift(x))

        def mean_penalty(**weights):
            at = lambda states, key: eqi.trajectory_penalty(
                task.block,
                states,
                key=key,
                power=2,
                detach=setting == "code",
                **weights,
            )
            return jnp.mean(jax.vmap(at)(trajectories, jr.split(key, len(x))))

        mse = jnp.mean(jnp.square(trajectories[:, -1, 1] - y))
        divergence = mean_penalty(divergence_weight=1.0)
        jacobian = mean_penalty(jacobian_weight=0.1)
        reward = jax.nn.sigmoid(divergence) if setting == "code" else divergence
        total = mse + weight * reward + jacobian
        return total, {"mse": mse, "divergence": divergence, "jacobian": jacobian}

    return loss


@eqx.filter_jit
def evaluate(task: Task):
    block, (x, y) = task.block, data()
    solutions = jax.vmap(block.solve)(lift(x))
    states = solutions.value
    field = lambda y: block.vector_field(0.0, y)
    jacobians = jax.vmap(jax.vmap(jax.jacfwd(field)))(states)
    times = jnp.linspace(0.0, NUM_LAYERS, NUM_LAYERS + 1)
    continuous = jax.vmap(
        lambda y0: dynamics.integrate(block.vector_field, y0, times, 1e-6)
    )(lift(x))

    # As the paper solves its equation: by minimising the squared residual.
    minimiser = eqi.MinimiserAsFixedPoint(optx.LBFGS(1e-3, 1e-3))
    as_paper = dataclasses.replace(block.layer, solver=minimiser, max_steps=200)
    as_paper = dataclasses.replace(block, layer=as_paper)
    paper_steps = jax.vmap(as_paper.solve)(lift(x)).stats["num_steps"]
    test = jnp.linspace(-5.0, 5.0, 40)
    out = jax.vmap(block)(lift(test))[:, 1]
    return {
        "mse": jnp.mean(jnp.square(states[:, -1, 1] - y)),
        "validation_mse": jnp.mean(jnp.square(out - jnp.sin(test))),
        "continuous_mse": jnp.mean(jnp.square(continuous[:, -1, 1] - y)),
        "newton_steps": jnp.mean(solutions.stats["num_steps"]),
        "lbfgs_steps": jnp.mean(paper_steps),
        "solved": jnp.mean(solutions.result == optx.RESULTS.successful),
    }, {"states": states, "continuous": continuous, "jacobians": jacobians}


def train(theta: float, config: Config):
    """All weights and seeds at once, the weights along the leading axis first."""
    weights = jnp.repeat(jnp.asarray(config.divergence_weights), config.seeds)
    keys = jr.split(jr.key(config.seed), config.seeds)
    of_each = jnp.concatenate([keys] * len(config.divergence_weights))
    make = lambda weight, key: make_task(theta, weight, key)
    tasks = dynamics.make_models(make, weights, of_each)
    rate = optax.cosine_decay_schedule(1e-3, config.steps, alpha=1e-2)
    return dynamics.fit(
        make_loss(config.setting),
        tasks,
        # Near the pole of a layer a single gradient may be huge.
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        config.steps,
        inputs=jr.split(keys[0], config.steps),
        name=f"theta {theta:g}",
    )


def run(config: Config):
    for theta in config.thetas:
        if not 0 <= theta <= 1:
            raise UserError(f"--thetas: {theta} is not between 0 and 1")
    if min(config.steps, config.seeds) < 1 or not config.divergence_weights:
        raise UserError(
            "--steps and --seeds must be at least 1, and --divergence-weights given"
        )
    results, curves = {}, {}
    for theta in config.thetas:
        start = time.perf_counter()
        tasks, history = train(theta, config)
        seconds = time.perf_counter() - start
        scores, shapes = eqx.filter_vmap(evaluate)(tasks)
        eigenvalues = np.linalg.eigvals(np.asarray(shapes["jacobians"]))
        growth = np.abs(eqi.stability_function(eigenvalues, theta))
        for k, weight in enumerate(config.divergence_weights):
            mine = slice(k * config.seeds, (k + 1) * config.seeds)
            by_seed = lambda x: x[mine].reshape(config.seeds, -1)
            results[f"theta {theta:g}, weight {weight:g}"] = {
                **{key: value[mine] for key, value in scores.items()},
                "least_real_part": by_seed(eigenvalues.real).min(1),
                "largest_growth": by_seed(growth).max(1),
                "seconds": seconds,
            }
            curves[theta, weight] = {
                "block": jax.tree.map(
                    lambda x: x[mine.start] if eqx.is_array(x) else x, tasks.block
                ),
                "states": np.asarray(shapes["states"][mine.start]),
                "continuous": np.asarray(shapes["continuous"][mine.start]),
                "eigenvalues": eigenvalues[mine.start],
                "history": {
                    key: np.asarray(h[mine.start]) for key, h in history.items()
                },
            }
    content = experiment.result("sine regression", config, rows(results), results)
    return content, curves


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    known = {
        "theta 0.5, weight 0": "1e-4",
        "theta 0.5, weight 1": "1.7e-3",
        "theta 0.5, weight 3": "1.1e-2",
    }
    return [
        results_file.row(
            f"{name}: MSE", one["mse"], "figure only", known.get(name, "figure only")
        )
        for name, one in results.items()
    ]


def report(results: dict[str, Any]) -> None:
    keys = ("mse", "validation_mse", "continuous_mse", "newton_steps", "lbfgs_steps")
    keys += ("least_real_part", "largest_growth", "solved")
    rows = [
        [name, *(results_file.spread(one[key]) for key in keys)]
        for name, one in results["results"].items()
    ]
    header = ["", "MSE", "validation", "continuous", "Newton", "L-BFGS"]
    header += ["least Re", "largest |R|", "solved"]
    results_file.print_table(header, rows)


def draw(config: Config, content, curves) -> None:
    weights = config.divergence_weights[
        :: 2 if len(config.divergence_weights) > 3 else 1
    ]
    size = len(weights), len(config.thetas)
    fields, field_axes = figures.grid(*size, 2.4, 2.3, sharex=True, sharey=True)
    spectra, spectrum_axes = figures.grid(*size, 2.4, 2.0, sharex=True, sharey=True)
    first, second = np.meshgrid(np.linspace(-7, 7, 20), np.linspace(-4, 4, 16))
    points = jnp.stack([jnp.asarray(first), jnp.asarray(second)], -1).reshape(-1, 2)
    real, imaginary = np.meshgrid(np.linspace(-8, 4, 200), np.linspace(-4, 4, 150))
    for row, weight in enumerate(weights):
        for column, theta in enumerate(config.thetas):
            one = curves[theta, weight]
            title = f"theta {theta:g}, weight {weight:g}"
            axis = field_axes[row, column]
            figures.name(axis, title)
            arrows = jax.vmap(lambda y: one["block"].vector_field(0.0, y))(points)
            arrows = arrows / (1e-9 + jnp.linalg.norm(arrows, axis=1, keepdims=True))
            axis.quiver(*points.T, *arrows.T, color=figures.LIGHT, width=0.004)
            for path, flow in zip(one["states"], one["continuous"]):
                axis.plot(*flow.T, color=figures.COLOURS[0], linewidth=0.6)
                axis.plot(*path.T, color=figures.ACCENT, linewidth=0.8)
            axis.plot(*one["states"][:, -1].T, "o", color=figures.ACCENT, markersize=2)
            axis.set(xlim=(-7, 7), ylim=(-4, 4))

            axis = spectrum_axes[row, column]
            figures.name(axis, title)
            growth = np.abs(eqi.stability_function(real + 1j * imaginary, theta))
            axis.contourf(real, imaginary, growth, [0, 1], colors=[figures.GRID])
            z = one["eigenvalues"].reshape(-1)
            axis.plot(z.real, z.imag, ".", color=figures.ACCENT, markersize=3)
            axis.set(xlim=(-8, 4), ylim=(-4, 4), aspect="equal")
    title = "Sine: layers (red) and the learned field's flow (blue)"
    figures.save(fields, config.out, "fields.png", title)
    title = "Sine: eigenvalues of the Jacobian, over the region of stability (grey)"
    figures.save(spectra, config.out, "eigenvalues.png", title)

    figure, axes = figures.grid(1, 3, 3.6)
    for axis, key in zip(axes[0], ("mse", "divergence", "jacobian")):
        figures.name(axis, {"mse": "mean squared error"}.get(key, key))
        axis.set_xlabel("step")
        if key != "divergence":
            axis.set_yscale("log")
        for weight, colour in zip(weights, figures.COLOURS):
            for theta in config.thetas:
                axis.plot(
                    curves[theta, weight]["history"][key],
                    color=colour,
                    alpha=0.3 + 0.7 * theta,
                    linewidth=0.7,
                    label=f"weight {weight:g}" if theta == config.thetas[-1] else None,
                )
    figures.legend(axes[0, 0])
    title = "Sine: parts of the loss, darker for larger theta"
    figures.save(figure, config.out, "training.png", title)


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = tyro.cli(Config, args=args)
    jax.config.update("jax_enable_x64", True)
    return experiment.conclude(config, run, report, draw)


if __name__ == "__main__":
    command_line.run(main)
