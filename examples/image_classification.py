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
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import image_models
import jax.random as jr
import optax
import optimistix as optx
import tyro
from training import classifiers, command_line, devices, image_data, loop, options
from training.command_line import UserError

import eqimplicit as eqi


AdjointName = Literal["jfb", "neumann", "phantom", "implicit", "unrolled"]


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Train an implicit network to classify images.

    The digits take about half a minute on two cores.
    """

    dataset: image_data.Name = "digits"
    """The digits are embedded, the others are in --data-dir."""

    adjoint: AdjointName = "jfb"
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

    pretrain_steps: int = 0
    """How many training steps to begin with that apply the
    cell --pretrain-depth times, and differentiate that."""

    pretrain_depth: int = 5
    """How often the cell is applied in them."""

    warm_start: bool = False
    """Start each solve of a training image from its last
    solution, which is stored. Tests start cold."""

    smoke: bool = False
    """A short run, 2 epochs of 500 images, to try things out."""


def check(config: Config) -> None:
    for name in ("max_steps", "num_terms", "pretrain_depth"):
        if getattr(config, name) < 1:
            options.refuse(name, getattr(config, name), "at least 1")
    if config.pretrain_steps < 0:
        options.refuse("pretrain_steps", config.pretrain_steps, "at least 0")
    options.check_positive(config, "damping")
    for name in ("rtol", "atol"):
        if not 0 <= getattr(config, name) < math.inf:
            options.refuse(name, getattr(config, name), "a number, not negative")
    if config.smoke and (config.epochs, config.train_size) != (Config.epochs, None):
        raise UserError("--smoke decides --epochs and --train-size. Leave them out")
    if config.rtol == 0 and config.atol == 0:
        raise UserError("--rtol and --atol must not both be zero")
    if config.warm_start and config.adjoint == "unrolled":
        raise UserError(
            "--warm-start leaves few steps to differentiate. Give another --adjoint "
            "than unrolled"
        )
    options.start(config)


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
    return model, state


@ft.cache  # Steps are compiled once for each optimiser, and two are never equal.
def make_optimiser(learning_rate, num_steps):
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.adamw(schedule, weight_decay=1e-2)


def at_step(config: Config, step: int) -> Callable[[Any], Any]:
    """How the model is trained at a step: for a start, unrolled."""
    if step < config.pretrain_steps:
        return classifiers.unroll(config.pretrain_depth)
    return loop.as_it_is


def diagnose(model, state, images, labels):
    cosines = eqx.filter_jit(classifiers.gradient_cosines)
    (cosine,) = cosines(model, state, images, labels, [model.layer.adjoint])
    return {"gradient_cosine": float(cosine)}


def train(config: Config) -> list[dict[str, Any]]:
    """Trains, or resumes. Returns the metrics of each epoch."""
    check(config)
    if config.smoke:
        config = dataclasses.replace(config, epochs=2, train_size=500)
    name = f"{config.dataset}-{config.adjoint}-{config.solver}"
    folder = config.out or pathlib.Path("runs", name)
    # Before anything is read or computed.
    with devices.claim(folder):
        data = image_data.load(
            config.dataset, options.data_folder(config), config.train_size
        )
        model, state = make_model(config, data.train.images.shape[1:])
        num_images = len(data.train.labels)
        num_steps = config.epochs * options.steps_per_epoch(config, num_images)
        task = loop.Task(
            model,
            state,
            classifiers.forward,
            make_optimiser(config.learning_rate, num_steps),
            at_step=ft.partial(at_step, config),
            diagnose=diagnose,
            smoothing=0.1,
            warm_start=config.warm_start,
        )
        title = f"{config.dataset}: {config.adjoint} gradients, {config.solver} solver"
        metrics, _, _ = loop.train(
            task, data, config, folder, title, "image-classification"
        )
        return metrics


def main(argv: list[str] | None = None) -> None:
    train(tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,)))


if __name__ == "__main__":
    command_line.run(main)
