import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax.interpreters import partial_eval
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._misc import accumulation_dtype, check_positive, check_positive_int, two_norm
from .base import AbstractParametrisation, resolve
from .untrained import Untrained, untrained


class SpectralNorm(AbstractParametrisation):
    r"""Spectral normalisation: the weight $W / \max(1, \sigma / b)$, with the largest
    singular value $\sigma$ of the operator that the layer applies, and a bound $b$. So
    the layer is $b$-Lipschitz. A weight that meets the bound is not changed (unlike
    that of [`equinox.nn.SpectralNorm`][], which always divides).

    The operator is the true one: for a convolution, on images of the given size with
    the zeros padded, not its kernel as a matrix.

    $\sigma$ is estimated by `num_steps` steps of an iteration from the vector $v$ that
    the node holds. Each goes to the best vector of the plane of $v$ and $W^\top W v$
    (and the last one to $W^\top W v$ itself), so that it finds no less than a step of
    the power iteration (Algorithm 1 of the paper) does. Resolving never changes this
    vector, so that inference is a function of its input;
    [`eqimplicit.advance_spectral_norms`][] after each step of the optimiser keeps it
    up with the weight. The gradient passes through $\sigma$, not through the vector.
    (Decoupled weight decay changes only its length, which does not matter. Decay that
    is added to the gradient before Adam's scaling turns it a little.)

    The estimate is never above $\sigma$; it tends to it geometrically, at least as the
    fourth power of the ratio of the two largest singular values.

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

    weight: Float[Array, "..."] | AbstractParametrisation
    vector: Float[Array, "..."]
    bound: float | Untrained
    operator: Callable = eqx.field(static=True)
    input_shape: tuple[int, ...] = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    def __init__(
        self,
        weight: Float[Array, "..."] | AbstractParametrisation,
        bound: float | Float[Array, ""] = 1.0,
        *,
        operator: Callable | None = None,
        input_shape: tuple[int, ...] | None = None,
        num_steps: int = 5,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `weight`: the weight to normalise, or another parametrisation that stands for
            it, e.g. an [`eqimplicit.WeightNorm`][].
        - `bound`: the largest norm $b$ that it may have. It is not trained: an array
            is held as an [`eqimplicit.Untrained`][].
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
        array = resolve(weight)
        if operator is None and input_shape is None and array.ndim == 2:
            operator, input_shape = jnp.matmul, array.shape[1:]
        if operator is None or input_shape is None:
            raise ValueError(
                "`operator` and `input_shape` must both be given, unless `weight` is a "
                f"matrix. Got a weight of shape {array.shape}."
            )
        self.weight = weight
        self.vector = jr.normal(key, input_shape, array.dtype)
        self.bound = untrained(bound)
        self.operator = operator
        self.input_shape = tuple(input_shape)
        self.num_steps = num_steps
        self.vector = _advanced_vector(self, 100 * num_steps)

    def resolve(self) -> Float[Array, "..."]:
        return _map_stacked(_normalised_weight, self)


def _map_stacked(fn, node):
    """`fn(node)`, or of each of the nodes that are stacked in one."""
    for _ in range(node.vector.ndim - len(node.input_shape)):
        fn = eqx.filter_vmap(fn)
    return fn(node)


def _normalised_weight(node):
    weight, (product, transposed) = resolve(node.weight), _products(node)
    start = _normalise(lax.stop_gradient(node.vector))
    _, image = _ascend(product, transposed, start, node.num_steps - 1)
    vector = _normalise(transposed(_normalise(image))).astype(weight.dtype)
    norm = two_norm(node.operator(weight, vector))
    factor = jnp.maximum(1, norm / lax.stop_gradient(node.bound))
    return weight / factor.astype(weight.dtype)


def _advanced_vector(node, num_steps):
    # The iteration never leaves an invariant subspace, such as that of the entries
    # which are not zero if the weight is diagonal, though the weight may have grown
    # beyond it. What is added to leave it changes the estimate by its square: rounding.
    vector = _normalise(node.vector)
    direction = _normalise(jr.normal(jr.key(0), vector.shape, vector.dtype))
    size = math.sqrt(jnp.finfo(node.vector.dtype).eps)
    start = _normalise(vector + size * direction)
    vector, _ = _ascend(*_products(node), start, num_steps)
    return vector.astype(node.vector.dtype)


def _products(node):
    """With the operator and with its transpose, of vectors in at least float32."""
    weight = lax.stop_gradient(resolve(node.weight))
    dtype = accumulation_dtype(weight.dtype)

    def product(v):
        return node.operator(weight, v.astype(weight.dtype)).astype(dtype)

    transpose = jax.linear_transpose(
        product, jax.ShapeDtypeStruct(node.input_shape, dtype)
    )
    return product, lambda image: transpose(image)[0]


def _ascend(product, transposed, vector, num_steps):
    """Steps that each go from a vector of unit length to the one with the largest image
    in the plane in which this grows the fastest. Also returns the image.
    """

    def step(_, carry):
        vector, image = carry
        other = _normalise(transposed(_normalise(image)))
        # Twice, since of a vector that has converged only rounding remains.
        other = _normalise(other - jnp.sum(vector * other) * vector)
        other = other - jnp.sum(vector * other) * vector
        pair = other, product(other)
        a, b = _normalise((image, pair[1]))
        angle = jnp.arctan2(2 * jnp.sum(a * b), jnp.sum(a * a) - jnp.sum(b * b)) / 2
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        best = jtu.tree_map(lambda x, y: cosine * x + sine * y, carry, pair)
        return _divide(best, two_norm(best[0]))

    return lax.fori_loop(0, num_steps, step, (vector, product(vector)))


def _normalise(tree):
    # Before it is squared, since the square of a small weight may underflow.
    return _divide(tree, two_norm(tree))


def _divide(tree, norm):
    norm = jnp.where(norm > 0, norm, 1)
    return jtu.tree_map(lambda x: x.astype(norm.dtype) / norm, tree)


def _is_spectral_norm(node):
    return isinstance(node, SpectralNorm)


def advance_spectral_norms(tree: PyTree[Any], num_steps: int = 1) -> PyTree[Any]:
    """Takes steps of the iteration of every [`eqimplicit.SpectralNorm`][] in a model,
    so that its estimate keeps up with a weight that is trained. Call it once after each
    step of the optimiser, never at inference.

    A direction that the weight did not have before is found as well; while it overtakes
    the others, the norm may be a few hundredths above the bound, or a tenth if the
    weight changes fast.

    Stacked layers, as `equinox.filter_vmap` of a constructor makes them, are advanced
    each.

    Costs `num_steps + 1` products with each operator and `num_steps` with its
    transpose.

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
        vector = _map_stacked(lambda n: _advanced_vector(n, num_steps), node)
        return eqx.tree_at(lambda n: n.vector, node, vector)

    return jtu.tree_map(advance, tree, is_leaf=_is_spectral_norm)


# What scales and shifts, or looks up, and what would undo a normalisation.
_LEFT_ALONE = (
    eqx.nn.LayerNorm,
    eqx.nn.GroupNorm,
    eqx.nn.RMSNorm,
    eqx.nn.BatchNorm,
    eqx.nn.Embedding,
)
_RESCALING = eqx.nn.WeightNorm, eqx.nn.SpectralNorm


def with_spectral_norm(
    tree: PyTree[Any],
    bound: float | Float[Array, ""] = 1.0,
    *,
    input_shape: tuple[int, ...] | None = None,
    num_steps: int = 5,
    key: PRNGKeyArray,
) -> PyTree[Any]:
    """Puts a [`eqimplicit.SpectralNorm`][] in place of the weight of every affine layer
    of a model: every Module with a `weight` of two or more axes, such as
    [`equinox.nn.Linear`][], [`equinox.nn.Conv2d`][] or one of yours, but for
    Equinox's normalisations and embeddings, which are left as they are.

    A composition of such layers with activations of slope at most one is Lipschitz with
    the product of the bounds.

    A weight that is another parametrisation already, e.g. an
    [`eqimplicit.WeightNorm`][], is normalised as what it stands for. One that is an
    [`eqimplicit.SpectralNorm`][] is replaced by one with the new bound.

    **Arguments:**

    - `tree`: the model, for example an [`equinox.nn.MLP`][].
    - `bound`: the bound of each layer.
    - `input_shape`: the shape of the input of the layers that are not
        [`equinox.nn.Linear`][], without a batch.
    - `num_steps`: as in [`eqimplicit.SpectralNorm`][].
    - `key`: a `jax.random` key.

    **Returns:**

    The model.

    **Raises:** a `ValueError` if `input_shape` is needed and not given, if a Module
    with such a weight is not affine in its input, or if the layers are stacked: those
    need `equinox.filter_vmap`.
    """

    def replace(node, key):
        if isinstance(node, _LEFT_ALONE) or not _is_layer(node):
            return node
        operator = shape = None
        if not isinstance(node, eqx.nn.Linear):
            operator, shape = _linear_part(node, input_shape), input_shape
        elif resolve(node.weight).ndim > 2:
            raise ValueError(
                "`tree` must not consist of stacked layers. Put `eqx.filter_vmap` "
                "around `with_spectral_norm`, or around what makes a layer with it."
            )
        weight = node.weight
        norm = SpectralNorm(
            weight.weight if isinstance(weight, SpectralNorm) else weight,
            bound,
            operator=operator,
            input_shape=shape,
            num_steps=num_steps,
            key=key,
        )
        return eqx.tree_at(lambda n: n.weight, node, norm)

    is_leaf = lambda x: isinstance(x, AbstractParametrisation) or _is_layer(x)
    leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_leaf)
    keys = jr.split(key, len(leaves))
    return treedef.unflatten([replace(x, k) for x, k in zip(leaves, keys)])


def _is_layer(node):
    """Whether it is a Module with a weight of two or more axes."""
    if not isinstance(node, eqx.Module) or isinstance(node, AbstractParametrisation):
        return False
    if isinstance(node, _RESCALING):
        raise ValueError(
            f"`tree` must not contain `eqx.nn.{type(node).__name__}`, which rescales "
            "the weight that is to be bounded. Use the layer inside it."
        )
    return getattr(resolve(getattr(node, "weight", None)), "ndim", 0) > 1


def _linear_part(layer, input_shape):
    """The operator of an affine layer."""
    name = type(layer).__name__
    if input_shape is None:
        raise ValueError(
            f"`input_shape` must be given for {name}: the norm of its operator depends "
            "on it."
        )
    layer = eqx.tree_at(lambda n: n.weight, layer, resolve(layer.weight))
    derivative = lambda x, t: jax.jvp(layer, (x,), (t,))[1]
    x = jax.ShapeDtypeStruct(input_shape, layer.weight.dtype)
    jaxpr = jax.make_jaxpr(derivative)(x, x).jaxpr
    # It is affine if its derivative does not depend on where it is taken.
    _, (is_used, _) = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    if is_used:
        raise ValueError(
            f"{name} has a `weight` and is not affine in its input, so that it has no "
            "norm to bound. Use `with_spectral_norm` on those parts of the model that "
            "are affine."
        )
    return _LinearPart(eqx.filter_eval_shape(lambda: layer))


class _LinearPart(eqx.Module):
    """`x -> A x` of a layer `x -> A x + b`, for any weight."""

    structure: PyTree[Any]

    def __call__(self, weight, x):
        is_struct = lambda s: isinstance(s, jax.ShapeDtypeStruct)
        zeros = lambda s: jnp.zeros(s.shape, s.dtype) if is_struct(s) else s
        layer = jtu.tree_map(zeros, self.structure)
        layer = eqx.tree_at(lambda n: n.weight, layer, weight)
        return jax.jvp(layer, (jnp.zeros_like(x),), (x,))[1]
