"""How the figures of the examples look."""

import io
import pathlib
from typing import Any

import matplotlib.figure
import numpy as np

from . import files


DARK, LIGHT, ACCENT, GRID = "#374151", "#9ca3af", "#c2410c", "#e5e7eb"
COLOURS = ("#2563eb", "#c2410c", "#15803d", "#7c3aed", "#b45309", "#0e7490")


def grid(
    rows: int, columns: int, width: float = 3.3, height: float = 2.7, **kwargs: Any
) -> tuple[matplotlib.figure.Figure, np.ndarray]:
    """A figure and its axes, always an array with two dimensions."""
    size = width * columns, height * rows
    figure = matplotlib.figure.Figure(size, dpi=160, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for one in axes.flat:
        style(one)
    return figure, axes


def style(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=DARK, labelsize=9, length=0, which="both")
    axes.spines[:].set_visible(False)
    axes.xaxis.label.set_color(DARK)
    axes.yaxis.label.set_color(DARK)


def name(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=DARK)


def legend(axes: Any, **kwargs: Any) -> None:
    axes.legend(frameon=False, labelcolor=DARK, fontsize=9, **kwargs)


def legend_beside(figure: matplotlib.figure.Figure, axes: Any) -> None:
    """One legend for all axes, to their right, for more lines than fit inside."""
    handles, labels = axes.get_legend_handles_labels()
    style = dict(frameon=False, labelcolor=DARK, fontsize=9)
    figure.legend(handles, labels, loc="outside right center", **style)


def save(
    figure: matplotlib.figure.Figure, folder: pathlib.Path, file: str, title: str
) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=DARK)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write(folder / file, content.getvalue())
