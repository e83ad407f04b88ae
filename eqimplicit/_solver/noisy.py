from collections.abc import Callable

import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._custom_types import Aux, Y
from .._misc import check_key, check_not_negative
from .measure import measure, Measurement
from .wrapper import AbstractSolverWrapper, Concluded, Evaluation


def _normal(leaves, key):
    keys = jr.split(key, len(leaves))
    return [jr.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]


class Noisy(AbstractSolverWrapper[Y, Aux, Int[Array, ""]]):
    r"""Perturbs each iterate before it is evaluated, with normal noise that is new in
    every step: step $k$ evaluates

    $$z_k + s \, \varepsilon_k, \qquad \varepsilon_k \sim N(0, I)$$

    The value is the last proposal, without its noise, which is evaluated once more:
    `stats["residual"]` and the auxiliary output are its own. `result` is that of the
    noisy solve, which succeeds only at tolerances above about $s$: what ends it as a
    rule is a number of steps ([`eqimplicit.Budget`][] or `max_steps`).

    With noise there is no fixed point but in distribution: the iterates of a
    contraction are a Markov chain, whose law converges as the map contracts, to a
    spread about the fixed point of some $s$. Trained so, a cell learns to lead back to
    its solutions from around them. For solvers without a history: differences of noisy
    evaluations are no secants.

    Costs one evaluation of `f` more, and the random numbers.
    """

    solver: optx.AbstractFixedPointSolver
    scale: float | Float[Array, ""]
    key: PRNGKeyArray

    # Explicit, since type checkers would take inherited properties for fields.
    def __init__(
        self,
        solver: optx.AbstractFixedPointSolver,
        scale: float | Float[Array, ""],
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `solver`: an [`optimistix.AbstractFixedPointSolver`][].
        - `scale`: the standard deviation $s$ of the noise, in the units of the state.
        - `key`: a `jax.random.key`. The same one gives the same noise: put a new one in
            for each training step and each example.

        **Raises:** a `TypeError` if `solver` is no fixed-point solver or `key` no key;
        a `ValueError` if `scale` is negative.
        """
        self.solver = solver
        self.scale = scale
        self.key = key

    def __check_init__(self):
        check_not_negative("scale", self.scale)
        check_key(self.key)

    def start(self, y: Y, aux: Aux) -> Int[Array, ""]:
        return jnp.array(0)

    def watch(
        self, own: Int[Array, ""], evaluation: Evaluation, measurement: Measurement
    ) -> Int[Array, ""]:
        return own + 1

    def perturb(self, own: Int[Array, ""], y: Y) -> Y:
        leaves, treedef = jtu.tree_flatten(y)
        noisy = [
            leaf + lax.stop_gradient(jnp.asarray(self.scale, leaf.dtype)) * noise
            for leaf, noise in zip(leaves, _normal(leaves, jr.fold_in(self.key, own)))
        ]
        return treedef.unflatten(noisy)

    def conclude(
        self,
        own: Int[Array, ""],
        result: optx.RESULTS,
        solution: Concluded,
        last: Callable[[], Evaluation],
    ) -> Concluded:
        evaluation = last()
        residual = measure(self, evaluation.point, evaluation.image).residual
        stats = {**solution.stats, "residual": residual}
        if "num_evaluations" in stats:
            stats["num_evaluations"] = stats["num_evaluations"] + 1
        return Concluded(evaluation.point, evaluation.aux, stats)
