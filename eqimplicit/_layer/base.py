from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._adjoint.base import check_uncoupled
from .._misc import check_positive_int, clone, state_dtype, stop_gradient


def check_solve_arguments(solver: Any, adjoint: Any, max_steps: Any) -> None:
    if isinstance(solver, optx.AbstractRootFinder):
        raise TypeError(
            f"`solver` must be a fixed-point solver. Got the root finder {solver!r}; "
            "wrap it as `eqimplicit.RootAsFixedPoint(solver)`."
        )
    if not isinstance(solver, optx.AbstractFixedPointSolver):
        raise TypeError(
            "`solver` must be an instance of `optimistix.AbstractFixedPointSolver`, "
            f"for example `eqimplicit.Anderson(1e-4, 1e-4)`. Got {solver!r}."
        )
    if not isinstance(adjoint, optx.AbstractAdjoint):
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


def solve_cell(
    cell: Callable,
    x: PyTree[Any],
    z0: PyTree[Array],
    *,
    key: PRNGKeyArray | None = None,
    state: eqx.nn.State | None = None,
    solver: optx.AbstractFixedPointSolver,
    adjoint: optx.AbstractAdjoint,
    max_steps: int,
    throw: bool,
    remedy: str,
) -> optx.Solution:
    """Solves `z = cell(z, x)`. The `remedy` ends the message of an error about `z0`."""
    state_dtype(z0, remedy)

    def fn(z, args):
        cell, x, key, state = args
        return evaluate_cell(cell, z, x, key, state)

    args = (cell, x, key, state)
    try:
        jaxpr, *output = eqx.filter_make_jaxpr(fn)(z0, args)
    except (TypeError, ValueError) as error:
        shapes = jtu.tree_map(jnp.shape, z0)
        error.add_note(f"`cell` was given a state of shape {shapes}. {remedy}")
        raise
    image, _ = eqx.combine(*output)
    check_same_structure("cell", image, z0, remedy)
    check_uncoupled(jaxpr.jaxpr)
    solution = optx.fixed_point(
        fn,
        solver,
        z0,
        args,
        has_aux=True,
        max_steps=max_steps,
        adjoint=adjoint,
        throw=throw,
    )
    new_state = stop_gradient(_keep_unchanged(jaxpr.jaxpr, (z0, args), solution.aux))
    return eqx.tree_at(
        lambda s: s.aux, solution, new_state, is_leaf=lambda x: x is None
    )


def _keep_unchanged(
    jaxpr: jex.core.Jaxpr, inputs: PyTree[Any], aux: PyTree[Any]
) -> PyTree[Any]:
    """Of the last outputs of a function, those that are inputs as they were put in.

    Under `vmap` all that a loop carries is mapped, even if it never changes. But frozen
    statistics, for example, are those of all examples.
    """
    arrays = jtu.tree_leaves(eqx.filter(inputs, eqx.is_array))
    given = {id(var): array for var, array in zip(jaxpr.invars, arrays)}
    dynamic, static = eqx.partition(aux, eqx.is_array)
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
