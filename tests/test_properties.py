"""Random maps: every solver with every adjoint, in float64 and float32.

A case is one map with one solver, one adjoint and one precision. What a program returns
is judged by NumPy in float64. `--cases` sets how many there are; single precision runs
in a process of its own, where JAX knows no other.
"""

import functools as ft
import itertools as it
import math
import os
import subprocess
import sys
from collections.abc import Callable

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi


SIZES = (1, 3, 8, 40)
BATCH = 9  # maps of a program, which is compiled once

SOLVERS_OF_SCALE: dict[str, Callable] = {
    "the default": lambda tol, scale: None,
    "Picard": lambda tol, scale: eqi.Picard(tol, tol * scale),
    "damped Picard": lambda tol, scale: eqi.Picard(tol, tol * scale, damping=0.6),
    "Anderson": lambda tol, scale: eqi.Anderson(tol, tol * scale),
    "Broyden": lambda tol, scale: eqi.Broyden(tol, tol * scale),
    "Newton": lambda tol, scale: eqi.RootAsFixedPoint(optx.Newton(tol, tol * scale)),
}
NUM_TERMS, DAMPING = 4, 0.7
ADJOINTS: dict[str, Callable] = {
    "implicit": lambda: eqi.ImplicitAdjoint(),
    "dense": lambda: eqi.ImplicitAdjoint(lx.LU()),
    "JFB": lambda: eqi.JFBAdjoint(),
    "Neumann": lambda: eqi.NeumannAdjoint(NUM_TERMS, DAMPING),
    "phantom": lambda: eqi.PhantomAdjoint(NUM_TERMS, DAMPING),
}
PAIRS = list(it.product(SOLVERS_OF_SCALE, ADJOINTS))
TOLERANCES = {np.float64: 1e-8, np.float32: 1e-4}


# The maps


class Map(eqx.Module):
    r"""$s \sigma(W z / s + x) + b$, where $\sigma$ is the identity or tanh."""

    weight: jax.Array
    x: jax.Array
    b: jax.Array
    scale: jax.Array
    bend: jax.Array
    cotangent: jax.Array

    def __call__(self, z, b):
        z = jnp.concatenate([z["first"], z["rest"]])
        u = self.weight @ (z / self.scale) + self.x
        bent = (1 - self.bend) * u + self.bend * jnp.tanh(u)
        return split(self.scale * bent + b)


def split(z):
    return {"first": z[:1], "rest": z[1:]}


def contraction(rng, size, radius):
    matrix = rng.normal(size=(size, size))
    return 0.95 * radius * matrix / np.linalg.norm(matrix, 2)


def rotation(rng, size, radius):
    return (0.5 + radius) * np.linalg.qr(rng.normal(size=(size, size)))[0]


def non_normal(rng, size, radius):
    """A radius below one, a norm far above it."""
    matrix = 3 * np.triu(rng.normal(size=(size, size)), 1) / size**0.5
    return matrix + 0.9 * radius * np.diag(np.sign(rng.normal(size=size)))


def expansion(rng, size, radius):
    return 4 * contraction(rng, size, radius)


KINDS = (contraction, rotation, non_normal, expansion)


@st.composite
def numbers(draw):
    """What a map is made of."""
    return (
        draw(st.sampled_from(KINDS)),
        draw(st.floats(0.0, 1.0)),
        draw(st.floats(-12.0, 12.0)),
        draw(st.sampled_from((0.0, 1.0))),
        draw(st.integers(0, 2**32 - 1)),
    )


def make_map(size, kind, radius, log_scale, bend, seed):
    rng = np.random.default_rng(seed)
    scale = 10.0**log_scale
    return Map(
        weight=kind(rng, size, radius),
        x=rng.normal(size=size),
        b=scale * rng.normal(size=size),
        scale=np.array(scale),
        bend=np.array(bend),
        cotangent=rng.normal(size=size),
    )


# The program


@ft.cache
def program(solver, adjoint, dtype):
    def run(fn):
        layer = eqi.DEQ(
            fn,
            SOLVERS_OF_SCALE[solver](TOLERANCES[dtype], fn.scale),
            ADJOINTS[adjoint](),
            init=lambda x: split(jnp.zeros_like(x)),
        )

        def solve(b):
            solution = layer.solve(b)
            value = jnp.concatenate([solution.value["first"], solution.value["rest"]])
            found = solution.result == optx.RESULTS.successful
            return value, (found, solution.stats["residual"])

        value, pullback, (found, residual) = jax.vjp(solve, fn.b, has_aux=True)
        return value, found, residual, pullback(fn.cotangent)[0]

    return eqx.filter_jit(jax.vmap(run))


# The judge


def check(fn, solver, adjoint, dtype, value, found, residual, gradient):
    """One example. `fn` holds the numbers of the program, in float64."""
    if not found:
        return
    eps, tol = float(np.finfo(dtype).eps), TOLERANCES[dtype]
    size, eye = value.size, np.eye(value.size)
    u = fn.weight @ (value / fn.scale) + fn.x
    image = fn.scale * ((1 - fn.bend) * u + fn.bend * np.tanh(u)) + fn.b
    slope = (1 - fn.bend) + fn.bend / np.cosh(np.clip(u, -300, 300)) ** 2
    jacobian = slope[:, None] * fn.weight
    norm = np.linalg.norm(fn.weight, 2)

    # How far the program's own evaluation of the map may be from the exact one.
    terms = np.abs(fn.weight) @ np.abs(value / fn.scale) + np.abs(fn.x)
    rounding = (size + 8) * eps
    evaluation = rounding * (fn.scale * terms + np.abs(fn.b) + np.abs(value))
    absolute = tol if solver == "the default" else tol * fn.scale
    allowed = absolute + tol * np.abs(image) + evaluation
    damped = DAMPING * jacobian + (1 - DAMPING) * eye
    if adjoint in ("JFB", "phantom"):  # The value is some steps beyond the solution.
        grown = max(1.0, np.linalg.norm(fn.weight, np.inf))
        steps = 1 if adjoint == "JFB" else NUM_TERMS
        allowed = np.max(allowed) * (2 + 2 * grown) ** steps
    assert np.all(np.abs(image - value) <= allowed)

    # The gradient with respect to b solves (I - J)^T w = cotangent.
    matrix, g = (eye - jacobian).T, fn.cotangent
    inverse = np.linalg.inv(matrix)
    exact = inverse @ g
    length = np.linalg.norm
    # By how much the Jacobian may be another one: rounding, and another point.
    bend = fn.bend * norm**2 * (np.max(evaluation) + np.max(allowed)) / fn.scale
    moved = size**0.5 * bend + 4 * rounding * (1 + norm)
    if adjoint in ("implicit", "dense"):
        rtol = max(1e-10 if dtype == np.float64 else 1e-6, 4 * eps)
        error = rtol * length(g) + moved * (length(gradient) + length(exact))
        assert length(gradient - exact) <= length(inverse, 2) * error
        return
    if adjoint == "JFB":
        lost = np.eye(size) - matrix
    else:
        lost = np.linalg.matrix_power(damped.T, NUM_TERMS)
    largest = max(1.0, length(damped, 2)) ** NUM_TERMS * NUM_TERMS
    slack = largest * (length(g) + length(exact)) * moved
    assert length(gradient - exact + lost @ exact) <= slack
    # And so within the bound by norms.
    assert length(gradient - exact) <= length(lost, 2) * length(exact) + slack


def check_batch(solver, adjoint, dtype, size, drawn):
    maps = [make_map(size, *draw) for draw in drawn]
    stacked = jax.tree.map(lambda *xs: np.stack(xs).astype(dtype), *maps)
    run = program(solver, adjoint, dtype)
    outs = [np.asarray(x) for x in run(stacked)]
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), stacked)
    for i, drawn_map in enumerate(drawn):
        fn, out = jax.tree.map(lambda x: x[i], (exact, tuple(outs)))
        out = jax.tree.map(lambda x: np.asarray(x, np.float64), out)
        hypothesis.note(f"{drawn_map} {out}")
        check(fn, solver, adjoint, dtype, *out)
    # One input that is not a number has no answer, and no other notices.
    spoilt = eqx.tree_at(lambda m: m.b, stacked, stacked.b.copy())
    spoilt.b[0, -1] = np.nan
    others = [np.asarray(x) for x in run(spoilt)]
    assert not others[1][0] and not np.all(np.isfinite(others[0][0]))
    for a, b in zip(outs, others):
        assert np.array_equal(a[1:], b[1:], equal_nan=True)


def check_pair(index, dtype, num_cases):
    """Every size where there are cases enough, otherwise one that changes from pair to
    pair.
    """
    solver, adjoint = PAIRS[index]
    num_batches = math.ceil(num_cases / (2 * len(PAIRS) * BATCH))
    first = index + index // len(SIZES) + 2 * (dtype is np.float32)
    sizes = [SIZES[(first + i) % len(SIZES)] for i in range(min(num_batches, 4))]
    for size in sizes:

        @hypothesis.seed(index)
        @hypothesis.settings(
            max_examples=math.ceil(num_batches / len(sizes)),
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(st.lists(numbers(), min_size=BATCH, max_size=BATCH))
        def run(drawn):
            check_batch(solver, adjoint, dtype, size, drawn)

        run()


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(i, id=", ".join(pair), marks=[pytest.mark.slow] * (i % 2))
        for i, pair in enumerate(PAIRS)
    ],
)
def test_double_precision(index, num_cases):
    check_pair(index, np.float64, num_cases)


@pytest.mark.process
def test_single_precision(num_cases):
    out = subprocess.run(
        [sys.executable, "-m", "tests.test_properties", str(num_cases)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_ENABLE_X64": "0"},
    )
    assert out.returncode == 0, out.stderr


if __name__ == "__main__":
    for index in range(len(PAIRS)):
        check_pair(index, np.float32, int(sys.argv[1]))
