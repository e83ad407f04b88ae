import numbers
from collections.abc import Iterator
from typing import Any

import jax.extend as jex
import jax.tree_util as jtu
import optimistix as optx

from .base import Inputs


def check_fixed_point(adjoint: optx.AbstractAdjoint, inputs: tuple[Any, ...]) -> None:
    """Refuses problems whose `rewrite_fn` is not `f(z) - z`.

    Optimistix rewrites a fixed-point problem that it is to solve with a least-squares
    method or a minimiser, and a root-finding problem may have either sign. An adjoint
    that iterates on the rewritten problem would diverge, or return a wrong gradient.
    """
    if not isinstance(Inputs(*inputs).solver, optx.AbstractFixedPointSolver):
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
