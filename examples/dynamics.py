"""What the examples that learn differential equations share: reference trajectories,
networks for vector fields, training of many seeds at once, and the results file.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from training import backward, progress
from training.command_line import UserError

import eqimplicit as eqi


Model = TypeVar("Model")


def integrate(
    vector_field: Callable,
    y0: PyTree[Array],
    times: Float[Array, " times"],
    tolerance: float = 1e-9,
    jump_times: Array | None = None,
    max_steps: int = 100_000,
) -> PyTree[Array]:
    """The solution of a differential equation at the given times, from the first of
    them on. Where it cannot be found (it may have escaped to infinity) it is infinite.
    """
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    if jump_times is not None:
        controller = diffrax.ClipStepSizeController(controller, jump_ts=jump_times)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),  # pyright: ignore[reportArgumentType]
        diffrax.Tsit5(),
        times[0],
        times[-1],
        None,
        y0,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=controller,
        max_steps=max_steps,
        throw=False,
    )
    return solution.ys


class NetworkField(eqx.Module):
    """A vector field that is a network of the state."""

    network: Callable

    def __call__(self, t, y, args):
        return self.network(y)


def mlp(
    in_size: int,
    out_size: int,
    width: int,
    depth: int,
    activation: Callable,
    key: PRNGKeyArray,
) -> eqx.nn.MLP:
    """A network with Xavier's initial weights, no initial biases, and none at its
    end. `depth` counts its hidden layers.
    """
    init = jax.nn.initializers.glorot_uniform()

    def replace(layer, key):
        layer = eqx.tree_at(lambda n: n.weight, layer, init(key, layer.weight.shape))
        if not layer.use_bias:
            return layer
        return eqx.tree_at(lambda n: n.bias, layer, jnp.zeros(layer.bias.shape))

    network = eqx.filter_eval_shape(
        eqx.nn.MLP,
        in_size,
        out_size,
        width,
        depth,
        activation,
        use_final_bias=False,
        key=key,
    )
    keys = jr.split(key, len(network.layers))
    layers = tuple(replace(n, k) for n, k in zip(network.layers, keys))
    return eqx.tree_at(lambda n: n.layers, network, layers)


def make_models(make: Callable[..., Model], *args: Array) -> Model:
    """Models, stacked along the leading axis of their arrays, one for each entry of the
    arguments: compiled, since that is much faster than many small operations.
    """
    return eqx.filter_jit(eqx.filter_vmap(make))(*args)


def fit(
    loss: Callable[[Model, Any], tuple[Array, PyTree[Array]]],
    models: Model,
    optimiser: optax.GradientTransformation,
    num_steps: int,
    *,
    name: str,
    inputs: PyTree[Array] | None = None,
    after: Callable[[Model], Model] = lambda model: model,
    num_chunks: int = 20,
    backward_patience: int = 200,
) -> tuple[Model, PyTree[Array]]:
    """Trains models, stacked along the leading axis of their arrays, all at once.

    `loss` is that of one model and of one entry of the `inputs`, which have one for
    each step, with what to record; `after` is applied to a model after each step.
    Returns the trained models and the records, with axes for the models and the steps.
    A loss that is not finite ends the run, and so do backward solves of which most fail
    in every step for long.
    """
    params, rest = eqx.partition(models, eqx.is_inexact_array)
    # Stacked as well, though not trained.
    others, static = eqx.partition(rest, eqx.is_array)
    # Not weakly typed, which the first step would change.
    params = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params)
    optimiser = optax.with_extra_args_support(optimiser)

    def train(carry, others, inputs):
        return jax.lax.scan(ft.partial(step, others), carry, inputs)

    def step(others, carry, x):
        params, state = carry

        def value_fn(params, probe):
            model = eqx.combine(params, others, static)
            return loss(eqi.with_probe(model, probe), x)

        grad_fn = jax.value_and_grad(value_fn, (0, 1), has_aux=True)
        probe = eqi.backward_probe()
        (value, record), (grads, status) = grad_fn(params, probe)
        updates, state = optimiser.update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=lambda params: value_fn(params, probe)[0],
        )
        params: Any = optax.apply_updates(params, updates)
        model = after(eqx.combine(params, others, static))
        params = eqx.filter(model, eqx.is_inexact_array)
        return (params, state), (record, backward.metrics(status))

    train = jax.jit(jax.vmap(train, in_axes=(0, 0, None)))
    carry = params, jax.vmap(optimiser.init)(params)
    # Equal ones, so that nothing is compiled twice.
    longest = -(-num_steps // num_chunks)
    chunk = max(n for n in range(1, longest + 1) if num_steps % n == 0)
    inputs = jnp.arange(num_steps) if inputs is None else inputs
    records = []
    patience = backward.Patience(backward_patience)
    with progress.bar(num_steps, name) as done:
        for start in range(0, num_steps, chunk):
            some = jax.tree.map(lambda x: x[start : start + chunk], inputs)
            carry, (record, solves) = train(carry, others, some)
            last = jax.tree.map(lambda x: x[:, -1], record)
            if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(last)):
                raise UserError(
                    f"{name}: the loss is not finite after step {start + chunk}. "
                    "Try a smaller learning rate or another seed"
                )
            solves = jax.tree.map(np.asarray, solves)
            for k in range(chunk):
                line = {name: np.mean(x[:, k]) for name, x in solves.items()}
                patience.watch(line, start + k)
            records.append(record)
            shown = {k: float(jnp.mean(v)) for k, v in last.items()}
            if np.any(solves["backward_solves"] > 0):
                shown["backward_failed"] = float(np.mean(solves["backward_failed"]))
            done(chunk, **shown)
    records = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *records)
    return eqx.combine(carry[0], others, static), records


def rmse(actual: Array, expected: Array, axis: Any = None) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(actual - expected), axis=axis))
