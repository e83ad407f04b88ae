"""The two-minute introduction: the scalar equation y = d + y^5, the first example of
the JFB paper. Its solution, by iteration and as a series, and its derivative, exact and
as each adjoint gives it.

    python examples/toy_equation.py
"""

import dataclasses
import math
import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import tyro
from training import command_line, experiment, figures, files, results as results_file

import eqimplicit as eqi


ADJOINTS = {
    "exact": eqi.ImplicitAdjoint(lx.LU()),
    "JFB": eqi.JFBAdjoint(),
    "Neumann, 2 terms": eqi.NeumannAdjoint(2),
    "Neumann, 5 terms": eqi.NeumannAdjoint(5),
    "phantom, 5 steps of .5": eqi.PhantomAdjoint(5, 0.5),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Solve y = d + y^5, and differentiate the solution.

    Takes about six seconds on two cores.
    """

    points: int = 201
    """How many values of d from -1/2 to 1/2."""

    out: pathlib.Path = pathlib.Path("runs/toy")
    """The folder for the figure and results.json."""


# --8<-- [start:solve]
def cell(y, d):
    return d + y**5


def solve(d: jax.Array, adjoint: Any) -> jax.Array:
    """The solution for one d. On [-1/2, 1/2] the map contracts by a half."""
    layer = eqi.DEQ(cell, eqi.Picard(rtol=0.0, atol=1e-15), adjoint, max_steps=100)
    return layer(d)


# --8<-- [end:solve]


def series(d: np.ndarray, num_terms: int) -> np.ndarray:
    """The first terms of d + d^5 + 5 d^9 + 35 d^13 + ..., by Lagrange's inversion."""
    coefficients = [math.comb(5 * n, n) / (4 * n + 1) for n in range(num_terms)]
    terms = [c * d ** (4 * n + 1) for n, c in enumerate(coefficients)]
    return np.sum(terms, axis=0)


def run(config: Config) -> dict[str, Any]:
    if config.points < 2:
        raise command_line.UserError("--points must be at least 2")
    d = jnp.linspace(-0.5, 0.5, config.points)
    y = eqx.filter_jit(jax.vmap(lambda d: solve(d, eqi.JFBAdjoint())))(d)
    derivatives = {
        name: np.asarray(jax.jit(jax.vmap(jax.grad(lambda d: solve(d, adjoint))))(d))
        for name, adjoint in ADJOINTS.items()
    }
    y = np.asarray(y)
    formula = 1 / (1 - 5 * y**4)
    inside = np.abs(np.asarray(d)) <= 1 / 3
    by_series = np.max(np.abs(series(np.asarray(d), 60) - y)[inside])
    error = np.max(np.abs(derivatives["exact"] - formula))
    rows = [
        results_file.row(
            "distance of the solution from 60 terms of its series, |d| up to 1/3",
            by_series,
            "closed form",
        ),
        results_file.row(
            "error of the exact derivative against 1 / (1 - 5 y^4)",
            error,
            "closed form",
        ),
        results_file.row(
            "JFB's derivative over the exact one at d = 1/2",
            derivatives["JFB"][-1] / formula[-1],
            "not stated",
        ),
    ]
    results = {"d": np.asarray(d), "y": y, "formula": formula, **derivatives}
    return experiment.result("toy equation", config, rows, results)


def draw(config: Config, content: dict[str, Any]) -> None:
    results = content["results"]
    d, y = results["d"], results["y"]
    figure, axes = figures.grid(1, 3, width=3.6, height=3.2)
    left, middle, right = axes[0]
    for k, start in enumerate((-0.5, 1 / 3, 0.5)):
        path = [0.0]
        for _ in range(15):
            path.append(cell(path[-1], start))
        style = {"color": figures.COLOURS[k], "markersize": 3}
        left.plot(range(16), path, "o-", label=f"d = {start:.2g}", **style)
    figures.name(left, "iteration of y = d + y^5 from zero")
    left.set_xlabel("step")
    figures.legend(left)

    middle.plot(d, y, color=figures.DARK, label="fixed point")
    for k, terms in enumerate((1, 2, 4)):
        style = {"color": figures.COLOURS[k], "linestyle": "--"}
        label = f"series, {terms} term{'s' * (terms > 1)}"
        middle.plot(d, series(d, terms), label=label, **style)
    figures.name(middle, "solution y(d)")
    middle.set_xlabel("d")
    figures.legend(middle)

    right.plot(d, results["formula"], color=figures.GRID, linewidth=6, label="formula")
    for k, name in enumerate(ADJOINTS):
        right.plot(d, results[name], color=figures.COLOURS[k], label=name)
    figures.name(right, "derivative dy/dd")
    right.set_xlabel("d")
    figures.legend(right)
    figures.save(figure, config.out, "toy.png", "y = d + y^5")


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = tyro.cli(Config, args=args)
    with files.claim(config.out):
        with jax.enable_x64(True):
            content = run(config)
        results_file.print_table(
            ["quantity", "value"],
            [
                [row["quantity"], results_file.spread(row["ours"])]
                for row in content["rows"]
            ],
        )
        results_file.save(config.out, content)
        draw(config, content)
        print(f"The figure and results.json are in {config.out}.")
        return content


if __name__ == "__main__":
    command_line.run(main)
