"""The experiments of the JFB paper: how training fares with the Jacobian-free gradient,
several terms of the Neumann series, the paper's conjugate gradients, and the exact
gradient.

    python examples/jfb_paper.py --dataset mnist --data-dir data
    python examples/jfb_paper.py --dataset mnist --data-dir data --small

Each method and seed has a run folder of its own, so that the same command resumes.
"""

import dataclasses
import functools as ft
import pathlib
import typing
from typing import Any

import numpy as np
import tyro
from jfb_networks import augment, diagnose, make_model, make_optimiser
from jfb_settings import Method, SETTINGS, SMALL
from training import (
    classifiers,
    command_line,
    experiment,
    figures,
    image_data,
    loop,
    options,
    results as results_file,
)
from training.command_line import UserError

import eqimplicit as eqi


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Repeat the experiments of the JFB paper.

    With --small takes four to six minutes on two cores;
    without, it wants a GPU.
    """

    dataset: image_data.Name = "mnist"
    """The digits are embedded, the others are in --data-dir."""

    methods: tuple[Method, ...] | None = None
    """By default all, or explicit, jfb, neumann-5, cg, exact if
    small. explicit applies the cell once; neumann-K adds K products
    with the Jacobian; cg is conjugate gradients as the paper
    stops them, without batch normalisation in the cell, whose
    kernels have bounded norms; cg-converged is the same but
    runs to the end; exact is this package's own, with batch
    normalisation. results.json has those of one call."""

    epochs: int | None = None
    """Passes over the training images."""

    batch_size: int = 100
    """Images per training step."""

    learning_rate: float | None = None
    """Of Adam. By default the paper's, or 1e-3 if small."""

    seeds: int = 1
    """Runs of each method, from --seed on."""

    small: bool = False
    """A setting for two cores: fewer images and epochs."""

    out: pathlib.Path | None = None
    """The folder of the experiment, by default runs/jfb-..."""


def run(config: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    setting = SETTINGS[config.dataset]
    small = setting.small if config.small else {}
    if config.small:
        *size, channels = setting.latent_shape
        channels = setting.small_network.get("channels", channels)
        setting = dataclasses.replace(
            setting,
            make=ft.partial(setting.make, **setting.small_network),
            latent_shape=(*size, channels),
        )
    config = dataclasses.replace(
        config,
        methods=options.given(
            config.methods, SMALL if config.small else typing.get_args(Method)
        ),
        epochs=options.given(config.epochs, small.get("epochs", setting.epochs)),
        train_size=options.given(config.train_size, small.get("train_size")),
        learning_rate=options.given(
            config.learning_rate, 1e-3 if config.small else setting.learning_rate
        ),
    )
    if not config.methods:
        raise UserError("--methods needs at least one method")
    data = image_data.load(
        config.dataset,
        options.data_folder(config),
        config.train_size,
        small.get("test_size"),
    )
    steps = options.steps_per_epoch(config, len(data.train.labels))

    def train(method, seed):
        model, state = make_model(method, setting, data.train.images.shape[1:], seed)
        task = loop.Task(
            model,
            state,
            classifiers.forward,
            make_optimiser(
                config.learning_rate,
                setting.weight_decay,
                200 * steps if setting.augment else None,
            ),
            after=eqi.advance_spectral_norms,
            augment=augment if setting.augment else None,
            diagnose=diagnose,
            backward_patience=None,  # A method that fails is a result.
        )
        metrics, _, _ = loop.train(
            task,
            data,
            # So that more methods and seeds can join the same experiment.
            dataclasses.replace(config, methods=(method,), seed=seed, seeds=1),
            config.out / f"{method}-{seed}",
            f"{config.dataset}: {method}",
            "jfb-paper",
        )
        return metrics

    histories = experiment.each(config.methods, config, train)
    return summarise(config, setting, histories, len(data.test.labels)), histories


def summarise(config, setting, histories, test_size):
    rows, results = [], {}
    for method, runs in histories.items():
        last = [metrics[-1] for metrics in runs]
        # The first epoch of each contains the compilation.
        seconds = [
            float(np.mean([line["seconds"] for line in metrics[1:] or metrics]))
            for metrics in runs
        ]
        results[method] = {
            "test_accuracy": [line["test_accuracy"] for line in last],
            "seconds": seconds,
            "evaluations": [line.get("evaluations") for line in last],
            "unconverged": [line.get("unconverged") for line in last],
            "products": [line.get("products") for line in last],
            "gradient_cosine": [line.get("gradient_cosine") for line in last],
        }
        rows.append(
            results_file.row(
                f"{method}: test accuracy, %",
                100 * np.array(results[method]["test_accuracy"]),
                setting.paper.accuracy.get(method, "not stated"),
                setting.code.get(method, "not known"),
            )
        )
        rows.append(
            results_file.row(
                f"{method}: seconds per epoch",
                seconds,
                setting.paper.seconds.get(method, "not stated"),
            )
        )
        if method != "explicit":
            rows.append(
                results_file.row(
                    f"{method}: products with J per gradient",
                    results[method]["products"],
                    setting.paper.products.get(method, "not stated"),
                )
            )
    title = f"JFB paper, {options.data_name(config)}, {config.epochs} epochs"
    return experiment.result(title, config, rows, results, test_size=test_size)


def report(content: dict[str, Any]) -> None:
    keys = ("test_accuracy", "seconds", "evaluations", "unconverged", "products")
    keys += ("gradient_cosine",)
    rows = [
        [method, *(results_file.spread(one[key]) for key in keys)]
        for method, one in content["results"].items()
    ]
    header = ["method", "test accuracy", "s / epoch", "evaluations", "unconverged"]
    results_file.print_table([*header, "products", "cosine"], rows)


def draw(config: Any, content: Any, histories: dict[str, list[Any]]) -> None:
    """Accuracy against epochs and against time, as in the paper's figures 5, 6 and 9,
    and the cosine with the exact gradient."""
    figure, axes = figures.grid(1, 3, height=3.3)
    colours = (*figures.COLOURS, figures.LIGHT, figures.DARK)
    for (method, runs), colour in zip(histories.items(), colours):
        accuracy = np.mean([[m["test_accuracy"] for m in run] for run in runs], 0)
        seconds = np.mean([np.cumsum([m["seconds"] for m in run]) for run in runs], 0)
        epochs = np.arange(1, len(accuracy) + 1)
        style = {"color": colour, "markersize": 3, "label": method}
        axes[0, 0].plot(epochs, 100 * accuracy, "o-", **style)
        axes[0, 1].plot(seconds, 100 * accuracy, "o-", **style)
        if method != "explicit":
            cosines = np.mean([[m["gradient_cosine"] for m in run] for run in runs], 0)
            axes[0, 2].plot(epochs, cosines, "o-", **style)
    axes[0, 0].set(xlabel="epoch", ylabel="test accuracy, %")
    axes[0, 1].set(xlabel="seconds, with evaluation", ylabel="test accuracy, %")
    axes[0, 2].set(xlabel="epoch", ylabel="cosine with the exact gradient")
    figures.legend(axes[0, 0])
    title = f"{config.dataset}: the gradients of the JFB paper"
    figures.save(figure, config.out, "accuracy.png", title)


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = options.start_in(tyro.cli(Config, args=args), "jfb")
    return experiment.conclude(config, run, report, draw)


if __name__ == "__main__":
    command_line.run(main)
