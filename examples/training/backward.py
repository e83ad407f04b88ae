"""How the backward solves of training steps went: what is logged of them, and when a
run ends because of them.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

import eqimplicit as eqi

from .command_line import UserError


def metrics(status: eqi.BackwardStatus) -> dict[str, Array]:
    """Of one step, as means over its solves."""
    mean = lambda x: x / jnp.maximum(status.num_solves, 1)
    return {
        "backward_solves": status.num_solves,
        "backward_failed": mean(status.num_failed),
        "backward_residual": mean(status.residual),
        "backward_products": mean(status.num_products),
    }


def known(means: dict[str, float]) -> dict[str, float]:
    """Without what is not: all of it where no backward solve ran, and the products of
    solvers that do not count them."""
    is_known = lambda name: means["backward_solves"] > 0 and means[name] == means[name]
    return {
        name: mean
        for name, mean in means.items()
        if not name.startswith("backward") or is_known(name)
    }


class Patience:
    """Ends a run when at least half of the backward solves have failed in each of so
    many steps, one after the other: their gradients are not what they are taken for.
    """

    def __init__(self, num_steps: int | None):
        self._num_steps = num_steps
        self._failing = 0

    def watch(self, line: dict[str, Any], step: int) -> None:
        failed = float(line["backward_failed"])
        self._failing = self._failing + 1 if failed >= 0.5 else 0
        if self._failing == self._num_steps:
            residual = float(line["backward_residual"])
            raise UserError(
                f"step {step}: {failed:.0%} of the backward solves have failed, and "
                f"half or more in each of the last {self._num_steps} steps. Their mean "
                f"residual is {residual:.1g} of the right-hand side: the gradients "
                "are wrong by about as much. Bound the cell, give the linear solver "
                "more steps, or take an adjoint that needs none (jfb)"
            )
