"""The results file of an experiment, and the table that is made of many."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import files


def row(
    quantity: str,
    ours: Any,
    paper: str = "not stated",
    code: str = "not known",
) -> dict[str, Any]:
    """A line of the table: a quantity, its values of all seeds, and what the paper and
    its authors' code have for it."""
    values = np.ravel(np.asarray(ours, float)).tolist()
    return {"quantity": quantity, "paper": paper, "code": code, "ours": values}


def save(folder: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes `results.json`. Arrays become lists, numbers that are not finite null."""

    def plain(value):
        if isinstance(value, pathlib.Path):
            return str(value)
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if value is None or isinstance(value, str | bool):
            return value
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list):
            return plain(value)
        return value if abs(value) < float("inf") else None

    content = json.dumps(plain(results), indent=1) + "\n"
    files.write(folder / "results.json", content.encode())


def spread(values: Any) -> str:
    """The mean of the seeds, and the range if there are several."""
    values = np.asarray(
        [np.nan if value is None else value for value in np.ravel(values)], float
    )
    mean = f"{np.mean(values):.3g}"
    if len(values) == 1:
        return mean
    return f"{mean} ({np.min(values):.3g} to {np.max(values):.3g})"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
