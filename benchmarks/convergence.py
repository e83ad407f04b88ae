"""How the residual falls with the evaluations of f: each solver on each family of
problems of `evaluations.py`, one seed.

    python benchmarks/convergence.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from bench import Row, run
from evaluations import make_problems, SOLVERS

import eqimplicit as eqi


@eqx.filter_jit
def _history(solver, nonlinear, weight, x, num_steps):
    image = lambda z: weight @ z + x
    fn = lambda z: jnp.tanh(image(z)) if nonlinear else image(z)
    zeros = jnp.zeros_like(x)
    return eqi.convergence_history(fn, zeros, solver, num_steps=num_steps)


def residuals(small: bool) -> list[Row]:
    num_steps = 5 if small else 120
    rows = []
    with jax.enable_x64(True):
        for name, (nonlinear, weight, x) in make_problems(0).items():
            arrays = jnp.asarray(weight), jnp.asarray(x)
            for solver_name, solver in SOLVERS.items():
                history = _history(solver, nonlinear, *arrays, num_steps)
                rows += [
                    {
                        "problem": name,
                        "solver": solver_name.replace("`", ""),
                        "evaluations": k + 1,
                        "residual": float(residual),
                    }
                    for k, residual in enumerate(history)
                    if (k + 1) % 5 == 0 or k == 0
                ]
    return rows


TABLES = {"residuals": residuals}


def draw(results, figure):
    rows = results["residuals"]
    figure.set_size_inches(10, 6)
    names = dict.fromkeys(row["problem"] for row in rows)
    for name, axes in zip(names, figure.subplots(2, 3, sharey=True).ravel()):
        for i, solver in enumerate(dict.fromkeys(row["solver"] for row in rows)):
            points = [
                (row["evaluations"], row["residual"])
                for row in rows
                if (row["problem"], row["solver"]) == (name, solver)
            ]
            style = "--" if "100" in solver else "-"
            axes.semilogy(*zip(*points), style, color=f"C{i % 3}", label=solver)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set(ylim=(1e-9, 1e3), xlabel="evaluations")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("residual")
    figure.axes[0].legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    run(__doc__, TABLES, draw)
