import functools as ft
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.extend as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree

from .._custom_types import LinearMap
from .._misc import all_finite, ravel, stop_gradient


while_loop = ft.partial(eqxi.while_loop, kind="lax")
_solver_types = (
    optx.AbstractFixedPointSolver,
    optx.AbstractRootFinder,
    optx.AbstractLeastSquaresSolver,
    optx.AbstractMinimiser,
)


def check_fixed_point(adjoint: optx.AbstractAdjoint, inputs: tuple[Any, ...]) -> None:
    """Refuses problems whose `rewrite_fn` is not `f(z) - z`.

    Optimistix rewrites a fixed-point problem that it is to solve with a least-squares
    method or a minimiser, and a root-finding problem may have either sign. An adjoint
    that iterates on the rewritten problem would diverge, or return a wrong gradient.
    """
    # The first, since the arguments of the map may be a solver as well.
    solver = next(x for x in inputs if isinstance(x, _solver_types))
    if not isinstance(solver, optx.AbstractFixedPointSolver):
        name = type(adjoint).__name__
        raise ValueError(
            f"`{name}` needs a fixed-point problem that is solved by a fixed-point "
            "solver, as in `optimistix.fixed_point(f, eqimplicit.Anderson(...), ...)`. "
            "Wrap a root finder as `eqimplicit.RootAsFixedPoint(optimistix.Newton(...))"
            "`; for root-finding, least-squares and minimisation problems use "
            "`eqimplicit.ImplicitAdjoint`."
        )


def check_uncoupled(jaxpr: jex.core.Jaxpr) -> None:
    """Refuses maps that communicate along a mapped axis from outside, as batch
    normalisation in training mode does under `vmap(..., axis_name=...)`: the examples'
    equations are coupled then, but each would be solved and differentiated as if alone.
    """
    for axis in _named_axes(jaxpr, frozenset()):
        raise ValueError(
            f"The cell communicates along the mapped axis {axis!r}, as batch "
            "normalisation does in training mode, so that the examples' equations are "
            "coupled. Take the whole batch as one state, with the `vmap` inside the "
            "cell; or freeze the statistics (inference mode); or use a normalisation "
            "of each example, such as `equinox.nn.GroupNorm`."
        )


# These know the name of an axis, but move nothing along it.
_silent = {"axis_index", "pvary", "pcast"}


def _named_axes(jaxpr: jex.core.Jaxpr, bound: frozenset[Any]) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _silent:
            continue
        inner = bound | frozenset(getattr(eqn.params.get("mesh"), "axis_names", ()))
        for key in ("axes", "axis_name"):
            axes = eqn.params.get(key, ())
            axes = axes if isinstance(axes, (tuple, list)) else (axes,)
            # Integers, NumPy's too, are axes of arrays. Only mapped axes have names.
            names = (a for a in axes if not isinstance(a, numbers.Integral))
            yield from (name for name in names if name not in bound)
        for param in jtu.tree_leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(param):
                yield from _named_axes(getattr(param, "jaxpr", param), inner)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, (jex.core.Jaxpr, jex.core.ClosedJaxpr))


def attach_steps(
    adjoint: optx.AbstractAdjoint,
    primal_fn: Callable,
    rewrite_fn: Callable,
    inputs: tuple[Any, ...],
    num_steps: int,
    damping: Any,
) -> tuple[PyTree[Array], PyTree[Any]]:
    """Solves without a derivative, then takes differentiable damped steps."""
    check_fixed_point(adjoint, inputs)
    root, residual = primal_fn(stop_gradient(inputs) + (while_loop,))
    _check_rewritten(rewrite_fn, root, residual, inputs)
    steps = _DampedSteps(rewrite_fn, num_steps)
    damping, residual = stop_gradient((damping, residual))
    root = _once_differentiable(
        steps, type(adjoint).__name__, root, residual, inputs, damping
    )
    return root, residual


def apply_implicit_rule(
    adjoint: optx.AbstractAdjoint,
    primal_fn: Callable,
    rewrite_fn: Callable,
    inputs: tuple[Any, ...],
    linear_solve: Callable[[LinearMap, PyTree[Array]], PyTree[Array]],
    *,
    exact: bool,
) -> tuple[PyTree[Array], PyTree[Any]]:
    r"""Gives the solution the tangent $S \, \partial f / \partial \theta \,
    \dot\theta$, where `linear_solve` applies $S \approx (I - J)^{-1}$.

    `exact` says that $S$ is that inverse, so that derivatives of the derivative are
    true; otherwise they are refused.
    """
    name = None if exact else type(adjoint).__name__
    inputs = inputs + (while_loop,)
    root, residual = _implicit(primal_fn, rewrite_fn, inputs, linear_solve, name)
    _check_rewritten(rewrite_fn, root, residual, inputs)
    return root, residual


def _check_rewritten(rewrite_fn, root, residual, inputs):
    jaxpr, _, _ = eqx.filter_make_jaxpr(rewrite_fn)(root, residual, inputs)
    check_uncoupled(jaxpr.jaxpr)


class _DampedSteps(eqx.Module):
    rewrite_fn: Callable
    num_steps: int = eqx.field(static=True)

    def __call__(self, root, residual, inputs, damping):
        def step(z, _):
            change = self.rewrite_fn(z, residual, inputs)
            return jtu.tree_map(
                lambda zi, ci: zi + jnp.asarray(damping, zi.dtype) * ci, z, change
            ), None

        # The solution has no derivative, so that the first step has one product less.
        # The others are a compiled loop only if they are many: convolutions in a loop
        # are slow on the CPU.
        z, _ = step(root, None)
        length = self.num_steps - 1
        z, _ = lax.scan(step, z, length=length, unroll=length < 16)
        return z


def _refuse_second_derivative(primals: PyTree[Any], name: str) -> PyTree[Any]:
    return eqxi.nondifferentiable(
        primals,
        msg=(
            f"Derivatives of a derivative by `{name}` are not defined: they would be "
            "those of an approximation, neither of the gradient that it returned nor "
            "of the exact one. Use `eqimplicit.ImplicitAdjoint` for second derivatives."
        ),
    )


def _split(primals: PyTree[Any], tangents: PyTree[Any]) -> tuple[PyTree[Any], ...]:
    unperturbed = jtu.tree_map(
        lambda t: t is None, tangents, is_leaf=lambda t: t is None
    )
    fixed, perturbed = eqx.partition(primals, unperturbed, is_leaf=lambda x: x is None)
    return perturbed, fixed


@eqx.filter_custom_jvp
def _once_differentiable(fn, name, *args):
    del name
    return fn(*args)


@_once_differentiable.def_jvp
def _once_differentiable_jvp(primals, tangents):
    fn, name, *args = primals
    _, _, *t_args = tangents
    perturbed, fixed = _split(_refuse_second_derivative(args, name), t_args)
    return jax.jvp(lambda p: fn(*eqx.combine(p, fixed)), (perturbed,), (t_args,))


@eqx.filter_custom_jvp
def _implicit(primal_fn, rewrite_fn, inputs, linear_solve, name):
    del rewrite_fn, linear_solve, name
    return jtu.tree_map(jnp.asarray, primal_fn(inputs))


@_implicit.def_jvp
def _implicit_jvp(primals, tangents):
    primal_fn, rewrite_fn, inputs, linear_solve, name = primals
    _, _, t_inputs, _, _ = tangents
    # Itself again, so that a derivative of this rule sees the root's own derivative.
    out = _implicit(primal_fn, rewrite_fn, inputs, linear_solve, name)
    root, residual = out
    if name is not None:
        root, inputs = _refuse_second_derivative((root, inputs), name)

    perturbed, fixed = _split(inputs, t_inputs)
    _, t_image = jax.jvp(
        lambda p: rewrite_fn(root, residual, eqx.combine(p, fixed)),
        (perturbed,),
        (t_inputs,),
    )
    _, minus_operator = jax.linearize(lambda z: rewrite_fn(z, residual, inputs), root)
    operator = lambda v: jtu.tree_map(jnp.negative, minus_operator(v))
    t_root = linear_solve(operator, t_image)
    return out, (t_root, jtu.tree_map(lambda _: None, residual))


class LinearSolve(eqx.Module):
    """Applies a Lineax solver to a linear map, so that the result is differentiable and
    transposable whatever the solver does inside, and so that it raises only on demand.

    (A differentiated `lineax.linear_solve` always raises on failure, by means of a host
    callback.)

    The leaves are solved for as one vector: JAX does not transpose a solve of whose
    right-hand side only some leaves depend on what is differentiated.
    """

    solver: lx.AbstractLinearSolver
    tags: frozenset[object]
    throw: bool

    def __call__(self, operator: LinearMap, vector: PyTree[Array]) -> PyTree[Array]:
        flat, unravel = ravel(vector)
        solution = lax.custom_linear_solve(
            lambda v: ravel(operator(unravel(v)))[0],
            flat,
            solve=ft.partial(self._solve, self.tags),
            transpose_solve=ft.partial(self._solve, lx.transpose_tags(self.tags)),
        )
        return unravel(solution)

    def _solve(self, tags, matvec, vector):
        structure = jax.eval_shape(lambda: vector)
        operator = lx.FunctionLinearOperator(matvec, structure, tags)
        solver = stop_gradient(self.solver)
        state = solver.init(operator, {})
        solution, result, _ = solver.compute(state, vector, {})
        # A masked loss has zero cotangents, on which some solvers divide zero by zero.
        is_zero = jnp.all(vector == 0)
        if self.throw:
            # Direct solvers do not look at what they return.
            result = lx.RESULTS.where(
                all_finite(solution), result, lx.RESULTS.breakdown
            )
            failed = (result != lx.RESULTS.successful) & ~is_zero
            solution = result.error_if(solution, failed)
        return jnp.where(is_zero, 0, solution)


def negate_tags(tags: frozenset[object]) -> frozenset[object]:
    """Tags of a matrix to those of its negative."""
    negative: dict[object, object] = {
        lx.positive_semidefinite_tag: lx.negative_semidefinite_tag,
        lx.negative_semidefinite_tag: lx.positive_semidefinite_tag,
    }
    tags = frozenset(negative.get(tag, tag) for tag in tags)
    return tags - {lx.unit_diagonal_tag}
