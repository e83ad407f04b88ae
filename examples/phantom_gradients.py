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
from typing import Any, Literal

import numpy as np
import phantom_synthetic
import tyro
from phantom_networks import (
    at_step,
    diagnose,
    make_forward,
    make_model,
    make_optimiser,
    METHODS,
    SMALL,
    SWEEP,
    without_adjoint,
)
from training import (
    command_line,
    experiment,
    figures,
    image_data,
    loop,
    options,
    results as results_file,
)


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """The experiments of the phantom-gradient paper.

    Digits with --small take about five minutes on two cores,
    random maps a minute and a half; the rest wants a GPU.
    """

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


def run(config: Any) -> tuple[dict[str, Any], None]:
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
    if config.max_steps < 1:
        options.refuse("max_steps", config.max_steps, "at least 1")
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
            config.dataset,
            options.data_folder(config),
            config.train_size,
            1000 if config.small else None,
        )
    synthetic = phantom_synthetic.run() if "synthetic" in config.parts else {}
    rows = phantom_synthetic.rows(synthetic)
    histories = experiment.each(
        chosen,
        config,
        lambda name, seed: train(name, chosen[name], config, data, seed),
    )
    for name, runs in histories.items():
        rows.append(
            results_file.row(
                f"{name}: test accuracy, %",
                [100 * metrics[-1]["test_accuracy"] for metrics in runs],
                chosen[name].paper if config.dataset == "cifar10" else "other data",
            )
        )
    title = f"phantom gradients, {options.data_name(config)}"
    content = experiment.result(title, config, rows, histories, synthetic=synthetic)
    return content, None


def train(name, method, config, data, seed):
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
        backward_patience=None,  # A method that fails is a result.
    )
    plain = "".join(c if c.isalnum() else "-" for c in name).strip("-")
    metrics, _, _ = loop.train(
        task,
        data,
        # So that more methods and seeds can join the same experiment.
        dataclasses.replace(config, parts=(), methods=(name,), seed=seed, seeds=1),
        config.out / f"{plain}-{seed}",
        f"{config.dataset}: {name}",
        "phantom-gradients",
    )
    return metrics


def report(content: dict[str, Any]) -> None:
    results_file.print_table(
        ["quantity", "paper", "ours"],
        [
            [row["quantity"], row["paper"], results_file.spread(row["ours"])]
            for row in content["rows"]
        ],
    )


def draw(config: Any, content: dict[str, Any], more: None) -> None:
    histories = content["results"]
    if content["synthetic"]:
        phantom_synthetic.draw(content["synthetic"], config.out)
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
        figures.save(figure, config.out, f"{part}.png", title)


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = options.start_in(tyro.cli(Config, args=args), "phantom")
    return experiment.conclude(config, run, report, draw)


if __name__ == "__main__":
    command_line.run(main)
