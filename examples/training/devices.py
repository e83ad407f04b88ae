"""Data parallelism: each batch is divided among all devices, of all processes; the
parameters are on every one. Values do not depend on the number of devices beyond
rounding.
"""

import contextlib
import functools as ft
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import files
from .command_line import UserError


def is_first() -> bool:
    """Whether this process writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def claim(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Of the first process, for all of them."""
    return files.claim(folder) if is_first() else contextlib.nullcontext()


def check_agreement(value: str, what: str) -> None:
    """Refuses to go on if the processes do not have the same value."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    different = np.flatnonzero(np.any(digests != digests[0], axis=1))
    if different.size > 0:
        raise UserError(f"processes 0 and {different[0]} do not agree on {what}")


@ft.cache
def _sharding(*names):
    mesh = Mesh(np.array(jax.devices()), "batch")
    return NamedSharding(mesh, PartitionSpec(*names))


def check_batch_size(batch_size: int) -> None:
    if batch_size % jax.device_count() != 0:
        raise UserError(
            f"--batch-size must be a multiple of the {jax.device_count()} devices, not "
            f"{batch_size}"
        )


def divide(batch: Any) -> Any:
    """Arrays whose leading axis is divided among the devices."""
    sharding = _sharding("batch")
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), batch
    )


def replicate(tree: Any) -> Any:
    """Arrays that are whole on each device; what is not an array stays as it is."""

    def place(x):
        if not isinstance(x, jax.Array | np.ndarray):
            return x
        # A copy by way of the host, which every process has.
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, _sharding(), lambda i: host[i])

    return jax.tree.map(place, tree)


def keep_whole(tree: Any) -> Any:
    """Within a compiled function: its arrays are to be whole on each device."""
    constrain = ft.partial(jax.lax.with_sharding_constraint, shardings=_sharding())
    return jax.tree.map(lambda x: constrain(x) if isinstance(x, jax.Array) else x, tree)
