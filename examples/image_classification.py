"""Trains an implicit network to classify images, with the solver and the adjoint of
your choice.

The embedded digits take less than a minute:

    python examples/image_classification.py --adjoint jfb
    python examples/image_classification.py --dataset mnist --data-dir data --epochs 3

The run folder holds a checkpoint, from which the same command resumes; one line of
metrics an epoch; and their curves. The test accuracy is that of the whole test set in
inference mode. It is reported and used for nothing.
"""

import dataclasses
import functools as ft
import math
import os
import pathlib
import time
from typing import Any, Literal

import command_line
import curves
import equinox as eqx
import image_data
import image_models
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import optimistix as optx
import pooch
import run_folder
import tqdm
import tyro
from command_line import UserError

import eqimplicit as eqi


@dataclasses.dataclass(frozen=True)
class Config:
    """Train an implicit network to classify images."""

    # tyro shows these lines as they are: at most 58 characters fit into a terminal.
    dataset: image_data.Name = "digits"
    """The digits are embedded, the others are in --data-dir."""

    adjoint: Literal["jfb", "neumann", "phantom", "implicit", "unrolled"] = "jfb"
    """How to differentiate the solution: by one step of the
    cell (jfb), by several terms of a series (neumann), by
    several steps (phantom), exactly (implicit), or through
    the iteration of the solver (unrolled; best with picard)."""

    solver: Literal["picard", "anderson", "broyden"] = "anderson"
    """How to find the fixed point."""

    rtol: float = 1e-3
    """Relative tolerance of the solver. In bfloat16 take 1e-2."""

    atol: float = 1e-3
    """Absolute tolerance of the solver. In bfloat16 take 1e-2."""

    max_steps: int = 50
    """The most steps a solve may take."""

    num_terms: int = 5
    """How many terms neumann takes, or steps phantom."""

    damping: float = 1.0
    """The damping of neumann or phantom. 1 is undamped."""

    epochs: int = 20
    """Passes over the training images."""

    batch_size: int = 50
    """Images per training step."""

    learning_rate: float = 2e-3
    """Of AdamW, at first. It falls to zero along a cosine."""

    seed: int = 0
    """Decides the parameters, drop-out and order of images."""

    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """In bfloat16 the parameters themselves stay in float32."""

    train_size: int | None = None
    """Train on the first so many images only."""

    smoke: bool = False
    """A short run, 2 epochs of 500 images, to try things out."""

    data_dir: pathlib.Path | None = None
    """The data folder, by default EQIMPLICIT_DATA or else a
    cache folder. Files are looked for in its subfolder
    mnist, fashion_mnist or cifar10, then in itself, and
    downloaded to the subfolder if they are not there."""

    out: pathlib.Path | None = None
    """The run folder, by default runs/DATASET-ADJOINT-SOLVER."""


def check(config: Config) -> None:
    for name in ("epochs", "batch_size", "max_steps", "num_terms", "train_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            _refuse(name, value, "at least 1")
    for name in ("learning_rate", "damping"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            _refuse(name, value, "a positive number")
    for name in ("rtol", "atol"):
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            _refuse(name, value, "a number, not negative")
    if config.smoke and (config.epochs, config.train_size) != (Config.epochs, None):
        raise UserError("--smoke decides --epochs and --train-size. Leave them out")
    if config.rtol == 0 and config.atol == 0:
        raise UserError("--rtol and --atol must not both be zero")
    if not 0 <= config.seed < 2**32:
        _refuse("seed", config.seed, "between 0 and 2**32 - 1")


def _refuse(name, value, wanted):
    raise UserError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")


def make_layer(config: Config, cell: Any) -> eqi.DEQ:
    solvers = {"picard": eqi.Picard, "anderson": eqi.Anderson, "broyden": eqi.Broyden}
    adjoints = {
        "jfb": eqi.JFBAdjoint(),
        "neumann": eqi.NeumannAdjoint(config.num_terms, config.damping),
        "phantom": eqi.PhantomAdjoint(config.num_terms, config.damping),
        "implicit": eqi.ImplicitAdjoint(),
        "unrolled": optx.RecursiveCheckpointAdjoint(),
    }
    solver = solvers[config.solver](rtol=config.rtol, atol=config.atol)
    return eqi.DEQ(cell, solver, adjoints[config.adjoint], config.max_steps)


def make_model(config: Config, image_shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """A network, and its Equinox state if it has batch normalisation: then it takes the
    whole batch, as one state of the layer. Without a state it takes one image.
    """
    key = jr.fold_in(jr.key(config.seed), 0)
    layer = ft.partial(make_layer, config)
    if config.dataset == "digits":
        model, state = image_models.digits_classifier(layer, key=key), None
    else:
        make = eqx.nn.make_with_state(eqi.models.jfb_mnist)
        model, state = make(image_shape, layer=layer, key=key)
    dtype = "float64" if config.precision == "float64" else "float32"
    return cast((model, state), dtype)


def cast(tree: Any, dtype: str) -> Any:
    return jtu.tree_map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree
    )


def forward(model, state, images, key=None):
    """The logits, the new Equinox state, and how the solves went."""
    if state is None and images.ndim == 4:
        keys = None if key is None else jr.split(key, len(images))
        return jax.vmap(forward, (None, None, 0, 0))(model, None, images, keys)
    features, state = model.encoder(images, state)
    solution = model.layer.solve(features, state=state)
    solves = {
        "evaluations": solution.stats["num_evaluations"],
        "unconverged": solution.result != optx.RESULTS.successful,
    }
    return model.head(solution.value, key=key), solution.aux, solves


@ft.cache  # Steps are compiled once for each optimiser, and two are never equal.
def make_optimiser(learning_rate, num_steps):
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.adamw(schedule, weight_decay=1e-2)


def cross_entropy(logits, labels):
    """With smoothed labels: less depends on the few hardest images, and on the seed."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(one_hot, 0.1)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def loss_fn(model, state, images, labels, key, precision):
    # The arrays that are optimised keep their dtype, and so do batch statistics.
    model, images = cast((model, images), precision)
    logits, state, solves = forward(model, state, images, key)
    loss = cross_entropy(logits, labels)
    correct = jnp.argmax(logits, axis=-1) == labels
    metrics = {"loss": loss, "train_accuracy": correct, **solves}
    return loss, (state, jtu.tree_map(jnp.mean, metrics))


@eqx.filter_jit
def train_step(model, state, opt_state, images, labels, key, optimiser, precision):
    grad_fn = eqx.filter_grad(loss_fn, has_aux=True)
    grads, (state, metrics) = grad_fn(model, state, images, labels, key, precision)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimiser.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), state, opt_state, metrics


@eqx.filter_jit
def count_correct(model, state, images, labels, precision):
    """Of a batch; negative labels are padding."""
    model, images = cast((eqx.nn.inference_mode(model), images), precision)
    logits, _, _ = forward(model, state, images)
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)


@eqx.filter_jit
def gradient_cosine(model, state, images, labels):
    """The cosine between the gradient of the cell's parameters and the exact one."""
    if state is None and images.ndim == 4:
        cosines = jax.vmap(gradient_cosine, (None, None, 0, 0))
        return jnp.mean(cosines(model, None, images, labels))
    features, state = model.encoder(images, state)
    head = eqx.nn.inference_mode(model.head)
    _, report = eqi.gradient_report(
        model.layer,
        lambda z: cross_entropy(head(z), labels),
        features,
        adjoints=[model.layer.adjoint],
        state=state,
    )
    return report.cosine


def train_epoch(config, data, epoch, optimiser, model, state, opt_state):
    key = jr.fold_in(jr.key(config.seed), epoch)
    order = np.asarray(jr.permutation(key, len(data.train.labels)))
    num_batches = len(order) // config.batch_size
    lines = []
    for i in tqdm.trange(num_batches, desc=f"epoch {epoch}", leave=False, disable=None):
        indices = order[i * config.batch_size : (i + 1) * config.batch_size]
        images, labels = data.normalise(data.train, indices)
        model, state, opt_state, line = train_step(
            model,
            state,
            opt_state,
            images,
            labels,
            jr.fold_in(key, i),
            optimiser,
            config.precision,
        )
        lines.append(line)
    means = {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}
    return model, state, opt_state, means


def test_accuracy(config, data, model, state):
    size, num_correct = len(data.test.labels), 0
    for start in range(0, size, config.batch_size):
        indices = np.arange(start, start + config.batch_size)
        images, labels = data.normalise(data.test, indices % size)
        labels = np.where(indices < size, labels, -1)
        num_correct += count_correct(model, state, images, labels, config.precision)
    return float(num_correct) / size


def train(config: Config) -> list[dict[str, Any]]:
    """Trains, or resumes. Returns the metrics of each epoch."""
    check(config)
    if config.smoke:
        config = dataclasses.replace(config, epochs=2, train_size=500)
    name = f"{config.dataset}-{config.adjoint}-{config.solver}"
    title = f"{config.dataset}: {config.adjoint} gradients, {config.solver} solver"
    folder = config.out or pathlib.Path("runs", name)
    options = dataclasses.asdict(config)
    del options["out"], options["data_dir"]
    old_metrics = run_folder.open_run(folder, options)
    metrics = old_metrics or []
    if len(metrics) == config.epochs:
        accuracy = metrics[-1]["test_accuracy"]
        print(
            f"{folder} is finished, with {accuracy:.2%} of the test set right. "
            "For another run give another --out."
        )
        return metrics

    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    data = image_data.load(config.dataset, data_folder(config), config.train_size)
    num_images = len(data.train.labels)
    if config.batch_size > num_images:
        _refuse("batch_size", config.batch_size, f"at most {num_images}")
    model, state = make_model(config, data.train.images.shape[1:])
    num_steps = config.epochs * (num_images // config.batch_size)
    optimiser = make_optimiser(config.learning_rate, num_steps)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    arrays = (model, state, opt_state)
    if old_metrics is None:
        run_folder.save(folder, options, metrics, arrays)
    else:
        arrays = run_folder.load(folder, arrays)
        print(f"{folder}: resuming after epoch {len(metrics)}.")

    for epoch in range(len(metrics) + 1, config.epochs + 1):
        start = time.perf_counter()
        *arrays, line = train_epoch(config, data, epoch, optimiser, *arrays)
        model, state, _ = arrays
        line["test_accuracy"] = test_accuracy(config, data, model, state)
        images, labels = data.normalise(data.train, np.arange(min(num_images, 32)))
        cosine = gradient_cosine(model, state, images, labels)
        line["gradient_cosine"] = float(cosine)
        line["seconds"] = time.perf_counter() - start
        metrics = [*metrics, {"epoch": epoch, **line}]
        # The checkpoint last: only then does the epoch count as done.
        with run_folder.replacing(folder / "curves.png") as path:
            curves.plot_curves(path, metrics, title)
        run_folder.save(folder, options, metrics, tuple(arrays))
        report(config, metrics[-1])
    print(f"The checkpoint, the metrics and their curves are in {folder}.")
    return metrics


def data_folder(config):
    default = os.environ.get("EQIMPLICIT_DATA") or pooch.os_cache("eqimplicit")
    return config.data_dir or pathlib.Path(default)


def report(config, line):
    print(
        f"epoch {line['epoch']:{len(str(config.epochs))}}/{config.epochs}  "
        f"loss {line['loss']:.4f}  "
        f"train {line['train_accuracy']:6.2%}  test {line['test_accuracy']:6.2%}  "
        f"evaluations {line['evaluations']:4.1f}  "
        f"unconverged {line['unconverged']:.1%}  {line['seconds']:.1f} s",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    train(tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,)))


if __name__ == "__main__":
    command_line.run(main)
