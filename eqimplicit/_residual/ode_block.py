from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from .._custom_types import Y
from .._misc import as_state, at_least_single, check_positive_int, ravel
from .._parametrisation.base import resolve
from .base import AbstractResidualLayer, as_time, check_scalar_step


class ODEBlock(eqx.Module):
    """Applies an implicit residual layer again and again: a discretised differential
    equation, with one step for each layer.

    The layers are one repeated, or `num_steps` of them with parameters of their own.
    Either way they are compiled once. The initial guess of each solve lies on the
    parabola through the last three states.

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

    layer: AbstractResidualLayer
    num_steps: int = eqx.field(static=True)
    stacked: bool = eqx.field(default=False, static=True)
    reversible: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        if not isinstance(self.layer, AbstractResidualLayer):
            raise TypeError(
                "`layer` must be an `eqimplicit.AbstractResidualLayer`, for example an "
                f"`eqimplicit.ThetaLayer`. Got {self.layer!r}."
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
        run = _run_reversibly if self.reversible else _run
        return _call(self, run, y0, as_time(t0), args)

    def trajectory(
        self, y0: PyTree[ArrayLike], t0: Any = 0.0, args: PyTree[Any] = None
    ) -> PyTree[Array]:
        """As calling the block, but returns the states at `times(t0)`: with a leading
        axis of length `num_steps + 1`, the initial state first.
        """
        return self.solve(y0, t0, args).value

    def solve(
        self, y0: PyTree[ArrayLike], t0: Any = 0.0, args: PyTree[Any] = None
    ) -> optx.Solution:
        """As calling the block, but returns a [`optimistix.Solution`][]: `value` is the
        trajectory; `result` and `stats` are those of the steps, with a leading axis of
        length `num_steps`.
        """
        return _solve(self, y0, as_time(t0), args)

    def inputs(
        self, y0: PyTree[ArrayLike], t0: Any, args: PyTree[Any]
    ) -> tuple[PyTree[Any], ...]:
        """What is scanned over: the arrays of each layer, and the rest, the initial
        state, the times, and `args`. A layer that is repeated is resolved only once.
        """
        if self.stacked:
            layers = eqx.partition(self.layer, eqx.is_array)
        else:
            check_scalar_step(self.layer.step_size)
            layers = eqx.partition(resolve(self.layer), lambda _: False)
        return layers, as_state(y0), self.times(t0), args

    def times(self, t0: Any = 0.0) -> Float[Array, " times"]:
        """The times of the states of a trajectory that starts at `t0`."""
        # At least in single precision: bfloat16 could not tell the steps apart.
        t0, step_size = at_least_single(t0), at_least_single(self.layer.step_size)
        if self.stacked and eqx.is_array(step_size):
            start = jnp.zeros_like(step_size[:1])
            return t0 + jnp.concatenate([start, jnp.cumsum(step_size)])
        # Integers, with which Python numbers stay weakly typed.
        with jax.numpy_dtype_promotion("standard"):
            return t0 + step_size * jnp.arange(self.num_steps + 1)

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

- `layer`: an [`eqimplicit.AbstractResidualLayer`][] such as a
    [`eqimplicit.ThetaLayer`][]; if `stacked`, one whose arrays all have a leading axis
    of length `num_steps`, as `equinox.filter_vmap` of its constructor makes it.
- `num_steps`: the number of steps.
- `stacked`: whether every step has parameters of its own.
- `reversible`: whether the gradient of calling the block finds its states again by
    stepping backwards, instead of storing them: memory for a few states, whatever
    `num_steps`, and about twice the work. For layers that step backwards as stably as
    forwards, such as those with theta = 1/2; a dissipative field is unstable backwards,
    the more the stiffer. If the way back misses the initial value of any unknown by
    more than a thousandth of the largest that it has been, the gradient is NaN. Reverse
    mode only, of the first order, and with respect to the block, `y0`, `t0` and `args`:
    what the vector field closes over must not be traced.

**Raises:** a `ValueError` if `num_steps` is below 1 or does not fit the arrays of
stacked layers; a `TypeError` if `layer` is no such layer.
"""


class _Path(eqx.Module):
    """The last state of a path, and its last differences of first and second order."""

    y: PyTree[Array]
    change: PyTree[Array]
    bend: PyTree[Array]
    is_line: Bool[Array, ""]

    def extrapolate(self):
        """On the parabola through the last three states, if there are as many."""
        return jtu.tree_map(lambda *x: sum(x), self.y, self.change, self.bend)

    def append(self, y):
        change = jtu.tree_map(jnp.subtract, y, self.y)
        bend = jtu.tree_map(
            lambda a, b: jnp.where(self.is_line, a - b, 0), change, self.change
        )
        return _Path(y, change, bend, jnp.array(True))


@eqx.filter_jit
def _call(block, run, y0, t0, args):
    return run(block.inputs(y0, t0, args))


@eqx.filter_jit
def _solve(block, y0, t0, args):
    inputs = block.inputs(y0, t0, args)
    _, solution = _scan(inputs, lambda solution: solution)
    _, start, _, _ = inputs
    value = jtu.tree_map(
        lambda first, rest: jnp.concatenate([first[None], rest]), start, solution.value
    )
    return eqx.tree_at(lambda s: s.value, solution, value)


def _start(y):
    zero = jtu.tree_map(jnp.zeros_like, y)
    return _Path(y, zero, zero, jnp.array(False))


def _scan(inputs, keep):
    (stack, shared), y0, times, args = inputs

    def step(path, x):
        own, t = x
        layer = eqx.combine(own, shared)
        solution = layer.solve(path.y, t, args, path.extrapolate())
        return path.append(solution.value), keep(solution)

    path, kept = lax.scan(step, _start(y0), (stack, times[:-1]))
    return path.y, kept


def _run(inputs):
    y, _ = _scan(inputs, lambda solution: None)
    return y


@eqx.filter_custom_vjp
def _run_reversibly(inputs):
    return _run(inputs)


@_run_reversibly.def_fwd
def _forward(perturbed, inputs):
    del perturbed
    y = _run(inputs)
    return y, y


@_run_reversibly.def_bwd
def _backward(last, cotangent, perturbed, inputs):
    """Carries the path and the cotangents back, from one step to the one before."""
    del perturbed
    (stack, shared), y0, times, args = inputs

    def step(carry, x):
        path, sizes, y_bar, shared_bar, args_bar = carry
        own, t = x
        layer = eqx.combine(own, shared)
        previous = layer.invert(path.y, t, args, path.extrapolate()).value

        def forward(point):
            own, shared, previous, t, args = point
            layer = eqx.combine(own, shared)
            return layer.solve(previous, t, args, path.y).value

        _, vjp = eqx.filter_vjp(forward, (own, shared, previous, t, args))
        ((own_bar, shared_add, y_bar, t_bar, args_add),) = vjp(y_bar)
        shared_bar = eqx.apply_updates(shared_bar, shared_add)
        args_bar = eqx.apply_updates(args_bar, args_add)
        sizes = _largest(sizes, previous)
        carry = path.append(previous), sizes, y_bar, shared_bar, args_bar
        return carry, (own_bar, t_bar)

    zeros = lambda tree: jtu.tree_map(
        jnp.zeros_like, eqx.filter(tree, eqx.is_inexact_array)
    )
    cotangent = jtu.tree_map(
        lambda c, y: jnp.zeros_like(y) if c is None else c,
        cotangent,
        last,
        is_leaf=lambda x: x is None,
    )
    sizes = _largest(last, y0)
    start = _start(last), sizes, cotangent, zeros(shared), zeros(args)
    (path, sizes, y_bar, shared_bar, args_bar), (stack_bar, times_bar) = lax.scan(
        step, start, (stack, times[:-1]), reverse=True
    )
    lost = _is_lost(path.y, y0, sizes, len(times) - 1)
    times_bar = jnp.append(times_bar, 0)
    bars = (stack_bar, shared_bar), y_bar, times_bar, args_bar
    return jtu.tree_map(lambda x: jnp.where(lost, jnp.nan, x), bars)


def _largest(a, b):
    return jtu.tree_map(lambda x, y: jnp.maximum(jnp.abs(x), jnp.abs(y)), a, b)


def _is_lost(y, y0, sizes, num_steps):
    """Whether any unknown has missed its initial value by more than a thousandth of the
    largest that it has been, and by more than the roundings of all steps explain.
    """
    missed, sizes = (
        ravel(tree)[0] for tree in (jtu.tree_map(jnp.subtract, y, y0), sizes)
    )
    rounding = float(jnp.finfo(sizes.dtype).eps) * num_steps**0.5 * jnp.max(sizes)
    # NaN compares false.
    return ~jnp.all(jnp.abs(missed) <= 1e-3 * sizes + rounding)
