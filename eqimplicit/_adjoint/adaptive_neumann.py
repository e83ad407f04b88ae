import equinox as eqx
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import LinearMap
from .._linear_solver.adaptive_neumann import AdaptiveNeumannSeries
from .._misc import check_fraction, check_positive_int
from .linear_solve import num_products_of
from .series import AbstractSeriesAdjoint


class AdaptiveNeumannAdjoint(AbstractSeriesAdjoint):
    r"""The Neumann-series phantom gradient with as many terms as it needs, and a
    damping for each: from $w = 0$ and the cotangent $r = g$

    $$w \leftarrow w + \lambda r, \qquad \lambda = \frac{\langle r, A r \rangle}{\|A
    r\|^2}, \qquad r \leftarrow r - \lambda A r, \qquad A = (I - J)^\top$$

    until a term is less than `rtol` of the sum. The damping makes the next remainder
    $r$, the residual of the backward equation, as small as a step along $r$ can; it
    shrinks in each step where the symmetric part of $I - J$ is positive, also where
    the map does not contract.

    Between [`eqimplicit.NeumannAdjoint`][], which takes the same number of terms
    everywhere, and [`eqimplicit.ImplicitAdjoint`][], which goes on until the residual
    is at rounding. The error is $A^{-1} r$: large where a small remainder lies along
    an eigenvalue of $J$ near one, however small its share. What was not met within
    `max_terms` is told by an [`eqimplicit.backward_probe`][].

    The value is the solution, unchanged.

    Costs one linearisation of `f` and a product with $J$ a term. Memory for one
    application. Forward mode works, with the terms that the tangent asks for; second
    derivatives raise an error. Auxiliary outputs and stats have no derivative.

    ??? cite "References"

        The paper of [`eqimplicit.NeumannAdjoint`][] leaves the choice of $k$ and
        $\lambda$ to future work. The dampings are those of the minimal residual
        iteration:

        ```bibtex
        @book{saad2003iterative,
            author = {Saad, Yousef},
            title = {Iterative Methods for Sparse Linear Systems},
            publisher = {SIAM},
            edition = {2},
            year = {2003},
        }
        ```
    """

    rtol: float | Float[Array, ""] = 0.03
    max_terms: int = eqx.field(default=50, static=True)

    def __check_init__(self):
        check_fraction("rtol", self.rtol)
        check_positive_int("max_terms", self.max_terms)

    @property
    def series(self) -> AdaptiveNeumannSeries:
        return AdaptiveNeumannSeries(self.rtol, self.max_terms)

    def count_products(
        self, operator: LinearMap, cotangent: PyTree[Array]
    ) -> Int[Array, ""]:
        return num_products_of(self.series, operator, cotangent)


AdaptiveNeumannAdjoint.__init__.__doc__ = """**Arguments:**

- `rtol`: the share of the sum below which a term is the last, between 0 and 1.
- `max_terms`: the largest number of terms.

**Raises:** a `ValueError` if either is out of range.
"""
