from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .._custom_types import LinearMap
from .base import AbstractFixedPointAdjoint
from .rules import attach_steps


class JFBAdjoint(AbstractFixedPointAdjoint):
    r"""Jacobian-free backpropagation: differentiates one application of `f` at the
    solution, as if the iterate that went in were a constant.

    In $\mathrm{d}z / \mathrm{d}\theta = (I - J)^{-1} \partial f / \partial \theta$ it
    replaces the inverse by the identity. The relative error is that of dropping
    $J + J^2 + \dots$, so it is small only for strong contractions; but where $f$ is
    contractive and $\partial f / \partial \theta$ well-conditioned, the result is a
    descent direction (Theorem 3.1 of the paper), and training with it works about as
    well as with the exact gradient.

    The value is the image of the solution under one more application of `f`, whether it
    is differentiated or not.

    Costs one evaluation of `f` and no product with $J$. Memory for one application.
    Forward mode works; second derivatives raise an error. Auxiliary outputs and stats
    have no derivative.

    ??? cite "References"

        ```bibtex
        @inproceedings{fung2022jfb,
            author = {Fung, Samy Wu and Heaton, Howard and Li, Qiuwei and McKenzie,
                      Daniel and Osher, Stanley and Yin, Wotao},
            title = {{JFB}: {J}acobian-Free Backpropagation for Implicit Networks},
            booktitle = {AAAI Conference on Artificial Intelligence},
            year = {2022},
        }
        ```
    """

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree[Any],
        tags: frozenset[object],
    ) -> PyTree[Array]:
        del tags
        return attach_steps(self, primal_fn, rewrite_fn, inputs, 1, 1.0)

    def count_products(
        self, operator: LinearMap, cotangent: PyTree[Array]
    ) -> Int[Array, ""]:
        del operator, cotangent
        return jnp.array(0)


JFBAdjoint.__init__.__doc__ = "**Arguments:** none."
