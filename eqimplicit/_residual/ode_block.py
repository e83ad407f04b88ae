from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._adjoint.probe import AbstractProbedLayer, BackwardStatus
from .._custom_types import Y
from .._misc import (
    accumulation_dtype,
    as_state,
    at_least_single,
    check_positive_int,
    state_dtype,
)
from .._parametrisation.base import resolve
from .base import (
    AbstractImplicitLayer,
    AbstractResidualLayer,
    as_time,
    can_invert,
    check_scalar_step,
    differentiates_iterations,
)
from .parallel import check_parallel, run_in_parallel
from .sequential import run, run_reversibly, scan, ScanInputs
from .times import check_times, Steps, steps_between


class ODEBlock(AbstractProbedLayer):
    """Applies an implicit residual layer again and again: a discretised differential
    equation, with one step for each layer.

    The layers are one repeated, or `num_steps` of them with parameters of their own.
    Either way they are compiled once. The initial guess of each solve lies on the
    parabola through the last three states. Steps are as long as the layer says, or go
    from one time of `ts` to the next.

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
    parallel: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        if not isinstance(self.layer, AbstractResidualLayer):
            raise TypeError(
                "`layer` must be an `eqimplicit.AbstractResidualLayer`, for example an "
                f"`eqimplicit.ThetaLayer`. Got {self.layer!r}."
            )
        if self.reversible and not can_invert(self.layer):
            raise ValueError(
                "A reversible block steps backwards, and a "
                f"{type(self.layer).__name__} has no `invert`."
            )
        if self.parallel:
            check_parallel(self.layer)
        if self.parallel and self.reversible:
            raise ValueError(
                "A block is either `reversible`, with memory for a few states, or "
                "`parallel`, with all of them at once."
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

    def report_to(self, probe: BackwardStatus) -> Any:
        if not isinstance(self.layer, AbstractProbedLayer):
            return self
        if self.stacked:
            # Summed again, as all that is broadcast is differentiated.
            spread = lambda x: jnp.broadcast_to(x, (self.num_steps, *x.shape))
            probe = jtu.tree_map(spread, probe)
        layer = self.layer.report_to(probe)
        return eqx.tree_at(lambda block: block.layer, self, layer)

    def __call__(
        self,
        y0: Y,
        t0: Any = 0.0,
        args: PyTree[Any] = None,
        *,
        ts: ArrayLike | None = None,
        probe: BackwardStatus | None = None,
    ) -> Y:
        """**Arguments:**

        - `y0`: the initial state, a pytree of floating arrays of one dtype.
        - `t0`: the initial time.
        - `args`: passed to the vector field.
        - `ts`: in place of `t0`, the times of all states, that of `y0` first. Step `k`
            then goes from `ts[k]` to `ts[k + 1]`, instead of by the `step_size` of its
            layer. There may be any number of steps (`num_steps` does not count), but
            for stacked layers. A step between equal times changes nothing, so that a
            short series is padded by its last time.
        - `probe`: an [`eqimplicit.backward_probe`][]. The gradient with respect to it
            says how the backward solves of all steps went.

        **Returns:**

        The state after the last step. [`eqimplicit.ODEBlock.solve`][] tells whether
        every step was found.

        **Raises:** as the layer; a `ValueError` for a `t0` beside `ts`, for `ts` of the
        wrong shape, and for times that decrease or are not finite. Where these are
        traced, the states after them are NaN.
        """
        if probe is not None:
            return self.report_to(probe)(y0, t0, args, ts=ts)
        if self.parallel:
            states = self.solve(y0, t0, args, ts=ts).value
            return jtu.tree_map(lambda x: x[-1], states)
        go = run_reversibly if self.reversible else run
        t0, ts = self._checked_times(t0, ts)
        steps = None if ts is None else steps_between(ts)
        return _call(self, go, y0, t0, steps, args)

    def trajectory(
        self,
        y0: PyTree[ArrayLike],
        t0: Any = 0.0,
        args: PyTree[Any] = None,
        *,
        ts: ArrayLike | None = None,
        probe: BackwardStatus | None = None,
    ) -> PyTree[Array]:
        """As calling the block, but returns the states at `times(t0, ts=ts)`: with a
        leading axis of length `num_steps + 1` or `len(ts)`, the initial state first.
        """
        return self.solve(y0, t0, args, ts=ts, probe=probe).value

    def solve(
        self,
        y0: PyTree[ArrayLike],
        t0: Any = 0.0,
        args: PyTree[Any] = None,
        *,
        ts: ArrayLike | None = None,
        probe: BackwardStatus | None = None,
    ) -> optx.Solution:
        """As calling the block, but returns a [`optimistix.Solution`][]: `value` is the
        trajectory; `result` and `stats` are those of the steps, with a leading axis of
        as many.
        """
        t0, ts = self._checked_times(t0, ts)
        steps = None if ts is None else steps_between(ts)
        block = self if probe is None else self.report_to(probe)
        return _solve(block, y0, t0, steps, args)

    def _checked_times(self, t0, ts):
        """The initial time as an array, or the times."""
        if ts is None:
            return as_time(t0), None
        if not (t0 is None or isinstance(t0, (int, float)) and t0 == 0):
            raise ValueError(
                "`ts` holds the time of `y0`: leave `t0` out. Got "
                f"`t0={t0!r}` beside `ts`."
            )
        ts = check_times(ts)
        if self.stacked and len(ts) != self.num_steps + 1:
            raise ValueError(
                "With stacked layers `ts` must hold num_steps + 1 = "
                f"{self.num_steps + 1} times. Got {len(ts)}."
            )
        name = type(self.layer).__name__
        if not self.layer.is_one_step:
            raise ValueError(
                f"The state of a {name} is that of two times, one step apart: it makes "
                "equal steps only. Got `ts`."
            )
        if isinstance(self.layer, AbstractImplicitLayer):
            if differentiates_iterations(self.layer.options.adjoint):
                raise ValueError(
                    f"With `ts` the {name} must not have the adjoint "
                    "`optimistix.RecursiveCheckpointAdjoint`: a step of length zero "
                    "takes no iterations, and its gradient would be zero. Use "
                    "`eqimplicit.ImplicitAdjoint`."
                )
        return None, ts

    def times(
        self, t0: Any = 0.0, *, ts: ArrayLike | None = None
    ) -> Float[Array, " times"]:
        """The times of the states of a trajectory that starts at `t0`, or `ts`."""
        t0, ts = self._checked_times(t0, ts)
        return _equal_times(self, t0) if ts is None else jnp.asarray(ts)

    def jump_times(
        self, t0: Any = 0.0, *, ts: ArrayLike | None = None
    ) -> Float[Array, " jumps"]:
        """The times at which [`eqimplicit.ODEBlock.vector_field`][] jumps: for stacked
        layers those between two steps, otherwise none. For `jump_ts` of
        [`diffrax.ClipStepSizeController`][].
        """
        times = self.times(t0, ts=ts)
        return times[1:-1] if self.stacked else times[:0]

    def vector_field(
        self,
        t: Any,
        y: PyTree[Array],
        args: PyTree[Any] = None,
        t0: Any = 0.0,
        *,
        ts: ArrayLike | None = None,
    ) -> PyTree[Array]:
        """The continuous field that the block has learned, with the signature of
        Diffrax. That of stacked layers is piecewise constant in time: from the start of
        step `k` on, until the next, the field of layer `k`; the first and last extend
        to all times before and after.

        **Arguments:**

        - `t`, `y`, `args`: as for any vector field.
        - `t0`: the time at which the first step starts.
        - `ts`: in place of `t0`, as for calling the block.
        """
        times = self.times(t0, ts=ts)
        if not self.stacked:
            return resolve(self.layer.vector_field)(t, y, args)
        # From the last time on, the last step that is not of length zero.
        last = jnp.maximum(jnp.searchsorted(times, times[-1]) - 1, 0)
        index = jnp.searchsorted(times[1:-1], t, side="right")
        index = jnp.minimum(index, last)
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
- `parallel`: whether all steps are solved at once, by Newton's method on the whole
    trajectory, of which each iteration is a linear recurrence, as the gradient is; it
    is solved by an associative scan, on the CPU by a loop. The values and derivatives
    are those of one step after the other, to the tolerance of the layer. For layers
    that solve an equation ([`eqimplicit.ThetaLayer`][],
    [`eqimplicit.RungeKuttaLayer`][]), whose `adjoint` is exact (of it, `throw` is used,
    and its linear solver where large states are left to steps in turn). On stable
    fields five to seven iterations do, whatever `num_steps`; where the whole trajectory
    is not found in 20, as on chaotic and on very stiff fields, the steps are made one
    after the other (in `stats`, `in_parallel` tells, and `num_steps` are the
    iterations). Only then are they made by the `solver` of the layer, of which
    otherwise only the tolerances count.

    States of up to 64 unknowns have their Jacobian, by a product for each: work and
    memory grow with the cube and the square of their number, for each step. Larger ones
    have GMRES on the whole trajectory, with memory for 24 of them, preconditioned with
    the recurrences of their components, whose diagonal Jacobian is estimated by 8
    products (4 more for each stage beyond the first): for processors of many cores, and
    fields whose unknowns depend more on themselves than on the sum of the others. A
    gradient that GMRES does not find is found one step after the other, too.

**Raises:** a `ValueError` if `num_steps` is below 1 or does not fit the arrays of
stacked layers, for a `parallel` block that is `reversible` or whose layer solves no
equation or has another adjoint; when called for more than 64 unknowns, if the equation
of the layer is for something else than a state, or several along a leading axis; a
`TypeError` if `layer` is no such layer.

??? cite "References"

    The parallel block is DEER, and for large states close to its quasi-Newton variant,
    whose diagonal Jacobians precondition here:

    ```bibtex
    @inproceedings{lim2024parallelizing,
        author = {Lim, Yi Heng and Zhu, Qi and Selfridge, Joshua and Kasim, Muhammad
                  Firmansyah},
        title = {Parallelizing Non-Linear Sequential Models over the Sequence Length},
        booktitle = {International Conference on Learning Representations},
        year = {2024},
    }

    @inproceedings{gonzalez2024scalable,
        author = {Gonzalez, Xavier and Warrington, Andrew and Smith, Jimmy T. H. and
                  Linderman, Scott W.},
        title = {Towards Scalable and Stable Parallelization of Nonlinear {RNNs}},
        booktitle = {Advances in Neural Information Processing Systems},
        year = {2024},
    }
    ```
"""


def _equal_times(block, t0):
    # At least in single precision: bfloat16 could not tell the steps apart.
    t0, step_size = at_least_single(t0), at_least_single(block.layer.step_size)
    if block.stacked and eqx.is_array(step_size):
        start = jnp.zeros_like(step_size[:1])
        return t0 + jnp.concatenate([start, jnp.cumsum(step_size)])
    # Integers, with which Python numbers stay weakly typed.
    with jax.numpy_dtype_promotion("standard"):
        return t0 + step_size * jnp.arange(block.num_steps + 1)


def _inputs(block, y0, t0, steps, args):
    y0 = as_state(y0)
    if block.stacked:
        stack, shared = eqx.partition(block.layer, eqx.is_array)
    else:
        check_scalar_step(block.layer.step_size)
        # Resolved only once.
        stack, shared = None, resolve(block.layer)
    if steps is None:
        steps = Steps(_equal_times(block, t0)[:-1], None)
    else:
        # A field must not be promoted by its time.
        dtype = accumulation_dtype(state_dtype(y0))
        steps = jtu.tree_map(lambda x: x.astype(dtype), steps)
    return ScanInputs(stack, shared, y0, steps, args)


@eqx.filter_jit
def _call(block, go, y0, t0, steps, args):
    return go(_inputs(block, y0, t0, steps, args))


@eqx.filter_jit
def _solve(block, y0, t0, steps, args):
    inputs = _inputs(block, y0, t0, steps, args)
    if block.parallel and len(inputs.steps.starts) > 0:
        solution = run_in_parallel(inputs)
    else:
        _, solution = scan(inputs, lambda solution: solution)
    value = jtu.tree_map(
        lambda first, rest: jnp.concatenate([first[None], rest]),
        inputs.y0,
        solution.value,
    )
    return eqx.tree_at(lambda s: s.value, solution, value)
