"""What can be counted of the speed and memory of a layer: products in the compiled
program, evaluations, products with J, bytes. What has to be timed is in `benchmarks/`.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest

import eqimplicit as eqi

from .helpers import ADJOINTS, matrix_of_norm


_root = pathlib.Path(__file__).parent.parent
SIZE = 71  # that of nothing else in the program, and above what GMRES keeps whole
ITERATIONS = {"Picard": eqi.Picard, "Anderson": eqi.Anderson, "Broyden": eqi.Broyden}


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


def make(getkey, size=SIZE, norm=0.5, **kwargs):
    cell = Cell(matrix_of_norm(getkey(), size, norm))
    return eqi.DEQ(cell, **kwargs), jr.normal(getkey(), (size,))


def loss(layer, x):
    return jnp.sum(layer(x) ** 2)


def count_products(fn, layer, x):
    """The different products with the weight or its transpose in the program. XLA
    merges those of the same operands in a region, where no name is used twice.
    """
    program = eqx.filter_jit(fn).lower(layer, x).as_text()
    matrix = f"tensor<{SIZE}x{SIZE}xf64>"
    functions = dict(
        re.findall(r"func\.func \w+ @(\w+)(.*?)(?=func\.func|\Z)", program, re.DOTALL)
    )

    def count(name):
        total = sum(map(count, re.findall(r"(?<!custom_)call @(\w+)", functions[name])))
        for region in re.split(r"cond \{|\} do \{", functions[name]):
            products = re.findall("dot_general (.*, .*?), (?:.*) : (.*) -> ", region)
            total += len({operands for operands, types in products if matrix in types})
        return total

    return count("main")


@pytest.mark.parametrize("name", ITERATIONS)
def test_a_solve_has_one_product_in_its_program(getkey, name):
    layer, x = make(getkey, solver=ITERATIONS[name](1e-4, 1e-4))
    assert count_products(loss, layer, x) == 1


PRODUCTS = {
    # the loop of the solver; the evaluation that goes with the tangent of the
    # arguments, and the linearisation, which the compiler merges; and the products with
    # the transpose of J: none, one in a loop, one per step, one in each of two loops
    "JFB": 1 + 1 + 0,
    "Neumann": 1 + 2 + 1,
    "Phantom": 1 + 5 + 4,
    "Implicit": 1 + 2 + 2,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_gradient_linearises_once_and_has_a_product_a_loop(getkey, name):
    layer, x = make(getkey, adjoint=ADJOINTS[name]())
    assert count_products(eqx.filter_grad(loss), layer, x) == PRODUCTS[name]


@pytest.mark.parametrize(
    "name, most",
    [("Picard", 15.5), ("Anderson", 14.5), ("Broyden", 14.5)],
)
def test_evaluations_to_tolerance(getkey, name, most):
    """Of a Gaussian weight with gain 0.8, the mean of ten seeds."""
    solver = ITERATIONS[name](0.0, 1e-4, optx.rms_norm)

    @eqx.filter_jit
    @eqx.filter_vmap
    def count(key):
        key1, key2 = jr.split(key)
        cell = Cell(0.8 * jr.normal(key1, (100, 100)) / 10)
        solution = eqi.DEQ(cell, solver).solve(jr.normal(key2, (100,)))
        finished = solution.result == optx.RESULTS.successful
        return jnp.where(finished, solution.stats["num_evaluations"], 1000)

    counts = count(jr.split(getkey(), 10))
    assert jnp.mean(counts) <= most


@pytest.mark.parametrize("gain, most", [(0.45, 13), (0.8, 24)])
def test_products_with_the_jacobian_per_exact_gradient(getkey, gain, most):
    """With the default adjoint, on a batch as one state in float32."""
    weight = (gain * jr.normal(getkey(), (100, 100)) / 10).astype(jnp.float32)
    layer = eqi.DEQ(Cell(weight), eqi.Anderson(1e-5, 1e-5))
    x = jr.normal(getkey(), (100, 16)).astype(jnp.float32)
    loss_of = lambda z: jnp.sum(z**2)

    @jax.jit
    def report(x):
        adjoints = [layer.adjoint]
        reports = eqi.gradient_report(layer, loss_of, x, adjoints=adjoints)
        return reports[1].num_products, reports[1].residual

    products, residual = report(x)
    assert products <= most
    assert residual <= 1e-3


def compiled_gradient(layer, x):
    return eqx.filter_jit(eqx.filter_grad(loss)).lower(layer, x).compile().compiled


def temporary_bytes(layer, x):
    return compiled_gradient(layer, x).memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("all_optimisations")
@pytest.mark.parametrize("name", ADJOINTS)
def test_temporary_memory_does_not_grow_with_the_steps_nor_hold_the_jacobian(
    getkey, name
):
    size = 1000

    # The weight is a constant of the program here, not a temporary.
    layer, x = make(getkey, size, adjoint=ADJOINTS[name](), max_steps=10)
    short = temporary_bytes(layer, x)
    longer = eqi.DEQ(layer.cell, adjoint=layer.adjoint, max_steps=1000)
    assert temporary_bytes(longer, x) == short
    assert short < 0.2 * 8 * size**2


@pytest.mark.usefixtures("all_optimisations")
@pytest.mark.parametrize("name", ADJOINTS)
def test_no_host_callback_in_the_gradient_of_a_layer(getkey, name):
    layer, x = make(getkey, adjoint=ADJOINTS[name]())
    custom_call = re.compile('custom_call_target="[^"]*callback')
    assert not custom_call.search(compiled_gradient(layer, x).as_text())
    loud = eqi.DEQ(layer.cell, adjoint=layer.adjoint, throw=True)
    assert custom_call.search(compiled_gradient(loud, x).as_text())


def test_the_program_of_a_block_does_not_grow_with_its_steps(getkey):
    weight = matrix_of_norm(getkey(), 3, 1.0)
    layer = eqi.ThetaLayer(lambda t, y, args: jnp.tanh(weight @ y), 0.5, 0.1)

    def lines(num_steps):
        block = eqi.ODEBlock(layer, num_steps)
        gradient = eqx.filter_jit(eqx.filter_grad(lambda y: jnp.sum(block(y))))
        return gradient.lower(jnp.ones(3)).as_text().count("\n")

    assert lines(10) == lines(1000)


@pytest.mark.process
def test_a_split_batch_stays_split(tmp_path):
    """On two devices and more, in a process of its own, since devices are counted when
    JAX starts.
    """
    script = [sys.executable, str(_root / "benchmarks" / "scaling.py")]
    out = subprocess.run(
        [*script, "--small", "--out", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )
    assert out.returncode == 0, out.stderr
    tables = json.loads((tmp_path / "results.json").read_text())["tables"]
    rows = tables["split batches"]
    assert {row["devices"] for row in rows} == {1, 2, 4, 8}
    for row in rows:
        assert row["rows of z on each"] == 16 // row["devices"]
        assert row["all-gathers"] == 0
        assert row["difference"] < 1e-6


@pytest.mark.parametrize("platform", ("cpu", "cuda"))
@pytest.mark.parametrize("parallel", (False, True))
@pytest.mark.parametrize("size, calls", ((2, False), (3, False), (4, True)))
def test_small_systems_call_no_library(size, calls, parallel, platform):
    layer = eqi.ThetaLayer(lambda t, y, args: -(y**3))
    block = eqi.ODEBlock(layer, 10, parallel=parallel)
    gradient = jax.jit(jax.grad(lambda y: jnp.sum(block(y))))
    lowered = gradient.trace(jnp.ones(size)).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert ("lapack" in text or "cusolver" in text or "getrf" in text) == calls


@pytest.mark.process
@pytest.mark.parametrize(
    "name",
    [
        "solvers",
        "adjoints",
        "cells",
        "against_others",
        "gpu",
        "predictors",
        "convergence",
        "remedies",
        "trajectories",
        "wrappers",
    ],
)
def test_benchmarks_run(tmp_path, name):
    script = [sys.executable, str(_root / "benchmarks" / f"{name}.py"), "--small"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    out = subprocess.run(
        script, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("|") > 20
