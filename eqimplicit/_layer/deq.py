import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._adjoint.implicit import ImplicitAdjoint
from .._adjoint.probe import (
    AbstractProbedLayer,
    BackwardStatus,
    Probed,
    split_probe,
)
from .._misc import as_state, check_callable
from .._parametrisation.base import resolve
from .._parametrisation.untrained import untrained
from .base import check_solve_arguments, solve_cell, SolveOptions


def _adjoint(adjoint):
    # It finds its own tolerance, and so needs no state to be chosen for.
    return untrained(ImplicitAdjoint() if adjoint is None else adjoint)


class DEQ(AbstractProbedLayer):
    r"""A deep equilibrium layer: maps the input `x` to the solution `z` of

    $$z = \text{cell}(z, x),$$

    as a stack of infinitely many layers with the same weights would.

    Takes one example, as all of Equinox does. Under `jax.vmap` every example stops on
    its own. A cell that couples the examples, such as one with batch normalisation in
    training mode, takes the whole batch as one state and does its `vmap` inside; it is
    refused under a `vmap` with an axis name outside.

    [Parametrisations][eqimplicit.AbstractParametrisation] in the cell are resolved once
    per solve.

    ??? cite "References"

        ```bibtex
        @inproceedings{bai2019deep,
            author = {Bai, Shaojie and Kolter, J. Zico and Koltun, Vladlen},
            title = {Deep Equilibrium Models},
            booktitle = {Advances in Neural Information Processing Systems},
            year = {2019},
        }
        ```
    """

    cell: Callable
    solver: optx.AbstractFixedPointSolver | None = eqx.field(
        default=None, converter=untrained
    )
    adjoint: optx.AbstractAdjoint | None = eqx.field(default=None, converter=_adjoint)
    max_steps: int = eqx.field(default=100, static=True)
    throw: bool = eqx.field(default=False, static=True)
    init: Callable | None = None

    def __check_init__(self):
        check_callable("cell", self.cell, "cell(z, x)")
        if self.init is not None:
            check_callable("init", self.init, "init(x)")
        check_solve_arguments(self.solver, self.adjoint, self.max_steps)

    def report_to(self, probe: BackwardStatus) -> Any:
        return eqx.tree_at(lambda deq: deq.cell, self, Probed(self.cell, probe))

    def __call__(
        self,
        x: PyTree[Any],
        z0: PyTree[Array] | None = None,
        *,
        key: PRNGKeyArray | None = None,
        state: eqx.nn.State | None = None,
        probe: BackwardStatus | None = None,
    ) -> Any:
        """**Arguments:**

        - `x`: the input, any pytree, passed to the cell.
        - `z0`: the initial guess, a pytree of floating arrays of one dtype. By default
            `init(x)`, and without an `init` zeros like `x`.
        - `key`: if given, the cell is called as `cell(z, x, key=key)`, with the same
            key at every evaluation: drop-out masks are frozen within a solve. (Noise
            that is new at every evaluation comes from [`eqimplicit.Noisy`][], around
            the solver: a cell has nothing to draw it from, and with it there is a fixed
            point only in distribution.)
        - `state`: if given, an `equinox.nn.State`, and the cell is called as
            `cell(z, x, state)`, and returns a pair of its output and a new state.
            Every evaluation sees the old state; the new one is that of the last
            evaluation of the solve, and has no derivative.
        - `probe`: an [`eqimplicit.backward_probe`][]. The gradient with respect to it
            says how the backward solve went.

        **Returns:**

        The solution `z`, or with a `state` the pair of `z` and the new state. It is
        returned whether the solve has finished or not (unless `throw=True`):
        [`eqimplicit.DEQ.solve`][] tells.

        **Raises:** as [`eqimplicit.DEQ.solve`][].
        """
        solution = self.solve(x, z0, key=key, state=state, probe=probe)
        if state is None:
            return solution.value
        return solution.value, solution.aux

    def solve(
        self,
        x: PyTree[Any],
        z0: PyTree[Array] | None = None,
        *,
        key: PRNGKeyArray | None = None,
        state: eqx.nn.State | None = None,
        probe: BackwardStatus | None = None,
    ) -> optx.Solution:
        """As calling the layer, but returns the whole [`optimistix.Solution`][].

        **Arguments:** as for calling the layer.

        **Returns:**

        A [`optimistix.Solution`][]: `value` is the solution, `result` whether it was
        found, `aux` the new Equinox state if there is one. `stats` holds `num_steps`,
        and with the solvers of this package `num_evaluations` of the cell and the final
        `residual`, in the norm of the solver.

        **Raises:** a `ValueError` if the initial guess is empty, not floating, or of
        mixed dtypes, if the cell returns anything other than its state in structure,
        shape and dtype, or if it communicates along a mapped axis.
        """
        deq = self if probe is None else self.report_to(probe)
        return _solve(deq, x, z0, key, state)


@eqx.filter_jit
def _solve(deq: DEQ, x, z0, key, state):
    cell, probe = split_probe(deq.cell)
    if z0 is None:
        zeros_like = ft.partial(jtu.tree_map, jnp.zeros_like)
        z0 = zeros_like(x) if deq.init is None else resolve(deq.init)(x)
    return solve_cell(
        resolve(cell),
        x,
        as_state(z0),
        SolveOptions(deq.solver, deq.adjoint, deq.max_steps, deq.throw, "DEQ"),
        key=key,
        state=state,
        probe=probe,
        remedy="Pass `z0`, or an `init`, that matches what the cell returns.",
    )


DEQ.__init__.__doc__ = """**Arguments:**

- `cell`: a callable, as a rule a Module, `cell(z, x) -> z`.
- `solver`: an [`optimistix.AbstractFixedPointSolver`][], of this package or any other.
    Wrap a root finder in [`eqimplicit.RootAsFixedPoint`][]. By default
    [`eqimplicit.Anderson`][], to a tolerance that suits the precision of the state
    ([`eqimplicit.default_solver`][]).
- `adjoint`: an [`optimistix.AbstractAdjoint`][]: how to differentiate the solution. By
    default [`eqimplicit.ImplicitAdjoint`][]. Arrays in it and in the solver are held as
    [`eqimplicit.Untrained`][], so that no optimiser changes them.
- `max_steps`: the largest number of steps of the solver.
- `throw`: whether to raise an error, at run time, if the solve has not finished. By
    default the layer returns what it has, so that training goes on.
- `init`: a callable `init(x) -> z0` that predicts the initial guess. It is not
    differentiated, except by adjoints that differentiate the iteration.

**Raises:** a `TypeError` for arguments of the wrong kind, a `ValueError` if `max_steps`
is below 1.
"""
