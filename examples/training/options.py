"""The options that every training script has."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any, Literal

import jax
import pooch

from . import processes
from .command_line import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    # tyro shows these lines as they are: at most 58 characters fit into a terminal.
    epochs: int = 20
    """Passes over the training images."""

    batch_size: int = 50
    """Images per training step."""

    learning_rate: float = 2e-3
    """Of the optimiser, at first."""

    seed: int = 0
    """Decides the parameters, drop-out and order of images."""

    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """In bfloat16 the parameters themselves stay in float32."""

    train_size: int | None = None
    """Train on the first so many images only."""

    data_dir: pathlib.Path | None = None
    """The data folder, by default EQIMPLICIT_DATA or else a
    cache folder. Files are looked for in its subfolder
    mnist, fashion_mnist, cifar10 or svhn, then in itself,
    and downloaded to the subfolder if they are not there."""

    out: pathlib.Path | None = None
    """The run folder, by default in runs."""

    coordinator: str | None = None
    """HOST:PORT of process 0, if several processes train
    together: each divides every batch among its devices."""

    num_processes: int = 1
    """How many processes train together."""

    process_id: int = 0
    """Which of them this is, from 0."""


# What does not change the result of a run.
_elsewhere = ("out", "data_dir", "coordinator", "num_processes", "process_id")


def start(options: Options) -> None:
    """Checks the options, and joins the other processes if there are any."""
    for name in ("epochs", "batch_size", "train_size", "num_processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            refuse(name, value, "at least 1")
    check_positive(options, "learning_rate")
    if not 0 <= options.seed < 2**32:
        refuse("seed", options.seed, "between 0 and 2**32 - 1")
    if options.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    processes.join(options.coordinator, options.num_processes, options.process_id)


def start_in(options: Any, prefix: str) -> Any:
    """As `start`. The folder of an experiment on images is named after it and them."""
    start(options)
    folder = given(options.out, pathlib.Path("runs", f"{prefix}-{options.dataset}"))
    return dataclasses.replace(options, out=folder)


def data_name(options: Any) -> str:
    return f"{options.dataset}, small" if options.small else options.dataset


def given(value: Any, default: Any) -> Any:
    return default if value is None else value


def steps_per_epoch(options: Options, num_images: int) -> int:
    """How many whole batches there are."""
    if options.batch_size > num_images:
        refuse("batch_size", options.batch_size, f"at most {num_images}")
    return num_images // options.batch_size


def check_positive(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            refuse(name, value, "a positive number")


def refuse(name: str, value: Any, wanted: str) -> None:
    raise UserError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")


def record(options: Options, experiment: str) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed."""
    values = dataclasses.asdict(options)
    kept = {name: value for name, value in values.items() if name not in _elsewhere}
    # As it will be read: with lists for tuples.
    return json.loads(json.dumps({"experiment": experiment, **kept}))


def data_folder(options: Options) -> pathlib.Path:
    default = os.environ.get("EQIMPLICIT_DATA") or pooch.os_cache("eqimplicit")
    return options.data_dir or pathlib.Path(default)
