from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, PyTree

from .._custom_types import Aux, Norm, Y
from .base import init_measurement, measure, Measurement


class _RootState(eqx.Module, Generic[Y]):
    iterate: Y
    measurement: Measurement
    root_state: PyTree[Any]


class _Residual(eqx.Module):
    """`g(z) = f(z) - z`, with `f(z)` itself in the auxiliary output."""

    fn: Callable

    def __call__(self, y, args):
        image, aux = self.fn(y, args)
        return jtu.tree_map(lambda a, b: a - b, image, y), (image, aux)


class RootAsFixedPoint(optx.AbstractFixedPointSolver[Y, Aux, _RootState[Y]]):
    r"""Makes a fixed-point solver of a root finder such as [`optimistix.Newton`][], by
    feeding it $g(z) = f(z) - z$.

    Optimistix accepts a root finder for a fixed-point problem as it is, but then hands
    the adjoint a rewritten problem that [`eqimplicit.JFBAdjoint`][] and its relatives
    cannot use. Wrapped, every adjoint sees the fixed-point problem.

    As with the other solvers here, the solution is the last iterate whose residual was
    measured, and it has converged when that residual meets the tolerances of the root
    finder (whose own stopping rule is not used). `stats` holds this `residual`.

    The `options` of the solve go to the root finder as they are.

    Costs what the root finder costs: for Newton's method with a dense Jacobian, a
    product with the Jacobian for each unknown and a factorisation a step. Right for
    stiff problems with few unknowns.
    """

    root_finder: optx.AbstractRootFinder

    # Explicit, since type checkers would take the properties below for fields.
    def __init__(self, root_finder: optx.AbstractRootFinder):
        """**Arguments:**

        - `root_finder`: an [`optimistix.AbstractRootFinder`][], for example
            `optimistix.Newton(rtol=1e-6, atol=1e-6)`. Its tolerances and norm are used.

        **Raises:** a `TypeError` if `root_finder` is not a root finder.
        """
        if not isinstance(root_finder, optx.AbstractRootFinder):
            raise TypeError(
                "`root_finder` must be an `optimistix.AbstractRootFinder`, for example "
                f"`optimistix.Newton(1e-6, 1e-6)`. Got {root_finder!r}."
            )
        self.root_finder = root_finder

    @property
    def rtol(self):
        return self.root_finder.rtol

    @property
    def atol(self):
        return self.root_finder.atol

    @property
    def norm(self) -> Norm:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.root_finder.norm

    def init(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        f_struct: PyTree[jax.ShapeDtypeStruct],
        aux_struct: PyTree[jax.ShapeDtypeStruct],
        tags: frozenset[object],
    ) -> _RootState[Y]:
        root_state = self.root_finder.init(
            _Residual(fn), y, args, options, f_struct, (f_struct, aux_struct), tags
        )
        return _RootState(y, init_measurement(y), root_state)

    def step(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _RootState[Y],
        tags: frozenset[object],
    ) -> tuple[Y, _RootState[Y], Aux]:
        new_y, root_state, (image, aux) = self.root_finder.step(
            _Residual(fn), y, args, options, state.root_state, tags
        )
        return new_y, _RootState(y, measure(self, y, image), root_state), aux

    def terminate(
        self,
        fn: Callable,
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _RootState[Y],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        _, root_result = self.root_finder.terminate(
            _Residual(fn), y, args, options, state.root_state, tags
        )
        converged = state.measurement.converged
        nonfinite = ~jnp.isfinite(state.measurement.residual)
        result = optx.RESULTS.where(nonfinite, optx.RESULTS.nonfinite, root_result)
        result = optx.RESULTS.where(converged, optx.RESULTS.successful, result)
        return converged, result

    def postprocess(
        self,
        fn: Callable,
        y: Y,
        aux: Aux,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _RootState[Y],
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        _, _, stats = self.root_finder.postprocess(
            _Residual(fn), y, aux, args, options, state.root_state, tags, result
        )
        return state.iterate, aux, {**stats, "residual": state.measurement.residual}
