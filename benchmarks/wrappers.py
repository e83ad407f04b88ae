"""What the solvers around solvers, and a probe of the backward solve, add to the time
of a training step.

    python benchmarks/wrappers.py

The cell is a dense layer; a batch is solved in a fixed number of steps by each solver,
bare and wrapped, and differentiated without a backward solve. The probe watches exact
gradients, by a solver that reports its residual and by one for which one more product
measures it.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from bench import Row, run, take_turns

import eqimplicit as eqi


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda solver: solver,
    "Budget": lambda solver: eqi.Budget(solver, jnp.array(20)),
    "Patience": lambda solver: eqi.Patience(solver, 20),
    "BestSoFar": eqi.BestSoFar,
    "Recorded": lambda solver: eqi.Recorded(solver, 20),
    "Noisy": lambda solver: eqi.Noisy(solver, 1e-3, jr.key(2)),
    "all five": lambda solver: eqi.Noisy(
        eqi.Recorded(eqi.BestSoFar(eqi.Patience(eqi.Budget(solver, 20), 20)), 20),
        1e-3,
        jr.key(2),
    ),
}
SOLVERS = {"Picard": eqi.Picard, "Anderson": eqi.Anderson}
LINEAR_SOLVERS = {
    "the default": eqi.ImplicitAdjoint(),
    "GMRES": eqi.ImplicitAdjoint(eqi.GMRES(1e-6, 0.0)),
    "lineax.LU": eqi.ImplicitAdjoint(lx.LU()),
}


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


def problem(batch: int, size: int) -> tuple[Cell, jax.Array]:
    weight = 0.45 * jr.normal(jr.key(0), (size, size)) / size**0.5
    return Cell(weight), jr.normal(jr.key(1), (batch, size))


def gradient(make: Callable[[Cell], eqi.DEQ], watched: bool) -> Callable[..., Any]:
    def loss(pair, xs):
        cell, probe = pair
        probe = probe if watched else None
        layer = make(cell)
        return jnp.mean(jax.vmap(lambda x: layer(x, probe=probe))(xs) ** 2)

    return eqx.filter_jit(eqx.filter_grad(loss))


def compare(
    sides: dict[str, Callable[..., Any]], batch: int, size: int, small: bool
) -> list[Row]:
    cell, xs = problem(batch, size)
    pair = cell, eqi.backward_probe()
    calls = {name: ft.partial(side, pair, xs) for name, side in sides.items()}
    times = take_turns(calls, rounds=3 if small else 15)
    first = next(iter(sides))
    return [
        {
            "batch": batch,
            "unknowns": size,
            "side": name,
            "ms": times.median(name),
            "over the first": times.ratio(name, first),
        }
        for name in sides
    ]


def wrappers(small: bool) -> list[Row]:
    def side(solver, wrap):
        # Never met.
        wrapped = wrap(solver(rtol=0.0, atol=1e-30))
        make = lambda cell: eqi.DEQ(cell, wrapped, eqi.JFBAdjoint(), max_steps=10)
        return gradient(make, watched=False)

    rows = []
    for name, solver in SOLVERS.items():
        sides = {f"{name}, {w}": side(solver, wrap) for w, wrap in WRAPPERS.items()}
        for batch, size in ((2, 4),) if small else ((1, 64), (64, 256)):
            rows += compare(sides, batch, size, small)
    return rows


def probes(small: bool) -> list[Row]:
    rows = []
    for name, adjoint in LINEAR_SOLVERS.items():
        make = lambda cell, adjoint=adjoint: eqi.DEQ(cell, adjoint=adjoint)
        sides = {
            name: gradient(make, watched=False),
            f"{name}, with a probe": gradient(make, watched=True),
        }
        batch, size = (2, 4) if small else (64, 64)
        rows += compare(sides, batch, size, small)
    return rows


def draw(results, figure):
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (title, rows) in zip(panels, results.items()):
        labels = [f"{row['side']} ({row['batch']} x {row['unknowns']})" for row in rows]
        axes.barh(labels, [row["over the first"] for row in rows])
        axes.set(title=title, xlabel="over the first of its group")
        axes.tick_params(labelsize=5)


TABLES = {"wrappers": wrappers, "probes": probes}

if __name__ == "__main__":
    run(__doc__, TABLES, draw)
