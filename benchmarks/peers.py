"""The gradient of a tanh layer in other libraries, called as their documentation shows.
The loss is half the sum of squares of z = tanh(z W^T + x), with the whole batch as one
state, and the gradient is with respect to W.

Each function returns functions of no arguments by name; it raises an `ImportError`
where its library is not installed.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from adjoints import Cell, loss_fn

import eqimplicit as eqi


Gradients = dict[str, Callable[[], Any]]
# So that no solve stops early.
NEVER = 1e-15


class Counter:
    """How often f is evaluated, in JAX by a callback. Products with J do not count."""

    def __init__(self):
        self.count = 0
        self.active = False

    def tick(self, _=None):
        self.count += 1

    def jax(self, cell: Callable) -> Callable:
        if not self.active:
            return cell

        @jax.custom_jvp
        def ticking(z):
            # Its argument keeps the callback inside loops.
            jax.debug.callback(self.tick, jnp.sum(z))
            return z

        ticking.defjvp(lambda z, t: (ticking(*z), *t))
        return lambda z, x: cell(ticking(z), x)


def _jitted(gradient, cell, x):
    gradient = eqx.filter_jit(gradient)
    return lambda: gradient(cell, x)


def _ours(solver, adjoint, max_steps, cell, x, counter):
    def loss(cell, x):
        layer = eqi.DEQ(counter.jax(cell), solver, adjoint, max_steps=max_steps)
        return loss_fn(layer, x, jnp.zeros_like(x))

    return _jitted(lambda cell, x: jax.grad(loss)(cell, x).weight, cell, x)


def ours(cell: Cell, x: jax.Array, steps: int, tolerance: float | None, c: Counter):
    if tolerance is None:
        forward = eqi.Picard(0.0, NEVER)
        backward = eqi.FixedPointLinearSolver(eqi.Picard(0.0, NEVER), max_steps=steps)
        make = lambda adjoint: _ours(forward, adjoint, steps, cell, x, c)
        return {
            "JFB": make(eqi.JFBAdjoint()),
            "exact": make(eqi.ImplicitAdjoint(backward)),
            "UPG(5, .5)": make(eqi.PhantomAdjoint(5, damping=0.5)),
        }
    fallback = eqi.GMRES(tolerance, 0.0)
    adjoint = eqi.ImplicitAdjoint(eqi.NeumannKrylov(tolerance, 0.0, fallback))
    make = lambda solver: _ours(solver, adjoint, steps, cell, x, c)
    return {
        "exact, Picard": make(eqi.Picard(0.0, tolerance, optx.rms_norm)),
        "exact, Anderson": make(eqi.Anderson(0.0, tolerance, optx.rms_norm)),
    }


def by_hand(cell: Cell, x: jax.Array, steps: int, tolerance: float | None, c: Counter):
    """A fixed loop in plain JAX, without any stop rule."""
    if tolerance is not None:
        return {}

    def loss(cell, x):
        f = c.jax(cell)
        body = lambda _, z: f(z, x)
        z = jax.lax.fori_loop(0, steps, body, jnp.zeros_like(x))
        z = f(jax.lax.stop_gradient(z), x)
        return jnp.sum(z**2) / 2

    return {"JFB": _jitted(lambda cell, x: jax.grad(loss)(cell, x).weight, cell, x)}


def optimistix(cell: Cell, x, steps, tolerance, c: Counter) -> Gradients:
    """Its fixed-point iteration with Lineax's GMRES for the gradient."""
    tol = NEVER if tolerance is None else tolerance
    solver = optx.FixedPointIteration(0.0, tol, optx.rms_norm)

    def solve(cell, x, adjoint):
        f = c.jax(cell)
        return optx.fixed_point(
            f,
            solver,
            jnp.zeros_like(x),
            x,
            max_steps=steps,
            adjoint=adjoint,
            throw=False,
        ).value

    def loss(cell, x):
        adjoint = optx.ImplicitAdjoint(lx.GMRES(tol, tol))
        return jnp.sum(solve(cell, x, adjoint) ** 2) / 2

    def jfb_loss(cell, x):
        stopped = jax.lax.stop_gradient(cell)
        z = jax.lax.stop_gradient(solve(stopped, x, optx.ImplicitAdjoint()))
        return jnp.sum(c.jax(cell)(z, x) ** 2) / 2

    if tolerance is None:
        grad = lambda cell, x: jax.grad(jfb_loss)(cell, x).weight
        return {"JFB": _jitted(grad, cell, x)}
    grad = lambda cell, x: jax.grad(loss)(cell, x).weight
    return {"exact, Picard": _jitted(grad, cell, x)}


def banax(cell: Cell, x, steps, tolerance, c: Counter) -> Gradients:
    import banax.adjoint as ba  # pyright: ignore[reportMissingImports]
    import banax.solver as bs  # pyright: ignore[reportMissingImports]

    def make(adjoint):
        def loss(cell, x):
            apply = lambda z, cell, x: c.jax(cell)(z, x)
            z = adjoint((apply, (cell, x)), jnp.zeros_like(x)).value
            return jnp.sum(z**2) / 2

        return _jitted(lambda cell, x: eqx.filter_grad(loss)(cell, x).weight, cell, x)

    if tolerance is None:
        # One evaluation comes before the first step.
        picard = ft.partial(bs.Picard, rtol=0.0, atol=NEVER)
        forward = backward = picard(max_steps=steps - 1)
        relaxed = bs.Relaxed(
            damp=0.5, rtol=0.0, atol=NEVER, max_steps=5, loop_kind="checkpointed"
        )
        return {
            "JFB": make(ba.JFB(forward)),
            "exact": make(ba.Implicit(forward, backward)),
            "UPG(5, .5)": make(ba.UnrollPhantom(forward, relaxed)),
        }
    atol = tolerance * x.size**0.5
    picard = bs.Picard(rtol=0.0, atol=atol, max_steps=steps)
    relative = ft.partial(bs.Picard, rtol=tolerance, max_steps=steps)
    anderson = bs.Anderson(rtol=0.0, atol=atol, max_steps=steps)
    return {
        "exact, Picard": make(ba.Implicit(picard, relative())),
        "exact, Anderson": make(
            ba.Implicit(anderson, bs.Anderson(rtol=tolerance, max_steps=steps))
        ),
    }


def jaxopt(cell: Cell, x, steps, tolerance, c: Counter) -> Gradients:
    """Backwards with BiCGStab. Its default there, CG on the normal equations to 1e-5,
    is slower.
    """
    import jaxopt as jo  # pyright: ignore[reportMissingImports]
    from jaxopt import linear_solve  # pyright: ignore[reportMissingImports]

    if tolerance is None:
        return {}
    tol = tolerance * x.size**0.5

    def make(solver_class):
        def loss(cell, x):
            apply = lambda z, params: c.jax(params[0])(z, params[1])
            backward = ft.partial(linear_solve.solve_bicgstab, tol=tolerance)
            solver = solver_class(
                apply, maxiter=steps, tol=tol, implicit_diff_solve=backward
            )
            z = solver.run(jnp.zeros_like(x), (cell, x)).params
            return jnp.sum(z**2) / 2

        return _jitted(lambda cell, x: jax.grad(loss)(cell, x).weight, cell, x)

    return {
        "exact, Picard": make(jo.FixedPointIteration),
        "exact, Anderson": make(jo.AndersonAcceleration),
    }


def anchorax(cell: Cell, x, steps, tolerance, c: Counter) -> Gradients:
    from anchorax.backprop import jfb  # pyright: ignore[reportMissingImports]

    if tolerance is not None:
        return {}

    class WithFlags(eqx.Module):
        cell: Cell

        def __call__(self, u, x, *, inference=False, key=None):
            return c.jax(self.cell)(u, x)

    def loss(cell, x):
        params, static = eqx.partition(WithFlags(cell), eqx.is_array)
        z, _, _ = jfb(
            (params, x), static, key=jax.random.key(0), eps=NEVER, max_depth=steps
        )
        return jnp.sum(z**2) / 2

    grad = lambda cell, x: eqx.filter_grad(loss)(cell, x).weight
    return {"JFB": _jitted(grad, cell, x)}


def _torch_problem(cell, x, c):
    import torch  # pyright: ignore[reportMissingImports]

    weight = torch.tensor(np.asarray(cell.weight), requires_grad=True)
    inputs = torch.tensor(np.asarray(x))

    def f(z):
        c.tick()
        return torch.tanh(torch.nn.functional.linear(z, weight) + inputs)

    def gradient(solve):
        def run():
            weight.grad = None
            (solve(f, torch.zeros_like(inputs)) ** 2).sum().div(2).backward()
            return weight.grad

        return run

    return torch, gradient


def torch(cell: Cell, x, steps, tolerance, c: Counter) -> Gradients:
    """A fixed loop in plain PyTorch, with the residual measured in each step."""
    torch, gradient = _torch_problem(cell, x, c)
    if tolerance is not None:
        return {}

    def jfb(f, z):
        with torch.no_grad():
            for _ in range(steps):
                previous, z = z, f(z)
                if (z - previous).norm() < NEVER:
                    break
        return f(z)

    def phantom(f, z):
        with torch.no_grad():
            for _ in range(steps):
                previous, z = z, f(z)
                if (z - previous).norm() < NEVER:
                    break
        for _ in range(5):
            z = 0.5 * f(z) + 0.5 * z
        return z

    return {"JFB": gradient(jfb), "UPG(5, .5)": gradient(phantom)}


def torchdeq(cell: Cell, x, steps, tolerance, c: Counter) -> Gradients:
    torch, gradient = _torch_problem(cell, x, c)
    from torchdeq import get_deq  # pyright: ignore[reportMissingImports]

    def make(**options):
        deq = get_deq(f_max_iter=steps, b_max_iter=steps, **options)
        return gradient(lambda f, z: deq(f, z)[0][-1])

    if tolerance is None:
        never = dict(f_tol=0.0, b_tol=0.0)
        return {
            "JFB": make(**never),
            "exact": make(ift=True, **never),
            "UPG(5, .5)": make(grad=5, tau=0.5, **never),
        }
    # Its norm is of one example.
    tols = dict(f_tol=tolerance * x.shape[1] ** 0.5, b_tol=tolerance)
    tols = dict(tols, b_stop_mode="rel", ift=True)
    anderson = dict(f_solver="anderson", b_solver="anderson")
    return {"exact, Picard": make(**tols), "exact, Anderson": make(**tols, **anderson)}


LIBRARIES = {
    "eqimplicit": ours,
    "plain JAX": by_hand,
    "Optimistix and Lineax": optimistix,
    "banax": banax,
    "jaxopt": jaxopt,
    "anchorax": anchorax,
    "TorchDEQ": torchdeq,
    "PyTorch": torch,
}
