"""Which remedies help two cells, taken as one would first write them, whose solves stop
converging in training; and the cells to start from, beside them. All defaults but for
the remedy; accuracies in inference mode.

    python benchmarks/remedies.py
    python benchmarks/remedies.py --small

The folder `data` holds the four files of MNIST, as they were published. Without them
only the digits are trained on.
"""

import functools as ft
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from bench import read_mnist, Row, run
from sklearn.datasets import load_digits

import eqimplicit as eqi
from eqimplicit import models


class NaturalCell(eqx.Module):
    """`norm(relu(W z + U x))`, on images of one pixel."""

    recurrent: models.Conv2d
    inject: models.Conv2d
    norm: Callable

    def __init__(self, channels, norm, *, key):
        keys = jr.split(key)
        self.recurrent = models.Conv2d(channels, channels, 1, key=keys[0])
        self.inject = models.Conv2d(channels, channels, 1, key=keys[1])
        self.norm = norm(channels)

    def __call__(self, z, x, state=None):
        hidden = jax.nn.relu(self.recurrent(z) + self.inject(x))
        out, new_state = self.norm(hidden, state)
        return out if state is None else (out, new_state)


class ResidualCell(eqx.Module):
    """`norm(relu(z + norm(K2 * norm(relu(K1 * z)) + x)))`, on images."""

    convs: tuple[models.Conv2d, models.Conv2d]
    norms: tuple[Callable, Callable, Callable]

    def __init__(self, channels, norm, *, key):
        keys = jr.split(key)
        conv = ft.partial(models.Conv2d, channels, channels, 3, padding=1)
        self.convs = conv(key=keys[0]), conv(key=keys[1])
        self.norms = norm(channels), norm(channels), norm(channels)

    def __call__(self, z, x, state=None):
        hidden, new_state = self.norms[0](jax.nn.relu(self.convs[0](z)), state)
        hidden, new_state = self.norms[1](self.convs[1](hidden) + x, new_state)
        out, new_state = self.norms[2](jax.nn.relu(z + hidden), new_state)
        return out if state is None else (out, new_state)


class Classifier(eqx.Module):
    """With an Equinox state the batch is one equation, else each image has its own."""

    encoder: Callable
    layer: eqi.DEQ
    head: eqx.nn.Linear

    def solve(self, images, state):
        features, _ = self.encoder(images)
        if state is None:
            solution = jax.vmap(self.layer.solve)(features)
        else:
            solution = self.layer.solve(features, state=state)
        logits = jax.vmap(self.head)(solution.value.reshape(len(images), -1))
        return logits, features, solution


_DATA = pathlib.Path("data")


class Zeros(eqx.Module):
    """The state to start from, of one image or of a batch."""

    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x):
        return jnp.zeros((*x.shape[:-3], *self.shape), x.dtype)


class Remedy(NamedTuple):
    """What is done to a cell or to its layer, one thing at a time."""

    norm: Callable | None = None
    weights: Callable | None = None
    layer: Callable = eqi.DEQ
    penalty: float = 0.0


def _weight_norm(cell, shape, key):
    put = lambda conv: eqx.tree_at(
        lambda c: c.weight, conv, eqi.WeightNorm(conv.weight, axis=-1)
    )
    is_conv = lambda node: isinstance(node, models.Conv2d)
    return jax.tree.map(lambda n: put(n) if is_conv(n) else n, cell, is_leaf=is_conv)


def _spectral_norm(cell, shape, key):
    return eqi.with_spectral_norm(cell, 0.9, input_shape=shape, key=key)


_picard = eqi.Picard(1e-4, 1e-4, damping=0.5)
REMEDIES = {
    "none": Remedy(),
    "penalty on the Jacobian, 0.1": Remedy(penalty=0.1),
    "penalty on the Jacobian, 1": Remedy(penalty=1.0),
    "WeightNorm": Remedy(weights=_weight_norm),
    "batch norm": Remedy(norm=models.BatchNorm),
    "group norm": Remedy(norm=models.GroupNorm),
    "SpectralNorm, 0.9": Remedy(weights=_spectral_norm),
    "damping 0.5": Remedy(
        layer=ft.partial(eqi.DEQ, solver=eqi.Anderson(1e-4, 1e-4, damping=0.5))
    ),
    "Picard, damping 0.5": Remedy(layer=ft.partial(eqi.DEQ, solver=_picard)),
    "history of 20": Remedy(
        layer=ft.partial(eqi.DEQ, solver=eqi.Anderson(1e-4, 1e-4, history_size=20))
    ),
    "Broyden": Remedy(layer=ft.partial(eqi.DEQ, solver=eqi.Broyden(1e-4, 1e-4))),
    "max_steps 400": Remedy(layer=ft.partial(eqi.DEQ, max_steps=400)),
    "JFB": Remedy(layer=ft.partial(eqi.DEQ, adjoint=eqi.JFBAdjoint())),
}


class Problem(NamedTuple):
    """Images and labels, for training and for the test; the encoder and the cell, as
    `make_cell(norm, key)`, that are trained on them; and for how many epochs.
    """

    data: tuple[Any, Any, Any, Any]
    make_encoder: Callable
    make_cell: Callable
    norm: Callable | None
    state_shape: tuple[int, ...]
    optimiser: optax.GradientTransformation
    num_epochs: int
    batch_size: int


class OnePixel(eqx.Module):
    """A cell of vectors, on images of one pixel."""

    cell: Callable

    def __call__(self, z, x):
        return self.cell(z[0, 0], x[0, 0])[None, None]


def _natural(norm, key):
    return NaturalCell(64, norm, key=key)


def _dense(norm, key):
    return OnePixel(models.DenseCell(64, 64, key=key))


def _residual(norm, key):
    return ResidualCell(16, norm, key=key)


def _convolutional(norm, key):
    return models.ConvCell(16, 16, key=key)


def _digits(small: bool, make_cell: Callable) -> Problem:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)[:, None, None]
    rng = np.random.default_rng(0)
    train, test = np.split(rng.permutation(len(images)), [100 if small else 1500])
    num_epochs = 1 if small else 8
    rate = optax.cosine_decay_schedule(1e-2, num_epochs * (len(train) // 50))
    data = images[train], labels[train], images[test[:297]], labels[test[:297]]
    adam = optax.adam(rate)
    encoder = lambda key: models.NoNorm()
    norm = ft.partial(models.GroupNorm, groups=1)
    return Problem(data, encoder, make_cell, norm, (1, 1, 64), adam, num_epochs, 50)


def _mnist(small: bool, make_cell: Callable, norm: Callable | None) -> Problem:
    images, labels, test_images, test_labels = read_mnist(_DATA)
    scale = lambda a: (a[..., None] / 255).astype(np.float32)
    n, num_tests = (100, 100) if small else (5000, 10000)
    test_images, test_labels = test_images[:num_tests], test_labels[:num_tests]
    data = scale(images[:n]), labels[:n], scale(test_images), test_labels
    encoder = lambda key: models.ConvEncoder(1, 8, 16, norm=models.GroupNorm, key=key)
    adam = optax.adam(1e-3)
    return Problem(data, encoder, make_cell, norm, (9, 9, 16), adam, 1, 50)


@eqx.filter_jit
def _step(net, opt_state, state, optimiser, penalty, images, labels, key):
    def loss_fn(net):
        logits, features, solution = net.solve(images, state)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = jnp.mean(losses)
        if penalty > 0:
            fn = lambda z: _cell_value(net.layer.cell, z, features, state)
            z = jax.lax.stop_gradient(solution.value)
            loss += penalty * eqi.jacobian_frobenius(fn, z, key=key) / z.size
        return loss, solution

    grads, solution = eqx.filter_grad(loss_fn, has_aux=True)(net)
    updates, opt_state = optimiser.update(grads, opt_state)
    net = eqi.advance_spectral_norms(eqx.apply_updates(net, updates))
    return net, opt_state, solution.aux, eqi.summarise(solution)


def _cell_value(cell, z, x, state):
    value = eqi.resolve(cell)(z, x, state)
    return value if state is None else value[0]


@eqx.filter_jit
def _test(net, state, images, labels):
    logits, _, solution = net.solve(images, state)
    return jnp.argmax(logits, axis=1) == labels, eqi.summarise(solution)


def train(problem: Problem, remedy: Remedy, seed: int) -> dict[str, Any]:
    """Trains, and says how many of the solves were found in the first and in the last
    fifth of the steps, and how well the classes of the test set are told."""
    keys = jr.split(jr.key(seed), 5)
    norm = remedy.norm or problem.norm
    make = eqx.nn.make_with_state(problem.make_cell)
    cell, state = make(norm, keys[0])
    if norm is not models.BatchNorm:
        state = None
    if remedy.weights is not None:
        cell = remedy.weights(cell, problem.state_shape, keys[1])
    net = Classifier(
        problem.make_encoder(keys[2]),
        remedy.layer(cell, init=Zeros(problem.state_shape)),
        eqx.nn.Linear(math.prod(problem.state_shape), 10, key=keys[3]),
    )
    opt_state = problem.optimiser.init(eqx.filter(net, eqx.is_inexact_array))
    images, labels, *tests = problem.data
    rng = np.random.default_rng(seed)
    found, evaluations = [], []
    for _ in range(problem.num_epochs):
        for batch in rng.permutation(len(images)).reshape(-1, problem.batch_size):
            net, opt_state, state, summary = _step(
                net,
                opt_state,
                state,
                problem.optimiser,
                remedy.penalty,
                images[batch],
                labels[batch],
                jr.fold_in(keys[4], len(found)),
            )
            found.append(1 - float(summary.share_not_found))
            evaluations.append(float(summary.mean_evaluations))
    net = eqx.nn.inference_mode(net)
    num_parts = max(1, len(tests[0]) // 500)
    parts = zip(*(np.split(part, num_parts) for part in tests))
    hits, summaries = zip(*(_test(net, state, *part) for part in parts))
    fifth = -(-len(found) // 5)
    return {
        "found at first, %": 100 * np.mean(found[:fifth]),
        "found at last, %": 100 * np.mean(found[-fifth:]),
        "evaluations at last": np.mean(evaluations[-fifth:]),
        "found in the test, %": 100
        - 100 * np.mean([s.share_not_found for s in summaries]),
        "accuracy, %": 100 * np.mean(hits),
    }


def _span(name, runs):
    low, high = (round(f(float(run[name]) for run in runs)) for f in (min, max))
    return f"{low}" if low == high else f"{low} to {high}"


def _rows(cell: Problem, starter: Problem, num_seeds: int) -> list[Row]:
    cases = {name: (cell, remedy) for name, remedy in REMEDIES.items()}
    cases["the cell to start from"] = starter, Remedy()
    cases["the cell to start from, JFB"] = starter, REMEDIES["JFB"]
    rows = []
    for name, (problem, remedy) in cases.items():
        if remedy.norm is None or remedy.norm is not problem.norm:
            runs = [train(problem, remedy, seed) for seed in range(num_seeds)]
            rows.append({"": name} | {key: _span(key, runs) for key in runs[0]})
    return rows


def digits(small: bool) -> list[Row]:
    """Layer normalisation of a dense cell, on 1500 digits in 8 epochs."""
    cell, starter = (_digits(small, make_cell) for make_cell in (_natural, _dense))
    return _rows(cell, starter, 1 if small else 3)


def mnist(small: bool) -> list[Row]:
    """A residual cell with batch normalisation, on an epoch of 5000 images of MNIST."""
    try:
        cell = _mnist(small, _residual, models.BatchNorm)
    except FileNotFoundError as error:
        return [{"MNIST": f"left out, since {error.filename} is missing"}]
    starter = _mnist(small, _convolutional, None)
    return _rows(cell, starter, 1 if small else 3)


def draw(results, figure):
    all_axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (title, rows) in zip(all_axes, results.items()):
        names = [row[""] for row in rows if "" in row]
        mean = lambda text: np.mean([float(t) for t in text.split(" to ")])
        for i, key in enumerate(("found at last, %", "accuracy, %")):
            values = [mean(row[key]) for row in rows if key in row]
            axes.barh(np.arange(len(names)) + 0.4 * i, values, 0.4, label=key)
        axes.set(
            title=title,
            xlim=(0, 140),
            yticks=np.arange(len(names)) + 0.2,
            yticklabels=names,
        )
        axes.invert_yaxis()
        axes.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    run(__doc__, {"digits": digits, "MNIST": mnist}, draw)
