"""Separates two spirals with stacked residual layers, and asks how robust plain and
Lipschitz-bounded fields are when the inputs are shifted.

    python examples/spiral.py
    python examples/spiral.py --thetas 0 --seeds 5

A field that may not stretch space must turn it instead: it learns the spirals as well,
and keeps more of its accuracy under a shift.
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
import tyro
from training import command_line, experiment, figures, results as results_file
from training.command_line import UserError

import eqimplicit as eqi


NUM_LAYERS = 10
SHIFTS = (0.0, 0.28, 0.33, 0.39, 0.44)

# The Lipschitz constants of the layers, or None for networks without a bound.
FIELDS = {
    "plain": None,
    "1-Lipschitz": (1.0,) * NUM_LAYERS,
    "2-Lipschitz": (2.0,) * NUM_LAYERS,
    "mixed": (2.0,) * 5 + (1.0,) * 5,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Separate two spirals, and shift them.

    Takes about four minutes on two cores.
    """

    fields: tuple[str, ...] = ("plain", "1-Lipschitz", "mixed")
    """Among plain, 1-Lipschitz, 2-Lipschitz and mixed (five
    layers 2-Lipschitz, five 1-Lipschitz). Plain ones are
    for theta 0 only: nothing makes their equations solvable."""

    thetas: tuple[float, ...] = (0.0, 0.5)
    """The thetas of the layers."""

    points: int = 400
    """Points for training, and as many for validation."""

    steps: int = 1000
    """Steps of Adam, each with all points."""

    seeds: int = 3
    """How many networks to train for each, all at once."""

    seed: int = 0
    """Decides the initial weights."""

    out: pathlib.Path = pathlib.Path("runs/spiral")
    """The folder for the figures and results.json."""


class Classifier(eqx.Module):
    """Layers in space, from points in the plane to the logit of the second spiral."""

    block: eqi.ODEBlock
    head: eqx.nn.Linear

    def __call__(self, point):
        return self.head(self.block(lift(point)))

    def continuous(self, point):
        """The same, with the flow of the learned field instead of the layers."""
        times = jnp.array([0.0, NUM_LAYERS])
        end = dynamics.integrate(
            self.block.vector_field,
            lift(point),
            times,
            1e-5,
            jump_times=self.block.jump_times(),
        )
        return self.head(end[-1])


def lift(point):
    return jnp.append(point, jnp.zeros((), point.dtype))


def spirals(num: int, offset: float):
    """Points on two spirals, and the labels of the spirals."""
    k = (jnp.arange(num // 2) + offset) * 96 / (num // 2)
    radius, angle = 6.5 * (1 - k / 104), k * jnp.pi / 16
    first = radius[:, None] * jnp.stack([jnp.sin(angle), jnp.cos(angle)], 1)
    labels = jnp.repeat(jnp.array([0.0, 1.0]), num // 2)
    return jnp.concatenate([first, -first]), labels


def make_classifier(name: str, theta: float, key) -> Classifier:
    key_layers, key_head = jr.split(key)

    def make_layer(key, bound):
        network = dynamics.mlp(3, 3, 10, 3, jax.nn.relu, key)
        if bound is None:
            return eqi.ThetaLayer(dynamics.NetworkField(network), theta)
        network = eqi.with_spectral_norm(network, num_steps=1, key=key)
        field = eqi.BoundedSpectrum(dynamics.NetworkField(network), -bound, bound)
        return eqi.ThetaLayer(field, theta)

    bounds = FIELDS[name]
    bounds = None if bounds is None else jnp.array(bounds)
    keys = jr.split(key_layers, NUM_LAYERS)
    layers = eqx.filter_vmap(make_layer)(keys, bounds)
    block = eqi.ODEBlock(layers, NUM_LAYERS, stacked=True)
    return Classifier(block, eqx.nn.Linear(3, "scalar", use_bias=False, key=key_head))


def train(name: str, theta: float, config: Config):
    points, labels = spirals(config.points, 0.0)

    def loss(model, _):
        logits = jax.vmap(model)(points)
        value = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))
        return value, {"loss": value, "accuracy": accuracy(logits, labels)}

    def advance(model):
        layers = eqx.filter_vmap(eqi.advance_spectral_norms)(model.block.layer)
        return eqx.tree_at(lambda m: m.block.layer, model, layers)

    keys = jr.split(jr.key(config.seed), config.seeds)
    models = dynamics.make_models(lambda key: make_classifier(name, theta, key), keys)
    decay = max(1, round(0.045 * config.steps))
    rate = optax.exponential_decay(1e-2, decay, 0.9, staircase=True)
    # A plain field may stretch space so much that a single gradient is huge.
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return dynamics.fit(
        loss,
        models,
        optimiser,
        config.steps,
        name=f"{name}, theta {theta:g}",
        after=advance,
    )


@eqx.filter_jit
def logits_of(model: Classifier, points):
    return jax.vmap(model)(points)


def accuracy(logits, labels):
    return jnp.mean((logits > 0) == (labels > 0.5))


@eqx.filter_jit
def evaluate(model: Classifier, num_points: int):
    points, labels = spirals(num_points, 0.5)

    def shifted(size):
        """The mean over eight directions of the shift."""
        angles = jnp.arange(8) * jnp.pi / 4
        shifts = size * jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1)
        of_shift = lambda shift: accuracy(jax.vmap(model)(points + shift), labels)
        return jnp.mean(jax.vmap(of_shift)(shifts))

    train_points, train_labels = spirals(num_points, 0.0)
    growth = eqi.lipschitz_constant(
        model.block, jax.vmap(lift)(points), key=jr.key(0), num_steps=20
    )
    return {
        "train": accuracy(jax.vmap(model)(train_points), train_labels),
        "shifted": jax.vmap(shifted)(jnp.array(SHIFTS)),
        "continuous": accuracy(jax.vmap(model.continuous)(points), labels),
        "lipschitz": growth,
    }


def run(config: Config):
    for name in config.fields:
        if name not in FIELDS:
            raise UserError(f"--fields: {name} is not one of {', '.join(FIELDS)}")
    for theta in config.thetas:
        if not 0 <= theta <= 1:
            raise UserError(f"--thetas: {theta} is not between 0 and 1")
    if min(config.points, config.steps, config.seeds) < 1:
        raise UserError("--points, --steps and --seeds must be at least 1")
    results, models = {}, {}
    for theta in config.thetas:
        for name in config.fields:
            if theta > 0 and FIELDS[name] is None:
                continue
            start = time.perf_counter()
            trained, _ = train(name, theta, config)
            seconds = time.perf_counter() - start
            scores = eqx.filter_vmap(lambda m: evaluate(m, config.points))(trained)
            results[f"{name}, theta {theta:g}"] = {**scores, "seconds": seconds}
            first = lambda x: x[0] if eqx.is_array(x) else x
            models[f"{name}, theta {theta:g}"] = jax.tree.map(first, trained)
    content = experiment.result("spirals", config, rows(results), results)
    return content, models


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    known = {"plain, theta 0": (".99", ".91"), "1-Lipschitz, theta 0": ("1.00", ".97")}
    return [
        results_file.row(
            f"{name}: accuracy {where}",
            np.asarray(one["shifted"])[:, k],
            "not in the paper",
            known.get(name, ("not known", "not known"))[k],
        )
        for name, one in results.items()
        for k, where in enumerate(("unshifted", f"shifted by {SHIFTS[1]:g}"))
    ]


def report(results: dict[str, Any]) -> None:
    rows = [
        [
            name,
            results_file.spread(one["train"]),
            *(results_file.spread(one["shifted"][:, k]) for k in range(len(SHIFTS))),
            results_file.spread(one["continuous"]),
            results_file.spread(one["lipschitz"]),
            f"{one['seconds']:.0f}",
        ]
        for name, one in results["results"].items()
    ]
    header = ["", "train", "validation", *(f"shift {s:g}" for s in SHIFTS[1:])]
    results_file.print_table(header + ["continuous", "Lipschitz", "seconds"], rows)


def draw(config: Config, results, models) -> None:
    columns = len(config.fields)
    rows = -(-len(models) // columns)
    figure, axes = figures.grid(rows, columns, 3, 3)
    first, second = np.meshgrid(np.linspace(-8, 8, 150), np.linspace(-8, 8, 150))
    grid = jnp.stack([jnp.asarray(first), jnp.asarray(second)], -1).reshape(-1, 2)
    points, labels = (np.asarray(x) for x in spirals(config.points, 0.5))
    for axis, (name, model) in zip(axes.flat, models.items()):
        figures.name(axis, name)
        logits = logits_of(model, grid).reshape(first.shape)
        axis.contourf(
            first, second, np.tanh(logits / 2), 20, cmap="coolwarm", alpha=0.6
        )
        for label, colour in ((0, figures.COLOURS[0]), (1, figures.ACCENT)):
            axis.plot(*points[labels == label].T, ".", color=colour, markersize=2)
        axis.set(aspect="equal", xlim=(-8, 8), ylim=(-8, 8))
    for axis in axes.flat[len(models) :]:
        axis.remove()
    figures.save(figure, config.out, "spirals.png", "Two spirals")

    figure, axes = figures.grid(1, 1, 5, 3.2)
    for (name, one), colour in zip(results["results"].items(), figures.COLOURS):
        mean = np.mean(one["shifted"], axis=0)
        axes[0, 0].plot(SHIFTS, mean, "o-", color=colour, markersize=3, label=name)
    axes[0, 0].set(xlabel="shift", ylabel="accuracy")
    figures.legend(axes[0, 0])
    figures.save(figure, config.out, "shifts.png", "Accuracy on shifted spirals")


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = tyro.cli(Config, args=args)
    return experiment.conclude(config, run, report, draw)


if __name__ == "__main__":
    command_line.run(main)
