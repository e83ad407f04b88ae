"""Data parallelism: each batch is divided among all devices, of all processes; the
parameters are on every one. Values do not depend on the number of devices beyond
rounding.
"""

import functools as ft
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .command_line import UserError


def join(coordinator: str | None, num_processes: int, process_id: int) -> None:
    """Joins the processes that train together, if there are several. To be called
    before JAX is used."""
    if num_processes == 1 and coordinator is None:
        return
    if coordinator is None:
        raise UserError("--num-processes needs --coordinator HOST:PORT")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id must be from 0 to {num_processes - 1}, not {process_id}"
        )
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"the process cannot join {coordinator} ({first_line})"
        ) from error


def is_first() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def check_agreement(value: int, what: str) -> None:
    """Refuses to go on if the processes do not have the same number."""
    if jax.process_count() == 1:
        return
    values = multihost_utils.process_allgather(np.array(value)).tolist()
    if len(set(values)) > 1:
        raise UserError(
            f"the processes do not agree on {what}: {values}. They must share the "
            "folder of --out"
        )


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
