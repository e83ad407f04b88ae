"""What a gradient costs: its error against its time and its products with J, for every
adjoint; and the memory and compilation that it takes.

    python benchmarks/adjoints.py
"""

import functools as ft
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optimistix as optx
from bench import draw_lines, Row, run, take_turns

import eqimplicit as eqi


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(z @ self.weight.T + x)


def make_problem(gain: float, size: int, batch: int) -> tuple[Cell, jax.Array]:
    """A Gaussian weight with that gain, easy for 0.45. A gain of zero stands for a hard
    one: 0.9 times orthogonal, with inputs so small that tanh hardly damps it.
    """
    weight = jr.normal(jr.key(0), (size, size))
    x = jr.normal(jr.key(1), (batch, size))
    if gain > 0:
        return Cell(gain * weight / size**0.5), x
    return Cell(0.9 * jnp.linalg.qr(weight)[0]), 0.01 * x


MAPS = {"Gaussian": 0.45, "orthogonal": 0.0}


def exact_gradient(cell: Cell, x: jax.Array) -> np.ndarray:
    """Of half the sum of squares of the fixed point, with respect to the weight, by
    dense linear algebra in float64.
    """
    weight, x64 = np.asarray(cell.weight, np.float64), np.asarray(x, np.float64)
    z = np.zeros_like(x64)
    for _ in range(2000):
        z = np.tanh(z @ weight.T + x64)
    slope = 1 - z**2
    eye = np.eye(len(weight))
    w = [np.linalg.solve(eye - weight.T * s, y) for s, y in zip(slope, z)]
    return (np.array(w) * slope).T @ z


def _implicit(tolerance):
    fallback = eqi.GMRES(tolerance, 0.0)
    return eqi.ImplicitAdjoint(eqi.NeumannKrylov(tolerance, 0.0, fallback))


FAMILIES: dict[str, Callable[[float], optx.AbstractAdjoint]] = {
    "Neumann": lambda k: eqi.NeumannAdjoint(int(k)),
    "Phantom, damping 0.5": lambda k: eqi.PhantomAdjoint(int(k), damping=0.5),
    "Adaptive Neumann": lambda share: eqi.AdaptiveNeumannAdjoint(share, 200),
    "Implicit": _implicit,
    "Implicit, GMRES": lambda tol: eqi.ImplicitAdjoint(eqi.GMRES(tol, 0.0)),
    "Optimistix, GMRES": lambda tol: optx.ImplicitAdjoint(lx.GMRES(tol, tol)),
}
SERIES = "Neumann", "Phantom, damping 0.5"
TERMS, TOLERANCES = (2, 5, 10, 20, 40), (1e-1, 1e-2, 1e-3, 1e-4)


def make_layer(cell: Cell, adjoint: optx.AbstractAdjoint) -> eqi.DEQ:
    solver = eqi.Anderson(0.0, 1e-6, optx.rms_norm)
    return eqi.DEQ(cell, solver, adjoint, max_steps=200)


def loss_fn(layer, x, z0):
    return jnp.sum(layer(x, z0) ** 2) / 2


def work_precision(small: bool) -> list[Row]:
    """The layer starts at its fixed point, so that the time is that of the gradient and
    of one or two evaluations of f.
    """
    size, batch = (16, 4) if small else (256, 64)
    rows = []
    for map, gain in list(MAPS.items())[: 1 if small else None]:
        cell, x = make_problem(gain, size, batch)
        exact = exact_gradient(cell, x)
        z = eqx.filter_jit(make_layer(cell, eqi.JFBAdjoint()))(x)
        adjoints: dict[Any, optx.AbstractAdjoint] = {("JFB", 1.0): eqi.JFBAdjoint()}
        for family, make in FAMILIES.items():
            settings = TERMS if family in SERIES else TOLERANCES
            for setting in settings[:1] if small else settings:
                adjoints[family, setting] = make(setting)
        ours = {
            key: adjoint
            for key, adjoint in adjoints.items()
            if not isinstance(adjoint, optx.ImplicitAdjoint)
        }
        layer = make_layer(cell, eqi.JFBAdjoint())
        _, *reports = eqx.filter_jit(eqi.gradient_report)(
            layer, lambda z: jnp.sum(z**2) / 2, x, z, adjoints=list(ours.values())
        )
        products = {key: int(one.num_products) for key, one in zip(ours, reports)}
        sides, errors = {}, {}
        for key, adjoint in adjoints.items():
            layer = make_layer(cell, adjoint)
            gradient = eqx.filter_jit(eqx.filter_grad(loss_fn))
            found = np.asarray(gradient(layer, x, z).cell.weight, np.float64)
            errors[key] = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            sides[str(key)] = ft.partial(gradient, layer, x, z)
        times = take_turns(sides, rounds=3 if small else 7)
        for key in adjoints:
            rows.append(
                {
                    "map": map,
                    "adjoint": key[0],
                    "terms or tolerance": key[1],
                    "relative error": float(errors[key]),
                    "products with J": products.get(key),
                    "ms": times.median(str(key)),
                    "spread": times.spread(str(key)),
                }
            )
    return rows


def memory(small: bool) -> list[Row]:
    """Temporary memory of a gradient, and the seconds to compile it."""
    sizes, all_steps = ((16,), (10,)) if small else ((256, 1024), (10, 1000))
    adjoints = {
        "JFB": eqi.JFBAdjoint(),
        "Neumann, 5 terms": eqi.NeumannAdjoint(5),
        "Phantom, 5 steps": eqi.PhantomAdjoint(5),
        "Implicit": eqi.ImplicitAdjoint(),
        "unrolled, checkpointed": optx.RecursiveCheckpointAdjoint(),
    }
    rows = []
    for size in sizes:
        cell, x = make_problem(MAPS["Gaussian"], size, 16)
        for name, adjoint in adjoints.items():
            for max_steps in all_steps:
                layer = eqi.DEQ(cell, adjoint=adjoint, max_steps=max_steps)
                gradient: Any = eqx.filter_jit(eqx.filter_grad(loss_fn))
                start = time.perf_counter()
                compiled = gradient.lower(layer, x, jnp.zeros_like(x)).compile()
                seconds = time.perf_counter() - start
                analysis = compiled.compiled.memory_analysis()
                rows.append(
                    {
                        "adjoint": name,
                        "unknowns": 16 * size,
                        "max_steps": max_steps,
                        "temporary, states": analysis.temp_size_in_bytes / x.nbytes,
                        "compilation, s": seconds,
                    }
                )
    return rows


def roulette(small: bool) -> list[Row]:
    """The randomised series against as many terms of the plain one: the error of its
    mean over many draws, and of a single draw.
    """
    size, batch, draws = (16, 4, 20) if small else (64, 16, 2000)
    rows = []
    for map, gain in MAPS.items():
        cell, x = make_problem(gain, size, batch)
        exact = exact_gradient(cell, x)
        whole = np.linalg.norm(exact)
        z = eqx.filter_jit(make_layer(cell, eqi.JFBAdjoint()))(x)
        for mean_terms in (5, 10, 20):

            def gradient(key, mean_terms=mean_terms, cell=cell, x=x, z=z):
                adjoint = eqi.RandomisedNeumannAdjoint(mean_terms, key=key)
                loss = lambda cell: loss_fn(make_layer(cell, adjoint), x, z)
                return eqx.filter_grad(loss)(cell).weight

            keys = jr.split(jr.key(2), draws)
            found = np.asarray(jax.jit(lambda k: jax.lax.map(gradient, k))(keys))
            plain = make_layer(cell, eqi.NeumannAdjoint(mean_terms))
            fixed = eqx.filter_jit(eqx.filter_grad(loss_fn))(plain, x, z).cell.weight
            error = lambda gradient: float(np.linalg.norm(gradient - exact) / whole)
            rows.append(
                {
                    "map": map,
                    "terms": mean_terms,
                    "Neumann": error(np.asarray(fixed)),
                    "mean of the draws": error(np.mean(found, axis=0)),
                    "a draw, median": float(np.median([error(one) for one in found])),
                    "a draw, root mean square": float(
                        np.mean([error(one) ** 2 for one in found]) ** 0.5
                    ),
                }
            )
    return rows


TABLES = {"work-precision": work_precision, "memory": memory, "roulette": roulette}


def draw(results, figure):
    figure.set_size_inches(10, 7)
    axes = figure.subplots(2, 2, sharey="col")
    rows = results.get("work-precision", [])
    for column, map in zip(axes.T, MAPS):
        column[0].set_title(map, loc="left", fontsize=9)
        for axis, x in zip(column, ("ms", "products with J")):
            own = [row for row in rows if row["map"] == map]
            if own:
                draw_lines(axis, own, x, "relative error", lambda row: row["adjoint"])


if __name__ == "__main__":
    run(__doc__, TABLES, draw)
