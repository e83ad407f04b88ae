from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._custom_types import Y
from .._misc import check_positive_int
from .._parametrisation.base import resolve


class ODEBlock(eqx.Module):
    """Applies an implicit residual layer again and again: a discretised differential
    equation, with one step for each layer.

    The layers are one repeated, or `num_steps` of them with parameters of their own.
    Either way they are compiled once. The step before gives the initial guess of each.

    !!! example

        ```python
        layer = eqi.ThetaLayer(field, theta=0.5, step_size=0.1)
        block = eqi.ODEBlock(layer, num_steps=20)

        # Parameters of its own for each step.
        make = lambda key: eqi.ThetaLayer(make_field(key), theta=0.5, step_size=0.1)
        layers = eqx.filter_vmap(make)(jr.split(key, 20))
        block = eqi.ODEBlock(layers, num_steps=20, stacked=True)

        # The learned field as a continuous-time model.
        term = diffrax.ODETerm(block.vector_field)
        ```
    """

    layer: Any
    num_steps: int = eqx.field(static=True)
    stacked: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        if not (hasattr(self.layer, "solve") and hasattr(self.layer, "step_size")):
            raise TypeError(
                "`layer` must have a step size and a `solve`, as "
                f"`eqimplicit.ThetaLayer` has. Got {self.layer!r}."
            )
        if self.stacked:
            leaves = jtu.tree_leaves_with_path(eqx.filter(self.layer, eqx.is_array))
            for path, leaf in leaves:
                if leaf.ndim == 0 or leaf.shape[0] != self.num_steps:
                    raise ValueError(
                        "In stacked layers every array has a leading axis of length "
                        f"`num_steps`, here {self.num_steps}, but "
                        f"`layer{jtu.keystr(path)}` has shape {leaf.shape}. Make them "
                        "with `equinox.filter_vmap` over as many keys."
                    )

    def __call__(self, y0: Y, t0: Any = 0.0, args: PyTree[Any] = None) -> Y:
        """**Arguments:**

        - `y0`: the initial state, a pytree of floating arrays of one dtype.
        - `t0`: the initial time.
        - `args`: passed to the vector field.

        **Returns:**

        The state after the last step. [`eqimplicit.ODEBlock.solve`][] tells whether
        every step was found.

        **Raises:** as the layer.
        """
        y, _ = self._scan(y0, t0, args, lambda solution: None)
        return y

    def trajectory(
        self, y0: PyTree[Array], t0: Any = 0.0, args: PyTree[Any] = None
    ) -> PyTree[Array]:
        """As calling the block, but returns the states at `times(t0)`: with a leading
        axis of length `num_steps + 1`, the initial state first.
        """
        return self.solve(y0, t0, args).value

    def solve(
        self, y0: PyTree[Array], t0: Any = 0.0, args: PyTree[Any] = None
    ) -> optx.Solution:
        """As calling the block, but returns a [`optimistix.Solution`][]: `value` is the
        trajectory; `result` and `stats` are those of the steps, with a leading axis of
        length `num_steps`.
        """
        without_state = lambda solution: eqx.tree_at(
            lambda s: s.state, solution, None, is_leaf=lambda x: x is None
        )
        _, solution = self._scan(y0, t0, args, without_state)
        value = jtu.tree_map(
            lambda first, rest: jnp.concatenate([first[None], rest]),
            jtu.tree_map(jnp.asarray, y0),
            solution.value,
        )
        return eqx.tree_at(lambda s: s.value, solution, value)

    def _scan(self, y0, t0, args, keep):
        stack, shared = eqx.partition(
            self.layer, eqx.is_array if self.stacked else lambda _: False
        )

        def step(carry, x):
            y, change = carry
            layer_slice, t = x
            layer = eqx.combine(layer_slice, shared)
            guess = jtu.tree_map(jnp.add, y, change)
            solution = layer.solve(y, t, args, guess)
            change = jtu.tree_map(jnp.subtract, solution.value, y)
            return (solution.value, change), keep(solution)

        y0 = jtu.tree_map(jnp.asarray, y0)
        no_change = jtu.tree_map(jnp.zeros_like, y0)
        times = self.times(t0)[:-1]
        (y, _), kept = lax.scan(step, (y0, no_change), (stack, times))
        return y, kept

    def times(self, t0: Any = 0.0) -> Float[Array, " times"]:
        """The times of the states of a trajectory that starts at `t0`."""
        if self.stacked and eqx.is_array(self.layer.step_size):
            elapsed = jnp.cumsum(self.layer.step_size)
            return t0 + jnp.concatenate([jnp.zeros_like(elapsed[:1]), elapsed])
        return t0 + self.layer.step_size * jnp.arange(self.num_steps + 1.0)

    def jump_times(self, t0: Any = 0.0) -> Float[Array, " jumps"]:
        """The times at which [`eqimplicit.ODEBlock.vector_field`][] jumps: for stacked
        layers those between two steps, otherwise none. For `jump_ts` of
        [`diffrax.ClipStepSizeController`][].
        """
        return self.times(t0)[1:-1] if self.stacked else self.times(t0)[:0]

    def vector_field(
        self, t: Any, y: PyTree[Array], args: PyTree[Any] = None, t0: Any = 0.0
    ) -> PyTree[Array]:
        """The continuous field that the block has learned, with the signature of
        Diffrax. That of stacked layers is piecewise constant in time: from `t0 + k h`
        on, until the next, the field of layer `k`; the first and last extend to all
        times before and after.

        **Arguments:**

        - `t`, `y`, `args`: as for any vector field.
        - `t0`: the time at which the first step starts.
        """
        if not self.stacked:
            return resolve(self.layer.vector_field)(t, y, args)
        index = jnp.searchsorted(self.jump_times(t0), t, side="right")
        fields, shared = eqx.partition(self.layer.vector_field, eqx.is_array)
        field = eqx.combine(jtu.tree_map(lambda x: x[index], fields), shared)
        return resolve(field)(t, y, args)


ODEBlock.__init__.__doc__ = """**Arguments:**

- `layer`: an [`eqimplicit.ThetaLayer`][]; if `stacked`, one whose arrays all have a
    leading axis of length `num_steps`, as `equinox.filter_vmap` of its constructor
    makes it.
- `num_steps`: the number of steps.
- `stacked`: whether every step has parameters of its own.

**Raises:** a `ValueError` if `num_steps` is below 1 or does not fit the arrays of
stacked layers; a `TypeError` if `layer` is no such layer.
"""
