from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._misc import check_positive, check_positive_int, two_norm
from .base import AbstractParametrisation


class SpectralNorm(AbstractParametrisation):
    r"""Spectral normalisation: the weight $W / \max(1, \sigma / b)$, with the largest
    singular value $\sigma$ of the operator that the layer applies, and a bound $b$. So
    the layer is $b$-Lipschitz. A weight that meets the bound is not changed (unlike
    that of [`equinox.nn.SpectralNorm`][], which always divides).

    The operator is the true one: for a convolution, on images of the given size with
    the zeros padded, not its kernel as a matrix.

    $\sigma$ is estimated by `num_steps` steps of a power iteration from the vector that
    the node holds (Algorithm 1 of the paper). Resolving never changes this vector, so
    that inference is a function of its input;
    [`eqimplicit.advance_spectral_norms`][] after each step of the optimiser keeps it
    up with the weight. The gradient passes through $\sigma$, not through the vector.
    (Decoupled weight decay changes only its length, which does not matter. Decay that
    is added to the gradient before Adam's scaling turns it a little.)

    The estimate is never above $\sigma$; it tends to it geometrically, as the square of
    the ratio of the two largest singular values.

    Costs, each time the node is resolved, `num_steps + 1` products with the operator
    and `num_steps` with its transpose.

    ??? cite "References"

        ```bibtex
        @inproceedings{miyato2018spectral,
            author = {Miyato, Takeru and Kataoka, Toshiki and Koyama, Masanori and
                      Yoshida, Yuichi},
            title = {Spectral Normalization for Generative Adversarial Networks},
            booktitle = {International Conference on Learning Representations},
            year = {2018},
        }

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

    weight: Float[Array, "..."]
    vector: Float[Array, "..."]
    bound: float | Float[Array, ""]
    operator: Callable = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    def __init__(
        self,
        weight: Float[Array, "..."],
        bound: float | Float[Array, ""] = 1.0,
        *,
        operator: Callable | None = None,
        input_shape: tuple[int, ...] | None = None,
        num_steps: int = 5,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `weight`: the weight to normalise.
        - `bound`: the largest norm $b$ that it may have.
        - `operator`: a function `operator(weight, x)`, linear in `x`; by default
            `weight @ x`. Hashable, if the layer is to be used under `jax.jit`.
        - `input_shape`: the shape of `x`; by default that of a matrix's input.
        - `num_steps`: the number of steps of the power iteration whenever the node is
            resolved. (When it is made, it takes 100 times as many.)
        - `key`: for the random vector to start from.

        [`eqimplicit.with_spectral_norm`][] does this for all layers of a model.

        **Raises:** a `ValueError` if `bound` is not positive, `num_steps` is below 1,
        or `weight` is not a matrix and no operator and shape are given.
        """
        check_positive("bound", bound)
        check_positive_int("num_steps", num_steps)
        if operator is None and input_shape is None and weight.ndim == 2:
            operator, input_shape = jnp.matmul, weight.shape[1:]
        if operator is None or input_shape is None:
            raise ValueError(
                "`operator` and `input_shape` must both be given, unless `weight` is a "
                f"matrix. Got a weight of shape {weight.shape}."
            )
        self.weight = weight
        self.vector = jr.normal(key, input_shape, weight.dtype)
        self.bound = bound
        self.operator = operator
        self.num_steps = num_steps
        self.vector = self.singular_vector(100 * num_steps)

    def singular_vector(self, num_steps: int) -> Float[Array, "..."]:
        """The vector, of unit length, after so many steps of the power iteration."""
        product = lambda v: self.operator(self.weight, v)
        transposed = jax.linear_transpose(product, self.vector)

        def step(_, v):
            # Twice, since the square of a small weight may underflow.
            (v,) = transposed(_normalise(product(v)))
            return _normalise(v)

        start = _normalise(self.vector)
        return lax.stop_gradient(lax.fori_loop(0, num_steps, step, start))

    def resolve(self) -> Float[Array, "..."]:
        vector = self.singular_vector(self.num_steps)
        norm = two_norm(self.operator(self.weight, vector))
        factor = jnp.maximum(1, norm / lax.stop_gradient(self.bound))
        return self.weight / factor.astype(self.weight.dtype)


def _normalise(v):
    norm = two_norm(v)
    return v / jnp.where(norm > 0, norm, 1).astype(v.dtype)


def _is_spectral_norm(node):
    return isinstance(node, SpectralNorm)


def advance_spectral_norms(tree: PyTree[Any], num_steps: int = 1) -> PyTree[Any]:
    """Takes steps of the power iteration of every [`eqimplicit.SpectralNorm`][] in a
    model, so that its estimate keeps up with a weight that is trained. Call it once
    after each step of the optimiser, never at inference.

    For stacked layers, apply it under `equinox.filter_vmap`.

    **Arguments:**

    - `tree`: any pytree.
    - `num_steps`: the number of steps.

    **Returns:**

    The pytree, with other vectors and the same weights.
    """
    check_positive_int("num_steps", num_steps)

    def advance(node):
        if not _is_spectral_norm(node):
            return node
        return eqx.tree_at(lambda n: n.vector, node, node.singular_vector(num_steps))

    return jtu.tree_map(advance, tree, is_leaf=_is_spectral_norm)


def with_spectral_norm(
    tree: PyTree[Any],
    bound: float = 1.0,
    *,
    input_shape: tuple[int, ...] | None = None,
    num_steps: int = 5,
    key: PRNGKeyArray,
) -> PyTree[Any]:
    """Puts a [`eqimplicit.SpectralNorm`][] in place of the weight of every affine layer
    of a model: every Module with a `weight` of two or more axes, such as
    [`equinox.nn.Linear`][] and [`equinox.nn.Conv2d`][].

    A composition of such layers with activations of slope at most one is Lipschitz with
    the product of the bounds.

    **Arguments:**

    - `tree`: the model, for example an [`equinox.nn.MLP`][].
    - `bound`: the bound of each layer.
    - `input_shape`: the shape of the input of the layers that are not
        [`equinox.nn.Linear`][], without a batch.
    - `num_steps`: as in [`eqimplicit.SpectralNorm`][].
    - `key`: a `jax.random` key.

    **Returns:**

    The model.

    **Raises:** a `ValueError` if `input_shape` is needed and not given.
    """

    def is_affine(node):
        return (
            isinstance(node, eqx.Module)
            and getattr(getattr(node, "weight", None), "ndim", 0) > 1
        )

    def replace(node, key):
        if not is_affine(node):
            return node
        if isinstance(node, eqx.nn.Linear):
            norm = SpectralNorm(node.weight, bound, num_steps=num_steps, key=key)
        elif input_shape is None:
            raise ValueError(
                f"`input_shape` must be given for {type(node).__name__}: the norm of "
                "its operator depends on it."
            )
        else:
            norm = SpectralNorm(
                node.weight,
                bound,
                operator=_LinearPart(eqx.filter_eval_shape(lambda: node)),
                input_shape=input_shape,
                num_steps=num_steps,
                key=key,
            )
        return eqx.tree_at(lambda n: n.weight, node, norm)

    leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_affine)
    keys = jr.split(key, len(leaves))
    return treedef.unflatten([replace(x, k) for x, k in zip(leaves, keys)])


class _LinearPart(eqx.Module):
    """`x -> A x` of a layer `x -> A x + b`, for any weight."""

    structure: PyTree[Any]

    def __call__(self, weight, x):
        is_struct = lambda s: isinstance(s, jax.ShapeDtypeStruct)
        zeros = lambda s: jnp.zeros(s.shape, s.dtype) if is_struct(s) else s
        layer = jtu.tree_map(zeros, self.structure)
        layer = eqx.tree_at(lambda n: n.weight, layer, weight)
        return jax.jvp(layer, (jnp.zeros_like(x),), (x,))[1]
