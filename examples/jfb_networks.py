"""The networks of the JFB paper, and how each method solves and trains them."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jfb_settings import Method, Setting
from normal_equations import NormalEquationsCG
from training import classifiers

import eqimplicit as eqi


def make_tolerance(method: Method, setting: Setting) -> tuple[float, int]:
    """Of the forward solve: the absolute tolerance, and the most steps."""
    if method.startswith("cg") and setting.exact_solve is not None:
        return setting.exact_solve
    return setting.atol, setting.max_steps


def make_adjoint(method: Method, setting: Setting) -> Any:
    if method in ("explicit", "jfb"):
        return eqi.JFBAdjoint()
    if method.startswith("neumann-"):
        return eqi.NeumannAdjoint(num_terms=int(method.removeprefix("neumann-")) + 1)
    if method == "cg":
        return eqi.ImplicitAdjoint(NormalEquationsCG(*make_tolerance(method, setting)))
    if method == "cg-converged":
        return eqi.ImplicitAdjoint(NormalEquationsCG(1e-5 / 100, 500))
    return eqi.ImplicitAdjoint()


def make_model(method: Method, setting: Setting, shape, seed: int) -> tuple[Any, Any]:
    def layer(cell):
        if method == "explicit":
            return eqi.models.OneStep(cell)
        if method.startswith("cg"):
            # The authors rescale the kernels when a random test finds no contraction.
            cell = eqi.with_spectral_norm(
                cell, setting.bound, input_shape=setting.latent_shape, key=jr.key(seed)
            )
        atol, max_steps = make_tolerance(method, setting)
        solver = eqi.Picard(rtol=0.0, atol=atol, norm=largest_of_batch)
        return eqi.DEQ(cell, solver, make_adjoint(method, setting), max_steps)

    cell_norm = eqi.models.NoNorm if method.startswith("cg") else None
    make = eqx.nn.make_with_state(setting.make)
    return make(shape, cell_norm=cell_norm, layer=layer, key=jr.key(seed))


def largest_of_batch(tree: Any) -> jax.Array:
    """The largest two-norm of an image, with which the paper stops."""
    single = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = sum(
        jnp.sum(jnp.square(single(x)), axis=range(1, x.ndim))
        for x in jax.tree.leaves(tree)
    )
    return jnp.sqrt(jnp.max(squares))


@ft.cache
def make_optimiser(learning_rate, weight_decay, halve_every):
    schedule: Any = learning_rate
    if halve_every is not None:
        schedule = optax.exponential_decay(
            learning_rate, halve_every, 0.5, staircase=True
        )
    # Decay in the gradient, as PyTorch's Adam has it.
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(schedule))


def augment(key, images):
    """A flip, a crop after a frame of 2 pixels, and a random rectangle of noise."""

    def one(key, image):
        keys = jr.split(key, 5)
        image = jnp.where(jr.bernoulli(keys[0]), image[:, ::-1], image)
        height, width, _ = image.shape
        framed = jnp.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=0.449)
        top, left = jr.randint(keys[1], (2,), 0, 5)
        image = jax.lax.dynamic_slice(framed, (top, left, 0), image.shape)
        area = height * width * jr.uniform(keys[2], minval=0.1, maxval=0.25)
        ratio = jnp.exp(jr.uniform(keys[3], minval=jnp.log(0.3), maxval=jnp.log(3.3)))
        size = jnp.array([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)])
        limits = jnp.array([height, width]) - size
        corner = jr.uniform(keys[4], (2,)) * jnp.maximum(limits, 0)
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
        inside = (rows >= corner[0]) & (rows < corner[0] + size[0])
        inside &= (columns >= corner[1]) & (columns < corner[1] + size[1])
        noise_key, chance_key = jr.split(key)
        erased = inside & jr.bernoulli(chance_key, 0.95)
        return jnp.where(erased[..., None], jr.normal(noise_key, image.shape), image)

    return jax.vmap(one)(jr.split(key, len(images)), images)


@eqx.filter_jit
def inspect_gradient(model, state, images, labels):
    """The cosine of a batch's gradient to the exact one, and its products with J."""
    features, state = eqx.nn.inference_mode(model.encoder)(images, state)
    head = eqx.nn.inference_mode(model.head)
    loss = lambda z: classifiers.cross_entropy(head(z), labels)
    _, report = eqi.gradient_report(
        model.layer, loss, features, adjoints=[model.layer.adjoint], state=state
    )
    return report.cosine, report.num_products


def diagnose(model, state, images, labels):
    """On a few images, since the exact gradient takes many products."""
    if isinstance(model.layer, eqi.models.OneStep):
        return {}
    cosine, products = inspect_gradient(model, state, images[:32], labels[:32])
    return {"gradient_cosine": float(cosine), "products": int(products)}
