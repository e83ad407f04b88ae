import math
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import PyTree

from .._adjoint.neumann import NeumannAdjoint
from .._adjoint.probe import BackwardStatus
from .._custom_types import Y
from .._misc import check_positive
from .._parametrisation.base import resolve
from .._parametrisation.bounded import BoundedSpectrum
from .._solver.picard import Picard
from .ode_block import ODEBlock
from .theta import ThetaLayer


class FPResNet(eqx.Module):
    r"""A network of implicit residual layers that are contractions by construction, so
    that Picard iteration solves each and the Neumann series differentiates it
    (section 2.3 of the paper): no other solver is needed, and the number of evaluations
    is known beforehand.

    With a vector field $F$ that is $L$-Lipschitz in the Euclidean norm, the equation of
    a [`eqimplicit.ThetaLayer`][] is a contraction with factor $q = \theta h L$, which
    must be below one. Then after $k$ evaluations

    $$\|f(z_k) - z_k\| \le q^{k-1} \|f(z_1) - z_1\|$$

    and the gradient of $k$ terms has a relative error of at most $q^k$ in the cotangent
    of the solution.

    !!! example

        ```python
        mlp = eqi.with_spectral_norm(eqx.nn.MLP(2, 2, 16, 2, key=key), key=key)
        field = MyField(mlp)  # calls `mlp(y)`; 1-Lipschitz with `jax.nn.relu`
        net = eqi.FPResNet(field, num_steps=10, theta=0.5, step_size=1.0)
        ```

    Costs, per layer, at most `max_evaluations(residual)` evaluations of the field, and
    `num_terms - 1` products with its transposed Jacobian for a gradient.

    ??? cite "References"

        ```bibtex
        @article{reshniak2021robust,
            author = {Reshniak, Viktor and Webster, Clayton G.},
            title = {Robust Learning with Implicit Residual Networks},
            journal = {Machine Learning and Knowledge Extraction},
            volume = {3},
            number = {1},
            pages = {34--55},
            year = {2021},
        }
        ```
    """

    block: ODEBlock
    contraction: float = eqx.field(static=True)
    tolerance: float = eqx.field(static=True)
    _atol: float = eqx.field(static=True)

    def __init__(
        self,
        vector_field: Callable,
        num_steps: int,
        theta: float = 0.5,
        step_size: float = 1.0,
        *,
        lipschitz: float | None = None,
        tolerance: float | None = None,
        stacked: bool = False,
        throw: bool = False,
    ):
        r"""**Arguments:**

        - `vector_field`: a callable, as a rule a Module,
            `vector_field(t, y, args) -> dy/dt`.
        - `num_steps`: the number of layers.
        - `theta`, `step_size`: $\theta$ and $h$, Python numbers.
        - `lipschitz`: the Lipschitz constant $L$ that the field has by construction; by
            default 1, for an [`eqimplicit.BoundedSpectrum`][]
            $\max(|\alpha|, |\beta|)$. It is not checked:
            [`eqimplicit.lipschitz_constant`][] estimates it.
        - `tolerance`: to which residual a layer is solved, in the root mean square over
            the unknowns, and for a `step_size` below one times that, since the errors
            of all steps add up; and the relative error of its gradient. Rounding is put
            up with besides. By default 1e-10 in float64, 1e-6 in float32, and four
            times the precision of the numbers below: those of the field's arrays, or
            JAX's default precision if it has none.
        - `stacked`: whether every layer has parameters of its own, so that every array
            of the field has a leading axis of length `num_steps`.
        - `throw`: whether to raise an error, at run time, if a solve has not finished.

        **Raises:** a `ValueError` if $\theta h L$ is not below one, and as
        [`eqimplicit.ThetaLayer`][] and [`eqimplicit.ODEBlock`][].
        """
        if tolerance is None:
            tolerance = _default_tolerance(vector_field)
        check_positive("tolerance", tolerance)
        if lipschitz is None and isinstance(vector_field, BoundedSpectrum):
            limits = resolve((vector_field.alpha, vector_field.beta))
            lipschitz = max(float(np.max(np.abs(limit))) for limit in limits)
        self.contraction = theta * step_size * (1.0 if lipschitz is None else lipschitz)
        self.tolerance = tolerance
        if not 0 <= self.contraction < 1:
            raise ValueError(
                "The layers must be contractions: `theta * step_size * lipschitz` must "
                f"be below 1. Got {self.contraction}. Choose a smaller `step_size` or "
                "`theta`, bound the weights more tightly (the `bound` of "
                "`eqimplicit.with_spectral_norm`) and say so by `lipschitz`, or use an "
                "`eqimplicit.ThetaLayer`, which needs no contraction."
            )
        self._atol = tolerance * min(1.0, step_size)
        # Any relative tolerance below rounding means rounding.
        solver = Picard(sys.float_info.min, self._atol, norm=optx.rms_norm)
        layer = ThetaLayer(
            vector_field,
            theta,
            step_size,
            solver=solver,
            adjoint=NeumannAdjoint(max(1, self._num_factors(1 / tolerance))),
            # A solve may start from a residual of a million.
            max_steps=2 + self._num_factors(1e6 / self._atol),
            throw=throw,
        )
        self.block = ODEBlock(layer, num_steps, stacked)

    def _num_factors(self, reduction):
        """How many contractions reduce a size by so much."""
        if reduction <= 1 or self.contraction == 0:
            return int(reduction > 1)
        return math.ceil(-math.log(reduction) / math.log(self.contraction))

    def max_evaluations(self, residual: float) -> int:
        r"""The a-priori bound on the number of evaluations of a solve, given the
        residual $\|f(z_1) - z_1\|$ of its initial guess, in the root mean square. (A
        solve of more than a million in residual may stop before, and says so.)
        """
        return 2 + self._num_factors(residual / self._atol)

    def __call__(
        self,
        y0: Y,
        t0: Any = 0.0,
        args: PyTree[Any] = None,
        *,
        probe: BackwardStatus | None = None,
    ) -> Y:
        """As [`eqimplicit.ODEBlock`][], of which `block` is one: it has the trajectory
        and the statistics. (With `ts` the guarantees hold for steps no longer than
        `step_size`.)

        **Arguments:**

        - `y0`: the initial state, a pytree of floating arrays of one dtype.
        - `t0`: the initial time.
        - `args`: passed to the vector field.
        - `probe`: as for [`eqimplicit.ODEBlock`][].

        **Returns:**

        The state after the last layer.
        """
        return self.block(y0, t0, args, probe=probe)


def _default_tolerance(vector_field):
    arrays = jtu.tree_leaves(eqx.filter(vector_field, eqx.is_inexact_array))
    dtype = arrays[0].dtype if arrays else jnp.zeros(()).dtype
    eps = float(jnp.finfo(dtype).eps)
    return max(1e-10 if jnp.finfo(dtype).bits >= 64 else 1e-6, 4 * eps)
