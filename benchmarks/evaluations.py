"""How many evaluations of f each solver takes to ||f(z) - z||_2 < 1e-6, in float64.

For each family of problems, the range over the seeds. The reference is Broyden's method
with full memory, which starts from -I and takes unit steps.
"""

import functools as ft
import math
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from bench import Row

import eqimplicit as eqi


class Problem(NamedTuple):
    """z = weight z + x, or z = tanh(weight z + x)."""

    nonlinear: bool
    weight: np.ndarray
    x: np.ndarray


def make_problems(seed: int) -> dict[str, Problem]:
    rng = np.random.default_rng(seed)
    symmetric = rng.normal(size=(100, 100))
    symmetric = symmetric + symmetric.T
    symmetric /= np.linalg.norm(symmetric, 2)
    general = rng.normal(size=(100, 100))
    general /= np.linalg.norm(general, 2)
    x = rng.normal(size=100)
    gaussian = rng.normal(size=(100, 100)) / 10
    rotations = np.zeros((14, 14))
    for i, angle in enumerate(rng.uniform(0.3, 2 * math.pi - 0.3, size=7)):
        c, s = math.cos(angle), math.sin(angle)
        rotations[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    return {
        "symmetric, radius 0.9": Problem(False, 0.9 * symmetric, x),
        "symmetric, radius 0.99": Problem(False, 0.99 * symmetric, x),
        "non-symmetric, norm 0.9": Problem(False, 0.9 * general, x),
        "tanh, gain 1": Problem(True, gaussian, x),
        "tanh, gain 1.5": Problem(True, 1.5 * gaussian, x),
        "rotations, radius 1": Problem(False, rotations, rng.normal(size=14)),
    }


_picard, _anderson, _broyden = (
    ft.partial(cls, 0.0, 1e-6, optx.two_norm)
    for cls in (eqi.Picard, eqi.Anderson, eqi.Broyden)
)
SOLVERS = {
    "`Picard`": _picard(),
    "`Anderson`": _anderson(),
    "`Broyden`": _broyden(),
    "`Anderson`, history 100": _anderson(history_size=100),
    "`Broyden`, history 100": _broyden(history_size=100),
}


@eqx.filter_jit
def _solve(solver, nonlinear, weight, x):
    def fn(z, args):
        weight, x = args
        image = weight @ z + x
        return jnp.tanh(image) if nonlinear else image

    z0 = jnp.zeros_like(x)
    return optx.fixed_point(fn, solver, z0, (weight, x), max_steps=500, throw=False)


def count(solver: optx.AbstractFixedPointSolver, problem: Problem) -> int | None:
    """The number of evaluations, or None if the solve did not finish in 500."""
    nonlinear, weight, x = problem
    sol = _solve(solver, nonlinear, jnp.asarray(weight), jnp.asarray(x))
    converged = sol.result == optx.RESULTS.successful
    return int(sol.stats["num_evaluations"]) if converged else None


def count_full_memory_broyden(problem: Problem) -> int:
    nonlinear, weight, x = problem
    f = lambda z: np.tanh(weight @ z + x) if nonlinear else weight @ z + x
    z, inverse = np.zeros(len(x)), -np.eye(len(x))
    g, evaluations = f(z) - z, 1
    while np.linalg.norm(g) >= 1e-6:
        step = -inverse @ g
        z = z + step
        g_new = f(z) - z
        change = inverse @ (g_new - g)
        inverse += np.outer(step - change, step @ inverse) / (step @ change)
        g, evaluations = g_new, evaluations + 1
    return evaluations


def _range(counts: Sequence[int | None]) -> str:
    if all(count is None for count in counts):
        return "none"
    found = [count for count in counts if count is not None]
    text = f"{min(found)} to {max(found)}"
    return (
        text if len(found) == len(counts) else f"{text} ({len(found)} of {len(counts)})"
    )


def table(num_seeds: int) -> list[Row]:
    seeds = [make_problems(seed) for seed in range(num_seeds)]
    rows = []
    for name in seeds[0]:
        problems = [problems[name] for problems in seeds]
        counts = [count_full_memory_broyden(p) for p in problems]
        row = {"problem": name, "full-memory Broyden": _range(counts)}
        for solver_name, solver in SOLVERS.items():
            row[solver_name] = _range([count(solver, p) for p in problems])
        rows.append(row)
    return rows
