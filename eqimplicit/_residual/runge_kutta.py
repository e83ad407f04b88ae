from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._custom_types import Y
from .._layer.base import check_solve_arguments, SolveOptions
from .._parametrisation.untrained import untrained
from .base import (
    AbstractImplicitLayer,
    as_time,
    check_residual_layer,
    explicit_solution,
    initial_guess,
    prepare,
    StepEquation,
)
from .tableau import ButcherTableau


class RungeKuttaLayer(AbstractImplicitLayer):
    r"""A residual layer that is one step of any Runge-Kutta method for
    $\dot y = F(t, y)$, with the slopes $k_i$ of its $s$ stages found together:

    $$k_i = F\Big(t + c_i h, y + h \sum_j a_{ij} k_j\Big), \qquad
    y' = y + h \sum_i b_i k_i$$

    (equation (7) of the paper). If the state is a tuple of parts, each may have a
    tableau of its own: a partitioned method, for Hamiltonian systems
    ([`eqimplicit.HamiltonianField`][]).

    Use it where the order 2 of [`eqimplicit.ThetaLayer`][] is too low for the steps
    that the data allow: a learned field is then closer to the true one.

    A step backwards solves the same equation with $a_{ij} - b_j$ instead of $a_{ij}$.

    Costs those of the solver on $s$ times as many unknowns as the state has, with $s$
    evaluations of $F$ (as a batch) for each of the equation.

    ??? cite "References"

        ```bibtex
        @book{hairer1996solving,
            author = {Hairer, Ernst and Wanner, Gerhard},
            title = {Solving Ordinary Differential Equations {II}: Stiff and
                     Differential-Algebraic Problems},
            publisher = {Springer},
            year = {1996},
        }
        ```
    """

    vector_field: Callable
    tableau: ButcherTableau | tuple[ButcherTableau, ...] = eqx.field(static=True)
    step_size: float | Float[Array, ""] = 1.0
    solver: optx.AbstractFixedPointSolver | None = eqx.field(
        default=None, converter=untrained
    )
    adjoint: optx.AbstractAdjoint | None = eqx.field(default=None, converter=untrained)
    max_steps: int = eqx.field(default=50, static=True)
    throw: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        check_residual_layer(self.vector_field, self.step_size, self.adjoint)
        if not all(isinstance(x, ButcherTableau) for x in _tableaux(self.tableau)):
            raise TypeError(
                "`tableau` must be a `eqimplicit.ButcherTableau`, or a tuple of them. "
                f"Got {self.tableau!r}."
            )
        if len({len(x.b) for x in _tableaux(self.tableau)}) != 1:
            raise ValueError(
                "The tableaux of a partitioned method must have equally many stages. "
                f"Got {self.tableau!r}."
            )
        check_solve_arguments(self.solver, self.adjoint, self.max_steps)

    @property
    def options(self) -> SolveOptions:
        return SolveOptions(
            self.solver, self.adjoint, self.max_steps, self.throw, "RungeKuttaLayer"
        )

    @property
    def is_explicit(self) -> bool:
        return all(tableau.is_explicit for tableau in _tableaux(self.tableau))

    @property
    def order(self) -> int:
        return min(tableau.order for tableau in _tableaux(self.tableau))

    def solve(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        return _step(self, y, as_time(t), args, z0, forwards=True)

    def invert(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        return _step(self, y, as_time(t), args, z0, forwards=False)

    def equation(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> StepEquation:
        return _equation(self, y, as_time(t), args, z0, forwards=True)

    def _tableau_of_each_leaf(self, y):
        if isinstance(self.tableau, ButcherTableau):
            return [self.tableau] * len(jtu.tree_leaves(y))
        if not isinstance(y, tuple) or len(y) != len(self.tableau):
            raise ValueError(
                f"With {len(self.tableau)} tableaux the state must be a tuple of "
                f"{len(self.tableau)} parts. Got a state of the structure "
                f"{jtu.tree_structure(y)}."
            )
        return [x for x, part in zip(self.tableau, y) for _ in jtu.tree_leaves(part)]


def _equation(layer, y, t, args, z0, *, forwards):
    field, y = prepare(layer, y, t, args)
    tableaux = tuple(layer._tableau_of_each_leaf(y))
    h, num_stages = layer.step_size, len(tableaux[0].b)

    def slopes_from(change):
        # A step of length zero has slopes as well.
        length = jnp.where(h == 0, 1, h if forwards else -h)

        def in_each_stage(leaf):
            slope = leaf / length.astype(leaf.dtype)
            return jnp.broadcast_to(slope, (num_stages, *leaf.shape))

        return jtu.tree_map(in_each_stage, change)

    def new_state(slopes):
        leaves, treedef = jtu.tree_flatten(y)
        weights = [
            jnp.asarray(x.b if forwards else [-b for b in x.b]) for x in tableaux
        ]
        return treedef.unflatten(
            _increments(leaves, h, weights, jtu.tree_leaves(slopes))
        )

    change = jtu.tree_map(jnp.subtract, initial_guess(y, z0), y)
    return StepEquation(
        _Stages(field, tableaux, forwards),
        (y, t, h, args),
        slopes_from(change),
        new_state=new_state,
        scale=slopes_from,
    )


@eqx.filter_jit
def _step(layer: RungeKuttaLayer, y, t, args, z0, *, forwards):
    equation = _equation(layer, y, t, args, z0, forwards=forwards)
    if not forwards or not layer.is_explicit:
        return layer.solve_equation(equation, y)
    slopes = _explicit_slopes(equation.cell, *equation.x)
    return explicit_solution(equation.new_state(slopes), layer.options)


RungeKuttaLayer.__init__.__doc__ = r"""**Arguments:**

- `vector_field`: a callable, as a rule a Module, `vector_field(t, y, args) -> dy/dt`,
    as in Diffrax.
- `tableau`: a [`eqimplicit.ButcherTableau`][], for example
    `eqi.ButcherTableau.gauss_legendre(2)`; or a tuple of them, with equally many
    stages, for a state that is a tuple of as many parts.
- `step_size`: $h$, in the units of `t`. A Python float, or a scalar array, which is
    differentiated.
- `solver`, `adjoint`, `max_steps`, `throw`: as for [`eqimplicit.ThetaLayer`][], for the
    slopes. An explicit tableau needs none of them.

**Raises:** a `TypeError` for arguments of the wrong kind, a `ValueError` if `step_size`
is not positive, if tableaux differ in their number of stages, or if `max_steps` is
below 1.
"""


def _tableaux(tableau):
    return tableau if isinstance(tableau, tuple) else (tableau,)


def _increments(leaves, h, weights, slopes):
    """Each leaf with its slopes added, as many times over as its weights say."""
    return [
        leaf
        + jnp.asarray(h, leaf.dtype)
        * jnp.tensordot(weight.astype(leaf.dtype), slope, axes=1)
        for leaf, weight, slope in zip(leaves, weights, slopes)
    ]


def _explicit_slopes(stages: Any, y, t, h, args):
    """One stage after the other, each from those before it."""
    field, tableaux = stages.vector_field, stages.tableaux
    leaves, treedef = jtu.tree_flatten(y)
    slopes = [jnp.zeros((0, *leaf.shape), leaf.dtype) for leaf in leaves]
    for i in range(len(tableaux[0].b)):
        weights = [jnp.asarray(x.a[i][:i]) for x in tableaux]
        stage = treedef.unflatten(_increments(leaves, h, weights, slopes))
        nodes = {x.c[i] for x in tableaux}
        values = {c: jtu.tree_leaves(field(t + c * h, stage, args)) for c in nodes}
        slopes = [
            jnp.concatenate([earlier, values[x.c[i]][k][None]])
            for k, (earlier, x) in enumerate(zip(slopes, tableaux))
        ]
    return treedef.unflatten(slopes)


class _Stages(eqx.Module):
    """The right-hand side of the equations of the slopes."""

    vector_field: Callable
    tableaux: tuple[ButcherTableau, ...] = eqx.field(static=True)
    forwards: bool = eqx.field(static=True)

    def __call__(self, slopes, x):
        y, t, h, args = x
        leaves, treedef = jtu.tree_flatten(y)
        matrices = [jnp.asarray(x.a) for x in self.tableaux]
        if not self.forwards:
            matrices = [
                a - jnp.asarray(x.b)[None] for a, x in zip(matrices, self.tableaux)
            ]

        def field(nodes):
            def at(t, slope_weights):
                stage = _increments(leaves, h, slope_weights, jtu.tree_leaves(slopes))
                return self.vector_field(t, treedef.unflatten(stage), args)

            # Python floats, so that the times keep their dtype.
            times = jnp.stack([jnp.asarray(t + c * h) for c in nodes])
            return jtu.tree_leaves(jax.vmap(at)(times, matrices))

        # One evaluation serves all parts of the state whose stages share their times.
        values = {x.c: field(x.c) for x in self.tableaux}
        return jtu.tree_structure(slopes).unflatten(
            [values[x.c][i] for i, x in enumerate(self.tableaux)]
        )
