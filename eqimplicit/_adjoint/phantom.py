from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import LinearMap
from .._misc import check_positive, check_positive_int
from .base import AbstractFixedPointAdjoint
from .rules import attach_steps


class PhantomAdjoint(AbstractFixedPointAdjoint):
    r"""The unrolled phantom gradient: takes $k$ damped steps

    $$h \leftarrow \lambda f(h) + (1 - \lambda) h$$

    from the solution, taken as a constant, and differentiates these.

    At an exact solution the derivative is
    $\lambda \sum_{i<k} B^i \, \partial f / \partial \theta$ with
    $B = \lambda J + (1 - \lambda) I$, that of [`eqimplicit.NeumannAdjoint`][], and
    differs from the exact one by $B^k (I - J)^{-1} \partial f / \partial \theta$. At an
    inexact solution it is the derivative of the value that is returned, which is what
    makes it sturdier than the series when `num_steps` is large.

    The value is the last of these steps, whether it is differentiated or not.

    Costs `num_steps` evaluations of `f` and `num_steps - 1` products with $J$. Memory
    for `num_steps` applications; up to 16 of them are compiled one by one, more are a
    compiled loop, slower on convolutions. Forward mode works; second derivatives raise
    an error. Auxiliary outputs and stats have no derivative.

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

    num_steps: int = eqx.field(static=True)
    damping: float | Float[Array, ""] = 1.0

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        check_positive("damping", self.damping)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree[Any],
        tags: frozenset[object],
    ) -> PyTree[Array]:
        del tags
        return attach_steps(
            self, primal_fn, rewrite_fn, inputs, self.num_steps, self.damping
        )

    def count_products(
        self, operator: LinearMap, cotangent: PyTree[Array]
    ) -> Int[Array, ""]:
        del operator, cotangent
        return jnp.array(self.num_steps - 1)


PhantomAdjoint.__init__.__doc__ = """**Arguments:**

- `num_steps`: the number $k$ of steps, at least 1.
- `damping`: the weight $\\lambda$ of the new iterate, positive; 1 is undamped.

**Raises:** a `ValueError` if either is out of range.
"""
