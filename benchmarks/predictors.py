"""How many evaluations of the field a step of an implicit layer takes, by the initial
guess of its solve. Counts in float64, of the default solver, which returns the
iterate after the one that meets its tolerance, and of others to a tolerance of 1e-6.

    python benchmarks/predictors.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from bench import Row, run

import eqimplicit as eqi


NUM_STEPS = 50


def lotka_volterra(t, y, args):
    prey, predators = y
    return jnp.stack(
        [2 / 3 * prey - 4 / 3 * prey * predators, prey * predators - predators]
    )


def stiff(t, y, args):
    return -20.0 * (y - jnp.cos(t))


def van_der_pol(t, y, args):
    return jnp.stack([y[1], 5.0 * (1 - y[0] ** 2) * y[1] - y[0]])


PROBLEMS = {
    "Lotka-Volterra, h = 0.2": (lotka_volterra, [1.0, 1.5], 0.2),
    "stiff decay to a cosine, h = 0.1": (stiff, [1.5], 0.1),
    "van der Pol, mu = 5, h = 0.05": (van_der_pol, [2.0, 0.0], 0.05),
}
# The state before, a line or a parabola through the last ones, and an explicit step
# (whose evaluation is counted).
PREDICTORS = {
    "the state": lambda field, t, h, y, y1, y2: y,
    "a line": lambda field, t, h, y, y1, y2: 2 * y - y1,
    "a parabola": lambda field, t, h, y, y1, y2: 3 * y - 3 * y1 + y2,
    "explicit Euler": lambda field, t, h, y, y1, y2: y + h * field(t, y, None),
}
SOLVERS = {
    "the default": None,
    "Newton": eqi.RootAsFixedPoint(optx.Newton(1e-6, 1e-6), judge_step=True),
    "Anderson": eqi.Anderson(1e-6, 1e-6),
    "Picard": eqi.Picard(1e-6, 1e-6),
}


def count(problem: str, predictor: str, solver: str) -> float | None:
    """The mean number of solver steps per layer, each with one evaluation, or None
    where a layer was not solved.
    """
    field, y0, h = PROBLEMS[problem]
    layer = eqi.ThetaLayer(field, 0.5, h, solver=SOLVERS[solver])

    @eqx.filter_jit
    def run():
        def step(carry, k):
            y, y1, y2 = carry
            guess = PREDICTORS[predictor](field, k * h, h, y, y1, y2)
            solution = layer.solve(y, k * h, None, guess)
            solved = solution.result == optx.RESULTS.successful
            return (solution.value, y, y1), (solution.stats["num_steps"], solved)

        # So far nothing has changed.
        start = jnp.array(y0)
        ks = jnp.arange(float(NUM_STEPS))
        return jax.lax.scan(step, (start,) * 3, ks)[1]

    steps, solved = run()
    if not jnp.all(solved):
        return None
    return float(jnp.mean(steps)) + (predictor == "explicit Euler")


def guesses(small: bool) -> list[Row]:
    rows = []
    with jax.enable_x64(True):
        for problem in list(PROBLEMS)[: 1 if small else None]:
            for solver in SOLVERS:
                row: Row = {"problem": problem, "solver": solver}
                row |= {name: count(problem, name, solver) for name in PREDICTORS}
                rows.append(row)
    return rows


TABLES = {"initial guesses": guesses}


def draw(results, figure):
    axes = figure.subplots()
    for row in results["initial guesses"]:
        counts = [float("nan" if row[k] is None else row[k]) for k in PREDICTORS]
        axes.plot(
            list(PREDICTORS),
            counts,
            marker="o",
            label=f"{row['problem']}, {row['solver']}",
        )
    axes.set_ylabel("solver steps per layer")
    axes.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    run(__doc__, TABLES, draw)
