import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import LinearMap
from .._linear_solver.neumann_series import NeumannSeries
from .._misc import check_positive, check_positive_int
from .series import AbstractSeriesAdjoint


class NeumannAdjoint(AbstractSeriesAdjoint):
    r"""The Neumann-series phantom gradient: replaces the inverse in
    $\mathrm{d}z / \mathrm{d}\theta = (I - J)^{-1} \partial f / \partial \theta$ by the
    first $k$ terms of a damped Neumann series,

    $$\lambda \sum_{i<k} B^i, \qquad B = \lambda J + (1 - \lambda) I.$$

    The error is exactly $B^k (I - J)^{-1} \partial f / \partial \theta$. The series
    converges with $k$ when every eigenvalue $\mu$ of $J$ satisfies
    $|1 - \lambda (1 - \mu)| < 1$; where it does not, more terms make it worse. One
    undamped term is [`eqimplicit.JFBAdjoint`][]. (The JFB paper counts from zero: its
    $k$ is `num_terms - 1`.)

    The value is the solution, unchanged.

    Costs one linearisation of `f` and `num_terms - 1` products with $J$. Memory for one
    application, however many terms. Forward mode works; second derivatives raise an
    error. Auxiliary outputs and stats have no derivative.

    ??? cite "References"

        ```bibtex
        @inproceedings{geng2021training,
            author = {Geng, Zhengyang and Zhang, Xin-Yu and Bai, Shaojie and Wang, Yisen
                      and Lin, Zhouchen},
            title = {On Training Implicit Models},
            booktitle = {Advances in Neural Information Processing Systems},
            year = {2021},
        }
        ```
    """

    num_terms: int = eqx.field(static=True)
    damping: float | Float[Array, ""] = 1.0

    def __check_init__(self):
        check_positive_int("num_terms", self.num_terms)
        check_positive("damping", self.damping)

    @property
    def series(self) -> NeumannSeries:
        return NeumannSeries(self.num_terms, self.damping)

    def count_products(
        self, operator: LinearMap, cotangent: PyTree[Array]
    ) -> Int[Array, ""]:
        del operator, cotangent
        return jnp.array(self.num_terms - 1)


NeumannAdjoint.__init__.__doc__ = """**Arguments:**

- `num_terms`: the number $k$ of terms, at least 1.
- `damping`: the weight $\\lambda$, positive; 1 is the plain series.

**Raises:** a `ValueError` if either is out of range.
"""
