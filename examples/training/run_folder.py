"""The folder of a training run: its checkpoint and metrics, and who may use it.

The checkpoint alone decides what a run is. It starts with one line of JSON, the
configuration and the metrics of every finished epoch; the arrays follow. Files are
written to a temporary name and renamed, so that a run can be killed at any time.
"""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax.tree_util as jtu

from .command_line import UserError


T = TypeVar("T")
_checkpoint, _temporary_suffix = "checkpoint.eqx", ".part"


def open_run(
    folder: pathlib.Path, config: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """The metrics of the epochs that were finished, or None for a new run.

    Refuses a folder with anything else in it than a run of this very configuration.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(folder, error) from error
    if _checkpoint not in names:
        if any(not name.endswith(_temporary_suffix) for name in names):
            raise UserError(
                f"{folder} is not empty and holds no run. Give another --out"
            )
        return None
    with _refuse_corrupt(folder), (folder / _checkpoint).open("rb") as file:
        header = json.loads(file.readline())
        old, metrics = header["config"], header["metrics"]
    for key in {**old, **config}:
        if old.get(key) != config.get(key):
            raise UserError(
                f"{folder} holds a run with {key.replace('_', '-')} {old.get(key)}, "
                f"not {config.get(key)}. Give another --out, or the options of that run"
            )
    return metrics


def load(folder: pathlib.Path, like: T) -> T:
    """The arrays of the checkpoint, in a pytree of the structure of `like`."""
    with (folder / _checkpoint).open("rb") as file:
        with _refuse_corrupt(folder):
            arrays = json.loads(file.readline())["arrays"]
        for saved, wanted in itertools.zip_longest(arrays, _describe(like)):
            if saved != wanted:
                raise UserError(
                    f"{folder / _checkpoint} is of another network: it has "
                    f"{saved or 'no array'} where {wanted or 'none'} belongs. Give "
                    "another --out"
                )
        with _refuse_corrupt(folder):
            return eqx.tree_deserialise_leaves(file, like)


def save(
    folder: pathlib.Path,
    config: dict[str, Any],
    metrics: list[dict[str, Any]],
    tree: Any,
) -> None:
    """Writes the metrics, one line of JSON an epoch, and then the checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if metrics:  # so that a folder without a checkpoint has nothing else either
            with replacing(folder / "metrics.jsonl") as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in metrics))
        with replacing(folder / _checkpoint) as path, path.open("wb") as file:
            header = {"config": config, "metrics": metrics, "arrays": _describe(tree)}
            file.write(json.dumps(header).encode() + b"\n")
            eqx.tree_serialise_leaves(file, tree)
    except OSError as error:
        raise _unusable(folder, error) from error


def _describe(tree):
    leaves = jtu.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return [f"{jtu.keystr(path)} {x.dtype}{list(x.shape)}" for path, x in leaves]


def _unusable(folder, error):
    return UserError(f"{folder} cannot be used ({error.strerror}). Give another --out")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path, which becomes `path` when all was written."""
    temporary = path.with_name(path.name + _temporary_suffix)
    try:
        yield temporary
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    os.replace(temporary, path)


@contextlib.contextmanager
def _refuse_corrupt(folder):
    try:
        yield
    # What Equinox and NumPy raise on broken files is of many kinds.
    except Exception as error:
        raise UserError(
            f"{folder / _checkpoint} is truncated or corrupt. Move it away to start "
            "again, or give another --out"
        ) from error
