import equinox as eqx
import jax.core
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, Int


class SolveSummary(eqx.Module):
    """How a batch of solves went: what to print while a model trains. `str` is a line,

    `32 solves, 3 % not found, 9.7 evaluations (at most 41), residual at most 2e-03`

    **Attributes:**

    - `num_solves`: how many there were.
    - `share_not_found`: the share of them whose result is not successful.
    - `mean_evaluations`, `max_evaluations`: of the map, or steps of a solver that does
        not count evaluations.
    - `max_residual`: the largest residual, in the norm of the solver; NaN if one is
        not finite, or if the solver does not report it.
    """

    num_solves: int = eqx.field(static=True)
    share_not_found: Float[Array, ""]
    mean_evaluations: Float[Array, ""]
    max_evaluations: Int[Array, ""]
    max_residual: Float[Array, ""]

    def __str__(self):
        if isinstance(self.share_not_found, jax.core.Tracer):
            return repr(self)
        if self.share_not_found.ndim > 0:
            return repr(self)
        return (
            f"{self.num_solves} solves, {self.share_not_found:.0%} not found, "
            f"{self.mean_evaluations:.1f} evaluations (at most {self.max_evaluations}),"
            f" residual at most {self.max_residual:.0e}"
        ).replace("%", " %")


def summarise(solution: optx.Solution) -> SolveSummary:
    """Summarises the solves of a layer or a block over all axes that its solution has:
    those of `jax.vmap`, of the steps of an [`eqimplicit.ODEBlock`][], of a scan.

    Works under `jax.jit`, and costs nothing.

    !!! example

        ```python
        layer = eqi.DEQ(lambda z, x: jax.numpy.tanh(0.5 * z + x))
        solution = jax.vmap(layer.solve)(jax.numpy.ones((32, 4)))
        print(eqi.summarise(solution))
        ```

    **Arguments:**

    - `solution`: what `solve` returns of a layer or block of this package, or an
        [`optimistix.Solution`][].

    **Returns:**

    A [`eqimplicit.SolveSummary`][].
    """
    stats = solution.stats
    not_found = jnp.asarray(solution.result != optx.RESULTS.successful)
    counts = jnp.asarray(stats.get("num_evaluations", stats["num_steps"]))
    residuals = jnp.asarray(stats.get("residual", jnp.nan))
    num_solves = max(not_found.size, 1)
    return SolveSummary(
        num_solves=not_found.size,
        share_not_found=jnp.sum(not_found) / num_solves,
        mean_evaluations=jnp.sum(counts) / num_solves,
        max_evaluations=jnp.max(counts, initial=0),
        max_residual=jnp.max(residuals, initial=0),
    )
