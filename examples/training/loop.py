"""The training loop: epochs of steps, with a checkpoint after each."""

import functools as ft
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax

import eqimplicit as eqi

from . import (
    backward,
    curves,
    devices,
    image_data,
    options as options_module,
    progress,
    run_folder,
    warm_start,
)
from .classifiers import cross_entropy, Output
from .command_line import UserError


def as_it_is(model: Any) -> Any:
    return model


class Task(NamedTuple):
    """What is trained, and how.

    - `model`, `state`: a network at the start, and its Equinox state or None.
    - `forward`: `forward(model, state, images, key) -> Output`.
    - `optimiser`: an Optax optimiser, the same object for equal runs, so that a step is
        compiled once.
    - `at_step`: a schedule: `at_step(step)`, counted from 0, returns a function that
        puts the solvers and adjoints of this step into the model, and leaves its
        parameters. A step is compiled for each such function.
    - `after`: `after(model) -> model`, called after every step of the optimiser.
    - `for_prediction`: `for_prediction(model) -> model`, with the solver and adjoint of
        evaluation, if those of training are others.
    - `augment`: `augment(key, images) -> images`, if images are altered in training.
    - `diagnose`: `diagnose(model, state, images, labels)` returns more metrics of an
        epoch, from a batch of training images.
    - `smoothing`: that of the labels in the loss.
    - `backward_patience`: after how many steps in a row in which most backward solves
        have failed the run ends, or None for never.
    - `warm_start`: whether each solve of a training image starts from its last one:
        `forward` then takes a `z0`, and returns a `solution`.
    """

    model: Any
    state: Any
    forward: Callable[..., Output]
    optimiser: optax.GradientTransformation
    at_step: Callable[[int], Callable[[Any], Any]] = lambda step: as_it_is
    after: Callable[[Any], Any] = as_it_is
    for_prediction: Callable[[Any], Any] = as_it_is
    augment: Callable[[Any, Any], Any] | None = None
    diagnose: Callable[..., dict[str, Any]] | None = None
    smoothing: float = 0.0
    backward_patience: int | None = 200
    warm_start: bool = False


def cast(tree: Any, dtype: str) -> Any:
    return jtu.tree_map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree
    )


def _loss(model_and_probe, state, images, labels, key, task, adapt, precision, z0):
    model, probe = model_and_probe
    model = adapt(model)
    if task.augment is not None:
        images = task.augment(jr.fold_in(key, 1), images)
    # The arrays that are optimised keep their dtype, and so do batch statistics.
    model, images = cast((model, images), precision)
    model = eqi.with_probe(model, probe)
    forward = task.forward if z0 is None else ft.partial(task.forward, z0=z0)
    output = forward(model, state, images, key)
    penalty = jnp.mean(jnp.asarray(output.penalty, jnp.float32))
    loss = cross_entropy(output.logits, labels, task.smoothing) + penalty
    metrics = {
        "loss": loss,
        "train_accuracy": jnp.mean(jnp.argmax(output.logits, axis=-1) == labels),
    }
    solves = output.solves.values()
    if solves:
        evaluations = [jnp.mean(solve.evaluations) for solve in solves]
        metrics["evaluations"] = jnp.sum(jnp.stack(evaluations))
        unconverged = [jnp.mean(solve.unconverged) for solve in solves]
        metrics["unconverged"] = jnp.mean(jnp.stack(unconverged))
    nonfinite = {k: jnp.any(solve.nonfinite) for k, solve in output.solves.items()}
    solution = None if z0 is None else output.solution
    return loss, (output.state, metrics, nonfinite, solution)


@eqx.filter_jit
def train_step(arrays, images, labels, key, task, adapt, precision, z0=None):
    """Returns the new model, state and optimiser state, the metrics, and if it was
    given the guess `z0` the solution."""
    model, state, opt_state = arrays
    grad_fn = eqx.filter_grad(_loss, has_aux=True)
    probed = model, eqi.backward_probe()
    (grads, status), (state, metrics, nonfinite, solution) = grad_fn(
        probed, state, images, labels, key, task, adapt, precision, z0
    )
    metrics |= backward.metrics(status)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = task.optimiser.update(grads, opt_state, params)
    model = task.after(eqx.apply_updates(model, updates))
    metrics["gradient_norm"] = optax.tree.norm(grads)
    new = eqx.filter((model, state), eqx.is_inexact_array)
    metrics["parameter_norm"] = optax.tree.norm(new)
    whole = devices.keep_whole(((model, state, opt_state), metrics, nonfinite))
    return *whole, solution


@eqx.filter_jit
def predict(model, state, images, forward, precision):
    model, images = cast((eqx.nn.inference_mode(model), images), precision)
    return devices.keep_whole(forward(model, state, images).logits)


def ranks(
    task: Task,
    model: Any,
    state: Any,
    data: image_data.Dataset,
    part: image_data.Images,
    batch_size: int,
    precision: str = "float32",
) -> np.ndarray:
    """Of the label of each image of a set, in inference mode: how many other classes
    are not less likely. NaN is below nothing, so that a tie is not right."""
    model = task.for_prediction(model)
    size, all_ranks = len(part.labels), []
    for start in range(0, size, batch_size):
        # The last batch is filled up with the first images, which do not count.
        indices = np.arange(start, start + batch_size)
        images, labels = data.normalise(part, indices % size)
        images = devices.divide(images)
        logits = np.asarray(predict(model, state, images, task.forward, precision))
        own = np.take_along_axis(logits, labels[:, None], axis=1)
        all_ranks.append(np.sum(~(logits < own), axis=1) - 1)
    return np.concatenate(all_ranks)[:size]


def train(
    task: Task,
    data: image_data.Dataset,
    options: options_module.Options,
    folder: pathlib.Path,
    title: str,
    experiment: str,
) -> tuple[list[dict[str, Any]], Any, Any]:
    """Trains, or resumes what is in the folder. Returns the metrics of each epoch, and
    the trained model and its state.
    """
    devices.check_batch_size(options.batch_size)
    options_module.steps_per_epoch(options, len(data.train.labels))
    with devices.claim(folder):
        return _train(task, data, options, folder, title, experiment)


def _train(task, data, options, folder, title, experiment):
    record = options_module.record(options, experiment)
    if task.warm_start:
        record["stored_solutions"] = len(data.train.labels)
    devices.check_agreement(str(record), "their options")
    model, state = task.model, task.state
    if options.precision == "float64":
        model, state = cast((model, state), "float64")
    opt_state = task.optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    store = _cold_store(task, model, state, data, options) if task.warm_start else None
    arrays, metrics = (model, state, opt_state, store), []
    resumed = run_folder.resume(folder, record, arrays)
    if resumed is not None:
        metrics, arrays = resumed
    what = f"the epochs that {folder} has finished: they must share the folder"
    devices.check_agreement(str(metrics), what)
    if resumed is None:
        _save(folder, record, metrics, arrays)
    else:
        if len(metrics) == options.epochs:
            _print(
                f"{folder} is finished, with {metrics[-1]['test_accuracy']:.2%} of the "
                "test set right. For another run give another --out."
            )
        else:
            _print(f"{folder}: resuming after epoch {len(metrics)}.")
    arrays = devices.replicate(arrays)
    patience = backward.Patience(task.backward_patience)

    for epoch in range(len(metrics) + 1, options.epochs + 1):
        start = time.perf_counter()
        arrays, line = _epoch(task, data, options, folder, epoch, arrays, patience)
        model, state, *_ = arrays
        test_ranks = ranks(
            task, model, state, data, data.test, options.batch_size, options.precision
        )
        line["test_accuracy"] = float(np.mean(test_ranks == 0))
        if task.diagnose is not None:
            few = np.arange(options.batch_size)
            images, labels = data.normalise(data.train, few)
            if options.precision == "float64":
                images = images.astype(np.float64)
            line |= task.diagnose(model, state, images, labels)
        line["seconds"] = time.perf_counter() - start
        metrics = [*metrics, {"epoch": epoch, **line}]
        # The checkpoint last: only then does the epoch count as done.
        if devices.is_first():
            curves.plot_curves(folder / "curves.png", metrics, title)
        _save(folder, record, metrics, arrays)
        _report(options, metrics[-1])
        if epoch == options.epochs:
            _print(f"The checkpoint, the metrics and their curves are in {folder}.")
    return metrics, arrays[0], arrays[1]


def _cold_store(task, model, state, data, options):
    batch, _ = data.normalise(data.train, np.arange(options.batch_size))
    model, batch = cast((model, jnp.asarray(batch)), options.precision)
    return warm_start.cold(task.forward, model, state, batch, len(data.train.labels))


def _epoch(task, data, options, folder, epoch, arrays, patience):
    key = jr.fold_in(jr.key(options.seed), epoch)
    order = np.asarray(jr.permutation(key, len(data.train.labels)))
    num_steps = options_module.steps_per_epoch(options, len(order))
    trained, store = arrays[:3], arrays[3]
    lines, nonfinite = [], []
    is_quiet = not devices.is_first()
    with progress.bar(num_steps, f"epoch {epoch}", leave=False, quiet=is_quiet) as done:
        for i in range(num_steps):
            indices = order[i * options.batch_size : (i + 1) * options.batch_size]
            batch = (*data.normalise(data.train, indices), indices)
            images, labels, own = devices.divide(batch)
            step = (epoch - 1) * num_steps + i
            trained, line, bad, solution = train_step(
                trained,
                images,
                labels,
                jr.fold_in(key, i),
                task._replace(model=None, state=None, at_step=None, diagnose=None),
                task.at_step(step),
                options.precision,
                None if store is None else warm_start.take(store, own),
            )
            if store is not None:
                store = warm_start.put(store, own, solution)
            lines.append(line)
            nonfinite.append(bad)
            # The step before, so that the device need not wait for the next.
            if i > 0:
                _check_finite(lines[-2], nonfinite[-2], step - 1, epoch, folder)
                patience.watch(lines[-2], step - 1)
            done()
    _check_finite(lines[-1], nonfinite[-1], epoch * num_steps - 1, epoch, folder)
    patience.watch(lines[-1], epoch * num_steps - 1)
    means = {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}
    return (*trained, store), backward.known(means)


def _check_finite(line, nonfinite, step, epoch, folder):
    names = "loss", "gradient_norm", "parameter_norm"
    values = [float(line[name]) for name in names]
    if all(np.isfinite(values)):
        return
    layers = [name for name, bad in nonfinite.items() if bad]
    where = (
        f"The solve of `{layers[0]}` was the first to give a NaN or infinity"
        if layers
        else "Every solve gave finite values"
    )
    raise UserError(
        f"step {step} (epoch {epoch}): the loss is {values[0]:g}, the norm of its "
        f"gradient {values[1]:g}, that of the new parameters {values[2]:g}. {where}. "
        f"{folder} keeps the checkpoint of epoch {epoch - 1}. Try another --out with a "
        "smaller --learning-rate"
    )


def _save(folder, record, metrics, arrays):
    if devices.is_first():
        run_folder.save(folder, record, metrics, arrays)


def _print(text):
    if devices.is_first():
        print(text, flush=True)


def _report(options, line):
    parts = [
        f"epoch {line['epoch']:{len(str(options.epochs))}}/{options.epochs}",
        f"loss {line['loss']:.4f}",
        f"train {line['train_accuracy']:6.2%}",
        f"test {line['test_accuracy']:6.2%}",
    ]
    if "evaluations" in line:
        parts.append(f"evaluations {line['evaluations']:4.1f}")
        parts.append(f"unconverged {line['unconverged']:.1%}")
    _print("  ".join([*parts, f"{line['seconds']:.1f} s"]))
