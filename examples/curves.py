"""The figure of a training run."""

import pathlib
from typing import Any

import matplotlib.figure
import matplotlib.ticker


_dark, _light, _accent, _grid = "#374151", "#9ca3af", "#c2410c", "#e5e7eb"


def plot_curves(path: pathlib.Path, metrics: list[dict[str, Any]], title: str) -> None:
    """Loss, accuracies, and evaluations of the cell per solve, over the epochs."""
    figure = matplotlib.figure.Figure((10, 3.3), dpi=160, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    epochs = [line["epoch"] for line in metrics]

    def draw(axes, key, colour, label=None):
        values = [line[key] for line in metrics]
        axes.plot(epochs, values, "o-", markersize=3, color=colour, label=label)

    def name(axes, text):
        axes.set_title(text, loc="left", fontsize=10, color=_dark)

    draw(left, "loss", _accent)
    left.set_ylim(0, 1.15 * max(line["loss"] for line in metrics))
    name(left, "training loss (labels smoothed)")

    draw(middle, "train_accuracy", _light, "training")
    draw(middle, "test_accuracy", _accent, "test")
    percent = matplotlib.ticker.FuncFormatter(lambda value, _: f"{100 * value:g} %")
    middle.yaxis.set_major_formatter(percent)
    middle.legend(frameon=False, loc="lower right", labelcolor=_dark)
    last = metrics[-1]["test_accuracy"]
    name(middle, f"accuracy (test set: {last:.1%})")

    draw(right, "evaluations", _accent)
    right.set_ylim(0, 1.15 * max(line["evaluations"] for line in metrics))
    name(right, "evaluations of the cell per solve")

    for axes in (left, middle, right):
        axes.set_xlabel("epoch", color=_dark)
        axes.set_xlim(0, len(metrics) + 0.5)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        axes.grid(color=_grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_dark, labelsize=9, length=0, which="both")
        axes.spines[:].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_dark)
    figure.savefig(path, format="png")
