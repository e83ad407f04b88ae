"""Robustness of implicit residual networks to noise (Example 4 of their paper): theta
layers trained on 1000 images of MNIST, and tested on noisy ones.

    python examples/robust_resnet.py --data-dir data
    python examples/robust_resnet.py --data-dir data --small

The paper tests on the images that it trains on; this on unseen ones as well. Each
network and seed has a run folder of its own, so that the same command resumes.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np
import tyro
from robust_networks import (
    advance,
    make_forward,
    make_model,
    make_optimiser,
    SKIP,
)
from robust_noise import KINDS, NOISES, PARTS, score
from training import (
    command_line,
    experiment,
    figures,
    image_data,
    loop,
    options,
    results as results_file,
)
from training.command_line import UserError


ALL = ("0", "0.25", "0.5", "0.75", "1", SKIP)
SMALL = ("0", "0.5", "1")
# Of the paper's Table 3, in percent: top-1, and top-2, at each level of noise.
PAPER = {
    "0": ((100, 98.2, 89.2, 74.7, 59.3, 47.2), (100, 99.7, 96.7, 89.0, 75.5, 65.7)),
    "0.25": ((100, 99.6, 95.7, 86.0, 74.1, 60.4), (100, 100, 99.3, 95.2, 89.1, 79.6)),
    "0.5": ((100, 99.9, 96.3, 89.3, 77.2, 64.7), (100, 100, 99.8, 97.8, 91.1, 83.4)),
    "0.75": ((100, 99.9, 98.3, 93.2, 81.8, 69.8), (100, 100, 100, 99.0, 94.4, 87.1)),
    "1": ((100, 99.9, 98.4, 93.6, 84.7, 73.0), (100, 100, 100, 98.8, 95.0, 87.9)),
}


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Robustness of implicit residual networks to noise.

    With --small takes about four minutes on two cores;
    without, it wants a GPU.
    """

    dataset: image_data.Name = "mnist"
    """The digits are embedded, the others are in --data-dir."""

    networks: tuple[str, ...] | None = None
    """Thetas; and skip, theta 1 with five steps of gradient
    descent on the residual in place of a solve. By default
    0, 0.25, 0.5, 0.75, 1, skip; or 0, 0.5, 1 if small.
    results.json has those of one call."""

    epochs: int | None = None
    """Passes over the training images."""

    batch_size: int | None = None
    """Images per training step: 125, or 25 if small."""

    learning_rate: float = 1e-2
    """Of Adam, at first. It falls to zero along a cosine."""

    train_size: int | None = 1000
    """Train on the first so many images only."""

    alpha: float = -3.0
    """The least of the spectrum of the fields."""

    beta: float = 1.0
    """The largest of the spectrum of the fields."""

    divergence_weight: float = 1.0
    """Of the penalty on the divergence of the fields. The
    paper has 0.01, its authors' code 1."""

    seeds: int = 1
    """Runs of each network, from --seed on."""

    small: bool = False
    """A setting for two cores: a smaller network, fewer
    epochs, and 1000 test images."""

    out: pathlib.Path | None = None
    """The folder, by default runs/robust-DATASET."""


def run(config: Any) -> tuple[dict[str, Any], None]:
    config = dataclasses.replace(
        config,
        networks=options.given(config.networks, SMALL if config.small else ALL),
        epochs=options.given(config.epochs, 14 if config.small else 100),
        batch_size=options.given(config.batch_size, 25 if config.small else 125),
    )
    assert config.networks is not None and config.epochs is not None
    for network in config.networks:
        try:
            is_theta = 0 <= float(network) <= 1
        except ValueError:
            is_theta = False
        if not is_theta and network != SKIP:
            raise UserError(f"--networks: {network} is no theta from 0 to 1, nor skip")
    data = image_data.load(
        config.dataset,
        options.data_folder(config),
        config.train_size,
        1000 if config.small else None,
    )
    most = int(data.train.images.max())
    steps = config.epochs * options.steps_per_epoch(config, len(data.train.labels))

    def train(network, seed):
        task = loop.Task(
            make_model(network, config, data.train.images.shape[1:], seed),
            None,
            make_forward(config.divergence_weight),
            make_optimiser(config.learning_rate, steps),
            after=advance,
        )
        metrics, model, _ = loop.train(
            task,
            data,
            # So that more networks and seeds can join the same experiment.
            dataclasses.replace(config, networks=(network,), seed=seed, seeds=1),
            config.out / f"{network}-{seed}",
            f"{config.dataset}: theta {network}",
            "robust-resnet",
        )
        last = {key: metrics[-1][key] for key in ("evaluations", "unconverged")}
        return score(task, model, data, config, most) | last

    scores = experiment.each(config.networks, config, train)
    results = {
        network: {key: np.array([one[key] for one in some]) for key in some[0]}
        for network, some in scores.items()
    }
    title = f"noise, {options.data_name(config)}"
    size = len(data.test.labels)
    lines = rows(results, config)
    return experiment.result(title, config, lines, results, test_size=size), None


def rows(results: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """At noise .3 to .5, where the paper compares."""
    lines = []
    is_mnist = config.dataset == "mnist"
    for kind, part in itertools.product(KINDS, PARTS):
        what = f"{kind} noise, {part}ing images"
        # It does not say whether its noise is clipped. That of its authors' code is.
        is_papers = is_mnist and part == "train"
        top_1 = {
            network: np.array(one[f"{part}, {kind}, top-1"])[:, 3:]
            for network, one in results.items()
        }
        for network, values in top_1.items():
            name = network if network == SKIP else f"theta {network}"
            papers = np.mean(PAPER[network][0][3:]) if network in PAPER else None
            lines.append(
                results_file.row(
                    f"{name}, {what}: top-1, mean of .3 to .5, %",
                    np.mean(values, axis=1),
                    f"{papers:.1f}" if papers and is_papers else "not stated",
                )
            )
        if {"0", "1"} <= results.keys():
            lines.append(
                results_file.row(
                    f"theta 1 over theta 0, {what}: points",
                    np.mean(top_1["1"] - top_1["0"], axis=1),
                    "23.4" if is_papers else "not stated",
                )
            )
    return lines


def report(content: dict[str, Any]) -> None:
    keys = itertools.product((1, 2), PARTS, KINDS)
    for key in (f"{part}, {kind}, top-{top}" for top, part, kind in keys):
        table = [
            [
                network,
                *(
                    results_file.spread(np.array(one[key])[:, k])
                    for k in range(len(NOISES))
                ),
                results_file.spread(one["evaluations"]),
            ]
            for network, one in content["results"].items()
        ]
        print(f"\n{key}, %")
        header = [
            "theta",
            *(f"noise {noise:g}" for noise in NOISES),
            "evaluations, training",
        ]
        results_file.print_table(header, table)


def draw(config: Any, content: dict[str, Any], more: None) -> None:
    figure, axes = figures.grid(2, 2, width=4, height=3.3)
    colours = itertools.cycle(figures.COLOURS)
    for (network, one), colour in zip(content["results"].items(), colours):
        name = network if network == SKIP else f"theta = {network}"
        style = "s--" if network == SKIP else "o-"
        for axis, (kind, part) in zip(axes.ravel(), itertools.product(KINDS, PARTS)):
            values = np.array(one[f"{part}, {kind}, top-1"])
            axis.plot(
                NOISES, values.mean(0), style, color=colour, markersize=3, label=name
            )
            axis.fill_between(
                NOISES, values.min(0), values.max(0), color=colour, alpha=0.12, lw=0
            )
            where = "training" if part == "train" else "unseen"
            figures.name(axis, f"{where} images, {kind} noise")
            axis.set(xlabel="standard deviation of the noise", ylabel="accuracy, %")
    figures.legend_beside(figure, axes[0, 0])
    title = f"{config.dataset}: robustness to noise"
    figures.save(figure, config.out, "noise.png", title)


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = options.start_in(tyro.cli(Config, args=args), "robust")
    return experiment.conclude(config, run, report, draw)


if __name__ == "__main__":
    command_line.run(main)
