from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._custom_types import Vector
from .._misc import (
    accumulation_dtype,
    at_most,
    check_positive_int,
    check_tolerances,
    dot,
    ravel,
    shared_max,
    two_norm,
    where,
)
from .base import AbstractMatrixFreeSolver, result_of, tolerance_for


# The largest system whose basis is kept whole, and the products of a cycle otherwise.
_WHOLE = 64
_RESTART = 20


class _State(eqx.Module):
    """The Arnoldi process of one cycle: `basis` has orthonormal rows, and `rotation`
    turns the Hessenberg matrix of the operator in this basis into a triangle, of which
    `inverse` is the inverse. It has as many columns as there have been products, less
    one, since the first product measures the residual of the solution.

    `residual` is that of the cycle, and that of `solution` before its first column.
    """

    solution: Vector
    previous_solution: Vector
    previous_residual: Float[Array, ""]
    basis: Float[Array, "rows size"]
    rotation: Float[Array, "rows rows"]
    inverse: Float[Array, "columns columns"]
    rotated: Float[Array, " rows"]
    num_in_cycle: Int[Array, ""]
    residual: Float[Array, ""]
    num_products: Int[Array, ""]
    broken_down: Bool[Array, ""]


class GMRES(AbstractMatrixFreeSolver):
    r"""The restarted generalised minimal residual method.

    Minimises $\|b - A x\|_2$ over a growing Krylov space. Stops as soon as the residual
    meets the tolerance, $\|b - A x\|_2 \le \text{atol} + \text{rtol} \|b\|_2$, also in
    the middle of a cycle. The residual of the recurrence may be far below the true one,
    so that one more product measures that of the solution: if it is too large, another
    cycle starts from it, until one that hardly helps. (A smaller `rtol` than four times
    the precision of the numbers is taken as four times it.)

    For systems that are not symmetric, in particular backward solves of maps that are
    not contractive. Where the map contracts well, the Neumann iteration of
    [`eqimplicit.NeumannKrylov`][] is cheaper, since it keeps no basis.

    Costs a product and four readings of the basis (its Gram-Schmidt process is repeated
    once, which keeps the basis orthogonal) a step, and a product a cycle to measure the
    residual; `num_products` in the stats is the number of products with $A$. Memory for
    `restart + 4` vectors. A short cycle may stagnate, on rotations of many unknowns for
    example: the solve then ends without success.

    ??? cite "References"

        ```bibtex
        @article{saad1986gmres,
            author = {Saad, Youcef and Schultz, Martin H.},
            title = {{GMRES}: A Generalized Minimal Residual Algorithm for Solving
                     Nonsymmetric Linear Systems},
            journal = {SIAM Journal on Scientific and Statistical Computing},
            volume = {7},
            number = {3},
            pages = {856--869},
            year = {1986},
        }
        ```
    """

    rtol: float | Float[Array, ""] | None
    atol: float | Float[Array, ""]
    restart: int | None = eqx.field(default=None, static=True)
    max_steps: int = eqx.field(default=200, static=True)

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        if self.restart is not None:
            check_positive_int("restart", self.restart)
        check_positive_int("max_steps", self.max_steps)

    def solve(
        self, operator: lx.AbstractLinearOperator, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        b, unravel = ravel(vector)
        dtype = accumulation_dtype(b.dtype)

        def product(v: Vector) -> Vector:
            image, _ = ravel(operator.mv(unravel(v.astype(b.dtype))))
            return image.astype(dtype)

        size = two_norm(b)
        tolerance = tolerance_for(self.rtol, self.atol, size, b.dtype)
        restart = _RESTART if at_most(_WHOLE + 1, b.size) > _WHOLE else _WHOLE
        restart = at_most(self.restart or restart, b.size)
        target = b.astype(dtype)

        def can_extend(state: _State) -> Bool[Array, ""]:
            room = state.num_in_cycle <= restart
            # One is kept for the residual.
            in_time = state.num_products + 1 < self.max_steps
            unfinished = (state.residual > tolerance) & ~state.broken_down
            return (state.num_in_cycle == 0) | (unfinished & room & in_time)

        def extend(state: _State) -> _State:
            # Whichever examples of a batch still run are at the same product; the index
            # must not be batched, or each access would be a gather or a scatter.
            index = shared_max(jnp.where(can_extend(state), state.num_in_cycle, 0))
            previous = jnp.maximum(index - 1, 0)
            v = jnp.where(index == 0, state.solution, state.basis[previous])
            image = product(v)
            column, w = lax.cond(
                index == 0,
                lambda: (jnp.zeros(restart + 1, dtype), target - image),
                lambda: _orthogonalise(state.basis, previous, image),
            )
            size = two_norm(w)
            row = w / jnp.where(size == 0, 1, size)
            state = where(
                index == 0,
                _restart(state, size),
                _extend(state, previous, column.at[index].set(size)),
            )
            basis = state.basis.at[index].set(row)
            return eqx.tree_at(lambda s: s.basis, state, basis)

        def run_cycle(state: _State) -> _State:
            state = lax.while_loop(can_extend, extend, state)
            return _finish(state)

        state = _start(target, size, restart)
        # A cycle without a column has only measured.
        is_open = lambda state: (state.num_in_cycle == 0) | can_extend(state)
        state = lax.while_loop(is_open, run_cycle, state)
        converged = jnp.isfinite(size) & (state.residual <= tolerance)
        result = result_of(converged, state.broken_down, vector)
        stats = {"num_products": state.num_products, "residual": state.residual}
        return unravel(state.solution.astype(b.dtype)), result, stats


def _start(b: Vector, size: Float[Array, ""], restart: int) -> _State:
    zeros = lambda *shape: jnp.zeros(shape, b.dtype)
    # Zero times, so that a NaN stays one.
    return _State(
        solution=0 * b,
        previous_solution=0 * b,
        previous_residual=size,
        basis=zeros(restart + 1, b.size).at[0].set(b / jnp.where(size == 0, 1, size)),
        rotation=jnp.eye(restart + 1, dtype=b.dtype),
        inverse=zeros(restart, restart),
        rotated=zeros(restart + 1).at[0].set(size),
        num_in_cycle=jnp.array(1),
        residual=size,
        num_products=jnp.array(0),
        broken_down=jnp.array(False),
    )


def _orthogonalise(
    basis: Float[Array, "rows size"], last: Int[Array, ""], w: Vector
) -> tuple[Float[Array, " rows"], Vector]:
    """Against the rows up to the last; what follows is left from another cycle."""
    in_use = jnp.arange(len(basis)) <= last
    column = jnp.where(in_use, dot(basis, w), 0)
    w = w - dot(column, basis)
    again = jnp.where(in_use, dot(basis, w), 0)
    return column + again, w - dot(again, basis)


def _restart(state: _State, residual: Float[Array, ""]) -> _State:
    """Begins a cycle at the solution, given its residual; or ends the solve with the
    one before, if that was as good.
    """
    # Not the other way round: NaN is no reason to go back.
    worse = residual >= state.previous_residual
    solution = jnp.where(worse, state.previous_solution, state.solution)
    stagnates = ~(residual < 0.99 * state.previous_residual)
    residual = jnp.where(worse, state.previous_residual, residual)
    return _State(
        solution=solution,
        previous_solution=solution,
        previous_residual=residual,
        basis=state.basis,
        rotation=jnp.eye(len(state.rotation), dtype=state.rotation.dtype),
        inverse=jnp.zeros_like(state.inverse),
        rotated=jnp.zeros_like(state.rotated).at[0].set(residual),
        num_in_cycle=jnp.array(1),
        residual=residual,
        num_products=state.num_products + 1,
        broken_down=state.broken_down | stagnates,
    )


def _extend(state: _State, j: Int[Array, ""], column: Float[Array, " rows"]) -> _State:
    """Adds the column that the `j`-th vector of the basis has given."""
    rotated_column = dot(state.rotation, column)
    a, b = rotated_column[j], rotated_column[j + 1]
    diagonal = jnp.hypot(a, b)
    # The Krylov space is exhausted, and the operator singular on it. Leave the column
    # out, which keeps the residual as it was.
    eps = jnp.finfo(column.dtype).eps
    singular = diagonal <= 10 * eps * two_norm(column)
    safe = jnp.where(singular, 1, diagonal)
    c, s = jnp.where(singular, 0, a / safe), jnp.where(singular, 1, b / safe)

    def rotate(x):
        first, second = x[j], x[j + 1]
        return x.at[j].set(c * first + s * second).at[j + 1].set(c * second - s * first)

    rotated = rotate(state.rotated)
    last = -dot(state.inverse, rotated_column[:-1]).at[j].set(-1) / safe
    return _State(
        solution=state.solution,
        previous_solution=state.previous_solution,
        previous_residual=state.previous_residual,
        basis=state.basis,
        rotation=rotate(state.rotation),
        inverse=state.inverse.at[:, j].set(jnp.where(singular, 0, last)),
        rotated=rotated,
        num_in_cycle=state.num_in_cycle + 1,
        residual=jnp.abs(rotated[j + 1]),
        num_products=state.num_products + 1,
        broken_down=state.broken_down | singular,
    )


def _finish(state: _State) -> _State:
    """Adds what a cycle has found; its residual remains to be measured."""
    used = jnp.arange(len(state.inverse)) < state.num_in_cycle - 1
    weights = dot(state.inverse, jnp.where(used, state.rotated[:-1], 0))
    step = dot(weights, state.basis[:-1])
    has_columns = state.num_in_cycle > 1
    solution = jnp.where(has_columns, state.solution + step, state.solution)
    num_in_cycle = jnp.where(has_columns, 0, state.num_in_cycle)
    return eqx.tree_at(
        lambda s: (s.solution, s.num_in_cycle), state, (solution, num_in_cycle)
    )


GMRES.__init__.__doc__ = """**Arguments:**

- `rtol`: tolerance relative to the size of the right-hand side; `None` means 1e-10 in
    double precision and 1e-6 below.
- `atol`: absolute tolerance. Not both may be zero.
- `restart`: the number of products in a cycle, after which the basis is built anew.
    `None` means 20, and for up to 64 unknowns as many as there are, which always
    suffice.
- `max_steps`: the largest number of products.

**Raises:** a `ValueError` for tolerances that are negative or both zero, or for a
`restart` or `max_steps` below 1.
"""
