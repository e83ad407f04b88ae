from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._adjoint.base import AbstractFixedPointAdjoint
from .._adjoint.guards import check_uncoupled
from .._adjoint.probe import BackwardStatus, EquationProbe
from .._misc import all_finite, check_positive_int, clone, state_dtype, stop_gradient
from .._parametrisation.base import resolve
from .._solver.wrapper import check_fixed_point_solver
from .defaults import default_solver
from .failures import explain_error, throw_unless_found


def check_solve_arguments(solver: Any, adjoint: Any, max_steps: Any) -> None:
    if solver is not None:
        check_fixed_point_solver(solver)
    if adjoint is not None and not isinstance(adjoint, optx.AbstractAdjoint):
        raise TypeError(
            "`adjoint` must be an instance of `optimistix.AbstractAdjoint`, for "
            f"example `eqimplicit.ImplicitAdjoint()`. Got {adjoint!r}."
        )
    check_positive_int("max_steps", max_steps)


def evaluate_cell(
    cell: Callable,
    z: PyTree[Any],
    x: PyTree[Any],
    key: PRNGKeyArray | None,
    state: eqx.nn.State | None,
) -> tuple[PyTree[Array], eqx.nn.State | None]:
    """Calls a cell as its user was told that it would be called."""
    keyword = {} if key is None else {"key": key}
    if state is None:
        image, new_state = cell(z, x, **keyword), None
    else:
        image, new_state = cell(z, x, clone(state), **keyword)
    return jtu.tree_map(jnp.asarray, image), new_state


class SolveOptions(eqx.Module):
    """How a residual layer solves its equation, and what it is called in messages."""

    solver: optx.AbstractFixedPointSolver | None
    adjoint: optx.AbstractAdjoint | None
    max_steps: int = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def or_defaults(self, state, scale):
        solver, adjoint = default_solver(state, scale)
        solver = solver if self.solver is None else resolve(self.solver)
        adjoint = adjoint if self.adjoint is None else resolve(self.adjoint)
        return solver, adjoint


SolveOptions.__init__.__doc__ = """**Arguments:**

- `solver`, `adjoint`: as for [`eqimplicit.ThetaLayer`][]; None for
    [`eqimplicit.default_solver`][].
- `max_steps`, `throw`: as for [`eqimplicit.ThetaLayer`][].
- `name`: that of the layer, for messages.
"""


@eqx.filter_jit
def _evaluate(z, args):
    """Traced once, however often a solver, an adjoint and a check need it."""
    cell, x, key, state, _ = args
    return evaluate_cell(cell, z, x, key, state)


def solve_cell(
    cell: Callable,
    x: PyTree[Any],
    z0: PyTree[Array],
    options: SolveOptions,
    *,
    key: PRNGKeyArray | None = None,
    state: eqx.nn.State | None = None,
    scale: PyTree[Array] | None = None,
    probe: BackwardStatus | None = None,
    remedy: str,
) -> optx.Solution:
    """Solves `z = cell(z, x)`. The `remedy` ends the message of an error about `z0`;
    for `scale` see `default_solver`.
    """
    state_dtype(z0, remedy)
    args = (cell, x, key, state, EquationProbe(probe))
    try:
        jaxpr, *output = eqx.filter_make_jaxpr(_evaluate)(z0, args)
    except (TypeError, ValueError, RuntimeError) as error:
        error.add_note(explain_error(error, z0, *args[:-1], remedy))
        raise
    image, _ = eqx.combine(*output)
    check_same_structure("cell", image, z0, remedy)
    solver, adjoint = options.or_defaults(z0, scale)
    if not isinstance(adjoint, AbstractFixedPointAdjoint):  # which does it itself
        check_uncoupled(jaxpr.jaxpr)
    solution = optx.fixed_point(
        _evaluate,
        solver,
        z0,
        args,
        has_aux=True,
        max_steps=options.max_steps,
        adjoint=adjoint,
        throw=False,
    )
    new_state = solution.aux
    if state is not None:
        new_state = stop_gradient(_keep_unchanged(z0, args, new_state))
    value, result, stats = solution.value, solution.result, solution.stats
    return finish(value, result, stats, options, aux=new_state)


def finish(
    value: PyTree[Array],
    result: optx.RESULTS,
    stats: dict[str, Any],
    options: SolveOptions,
    aux: PyTree[Any] = None,
) -> optx.Solution:
    """The solution of a layer, which never counts as found if it is not finite.

    It has no solver state, which may hold functions, and so could be returned neither
    from `jax.vmap` nor from `jax.lax.scan`.
    """
    found = result == optx.RESULTS.successful
    nonfinite = found & ~all_finite(value)
    result = optx.RESULTS.where(nonfinite, optx.RESULTS.nonfinite, result)
    if options.throw:
        value = throw_unless_found(value, result, stats, options.name)
    return optx.Solution(value=value, result=result, aux=aux, stats=stats, state=None)


def _keep_unchanged(
    z0: PyTree[Array], args: PyTree[Any], new_state: PyTree[Any]
) -> PyTree[Any]:
    """Of the new Equinox state, what the cell returns as it was put in (and not as the
    state of the solve, which changes), from where it was put in.

    Under `vmap` all that a loop carries is mapped, even if it never changes. But frozen
    statistics, for example, are those of all examples.
    """

    def evaluate(z, args):
        cell, x, key, state, _ = args
        return evaluate_cell(cell, z, x, key, state)

    closed, _, _ = eqx.filter_make_jaxpr(evaluate)(z0, args)
    jaxpr, num_unknown = closed.jaxpr, len(jtu.tree_leaves(z0))
    variables = jaxpr.invars[num_unknown:]
    arrays = jtu.tree_leaves(eqx.filter(args, eqx.is_array))
    given = {id(var): array for var, array in zip(variables, arrays)}
    dynamic, static = eqx.partition(new_state, eqx.is_array)
    leaves, treedef = jtu.tree_flatten(dynamic)
    variables = jaxpr.outvars[len(jaxpr.outvars) - len(leaves) :]
    leaves = [given.get(id(var), leaf) for var, leaf in zip(variables, leaves)]
    return eqx.combine(jtu.tree_unflatten(treedef, leaves), static)


def check_same_structure(
    name: str, output: PyTree[Any], state: PyTree[Any], remedy: str
) -> None:
    """Names the first leaf in which the output of a map differs from its state."""
    output_def, state_def = jtu.tree_structure(output), jtu.tree_structure(state)
    if output_def != state_def:
        raise ValueError(
            f"`{name}` must return a pytree of the structure of the state, "
            f"{state_def}, but it returned {output_def}. {remedy}"
        )
    pairs = zip(jtu.tree_leaves_with_path(output), jtu.tree_leaves(state))
    for (path, out), expected in pairs:
        if out.shape != expected.shape or out.dtype != expected.dtype:
            raise ValueError(
                f"`{name}` must return what it is given, but leaf "
                f"`state{jtu.keystr(path)}` has shape {expected.shape} and dtype "
                f"{expected.dtype} in the state, and shape {out.shape} and dtype "
                f"{out.dtype} in the output. {remedy}"
            )
