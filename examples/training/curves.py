"""The figure of a training run."""

import pathlib
from typing import Any

import matplotlib.ticker

from . import figures
from .figures import ACCENT, LIGHT, name


def plot_curves(path: pathlib.Path, metrics: list[dict[str, Any]], title: str) -> None:
    """Loss, accuracies, and evaluations of the cell per solve, over the epochs."""
    figure, axes = figures.grid(1, 3, height=3.3)
    left, middle, right = axes[0]
    epochs = [line["epoch"] for line in metrics]

    def draw(axes, key, colour, label=None):
        values = [line[key] for line in metrics]
        axes.plot(epochs, values, "o-", markersize=3, color=colour, label=label)

    draw(left, "loss", ACCENT)
    left.set_ylim(0, 1.15 * max(line["loss"] for line in metrics))
    name(left, "training loss")

    draw(middle, "train_accuracy", LIGHT, "training")
    draw(middle, "test_accuracy", ACCENT, "test")
    percent = matplotlib.ticker.FuncFormatter(lambda value, _: f"{100 * value:g} %")
    middle.yaxis.set_major_formatter(percent)
    figures.legend(middle, loc="lower right")
    last = metrics[-1]["test_accuracy"]
    name(middle, f"accuracy (test set: {last:.1%})")

    if "evaluations" in metrics[-1]:
        draw(right, "evaluations", ACCENT)
        right.set_ylim(0, 1.15 * max(1, *(line["evaluations"] for line in metrics)))
    name(right, "evaluations of the cell, all solves")

    for axes in (left, middle, right):
        axes.set_xlabel("epoch", color=figures.DARK)
        axes.set_xlim(0, len(metrics) + 0.5)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    figures.save(figure, path.parent, path.name, title)
