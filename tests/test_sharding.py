"""Layers on several devices, in a process of its own, since devices are counted when
JAX starts.
"""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import eqimplicit as eqi


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


class SplitCell(eqx.Module):
    """Each device holds some columns of the weight."""

    weight: jax.Array
    mesh: Mesh = eqx.field(static=True)

    def __call__(self, z, x):
        product = jax.shard_map(
            lambda weight, z: jax.lax.psum(weight @ z, "model"),
            mesh=self.mesh,
            in_specs=(P(None, "model"), P("model")),
            out_specs=P(),
            axis_names={"model"},
        )(self.weight, z)
        return jnp.tanh(product + x)


class Field(eqx.Module):
    cell: eqx.Module

    def __call__(self, t, y, args):
        return self.cell(y, -y)


def main():
    mesh = Mesh([jax.devices()[:2], jax.devices()[2:]], ("data", "model"))
    weight = 0.15 * jr.normal(jr.key(0), (8, 8))
    xs = jr.normal(jr.key(1), (6, 8))
    layers = {
        "DEQ": eqi.DEQ,
        "DEQ, JFB": lambda cell: eqi.DEQ(cell, adjoint=eqi.JFBAdjoint()),
        "ThetaLayer": lambda cell: eqi.ThetaLayer(Field(cell), step_size=0.1),
    }
    for name, make in layers.items():

        def plain(weight, xs):
            return jax.vmap(make(Cell(weight)))(xs)

        def mapped(weight, xs, **kwargs):
            specs = dict(in_specs=(P(), P("data")), out_specs=P("data"))
            return jax.shard_map(plain, mesh=mesh, check_vma=False, **specs, **kwargs)(
                weight, xs
            )

        def half_mapped(weight, xs):
            return mapped(weight, xs, axis_names={"data"})

        def split(weight, xs):
            return jax.vmap(make(SplitCell(weight, mesh)))(xs)

        def run(fn):
            loss = lambda weight, xs: jnp.sum(fn(weight, xs) ** 2)
            return jax.jit(jax.value_and_grad(loss, (0, 1)))(weight, xs)

        expected = run(plain)
        for fn in (mapped, half_mapped, split):
            assert eqx.tree_equal(run(fn), expected, rtol=1e-5, atol=1e-5), (name, fn)


@pytest.mark.process
def test_layers_run_on_several_devices():
    """Batches that are split by hand, and weights that are."""
    out = subprocess.run(
        [sys.executable, "-m", "tests.test_sharding"],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    assert out.returncode == 0, out.stderr


if __name__ == "__main__":
    main()
