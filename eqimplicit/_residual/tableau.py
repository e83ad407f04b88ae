import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._misc import check_positive_int, inexact


@dataclasses.dataclass(frozen=True)
class ButcherTableau:
    r"""The coefficients $A$, $b$ and $c$ of a Runge-Kutta method with $s$ stages, as
    tuples of Python floats. Any method: explicit, diagonally or fully implicit.

    **Arguments:**

    - `a`: $A$, a tuple of rows.
    - `b`: $b$, the weights, which sum to one.
    - `c`: $c$, the nodes.

    **Raises:** a `ValueError` if the sizes do not fit or the weights do not sum to one.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __post_init__(self):
        stages = len(self.b)
        if len(self.c) != stages or [len(row) for row in self.a] != [stages] * stages:
            raise ValueError(
                "`a` must be a square matrix of the size of `b` and `c`. Got "
                f"a={self.a!r}, b={self.b!r}, c={self.c!r}."
            )
        if not math.isclose(sum(self.b), 1, rel_tol=1e-9):
            raise ValueError(
                f"`b` must sum to 1 for a consistent method. Got {self.b!r}."
            )

    @property
    def is_explicit(self) -> bool:
        """Whether each stage needs only those before it."""
        return not np.any(np.triu(np.asarray(self.a)))

    @functools.cached_property
    def order(self) -> int:
        """The order of the method: as many as there are for which all conditions of
        Butcher's trees hold, at most 10.
        """
        return order_of(np.asarray(self.a), np.asarray(self.b))

    @classmethod
    def gauss_legendre(cls, num_stages: int) -> "ButcherTableau":
        r"""The Gauss-Legendre method of order $2 s$. Symmetric, symplectic, A-stable;
        with one stage it is the implicit midpoint rule.

        **Arguments:**

        - `num_stages`: $s$.
        """
        check_positive_int("num_stages", num_stages)
        nodes, _ = np.polynomial.legendre.leggauss(num_stages)
        return _collocation((nodes + 1) / 2)

    @classmethod
    def radau_iia(cls, num_stages: int) -> "ButcherTableau":
        r"""The Radau IIA method of order $2 s - 1$. L-stable, its last stage is the new
        state; with one stage it is the implicit Euler method.

        **Arguments:**

        - `num_stages`: $s$.
        """
        check_positive_int("num_stages", num_stages)
        # Its nodes are the zeros of a difference of two Legendre polynomials.
        polynomial = np.zeros(num_stages + 1)
        polynomial[-2:] = [-1, 1]
        nodes = np.sort(np.polynomial.legendre.legroots(polynomial).real)
        nodes[-1] = 1
        return _collocation((nodes + 1) / 2)

    @classmethod
    def sdirk(cls) -> "ButcherTableau":
        r"""The singly diagonally implicit method with two stages, of order 2 and
        L-stable.
        """
        gamma = 1 - 1 / math.sqrt(2)
        return cls(((gamma, 0.0), (1 - gamma, gamma)), (1 - gamma, gamma), (gamma, 1.0))

    def stability_function(self, z: Any) -> Any:
        r"""What a step multiplies a solution of $\dot y = \lambda y$ with, for
        $z = h \lambda$:

        $$R(z) = \frac{\det(I - z A + z \mathbf{1} b^\top)}{\det(I - z A)}
        = 1 + z b^\top (I - z A)^{-1} \mathbf{1}$$

        **Arguments:**

        - `z`: $h \lambda$, real or complex, a number or an array of any shape.

        **Returns:**

        $R(z)$, of the shape of `z`.
        """
        z = inexact(z)
        a, b = (jnp.asarray(x, z.dtype) for x in (self.a, self.b))
        eye = jnp.eye(len(b), dtype=z.dtype)

        def at(point):
            return 1 + point * (b @ jnp.linalg.solve(eye - point * a, jnp.ones_like(b)))

        return jax.vmap(at)(z.reshape(-1)).reshape(z.shape)


def order_of(a: np.ndarray, b: np.ndarray, largest: int = 10) -> int:
    """By trees of more and more vertices: of each, the density and the vector whose
    sum by the weights must be one over that.
    """
    trees = [[]]
    for size in range(1, largest + 1):
        new = []
        for branches in _forests(trees, size - 1, size - 1):
            density = size * math.prod(d for d, _ in branches)
            vector = math.prod((a @ v for _, v in branches), start=np.ones(len(b)))
            new.append((density, vector))
        if not all(abs(b @ v - 1 / d) < 1e-9 for d, v in new):
            return size - 1
        trees.append(new)
    return largest


def _forests(trees, size, biggest):
    """All multisets of trees with so many vertices, none with more than `biggest`."""
    if size == 0:
        yield ()
    for first in range(1, min(size, biggest) + 1):
        for count in range(1, size // first + 1):
            heads = itertools.combinations_with_replacement(trees[first], count)
            for head in heads:
                rest = size - first * count
                for tail in _forests(trees, rest, first - 1):
                    yield (*head, *tail)


def _collocation(nodes: np.ndarray) -> ButcherTableau:
    """Integrates, from zero to each node and to one, the polynomials that are one at
    one node and zero at the others, which are sums of Legendre polynomials.
    """
    legendre, size = np.polynomial.legendre, len(nodes)
    sums = np.linalg.inv(legendre.legvander(2 * nodes - 1, size - 1))
    antiderivatives = legendre.legint(sums, lbnd=-1) / 2
    integrals = lambda x: legendre.legval(2 * x - 1, antiderivatives)
    floats = lambda row: tuple(float(x) for x in row)
    a = tuple(floats(integrals(node)) for node in nodes)
    return ButcherTableau(a, floats(integrals(1.0)), floats(nodes))
