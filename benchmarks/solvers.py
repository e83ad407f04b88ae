"""What a fixed-point solve costs: over its own evaluations of f, in evaluations to a
tolerance, and under `jax.vmap` against the batch as one state.

    python benchmarks/solvers.py
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import evaluations
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from bench import draw_lines, Row, run, take_turns

import eqimplicit as eqi


SOLVERS: dict[str, Callable[..., Any]] = {
    "Picard": eqi.Picard,
    "Anderson": eqi.Anderson,
    "Broyden": eqi.Broyden,
}
NUM_STEPS = 10


def dense(size: int, batch: int) -> tuple[Callable, Any, Any]:
    weight = jr.normal(jr.key(0), (size, size)) / (2 * size**0.5)
    x = jr.normal(jr.key(1), (batch, size))
    fn = lambda z, args: jnp.tanh(z @ args[0] + args[1])
    return fn, jnp.zeros_like(x), (weight, x)


def elementwise(size: int) -> tuple[Callable, Any, Any]:
    """As memory-bound as can be. The slopes differ, or secant methods would be done at
    once.
    """
    x = jr.normal(jr.key(1), (size,))
    slope = jr.uniform(jr.key(2), (size,), minval=-0.9, maxval=0.9)
    return lambda z, args: args[0] * z + args[1], jnp.zeros_like(x), (slope, x)


def never_stops(solver: Callable[..., Any]) -> optx.AbstractFixedPointSolver:
    return solver(rtol=0.0, atol=1e-15)


def history_size(solver: Callable[..., Any]) -> int:
    return getattr(never_stops(solver), "history_size", 0)


def solve(fn, solver, z0, args):
    """The value, which is to be timed, and the number of evaluations."""
    solution = optx.fixed_point(fn, solver, z0, args, max_steps=NUM_STEPS, throw=False)
    return solution.value, solution.stats["num_evaluations"]


def check_evaluations(side: Callable) -> None:
    _, counts = side()
    assert jnp.all(counts == NUM_STEPS), counts


def overhead(small: bool) -> list[Row]:
    """A solve of a fixed number of steps, against as many single evaluations."""
    problems = {
        "dense 128, batch 16": dense(128, 16),
        "dense 256, batch 64": dense(256, 64),
        "dense 512, batch 256": dense(512, 256),
        "elementwise 262,144": elementwise(262_144),
    }
    if small:
        problems = {"dense 16, batch 4": dense(16, 4)}
    rows = []
    for name, (fn, z0, args) in problems.items():
        evaluate = jax.jit(fn)
        read = jax.jit(lambda h: jnp.sum(h, axis=tuple(range(1, h.ndim))))
        sides: dict[str, Callable] = {"f": lambda: evaluate(z0, args)}
        for solver_name, solver in SOLVERS.items():
            solved = eqx.filter_jit(ft.partial(solve, fn, never_stops(solver)))
            sides[solver_name] = ft.partial(solved, z0, args)
            check_evaluations(sides[solver_name])
            history = jnp.ones((2, history_size(solver), *z0.shape))
            sides[f"{solver_name}'s history"] = ft.partial(read, history)
        times = take_turns(sides, rounds=3 if small else 15)
        for solver_name in SOLVERS:
            ms, one = times.median(solver_name), times.median("f")
            rows.append(
                {
                    "problem": name,
                    "solver": solver_name,
                    "evaluations": NUM_STEPS,
                    "ms": ms,
                    "spread": times.spread(solver_name),
                    "one evaluation, ms": one,
                    "over its evaluations": times.ratio(solver_name, "f") / NUM_STEPS,
                    "more a step, ms": ms / NUM_STEPS - one,
                    "history read twice, ms": 2
                    * times.median(f"{solver_name}'s history"),
                }
            )
    return rows


def to_tolerance(small: bool) -> list[Row]:
    """Evaluations until ||f(z) - z||_2 < 1e-6, in float64; the range over the seeds."""
    with jax.enable_x64(True):
        return evaluations.table(num_seeds=1 if small else 5)


def batches(small: bool) -> list[Row]:
    """`jax.vmap` of a solve, against the same solve with the batch as one state."""
    sizes = [(256, b) for b in (1, 16, 64, 256, 1024)]
    sizes += [(16, 64), (4096, 64), (65_536, 16)]
    if small:
        sizes = [(16, 4)]
    rows = []
    for size, batch in sizes:
        is_dense = size <= 256
        fn, z0, args = dense(size, batch) if is_dense else elementwise(batch * size)
        shared, x = args
        if not is_dense:
            shared = shared[:size]
            z0, x = z0.reshape(batch, size), x.reshape(batch, size)
        one = lambda solver, z0, x, shared=shared, fn=fn: solve(
            fn, solver, z0, (shared, x)
        )
        for solver_name, solver in SOLVERS.items():
            solver = never_stops(solver)
            vmapped = jax.jit(jax.vmap(ft.partial(one, solver)))
            together = jax.jit(ft.partial(one, solver))
            sides = {
                "vmap": ft.partial(vmapped, z0, x),
                "one state": ft.partial(together, z0, x),
            }
            for side in sides.values():
                check_evaluations(side)
            times = take_turns(sides, rounds=3 if small else 9)
            rows.append(
                {
                    "cell": "dense" if is_dense else "elementwise",
                    "unknowns": size,
                    "batch": batch,
                    "solver": solver_name,
                    "evaluations": NUM_STEPS,
                    "vmap, ms": times.median("vmap"),
                    "one state, ms": times.median("one state"),
                    "ratio": times.ratio("vmap", "one state"),
                }
            )
    return rows


TABLES = {"overhead": overhead, "evaluations": to_tolerance, "batches": batches}


def draw(results, figure):
    axes = figure.subplots(1, 2)
    by_solver = lambda row: row["solver"]
    if "overhead" in results:
        draw_lines(
            axes[0],
            results["overhead"],
            "one evaluation, ms",
            "over its evaluations",
            by_solver,
        )
    if "batches" in results:
        rows = [r for r in results["batches"] if r["unknowns"] <= 256]
        rows = [r for r in rows if r["unknowns"] == rows[0]["unknowns"]]
        draw_lines(axes[1], rows, "batch", "ratio", by_solver)


if __name__ == "__main__":
    run(__doc__, TABLES, draw)
