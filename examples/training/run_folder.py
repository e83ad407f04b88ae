"""The folder of a training run: its checkpoint and metrics.

The checkpoint alone decides what a run is. It starts with a line of JSON, the header:
the configuration, the metrics of every finished epoch, and the shapes and the digest of
the arrays. The digest of the header comes before it, and the arrays after it.
"""

import contextlib
import hashlib
import io
import itertools
import json
import pathlib
from typing import Any, TypeVar

import equinox as eqx
import jax.tree_util as jtu

from . import files
from .command_line import UserError


T = TypeVar("T")
_CHECKPOINT = "checkpoint.eqx"
# Longer than any header, so that a line without an end is not read for ever.
_LONGEST_HEADER = 2**28


def resume(
    folder: pathlib.Path, config: dict[str, Any], like: T
) -> tuple[list[dict[str, Any]], T] | None:
    """The metrics of the epochs that were finished, and the arrays, in a pytree of the
    structure of `like`; or None for a new run.

    Refuses a folder with anything else in it than a run of this very configuration.
    """
    try:
        names = {path.name for path in folder.iterdir()} - {files.LOCK}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{folder} cannot be used ({error.strerror}). Give another --out"
        ) from error
    if _CHECKPOINT not in names:
        if any(not name.endswith(files.PART) for name in names):
            raise UserError(
                f"{folder} is not empty and holds no run. Give another --out"
            )
        return None
    path = folder / _CHECKPOINT
    with _refuse_corrupt(path), files.open_plain(path) as file:
        header = _read_header(file)
        metrics = header["metrics"]
        if [line["epoch"] for line in metrics] != [*range(1, len(metrics) + 1)]:
            raise ValueError("its metrics are wrong")
        _check_config(folder, header["config"], config)
        _check_arrays(path, header["arrays"], like)
        wanted = _serialise(like)
        content = file.read(len(wanted) + 1)
        if len(content) != len(wanted) or _digest(content) != header["digest"]:
            raise ValueError("the digest of its arrays is wrong")
        arrays, rest = eqx.partition(like, eqx.is_array)
        arrays = eqx.tree_deserialise_leaves(io.BytesIO(content), arrays)
        return metrics, eqx.combine(arrays, rest)


def save(
    folder: pathlib.Path,
    config: dict[str, Any],
    metrics: list[dict[str, Any]],
    tree: Any,
) -> None:
    """Writes the metrics, one line of JSON an epoch, and then the checkpoint."""
    if metrics:  # so that a folder without a checkpoint has nothing else either
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        files.write(folder / "metrics.jsonl", lines.encode())
    content = _serialise(tree)
    header = {
        "config": config,
        "metrics": metrics,
        "arrays": _describe(tree),
        "digest": _digest(content),
    }
    line = json.dumps(header).encode() + b"\n"
    digest = _digest(line).encode() + b"\n"
    files.write(folder / _CHECKPOINT, digest + line + content)


def _read_header(file):
    digest = file.readline(len(_digest(b"")) + 1)
    line = file.readline(_LONGEST_HEADER)
    if digest != _digest(line).encode() + b"\n":
        raise ValueError("the digest of its header is wrong")
    return json.loads(line)


def _check_config(folder, old, config):
    for key in {**old, **config}:
        if old.get(key) != config.get(key):
            raise UserError(
                f"{folder} holds a run with {key.replace('_', '-')} {old.get(key)}, "
                f"not {config.get(key)}. Give another --out, or the options of that run"
            )


def _check_arrays(path, arrays, like):
    for saved, wanted in itertools.zip_longest(arrays, _describe(like)):
        if saved != wanted:
            raise UserError(
                f"{path} is of another network: it has {saved or 'no array'} where "
                f"{wanted or 'none'} belongs. Give another --out"
            )


def _serialise(tree):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, eqx.filter(tree, eqx.is_array))
    return file.getvalue()


def _digest(content):
    return hashlib.sha256(content).hexdigest()


def _describe(tree):
    leaves = jtu.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return [f"{jtu.keystr(path)} {x.dtype}{list(x.shape)}" for path, x in leaves]


@contextlib.contextmanager
def _refuse_corrupt(path):
    try:
        yield
    except UserError:
        raise
    # What broken files raise is of many kinds.
    except Exception as error:
        raise UserError(
            f"{path} is truncated or corrupt ({error}). Move it away to start again, "
            "or give another --out"
        ) from error
