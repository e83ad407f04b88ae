"""Image classifiers, as the training loop wants them."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import optimistix as optx
from jaxtyping import Array, Float, Int, PyTree

import eqimplicit as eqi


class Solve(NamedTuple):
    """How the solve of one layer went; arrays with one entry an example, or none."""

    evaluations: Array
    unconverged: Array
    nonfinite: Array

    @classmethod
    def of(cls, solution: optx.Solution) -> "Solve":
        return cls(
            solution.stats["num_evaluations"],
            solution.result != optx.RESULTS.successful,
            solution.result == optx.RESULTS.nonfinite,
        )


class Output(NamedTuple):
    """Of a network in training: the logits, its new Equinox state, the solve of each
    layer by its name, what is added to the loss, and the solutions, of which each image
    has its own, for those that start from them."""

    logits: Float[Array, "*batch classes"]
    state: Any
    solves: dict[str, Solve]
    penalty: Float[Array, ""] | float = 0.0
    solution: PyTree[Array] = None


def forward(
    model: eqi.models.ImageClassifier, state, images, key=None, z0=None
) -> Output:
    """Of a network with one implicit layer, on a batch of images. With an Equinox state
    the batch is one state of the layer, else each image has a solve of its own. The
    solve starts from `z0`, if that is given.
    """
    if state is None and images.ndim == 4:
        keys = None if key is None else jr.split(key, len(images))
        batched = jax.vmap(forward, (None, None, 0, 0, 0))
        return batched(model, None, images, keys, z0)
    encoder_key = None if key is None else jr.fold_in(key, 0)
    features, state = model.encoder(images, state, key=encoder_key)
    if not isinstance(model.layer, eqi.DEQ):  # explicit
        z = model.layer(features, state=state)
        z, state = (z, None) if state is None else z
        return Output(model.head(z, key=key), state, {})
    solution = model.layer.solve(features, z0, state=state)
    z = solution.value
    logits = model.head(z, key=key)
    return Output(logits, solution.aux, {"layer": Solve.of(solution)}, solution=z)


@ft.cache  # One object for equal depths, for which a step is compiled once.
def unroll(depth: int) -> Callable[[Any], Any]:
    """Puts so many applications of the cell, differentiated as such, in place of the
    solve of a network: for the start of training."""

    def unrolled(model: eqi.models.ImageClassifier) -> eqi.models.ImageClassifier:
        old = model.layer
        assert isinstance(old, eqi.DEQ)
        # The tolerance is never met.
        solver = eqi.Picard(rtol=0.0, atol=1e-30)
        adjoint = optx.RecursiveCheckpointAdjoint()
        layer = eqi.DEQ(old.cell, solver, adjoint, depth, init=old.init)
        return eqx.tree_at(lambda m: m.layer, model, layer)

    return unrolled


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Its mean. With smoothed labels less depends on the few hardest images."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(one_hot, smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def gradient_cosines(
    model: eqi.models.ImageClassifier, state, images, labels, adjoints: Sequence[Any]
) -> Float[Array, " adjoints"]:
    """The cosines between the gradient of the cell's parameters that each adjoint gives
    and the exact one."""
    if state is None and images.ndim == 4:
        one = lambda image, label: gradient_cosines(model, None, image, label, adjoints)
        return jnp.mean(jax.vmap(one)(images, labels), axis=0)
    features, state = model.encoder(images, state)
    assert isinstance(model.layer, eqi.DEQ)
    head: Callable = eqx.nn.inference_mode(model.head)
    _, *reports = eqi.gradient_report(
        model.layer,
        lambda z: cross_entropy(head(z), labels),
        features,
        adjoints=adjoints,
        state=state,
    )
    return jnp.stack([report.cosine for report in reports])
