from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.scipy as jsp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._custom_types import Vector
from .._misc import (
    accumulation_dtype,
    check_positive_int,
    check_tolerances,
    dot,
    ravel,
    two_norm,
)
from .base import AbstractMatrixFreeSolver, result_of, tolerance_for


class _Cycle(eqx.Module):
    """The Arnoldi process: `basis` has orthonormal rows, and `rotation` turns the
    Hessenberg matrix of the operator in this basis into `triangle`. There are `restart`
    columns, and one more row.
    """

    basis: Float[Array, "rows size"]
    rotation: Float[Array, "rows rows"]
    triangle: Float[Array, "rows columns"]
    rotated: Float[Array, " rows"]
    num_columns: Int[Array, ""]
    residual: Float[Array, ""]
    num_products: Int[Array, ""]
    broken_down: Bool[Array, ""]


class _Progress(eqx.Module):
    solution: Vector
    residual_vector: Vector
    residual: Float[Array, ""]
    num_products: Int[Array, ""]
    broken_down: Bool[Array, ""]


class GMRES(AbstractMatrixFreeSolver):
    r"""The restarted generalised minimal residual method.

    Minimises $\|b - A x\|_2$ over a growing Krylov space. Stops as soon as the residual
    meets the tolerance, $\|b - A x\|_2 \le \text{atol} + \text{rtol} \|b\|_2$, also in
    the middle of a cycle, and needs no further product to confirm it or to restart.
    (The residual is that of the recurrence, which can be below the true one by some
    multiple of the precision of the numbers. A smaller `rtol` than four times that
    precision is taken as four times it.)

    For systems that are not symmetric, in particular backward solves of maps that are
    not contractive. Where the map contracts well, the Neumann iteration of
    [`eqimplicit.NeumannKrylov`][] is cheaper, since it keeps no basis.

    Costs a product and four readings of the basis (its Gram-Schmidt process is repeated
    once, which keeps the basis orthogonal) a step; `num_products` in the stats is the
    number of products with $A$. Memory for `restart + 1` vectors.

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

    rtol: float | Float[Array, ""]
    atol: float | Float[Array, ""]
    restart: int = eqx.field(default=20, static=True)
    max_steps: int = eqx.field(default=200, static=True)

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
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

        def unfinished(state: _Progress | _Cycle) -> Bool[Array, ""]:
            in_time = state.num_products < self.max_steps
            return (state.residual > tolerance) & in_time & ~state.broken_down

        def extend(cycle: _Cycle) -> _Cycle:
            return _extend(product, cycle)

        def can_extend(cycle: _Cycle) -> Bool[Array, ""]:
            return unfinished(cycle) & (cycle.num_columns < restart)

        def run_cycle(progress: _Progress) -> _Progress:
            cycle = lax.while_loop(can_extend, extend, _start(progress, restart))
            return _finish(progress, cycle)

        restart = min(self.restart, b.size)
        progress = _Progress(
            solution=0 * b.astype(dtype),  # so that a NaN stays one
            residual_vector=b.astype(dtype),
            residual=size,
            num_products=jnp.array(0),
            broken_down=jnp.array(False),
        )
        progress = lax.while_loop(unfinished, run_cycle, progress)
        converged = jnp.isfinite(size) & (progress.residual <= tolerance)
        result = result_of(converged, progress.broken_down, vector)
        stats = {
            "num_products": progress.num_products,
            "residual": progress.residual,
        }
        return unravel(progress.solution.astype(b.dtype)), result, stats


def _start(progress: _Progress, restart: int) -> _Cycle:
    r = progress.residual_vector
    basis = jnp.zeros((restart + 1, r.size), r.dtype)
    return _Cycle(
        basis=basis.at[0].set(r / progress.residual),
        rotation=jnp.eye(restart + 1, dtype=r.dtype),
        triangle=jnp.zeros((restart + 1, restart), r.dtype),
        rotated=jnp.zeros(restart + 1, r.dtype).at[0].set(progress.residual),
        num_columns=jnp.array(0),
        residual=progress.residual,
        num_products=progress.num_products,
        broken_down=progress.broken_down,
    )


def _extend(product, cycle: _Cycle) -> _Cycle:
    # Whichever examples of a batch still run are at the same column; the indices must
    # not be batched, or each access would be a gather or a scatter.
    j = eqxi.unvmap_max(cycle.num_columns)
    w = product(cycle.basis[j])
    column = dot(cycle.basis, w)
    w = w - dot(column, cycle.basis)
    again = dot(cycle.basis, w)
    w = w - dot(again, cycle.basis)
    size = two_norm(w)
    column = (column + again).at[j + 1].set(size)

    rotated_column = dot(cycle.rotation, column)
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

    rotated = rotate(cycle.rotated)
    return _Cycle(
        basis=cycle.basis.at[j + 1].set(w / jnp.where(size == 0, 1, size)),
        rotation=rotate(cycle.rotation),
        triangle=cycle.triangle.at[:, j].set(
            jnp.where(singular, 0, rotate(rotated_column))
        ),
        rotated=rotated,
        num_columns=cycle.num_columns + 1,
        residual=jnp.abs(rotated[j + 1]),
        num_products=cycle.num_products + 1,
        broken_down=singular,
    )


def _finish(progress: _Progress, cycle: _Cycle) -> _Progress:
    restart = cycle.triangle.shape[1]
    used = jnp.arange(restart) < cycle.num_columns
    triangle = cycle.triangle[:-1]
    used = used & (jnp.diagonal(triangle) != 0)
    identity = jnp.eye(restart, dtype=triangle.dtype)
    triangle = jnp.where(jnp.outer(used, used), triangle, identity)
    weights = jnp.where(used, cycle.rotated[:-1], 0)
    weights = jsp.linalg.solve_triangular(triangle, weights)
    last = jnp.arange(restart + 1) == cycle.num_columns
    residual_weights = jnp.where(last, cycle.rotated, 0) @ cycle.rotation
    # Singular up to rounding, which in so large a step is as large as the residual.
    eps = jnp.finfo(triangle.dtype).eps
    step_size = two_norm(cycle.triangle) * two_norm(weights)
    lost = 10 * eps * step_size > progress.residual
    new = _Progress(
        solution=progress.solution + dot(weights, cycle.basis[:-1]),
        residual_vector=dot(residual_weights, cycle.basis),
        residual=cycle.residual,
        num_products=cycle.num_products,
        broken_down=cycle.broken_down,
    )
    old = eqx.tree_at(
        lambda p: (p.num_products, p.broken_down),
        progress,
        (cycle.num_products, jnp.array(True)),
    )
    return jtu.tree_map(lambda a, b: jnp.where(lost, a, b), old, new)


GMRES.__init__.__doc__ = """**Arguments:**

- `rtol`: tolerance relative to the size of the right-hand side.
- `atol`: absolute tolerance. Not both may be zero.
- `restart`: the number of products in a cycle, after which the basis is built anew.
- `max_steps`: the largest number of products.

**Raises:** a `ValueError` for tolerances that are negative or both zero, or for a
`restart` or `max_steps` below 1.
"""
