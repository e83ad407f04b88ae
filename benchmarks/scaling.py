"""A batch that is split over several devices: whether it stays split, whether the
devices talk more than they must, and whether the values are those of one device.

    python benchmarks/scaling.py

Where there is one CPU it is taken for eight devices, which share its cores: the times
then show what the splitting costs, not what it gains.
"""

import os


os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import functools as ft  # noqa: E402
import re  # noqa: E402
from typing import Any  # noqa: E402

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import numpy as np  # noqa: E402
from adjoints import Cell  # noqa: E402
from bench import draw_lines, Row, run, take_turns  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import eqimplicit as eqi  # noqa: E402


ADJOINTS = {"JFB": eqi.JFBAdjoint(), "Implicit": eqi.ImplicitAdjoint()}


def loss_fn(layer, x):
    z = jax.vmap(layer)(x)
    return jnp.mean(z**2), z


@eqx.filter_jit
def evaluations(layer, x):
    return jax.vmap(layer.solve)(x).stats["num_evaluations"]


def split(small: bool) -> list[Row]:
    size, batch = (16, 16) if small else (256, 1024)
    weight = 0.9 * jr.normal(jr.key(0), (size, size)) / (2 * size**0.5)
    x = jr.normal(jr.key(1), (batch, size))
    rows, sides, values = [], {}, {}
    counts = [n for n in (1, 2, 4, 8) if n <= len(jax.devices())]
    for name, adjoint in ADJOINTS.items():
        for count in counts:
            mesh = Mesh(np.array(jax.devices()[:count]), "batch")
            layer = eqi.DEQ(Cell(weight), eqi.Anderson(1e-6, 1e-6), adjoint)
            layer = eqx.filter_shard(layer, NamedSharding(mesh, PartitionSpec()))
            own = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
            value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
            gradient: Any = eqx.filter_jit(value_and_grad)
            text = gradient.lower(layer, own).compile().compiled.as_text()
            (_, z), grads = gradient(layer, own)
            reference = values.setdefault(name, grads.cell.weight)
            difference = jnp.linalg.norm(
                np.asarray(grads.cell.weight) - np.asarray(reference)
            )
            sides[f"{name} {count}"] = ft.partial(gradient, layer, own)
            rows.append(
                {
                    "adjoint": name,
                    "devices": count,
                    "evaluations": int(jnp.max(evaluations(layer, own))),
                    "rows of z on each": z.addressable_shards[0].data.shape[0],
                    "all-gathers": len(re.findall(r"all-gather(-start)?\(", text)),
                    "all-reduces": len(re.findall(r"all-reduce(-start)?\(", text)),
                    "difference": float(difference / jnp.linalg.norm(reference)),
                }
            )
    times = take_turns(sides, rounds=3 if small else 9)
    for row in rows:
        side = f"{row['adjoint']} {row['devices']}"
        row["ms"], row["spread"] = times.median(side), times.spread(side)
    return rows


TABLES = {"split batches": split}


def draw(results, figure):
    if "split batches" in results:
        rows = results["split batches"]
        draw_lines(figure.subplots(), rows, "devices", "ms", lambda row: row["adjoint"])


if __name__ == "__main__":
    run(__doc__, TABLES, draw)
