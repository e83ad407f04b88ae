"""The experiments of the phantom-gradient paper: random maps, and a multiscale network
(MDEQ) trained with exact and with phantom gradients.

    python examples/phantom_gradients.py --parts synthetic
    python examples/phantom_gradients.py --dataset cifar10 --data-dir data
    python examples/phantom_gradients.py --dataset digits --small

Each method and seed has a run folder of its own, so that the same command resumes.
"""

import dataclasses
import functools as ft
import pathlib
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import phantom_synthetic
import tyro
from training import (
    classifiers,
    command_line,
    devices,
    figures,
    image_data,
    loop,
    options,
    results as results_file,
)

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


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """The experiments of the phantom-gradient paper."""

    parts: tuple[Literal["synthetic", "ablation", "sweep"], ...] = (
        "synthetic",
        "ablation",
        "sweep",
    )
    """Random maps; the rows of the paper's Table 1; and k and
    lambda varied, as in its Figure 3."""

    dataset: image_data.Name = "cifar10"
    """The digits are embedded, the others are in --data-dir."""

    methods: tuple[str, ...] = ()
    """Rows of the ablation and the sweep; by default all, or
    four if small. results.json has those of one call."""

    epochs: int | None = None
    """Passes over the training images."""

    batch_size: int | None = None
    """Images per training step: 128, or 32 if small."""

    learning_rate: float = 1e-3
    """Of Adam. That of SGD is a hundred times as large. Both
    fall to zero along a cosine."""

    pretrain_steps: int = 3000
    """Of the methods with pretraining, how many steps unroll
    ten applications of the cell. At most a fifth of all."""

    max_steps: int = 22
    """The most steps of Broyden's method a solve takes."""

    seeds: int = 1
    """Runs of each method, from --seed on."""

    small: bool = False
    """A setting for two cores: a smaller network, fewer
    epochs and images, and shorter solves."""

    out: pathlib.Path | None = None
    """The folder, by default runs/phantom-DATASET."""


def make_model(method: Method, config: Config, shape, seed: int):
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


def run(
    config: Config, folder: pathlib.Path
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    small = {"epochs": 10 if config.dataset == "digits" else 5, "max_steps": 12}
    if config.small:
        config = dataclasses.replace(
            config,
            epochs=options.given(config.epochs, small["epochs"]),
            max_steps=min(config.max_steps, small["max_steps"]),
            train_size=options.given(
                config.train_size, None if config.dataset == "digits" else 2000
            ),
            batch_size=options.given(config.batch_size, 32),
        )
    config = dataclasses.replace(
        config,
        epochs=options.given(config.epochs, 50),
        batch_size=options.given(config.batch_size, 128),
    )
    for name in ("max_steps", "seeds"):
        if getattr(config, name) < 1:
            options.refuse(name, getattr(config, name), "at least 1")
    known = {
        **(SWEEP if "sweep" in config.parts else {}),
        **(METHODS if "ablation" in config.parts else {}),
    }
    for name in config.methods:
        if name not in known:
            options.refuse("methods", name, f"among {', '.join(known) or 'none'}")
    some = config.methods or (SMALL if config.small else tuple(known))
    chosen = {name: method for name, method in known.items() if name in some}
    data: Any = None
    if chosen:
        data = image_data.load(
            config.dataset, options.data_folder(config), config.train_size
        )
        if config.small:
            test = image_data.Images(*(x[:1000] for x in data.test))
            data = data._replace(test=test)
    synthetic, rows, histories = {}, [], {}
    if "synthetic" in config.parts:
        synthetic = run_synthetic()
        rows += synthetic_rows(synthetic)
    for name, method in chosen.items():
        histories[name] = [
            train(name, method, config, data, folder, seed)
            for seed in range(config.seed, config.seed + config.seeds)
        ]
        last = [metrics[-1] for metrics in histories[name]]
        rows.append(
            results_file.row(
                f"{name}: test accuracy, %",
                [100 * line["test_accuracy"] for line in last],
                method.paper if config.dataset == "cifar10" else "other data",
            )
        )
    size = ", small" if config.small else ""
    content = {
        "experiment": f"phantom gradients, {config.dataset}{size}",
        "config": dataclasses.asdict(config),
        "rows": rows,
        "synthetic": synthetic,
        "results": histories,
    }
    return content, histories


def train(name, method, config, data, folder, seed):
    steps = config.epochs * options.steps_per_epoch(config, len(data.train.labels))
    pretrain_steps = min(config.pretrain_steps, steps // 5) if method.pretrained else 0
    task = loop.Task(
        make_model(method, config, data.train.images.shape[1:], seed),
        None,
        make_forward(method.jacobian_weight),
        make_optimiser(method.optimiser, config.learning_rate, steps),
        at_step=ft.partial(at_step, pretrain_steps),
        for_prediction=without_adjoint,
        diagnose=diagnose,
    )
    plain = "".join(c if c.isalnum() else "-" for c in name).strip("-")
    metrics, _, _ = loop.train(
        task,
        data,
        # So that more methods and seeds can join the same experiment.
        dataclasses.replace(config, parts=(), methods=(name,), seed=seed, seeds=1),
        folder / f"{plain}-{seed}",
        f"{config.dataset}: {name}",
        "phantom-gradients",
    )
    return metrics


def out_folder(config):
    return config.out or pathlib.Path("runs", f"phantom-{config.dataset}")


def run_synthetic():
    with jax.enable_x64(True):
        return {
            name: phantom_synthetic.compare(name, 64, 20)
            for name in phantom_synthetic.MAPS
        }


def synthetic_rows(synthetic):
    rows = []
    for name, one in synthetic.items():
        for damping, k in ((1.0, 1), (1.0, 5), (0.5, 5), (0.5, 9), (0.1, 20)):
            i = phantom_synthetic.DAMPINGS.index(damping)
            j = phantom_synthetic.STEPS.index(k)
            rows.append(
                results_file.row(
                    f"{name}: cosine of UPG({k}, {damping:g})",
                    one["unrolled"][:, i, j],
                    "figure only",
                )
            )
    return rows


def report(content: dict[str, Any]) -> None:
    results_file.print_table(
        ["quantity", "paper", "ours"],
        [
            [row["quantity"], row["paper"], results_file.spread(row["ours"])]
            for row in content["rows"]
        ],
    )


def draw(config: Config, content: dict[str, Any], histories) -> None:
    folder = out_folder(config)
    if content["synthetic"]:
        phantom_synthetic.draw(content["synthetic"], folder)
    panels = {
        "test_accuracy": "test accuracy",
        "cosine_upg": "cosine of UPG(5, .5) with the exact gradient",
        "spectral_radius": "spectral radius of the cell's Jacobian",
    }
    for part, methods in (("ablation", METHODS), ("sweep", SWEEP)):
        lines = {name: histories[name] for name in methods if name in histories}
        if not lines:
            continue
        figure, axes = figures.grid(1, len(panels), width=4, height=3.6)
        for i, (name, runs) in enumerate(lines.items()):
            style = ("-", "--", ":")[i // len(figures.COLOURS)]
            colour = figures.COLOURS[i % len(figures.COLOURS)]
            for axis, key in zip(axes[0], panels):
                values = np.mean([[line[key] for line in run] for run in runs], axis=0)
                epochs = np.arange(1, len(values) + 1)
                axis.plot(epochs, values, style, color=colour, label=name)
        for axis, title in zip(axes[0], panels.values()):
            figures.name(axis, title)
            axis.set_xlabel("epoch")
        figures.legend_beside(figure, axes[0, 0])
        title = f"{config.dataset}: exact and phantom gradients"
        figures.save(figure, folder, f"{part}.png", title)


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = tyro.cli(Config, args=args)
    options.start(config)
    folder = out_folder(config)
    with devices.claim(folder):
        content, histories = run(config, folder)
        if not devices.is_first():
            return content
        report(content)
        results_file.save(folder, content)
        draw(config, content, histories)
        print(f"The figures and results.json are in {folder}.")
        return content


if __name__ == "__main__":
    command_line.run(main)
