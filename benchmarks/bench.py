"""What the benchmarks share: sides that take turns, tables, and their files.

A benchmark is a dictionary of tables, each a function that takes `small` and returns
rows. Its command prints the tables and writes them to `results.json` beside a figure.
"""

import argparse
import gzip
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


Row = dict[str, Any]


class Sides:
    """The times of things that are compared, a list of turns for each."""

    def __init__(self, times: Mapping[str, list[float]]):
        self._times = times

    def median(self, name: str) -> float:
        """Milliseconds a call."""
        return statistics.median(self._times[name])

    def spread(self, name: str) -> float:
        """Half the distance between the quartiles, in milliseconds."""
        low, high = np.percentile(self._times[name], [25, 75])
        return float(high - low) / 2

    def ratio(self, name: str, to: str) -> float:
        """The median of the rounds' ratios, which slow spells of a machine leave be."""
        return statistics.median(
            a / b for a, b in zip(self._times[name], self._times[to])
        )


def take_turns(
    sides: Mapping[str, Callable[[], Any]], rounds: int = 15, turn_ms: float = 20.0
) -> Sides:
    """Times functions that take turns, so that whatever slows the machine down slows
    all of them. A turn is as many calls as take about `turn_ms`, one at the least,
    each waited for. Before it comes a pause, in which the threads of the side before go
    to sleep, and a call that wakes up its own. The first round is left out.
    """
    calls = {}
    for name, side in sides.items():
        jax.block_until_ready(side())
        start = time.perf_counter()
        jax.block_until_ready(side())
        seconds = time.perf_counter() - start
        calls[name] = max(1, round(turn_ms / 1e3 / seconds))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, side in sides.items():
            time.sleep(0.005)
            jax.block_until_ready(side())
            start = time.perf_counter()
            for _ in range(calls[name]):
                jax.block_until_ready(side())
            if i > 0:
                ms = 1e3 * (time.perf_counter() - start) / calls[name]
                times[name].append(ms)
    return Sides(times)


def machine() -> str:
    """Device and versions, in a line."""
    device = jax.devices()[0]
    packages = ("jax", "equinox", "lineax", "optimistix", "eqimplicit")
    versions = [f"{name} {_version(name)}" for name in packages]
    where = f"{len(jax.devices())} x {device.device_kind}, {os.cpu_count()} CPU cores"
    return ", ".join([where, f"Python {platform.python_version()}", *versions])


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "from its source"


def _cell(value):
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.3g}"
    return "" if value is None else str(value)


def markdown(rows: list[Row]) -> str:
    """A table whose columns are the keys of the rows, in the order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_mnist(folder: pathlib.Path) -> list[np.ndarray]:
    """Images and labels, for training and for the test, of the four published files.

    **Raises:** a `FileNotFoundError` if one of them is missing.
    """
    return [
        _read_idx(folder / f"{part}-{kind}-ubyte.gz")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]


def _read_idx(path):
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def draw_lines(
    axes: Any, rows: list[Row], x: str, y: str, group: Callable[[Row], str]
) -> None:
    """A line for each group of rows, on logarithmic axes, where zero has no place."""
    for i, name in enumerate(dict.fromkeys(map(group, rows))):
        points = [(r[x], r[y]) for r in rows if group(r) == name and r[x] and r[y]]
        if points:
            style = dict(color=f"C{i}", marker="o", markersize=3)
            axes.loglog(*zip(*points), label=name, **style)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)


def run(
    doc: str | None,
    tables: Mapping[str, Callable[[bool], list[Row]]],
    draw: Callable[[dict[str, list[Row]], Any], None],
) -> None:
    """The command line of a benchmark. `draw` takes the results and a figure."""
    import matplotlib.figure

    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="small problems, to see that it works"
    )
    parser.add_argument(
        "--tables", nargs="+", choices=list(tables), default=list(tables)
    )
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    name = pathlib.Path(parser.prog).stem
    folder = args.out or pathlib.Path("runs") / "benchmarks" / name
    results = {title: tables[title](args.small) for title in args.tables}
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "small": args.small, "tables": results}
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    figure = matplotlib.figure.Figure((10, 4), dpi=160, layout="constrained")
    draw(results, figure)
    figure.savefig(folder / "figure.png")
    print(machine())
    for title, rows in results.items():
        print(f"\n{title}\n\n{markdown(rows)}")
    print(f"\nresults.json and figure.png are in {folder}")
