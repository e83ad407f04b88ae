"""How near phantom gradients come to the exact one, on random maps: the synthetic
setting of their paper, and what their accuracy costs in conditioning.
"""

import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.ticker
import numpy as np
from training import figures, results as results_file

import eqimplicit as eqi


STEPS = (1, 2, 3, 5, 9, 20)
DAMPINGS = (1.0, 0.5, 0.1)
MAPS = ("tanh, Gaussian", "relu, Gaussian", "linear, orthogonal", "linear, symmetric")


class Cell(eqx.Module):
    """`z = activation(W z + x)`."""

    weight: jax.Array
    activation: Any = eqx.field(static=True)

    def __call__(self, z, x):
        return self.activation(self.weight @ z + x)


def make_weight(name: str, size: int, seed: int) -> np.ndarray:
    """Of norm .9."""
    weight = np.random.default_rng(seed).normal(size=(size, size))
    if name.endswith("Gaussian"):
        return 0.9 * weight / np.linalg.norm(weight, 2)
    orthogonal, _ = np.linalg.qr(weight)
    if name.endswith("orthogonal"):
        return 0.9 * orthogonal
    return orthogonal * np.linspace(0, 0.9, size) @ orthogonal.T


def compare(name: str, size: int, seeds: int) -> dict[str, Any]:
    """For every seed: the cosines of the unrolled form and of the Neumann form with the
    exact gradient, and the condition number of the matrix that is used in place of
    $(I - J)^{-1}$."""
    adjoints = [
        kind(k, damping)
        for kind in (eqi.PhantomAdjoint, eqi.NeumannAdjoint)
        for damping in DAMPINGS
        for k in STEPS
    ]
    activations = {"tanh": jnp.tanh, "relu": jax.nn.relu, "linear": lambda x: x}
    activation = activations[name.split(",")[0]]

    @jax.jit
    @jax.vmap
    def one(weight, key):
        keys = jr.split(key)
        cell = Cell(weight, activation)
        x, target = jr.normal(keys[0], (size,)), jr.normal(keys[1], (size,))
        layer = eqi.DEQ(cell, eqi.Picard(0.0, 1e-12), max_steps=1000)
        loss = lambda z: jnp.sum(jnp.square(z - target)) / 2
        _, *reports = eqi.gradient_report(layer, loss, x, adjoints=adjoints)
        jacobian = jax.jacfwd(lambda z: cell(z, x))(layer(x))
        return jnp.stack([report.cosine for report in reports]), jacobian

    weights = jnp.stack([make_weight(name, size, seed) for seed in range(seeds)])
    cosines, jacobians = one(weights, jr.split(jr.key(0), seeds))
    shape = seeds, 2, len(DAMPINGS), len(STEPS)
    unrolled, neumann = np.moveaxis(np.asarray(cosines).reshape(shape), 1, 0)
    conditions = [_conditions(np.asarray(jacobians), d) for d in DAMPINGS]
    return {
        "unrolled": unrolled,
        "neumann": neumann,
        "condition": np.stack(conditions, axis=1),
    }


def _conditions(jacobians, damping):
    """Of $\\lambda \\sum_{i < k} B^i$ with $B = \\lambda J + (1 - \\lambda) I$."""
    identity = np.eye(jacobians.shape[-1])
    step = damping * jacobians + (1 - damping) * identity
    total, totals = damping * identity + 0 * step, {}
    for k in range(1, max(STEPS) + 1):
        totals[k] = np.linalg.cond(total)
        total = damping * identity + step @ total
    return np.stack([totals[k] for k in STEPS], axis=-1)


def run() -> dict[str, dict[str, Any]]:
    with jax.enable_x64(True):
        return {name: compare(name, 64, 20) for name in MAPS}


def rows(synthetic: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for name, one in synthetic.items():
        for damping, k in ((1.0, 1), (1.0, 5), (0.5, 5), (0.5, 9), (0.1, 20)):
            i = DAMPINGS.index(damping)
            j = STEPS.index(k)
            lines.append(
                results_file.row(
                    f"{name}: cosine of UPG({k}, {damping:g})",
                    one["unrolled"][:, i, j],
                    "figure only",
                )
            )
    return lines


def draw(results: dict[str, dict[str, Any]], folder: pathlib.Path) -> None:
    """Above, the cosine against k, as in the paper's figure 1; below, against the
    condition number."""
    figure, axes = figures.grid(2, len(results), height=2.9)
    for column, (name, one) in enumerate(results.items()):
        above, below = axes[:, column]
        for i, damping in enumerate(DAMPINGS):
            cosine = one["unrolled"][:, i]
            style = {"color": figures.COLOURS[i], "label": f"damping {damping:g}"}
            above.plot(STEPS, cosine.mean(0), "o-", markersize=3, **style)
            above.fill_between(
                STEPS,
                cosine.min(0),
                cosine.max(0),
                color=figures.COLOURS[i],
                alpha=0.12,
                lw=0,
            )
            conditions = np.median(one["condition"][:, i], axis=0)
            below.plot(conditions, 1 - cosine.mean(0), "o-", markersize=3, **style)
        figures.name(above, name)
        above.set_xlabel("steps k")
        below.set(xscale="log", yscale="log", xlabel="condition number")
        below.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[0, 0].set_ylabel("cosine with the exact gradient")
    axes[1, 0].set_ylabel("1 - cosine")
    figures.legend(axes[0, 0], loc="lower right")
    figures.save(figure, folder, "synthetic.png", "Phantom gradients on random maps")
