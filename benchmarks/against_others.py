"""The gradient of z = tanh(W z + x) in this package and in others: the same problem,
and either the same number of evaluations or the same error.

    python benchmarks/against_others.py

Libraries that are not installed are left out, and the last table says why. For all of
them: Python 3.12, `pip install torch==2.13.0 torchdeq banax jaxopt anchorax`.
"""

import functools as ft
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from adjoints import exact_gradient, make_problem
from bench import draw_lines, Row, run, take_turns
from peers import Counter, LIBRARIES


OURS = "eqimplicit"
TOLERANCES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
TARGET = 1e-3


def _problems(small):
    for gain in (0.45,) if small else (0.45, 0.8):
        cell, x = make_problem(gain, *((16, 4) if small else (256, 64)))
        yield f"gain {gain}", cell, x


@ft.cache
def left_out_because() -> dict[str, str]:
    """The libraries that do not work here, found out on a tiny problem."""
    cell, x = make_problem(0.45, 4, 2)
    reasons = {}
    for library, make in LIBRARIES.items():
        try:
            for tolerance in (None, 1e-2):
                for fn in make(cell, x, 2, tolerance, Counter()).values():
                    fn()
        except Exception as error:  # of whatever kind the library raises
            reasons[library] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return reasons


def gradients(
    cell: Any, x: jax.Array, steps: int, tolerance: float | None
) -> Iterator[tuple[str, str, Any, int]]:
    """Method, library, the function and how often it evaluates f."""
    for library, make in LIBRARIES.items():
        if library in left_out_because():
            continue
        counter = Counter()
        counter.active = True
        counted = make(cell, x, steps, tolerance, counter)
        timed = make(cell, x, steps, tolerance, Counter())
        for method, fn in counted.items():
            counter.count = 0
            jax.block_until_ready(fn())
            jax.effects_barrier()
            yield method, library, timed[method], counter.count


def _measure(problem, cell, x, steps, tolerances, small):
    """The counts are those of a program with a callback in each evaluation, which the
    compiler must leave alone; it may merge some of those that are timed.
    """
    exact = exact_gradient(cell, x)
    rows, sides = [], {}
    for tolerance in tolerances:
        for method, library, fn, count in gradients(cell, x, steps, tolerance):
            found = np.asarray(fn(), np.float64)
            row: Row = {"problem": problem, "method": method, "library": library}
            if tolerance is not None:
                row["tolerance"] = tolerance
            row["evaluations of f, at most"] = count
            error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            row["relative error"] = float(error)
            rows.append(row)
            sides[str(len(rows) - 1)] = fn
    times = take_turns(sides, rounds=3 if small else 7)
    for i, row in enumerate(rows):
        row["ms"], row["spread"] = times.median(str(i)), times.spread(str(i))
        row["side"] = str(i)
    return rows, times


def _compare(rows, times):
    """Each row of a problem against ours of the same method, if we have one."""
    own = {row["method"]: row["side"] for row in rows if row["library"] == OURS}
    for row in rows:
        side = row.pop("side")
        if row["method"] in own and row["library"] != OURS:
            ratio = times.ratio(own[row["method"]], side)
            row["ours / theirs"] = ratio
            row["slower"] = OURS if ratio > 1 else row["library"]
    return rows


def equal_work(small: bool) -> list[Row]:
    """Ten Picard steps in each, whatever the residual; where the gradient is exact, ten
    steps of a Picard solve of the adjoint equation.
    """
    rows = []
    for problem, cell, x in _problems(small):
        rows += _compare(*_measure(problem, cell, x, 10, [None], small))
    return rows


def equal_error(small: bool) -> list[Row]:
    """Of the tolerances, the fastest with a relative error of at most 1e-3."""
    rows = []
    for problem, cell, x in _problems(small):
        best: dict[Any, Row] = {}
        tolerances = TOLERANCES[3:] if small else TOLERANCES
        measured, times = _measure(problem, cell, x, 200, tolerances, small)
        for row in measured:
            key = row["method"], row["library"]
            found = row["relative error"] <= TARGET
            if found and (key not in best or row["ms"] < best[key]["ms"]):
                best[key] = row
        rows += _compare(list(best.values()), times)
        for row in measured:
            name = {k: row[k] for k in ("problem", "method", "library")}
            if (row["method"], row["library"]) not in best and name not in rows:
                rows.append(name)  # did not get there, whatever its tolerance
    return rows


def left_out(small: bool) -> list[Row]:
    del small
    reasons = left_out_because().items()
    return [{"library": name, "left out, because": reason} for name, reason in reasons]


TABLES = {
    "ten evaluations": equal_work,
    "relative error 1e-3": equal_error,
    "left out": left_out,
}


def draw(results, figure):
    axes = figure.subplots(1, 2)
    for axis, title in zip(axes, list(TABLES)[:2]):
        if title in results:
            rows = [row for row in results[title] if "ms" in row]
            draw_lines(
                axis, rows, "evaluations of f, at most", "ms", lambda r: r["library"]
            )
        axis.set_title(title, loc="left", fontsize=9)


if __name__ == "__main__":
    run(__doc__, TABLES, draw)
