"""Problems and named constructors that several test files share."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optimistix as optx
import pytest

import eqimplicit as eqi


SOLVERS: dict[str, Callable] = {
    "Picard": lambda rtol, atol: eqi.Picard(rtol, atol),
    "damped Picard": lambda rtol, atol: eqi.Picard(rtol, atol, damping=0.7),
    "Anderson": lambda rtol, atol: eqi.Anderson(rtol, atol),
    "damped Anderson": lambda rtol, atol: eqi.Anderson(rtol, atol, damping=0.7),
    "Anderson with one step": lambda rtol, atol: eqi.Anderson(
        rtol, atol, history_size=1
    ),
    "Broyden": lambda rtol, atol: eqi.Broyden(rtol, atol),
    "damped Broyden": lambda rtol, atol: eqi.Broyden(rtol, atol, damping=0.7),
    "Broyden with two steps": lambda rtol, atol: eqi.Broyden(
        rtol, atol, history_size=2
    ),
    "Newton": lambda rtol, atol: eqi.RootAsFixedPoint(optx.Newton(rtol, atol)),
    "Chord": lambda rtol, atol: eqi.RootAsFixedPoint(optx.Chord(rtol, atol)),
}

# Solvers that are iterations of ours on every dtype (factorisations need float32).
ITERATIONS = [name for name in SOLVERS if name not in ("Newton", "Chord")]

EXACT_ADJOINTS: dict[str, Callable] = {
    "Implicit": lambda: eqi.ImplicitAdjoint(
        eqi.NeumannKrylov(1e-12, 0.0, eqi.GMRES(1e-12, 0.0))
    ),
}

APPROXIMATE_ADJOINTS: dict[str, Callable] = {
    "JFB": lambda: eqi.JFBAdjoint(),
    "Neumann": lambda: eqi.NeumannAdjoint(num_terms=5, damping=0.5),
    "Phantom": lambda: eqi.PhantomAdjoint(num_steps=5, damping=0.5),
    # So tight that it is the inverse.
    "Adaptive": lambda: eqi.AdaptiveNeumannAdjoint(1e-12, 1000),
    "Randomised": lambda: eqi.RandomisedNeumannAdjoint(3, key=jr.key(1)),
}

ADJOINTS = {**EXACT_ADJOINTS, **APPROXIMATE_ADJOINTS}

# At a point where the loss has gradient g, each adjoint gives (df/dtheta)^T S^T g.
INVERSES: dict[str, Callable] = {
    "Implicit": lambda J: jnp.linalg.inv(jnp.eye(len(J)) - J),
    "JFB": lambda J: jnp.eye(len(J)),
    "Neumann": lambda J: neumann_sum(J, 5, 0.5),
    "Phantom": lambda J: neumann_sum(J, 5, 0.5),
    "Adaptive": lambda J: jnp.linalg.inv(jnp.eye(len(J)) - J),
    "Randomised": lambda J: roulette_sum(J, 3, jr.key(1)),
}


def neumann_sum(jacobian, num_terms, damping):
    identity = jnp.eye(len(jacobian))
    matrix = damping * jacobian + (1 - damping) * identity
    term = total = identity
    for _ in range(num_terms - 1):
        term = term @ matrix
        total = total + term
    return damping * total


def roulette_sum(jacobian, mean_terms, key):
    """The sum over as many terms as the key says, by the definition."""
    survival = 1 - 1 / mean_terms
    uniform = jr.uniform(key, minval=jnp.finfo(jnp.float32).tiny)
    term = total = jnp.eye(len(jacobian))
    probability = survival
    while uniform < probability:
        term = term @ jacobian
        total = total + term / probability
        probability = probability * survival
    return total


def tanh_map(z, args):
    weight, x = args
    return jnp.tanh(weight @ z + x)


def matrix_of_norm(key, size, norm, dtype=jnp.float64):
    matrix = jr.normal(key, (size, size))
    return (norm * matrix / jnp.linalg.norm(matrix, 2)).astype(dtype)


def orthogonal(key, size):
    return jnp.linalg.qr(jr.normal(key, (size, size)))[0]


def tree_dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b)))


def relative_error(a, b):
    difference = jtu.tree_map(jnp.subtract, a, b)
    return jnp.sqrt(tree_dot(difference, difference) / tree_dot(b, b))


def directional_difference(fn, point, direction, step=1e-5):
    """The derivative of `fn` by fourth-order central differences."""

    def at(multiple):
        return fn(jtu.tree_map(lambda p, d: p + multiple * step * d, point, direction))

    return (8 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12 * step)


def random_like(key, tree):
    leaves, treedef = jtu.tree_flatten(tree)
    keys = jr.split(key, len(leaves))
    return treedef.unflatten(
        [jr.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    )


def compiled_text(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


def solve(fn, solver, z0, args=None, **kwargs):
    kwargs = {"throw": False, "max_steps": 500, **kwargs}
    return eqx.filter_jit(optx.fixed_point)(fn, solver, z0, args, **kwargs)


def slow_but(names, *kept):
    """All names as parameters of a test, of which only some run without `-m slow`."""
    return [
        name if name in kept else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]
