from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._custom_types import LinearMap
from .._linear_solver.randomised_neumann import RandomisedNeumannSeries
from .._misc import check_at_least, check_key
from .series import AbstractSeriesAdjoint


class RandomisedNeumannAdjoint(AbstractSeriesAdjoint):
    r"""The Neumann series with a random number of terms, weighted so that its mean is
    the exact gradient (Russian roulette): with $q = 1 - 1 / m$ for `mean_terms` $m$,

    $$\sum_{i<N} q^{-i} J^i, \qquad P(N > i) = q^i,$$

    has the mean $\sum_i J^i = (I - J)^{-1}$ where that series converges, for maps with
    a spectral radius below one. So there is no bias at the price of few products, and
    noise instead: a stochastic gradient's own may drown it.

    The variance is finite where the spectral radius of $J$ is below $\sqrt q$, that is
    for $m > 1 / (1 - \rho^2)$: 5.3 terms for $\rho = .9$, 51 for $.99$. Beyond, few of
    the draws are huge and most are too small (heavy tails): take more terms, or
    [`eqimplicit.ImplicitAdjoint`][].

    The value is the solution, unchanged.

    Costs one linearisation of `f` and `mean_terms - 1` products with $J$ on average,
    as many as the key says (all examples of a `jax.vmap` as many, unless each has a key
    of its own). Memory for one application. Forward mode works; second derivatives
    raise an error. Auxiliary outputs and stats have no derivative.

    !!! example

        ```python
        def loss(cell, x, key):
            adjoint = eqi.RandomisedNeumannAdjoint(mean_terms=8, key=key)
            return jnp.sum(eqi.DEQ(cell, adjoint=adjoint)(x) ** 2)

        # A new key for each step and each example.
        jax.vmap(lambda x, key: loss(cell, x, key))(xs, jr.split(key, len(xs)))
        ```

    ??? cite "References"

        ```bibtex
        @article{mcleish2011general,
            author = {McLeish, Don},
            title = {A General Method for Debiasing a {M}onte {C}arlo Estimator},
            journal = {Monte Carlo Methods and Applications},
            volume = {17},
            number = {4},
            pages = {301--315},
            year = {2011},
        }
        ```
    """

    mean_terms: float | int | Float[Array, ""]
    key: PRNGKeyArray

    def __init__(
        self, mean_terms: float | int | Float[Array, ""], *, key: PRNGKeyArray
    ):
        """**Arguments:**

        - `mean_terms`: the mean number $m$ of terms, at least 1; 1 is
            [`eqimplicit.JFBAdjoint`][].
        - `key`: a `jax.random.key`, for the number of terms. The same one always gives
            the same number: put a new one in for each training step.

        **Raises:** a `ValueError` if `mean_terms` is below 1, a `TypeError` if `key` is
        no key.
        """
        self.mean_terms = mean_terms
        self.key = key

    def __check_init__(self):
        check_at_least("mean_terms", self.mean_terms, 1)
        check_key(self.key)

    @property
    def series(self) -> RandomisedNeumannSeries:
        return RandomisedNeumannSeries(self.mean_terms, self.key)

    def count_products(
        self, operator: LinearMap, cotangent: PyTree[Array]
    ) -> Int[Array, ""]:
        del operator, cotangent
        return self.series.num_terms() - 1
