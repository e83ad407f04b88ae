"""What a gradient through a trajectory costs: one step after the other, all at once,
and by Diffrax with constant steps; against the length, the size of the state and the
batch.

    python benchmarks/trajectories.py

The field is a network of one hidden layer, the steps are those of the implicit midpoint
rule, by Diffrax those of the implicit Euler method and of Kvaerno 3 (by Newton's method
to 1e-5: its own way does not find all of these steps). Where torchdiffeq is installed
(`pip install torch==2.13.0 torchdiffeq`), it joins with its implicit midpoint rule; its
releases up to 0.2.5 have the explicit one only, which has nothing to solve.
"""

import functools as ft
import importlib.util
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
from bench import draw_lines, Row, run, take_turns

import eqimplicit as eqi


END = 5.0


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, size: int):
        self.mlp = eqx.nn.MLP(size, size, 16, 1, jnp.tanh, key=jr.key(0))

    def __call__(self, t, y, args):
        return self.mlp(y) - 0.3 * y


def block(num_steps: int, parallel: bool) -> Callable[[Field, Any], Any]:
    def states(field, y0):
        layer = eqi.ThetaLayer(field, step_size=END / num_steps)
        return eqi.ODEBlock(layer, num_steps, parallel=parallel).trajectory(y0)

    return states


def by_diffrax(num_steps: int, solver: Any) -> Callable[[Field, Any], Any]:
    root_finder = optx.Newton(rtol=1e-5, atol=1e-5)

    def states(field, y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver(root_finder=root_finder),
            0.0,
            END,
            END / num_steps,
            y0,
            saveat=diffrax.SaveAt(t0=True, steps=True),
            stepsize_controller=diffrax.ConstantStepSize(),
            max_steps=num_steps,
        ).ys

    return states


def by_torchdiffeq(num_steps: int, field: Field, y0: Any) -> dict[str, Callable]:
    """Its gradient, by backpropagation through its steps, if it is installed."""
    if importlib.util.find_spec("torchdiffeq") is None:
        return {}
    import torch  # pyright: ignore[reportMissingImports]
    from torchdiffeq import odeint  # pyright: ignore[reportMissingImports]
    from torchdiffeq._impl.odeint import (  # pyright: ignore[reportMissingImports]
        SOLVERS,
    )

    size = y0.shape[-1]
    mlp = torch.nn.Sequential(
        torch.nn.Linear(size, 16), torch.nn.Tanh(), torch.nn.Linear(16, size)
    )
    with torch.no_grad():
        for theirs, ours in zip((mlp[0], mlp[2]), field.mlp.layers):
            theirs.weight.copy_(torch.tensor(np.asarray(ours.weight)))
            theirs.bias.copy_(torch.tensor(np.asarray(ours.bias)))
    start, times = torch.tensor(np.asarray(y0)), torch.linspace(0, END, num_steps + 1)
    method = "implicit_midpoint" if "implicit_midpoint" in SOLVERS else "midpoint"

    def side():
        mlp.zero_grad()
        slope = lambda t, y: mlp(y) - 0.3 * y
        (odeint(slope, start, times, method=method) ** 2).mean().backward()

    return {f"torchdiffeq, {method}": side}


def gradients(num_steps: int) -> dict[str, Callable[[Field, Any], Any]]:
    methods = {
        "one by one": block(num_steps, parallel=False),
        "all at once": block(num_steps, parallel=True),
        "Diffrax, ImplicitEuler": by_diffrax(num_steps, diffrax.ImplicitEuler),
        "Diffrax, Kvaerno3": by_diffrax(num_steps, diffrax.Kvaerno3),
    }

    def gradient(states):
        def loss(field, y0):
            return jnp.mean(jax.vmap(ft.partial(states, field))(y0) ** 2)

        return eqx.filter_jit(eqx.filter_grad(loss))

    return {name: gradient(states) for name, states in methods.items()}


def compare(num_steps: int, size: int, batch: int, small: bool) -> list[Row]:
    field, y0 = Field(size), jr.normal(jr.key(1), (batch, size))
    sides = {
        name: ft.partial(gradient, field, y0)
        for name, gradient in gradients(num_steps).items()
    }
    sides |= by_torchdiffeq(num_steps, field, y0)
    times = take_turns(sides, rounds=3 if small else 11)
    return [
        {
            "steps": num_steps,
            "unknowns": size,
            "batch": batch,
            "method": name,
            "ms": times.median(name),
            "spread": times.spread(name),
            "over one by one": times.ratio(name, "one by one"),
        }
        for name in sides
    ]


def lengths(small: bool) -> list[Row]:
    counts = (5, 10) if small else (50, 200, 500, 2000)
    return [row for n in counts for row in compare(n, 2, 1, small)]


def batches(small: bool) -> list[Row]:
    sizes = (1, 2) if small else (1, 7, 50)
    return [row for n in sizes for row in compare(5 if small else 50, 2, n, small)]


def sizes(small: bool) -> list[Row]:
    counts = (2, 4) if small else (1, 2, 3, 4, 8, 128)
    return [row for n in counts for row in compare(5 if small else 200, n, 1, small)]


TABLES = {"lengths": lengths, "batches": batches, "sizes": sizes}
AXES = {"lengths": "steps", "batches": "batch", "sizes": "unknowns"}


def draw(results, figure):
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (title, rows) in zip(panels, results.items()):
        draw_lines(axes, rows, AXES[title], "ms", lambda row: row["method"])
        values = sorted({row[AXES[title]] for row in rows})
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()


if __name__ == "__main__":
    run(__doc__, TABLES, draw)
