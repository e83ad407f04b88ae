"""Laws of the adjoints: with J = df/dz at the solution, and S the inverse of I - J or
what stands in for it, every derivative is S df/dtheta.
"""

import itertools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqimplicit as eqi
from eqimplicit._adjoint.base import Inputs, Outcome
from eqimplicit._adjoint.rules import while_loop

from .helpers import (
    ADJOINTS,
    APPROXIMATE_ADJOINTS,
    compiled_text,
    directional_difference,
    EXACT_ADJOINTS,
    INVERSES,
    matrix_of_norm,
    neumann_sum,
    orthogonal,
    random_like,
    relative_error,
    SOLVERS,
    tanh_map,
    tree_dot,
)


TIGHT = eqi.Anderson(1e-13, 1e-14)
SIZE = 6
CALLBACK = re.compile('custom_call_target="[^"]*callback')


def problem(norm=0.9):
    weight = matrix_of_norm(jr.key(0), SIZE, norm)
    args = (weight, jr.normal(jr.key(1), (SIZE,)))
    g = jr.normal(jr.key(2), (SIZE,))
    return args, g


def value(args, adjoint, solver=TIGHT, fn=tanh_map, z0=None, **kwargs):
    z0 = jnp.zeros(SIZE) if z0 is None else z0
    kwargs = {"throw": False, "max_steps": 1000, **kwargs}
    return optx.fixed_point(fn, solver, z0, args, adjoint=adjoint, **kwargs).value


def gradient(args, g, adjoint, **kwargs):
    loss = lambda args: g @ value(args, adjoint, **kwargs)
    return jax.jit(jax.grad(loss))(args)


@jax.jit
def solution(args):
    """The solution, the Jacobian there, and that with respect to the arguments."""
    z = value(args, optx.ImplicitAdjoint())
    return z, *(jax.jacobian(tanh_map, i)(z, args) for i in (0, 1))


def linear_algebra(args, g, inverse):
    """The gradient by dense linear algebra at the exact solution."""
    _, jacobian, jacobian_args = solution(args)
    w = inverse(jacobian).T @ g
    return jtu.tree_map(lambda J: jnp.tensordot(w, J, 1), jacobian_args)


@pytest.mark.parametrize("name", ADJOINTS)
def test_reverse_and_forward_mode_equal_dense_linear_algebra(name):
    args, g = problem()
    expected = linear_algebra(args, g, INVERSES[name])
    adjoint = ADJOINTS[name]()
    assert relative_error(gradient(args, g, adjoint), expected) < 1e-10
    direction = random_like(jr.key(3), args)
    loss = lambda args: g @ value(args, adjoint)
    _, tangent = jax.jit(lambda a, t: jax.jvp(loss, (a,), (t,)))(args, direction)
    assert jnp.allclose(tangent, tree_dot(expected, direction), rtol=1e-9)


@pytest.mark.parametrize("name", EXACT_ADJOINTS)
def test_exact_adjoints_equal_finite_differences(name):
    args, g = problem()
    direction = random_like(jr.key(3), args)
    loss = jax.jit(lambda args: g @ value(args, EXACT_ADJOINTS[name]()))
    difference = directional_difference(loss, args, direction, step=1e-3)
    gradients = gradient(args, g, EXACT_ADJOINTS[name]())
    assert jnp.allclose(tree_dot(gradients, direction), difference, rtol=1e-8)


@pytest.mark.parametrize("name", ADJOINTS)
def test_forward_jacobian_equals_reverse_jacobian(name):
    (weight, x), _ = problem()
    fn = lambda x: value((weight, x), ADJOINTS[name]())
    forward, reverse = jax.jit(lambda x: (jax.jacfwd(fn)(x), jax.jacrev(fn)(x)))(x)
    assert jnp.allclose(forward, reverse, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", EXACT_ADJOINTS)
def test_exact_adjoints_have_true_hessians(name):
    (weight, x), g = problem()
    direction, other = jr.normal(jr.key(4), (2, SIZE))

    def slope(x):
        return jax.jvp(
            lambda x: g @ value((weight, x), EXACT_ADJOINTS[name]()), (x,), (direction,)
        )[1]

    expected = directional_difference(jax.jit(slope), x, other, step=1e-3)
    loss = lambda x: g @ value((weight, x), EXACT_ADJOINTS[name]())
    H = jax.jit(jax.hessian(loss))(x)
    assert jnp.allclose(direction @ H @ other, expected, rtol=1e-7)
    assert jnp.allclose(H, H.T, atol=1e-9)
    product = jax.jit(jax.grad(lambda x: jax.grad(loss)(x) @ other))(x)
    assert jnp.allclose(product, H @ other, atol=1e-9)


@pytest.mark.parametrize("name", APPROXIMATE_ADJOINTS)
def test_approximate_adjoints_refuse_second_derivatives(name):
    (weight, x), g = problem()
    adjoint = APPROXIMATE_ADJOINTS[name]()
    loss = lambda x: g @ value((weight, x), adjoint)
    for second in (jax.jacfwd(jax.grad(loss)), jax.jacrev(jax.jacfwd(loss))):
        with pytest.raises(
            RuntimeError, match=f"{type(adjoint).__name__}.*ImplicitAdj"
        ):
            jax.jit(second)(x)


def test_jfb_is_one_neumann_term_is_one_phantom_step_at_an_exact_solution():
    args, g = problem()
    jfb = gradient(args, g, eqi.JFBAdjoint())
    for adjoint in (eqi.NeumannAdjoint(1), eqi.PhantomAdjoint(1)):
        assert relative_error(gradient(args, g, adjoint), jfb) < 1e-12


def test_one_damped_term_is_jfb_times_the_damping():
    args, g = problem()
    jfb = gradient(args, g, eqi.JFBAdjoint())
    scaled = jtu.tree_map(lambda x: 0.3 * x, jfb)
    for adjoint in (eqi.NeumannAdjoint(1, 0.3), eqi.PhantomAdjoint(1, 0.3)):
        assert relative_error(gradient(args, g, adjoint), scaled) < 1e-12


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_phantom_equals_neumann_up_to_the_residual_of_the_solution(damping):
    args, g = problem()
    errors = []
    for tol in (1e-2, 1e-4, 1e-7, 1e-13):
        solver = eqi.Picard(0.0, tol)
        phantom = gradient(args, g, eqi.PhantomAdjoint(4, damping), solver=solver)
        neumann = gradient(args, g, eqi.NeumannAdjoint(4, damping), solver=solver)
        error = float(relative_error(phantom, neumann))
        assert error < 20 * tol
        errors.append(error)
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-4


def test_many_neumann_terms_give_the_exact_gradient():
    args, g = problem()
    exact = gradient(args, g, eqi.ImplicitAdjoint(lx.LU()))
    many = gradient(args, g, eqi.NeumannAdjoint(400, damping=0.5))
    assert relative_error(many, exact) < 1e-12


@pytest.mark.parametrize("num_terms, damping", [(1, 1.0), (3, 1.0), (4, 0.5), (9, 0.2)])
def test_remainder_of_the_neumann_series(num_terms, damping):
    args, g = problem()

    def remainder(J):
        B = damping * J + (1 - damping) * jnp.eye(SIZE)
        return jnp.linalg.matrix_power(B, num_terms) @ INVERSES["Implicit"](J)

    exact = linear_algebra(args, g, INVERSES["Implicit"])
    rest = linear_algebra(args, g, remainder)
    found = gradient(args, g, eqi.NeumannAdjoint(num_terms, damping))
    difference = jtu.tree_map(lambda e, r: e - r, exact, rest)
    assert relative_error(found, difference) < 1e-12


LINEAR_SOLVERS = {
    "GMRES": eqi.GMRES(1e-12, 0.0),
    "Neumann series": eqi.NeumannSeries(400),
    "Picard": eqi.FixedPointLinearSolver(eqi.Picard(1e-13, 1e-14), max_steps=1000),
    "Anderson": eqi.FixedPointLinearSolver(eqi.Anderson(1e-13, 1e-14)),
    "Broyden": eqi.FixedPointLinearSolver(eqi.Broyden(1e-13, 1e-14)),
    "LU": lx.LU(),
    "QR": lx.QR(),
    "Lineax's choice": lx.AutoLinearSolver(well_posed=True),
    "Lineax's GMRES": lx.GMRES(1e-12, 1e-12),
    "normal equations": lx.Normal(lx.CG(1e-13, 1e-13)),
    "BiCGStab": lx.BiCGStab(1e-12, 1e-12),
}


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_every_linear_solver_gives_the_exact_gradient_and_tangent(name):
    args, g = problem()
    expected = linear_algebra(args, g, INVERSES["Implicit"])
    adjoint = eqi.ImplicitAdjoint(LINEAR_SOLVERS[name])
    assert relative_error(gradient(args, g, adjoint), expected) < 1e-9
    direction = random_like(jr.key(3), args)
    loss = lambda args: g @ value(args, adjoint)
    _, tangent = jax.jit(lambda a, t: jax.jvp(loss, (a,), (t,)))(args, direction)
    assert jnp.allclose(tangent, tree_dot(expected, direction), rtol=1e-8)


def test_unrolling_picard_to_convergence_gives_the_exact_gradient():
    args, g = problem()
    exact = linear_algebra(args, g, INVERSES["Implicit"])
    unrolled = gradient(
        args, g, optx.RecursiveCheckpointAdjoint(), solver=eqi.Picard(1e-13, 1e-14)
    )
    assert relative_error(unrolled, exact) < 1e-9


def additive_map(z, args):
    """Contracts with factor `gamma`, with the Jacobian `weight` in its parameters."""
    gamma, rotation, weight, theta = args
    return gamma * jnp.sin(rotation @ z) + weight @ theta


def cosine_with_the_exact_gradient(key, gamma, condition, adjoint, tol):
    """The cosine between the gradients of a random quadratic loss with respect to
    `theta`, where `weight @ weight.T` has the given condition number; with it the
    Jacobian of the map.
    """
    keys = jr.split(key, 5)
    spectrum = jnp.sqrt(jnp.linspace(1.0, condition, SIZE))
    weight = orthogonal(keys[0], SIZE) @ (
        spectrum[:, None] * orthogonal(keys[1], 9)[:SIZE]
    )
    rotation = orthogonal(keys[2], SIZE)
    theta, target = 0.1 * jr.normal(keys[3], (9,)), jr.normal(keys[4], (SIZE,))

    def loss(theta, adjoint, tol):
        args = (gamma, rotation, weight, theta)
        z = value(args, adjoint, eqi.Picard(0.0, tol), additive_map)
        return jnp.sum((z - target) ** 2), z

    found, _ = jax.grad(loss, has_aux=True)(theta, adjoint, tol)
    exact, z = jax.grad(loss, has_aux=True)(theta, eqi.ImplicitAdjoint(lx.LU()), 1e-13)
    jacobian = jax.jacobian(additive_map)(z, (gamma, rotation, weight, theta))
    return found @ exact / jnp.sqrt((found @ found) * (exact @ exact)), jacobian


@eqx.filter_jit
def cosines_of_problems(gamma, condition, adjoint, tol):
    one = lambda key: cosine_with_the_exact_gradient(
        key, gamma, condition, adjoint, tol
    )
    return jax.vmap(one)(jr.split(jr.key(7), 100))


@pytest.mark.parametrize("tol", [1e-13, 1e-2])
@pytest.mark.parametrize("gamma, condition", [(0.3, 3.2), (0.6, 1.6), (0.9, 1.1)])
def test_jfb_descends_where_its_theorem_says_so(gamma, condition, tol):
    # Theorem 3.1 of the JFB paper asks for kappa(M^T M) < 1 / gamma; Corollary 3.1 says
    # the same close to the fixed point.
    assert condition < 1 / gamma
    arrays = (jnp.array(number) for number in (gamma, condition, tol))
    gamma, condition, tol = arrays
    cosines, _ = cosines_of_problems(gamma, condition, eqi.JFBAdjoint(), tol)
    assert jnp.all(cosines > 0)


def test_jfb_may_ascend_where_its_theorem_is_silent():
    # <P^T g, P^T a> = a^T P P^T (I - J^T) a for the adjoint state a; take the a that
    # makes this most negative.
    c, s = 0.5, np.sqrt(0.75)
    jacobian = 0.9 * jnp.array([[c, -s], [s, c]])
    weight = jnp.diag(jnp.array([1.0, 10.0]))
    matrix = weight @ weight.T @ (jnp.eye(2) - jacobian.T)
    lowest, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    a = vectors[:, 0]
    g = (jnp.eye(2) - jacobian.T) @ a
    fn = lambda z, theta: jacobian @ z + weight @ theta
    jfb, exact = (
        gradient(jnp.zeros(2), g, adjoint, fn=fn, z0=jnp.zeros(2))
        for adjoint in (eqi.JFBAdjoint(), eqi.ImplicitAdjoint(lx.LU()))
    )
    assert lowest[0] < -1
    assert jnp.allclose(jfb @ exact, lowest[0], rtol=1e-10)


@pytest.mark.parametrize("num_terms, damping", [(3, 1.0), (6, 0.5)])
@pytest.mark.parametrize("cls", [eqi.NeumannAdjoint, eqi.PhantomAdjoint])
def test_phantom_gradients_ascend_where_their_theorem_says_so(cls, num_terms, damping):
    # Theorem 1 of the phantom-gradient paper asks for |D (I - J) - I| < 1 / kappa^2;
    # for a truncated series D that norm is |B^k| <= (damping L + 1 - damping)^k.
    gamma, condition = 0.5, 5.0
    cosines, jacobians = cosines_of_problems(
        gamma, condition, cls(num_terms, damping), 1e-13
    )
    identity = jnp.eye(SIZE)
    for jacobian in jacobians[:20]:
        D = neumann_sum(jacobian, num_terms, damping)
        norm = jnp.linalg.norm(D @ (identity - jacobian) - identity, 2)
        B = damping * jacobian + (1 - damping) * identity
        power = jnp.linalg.norm(jnp.linalg.matrix_power(B, num_terms), 2)
        assert jnp.allclose(norm, power, rtol=1e-10)
        assert power <= (damping * gamma + 1 - damping) ** num_terms + 1e-12
    assert (damping * gamma + 1 - damping) ** num_terms < 1 / condition
    assert jnp.all(cosines > 0)


@pytest.mark.parametrize("cls", [eqi.NeumannAdjoint, eqi.PhantomAdjoint])
def test_phantom_gradients_converge_to_the_exact_one(cls):
    # Theorem 2 of the phantom-gradient paper; steps also from an inexact solution.
    args, g = problem(0.8)
    exact = linear_algebra(args, g, INVERSES["Implicit"])
    tol = 1e-2 if cls is eqi.PhantomAdjoint else 1e-13
    errors = [
        float(
            relative_error(
                gradient(args, g, cls(k), solver=eqi.Picard(0.0, tol)), exact
            )
        )
        for k in (1, 5, 20, 100)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10


@pytest.mark.parametrize("gamma", [0.3, 0.6, 0.9])
def test_jfb_and_the_exact_gradient_of_a_bias_make_a_bounded_angle(gamma):
    # cos(g, (I - J)^-T g) >= sqrt(1 - gamma^2), attained by rotations by arccos(gamma).
    g = jr.normal(jr.key(5), (SIZE,))
    c, s = gamma, np.sqrt(1 - gamma**2)
    worst = jnp.kron(jnp.eye(SIZE // 2), jnp.array([[c, -s], [s, c]]))

    def cosine(rotation):
        fn = lambda z, x: gamma * rotation @ z + x
        jfb, exact = (
            gradient(jnp.zeros(SIZE), g, adjoint, fn=fn)
            for adjoint in (eqi.JFBAdjoint(), eqi.ImplicitAdjoint(lx.LU()))
        )
        return jfb @ exact / jnp.sqrt((jfb @ jfb) * (exact @ exact))

    assert cosine(orthogonal(jr.key(6), SIZE)) >= np.sqrt(1 - gamma**2)
    assert jnp.allclose(cosine(worst), np.sqrt(1 - gamma**2), rtol=1e-9)


@pytest.mark.parametrize("name", ADJOINTS)
def test_toy_sensitivity_of_the_jfb_paper(name):
    # y = d + y^5, dy/dd = 1 / (1 - 5 y^4).
    root = lambda d: value(
        d,
        ADJOINTS[name](),
        eqi.Picard(0.0, 1e-15),
        lambda y, d: d + y**5,
        jnp.array(0.0),
    )
    reverse, forward = jax.jit(jax.grad(root)), jax.jit(jax.jacfwd(root))
    for d, slope in {0.5: 1.850320, 1 / 3: 1.069574, 0.1: 1.000500}.items():
        d = jnp.array(d)
        y = jax.jit(root)(d)
        expected = INVERSES[name](5 * y[None, None] ** 4)[0, 0]
        assert jnp.allclose(reverse(d), expected, rtol=1e-9)
        assert jnp.allclose(forward(d), expected, rtol=1e-9)
        if name in EXACT_ADJOINTS:
            assert abs(float(reverse(d)) - slope) < 1e-6


@pytest.mark.parametrize("solver", ["Broyden", "Newton"])
@pytest.mark.parametrize("name", ADJOINTS)
def test_gradient_does_not_depend_on_the_solver(name, solver):
    args, g = problem()
    solver = SOLVERS[solver](1e-13, 1e-14)
    found = gradient(args, g, ADJOINTS[name](), solver=solver)
    assert relative_error(found, linear_algebra(args, g, INVERSES[name])) < 1e-9


@pytest.mark.parametrize("name", APPROXIMATE_ADJOINTS)
def test_approximate_gradient_does_not_depend_on_tolerance_or_start(name):
    # Up to the accuracy of the solution: k terms are k terms.
    args, g = problem()
    adjoint = APPROXIMATE_ADJOINTS[name]()
    reference = gradient(args, g, adjoint)
    z = value(args, adjoint)
    warm = gradient(args, g, adjoint, z0=z, solver=eqi.Picard(1e-3, 1e-3))
    assert relative_error(warm, reference) < 1e-9
    for tol in (1e-3, 1e-6, 1e-9):
        loose = gradient(args, g, adjoint, solver=eqi.Picard(0.0, tol))
        assert relative_error(loose, reference) < 30 * tol


@pytest.mark.parametrize("name", ADJOINTS)
def test_value_does_not_depend_on_differentiation(name):
    args, g = problem()
    loss = lambda args: g @ value(args, ADJOINTS[name](), eqi.Picard(0.0, 1e-2))
    plain = jax.jit(loss)(args)
    with_gradient, _ = jax.jit(jax.value_and_grad(loss))(args)
    tangent_in = jtu.tree_map(jnp.ones_like, args)
    with_tangent, _ = jax.jit(lambda a: jax.jvp(loss, (a,), (tangent_in,)))(args)
    assert jnp.allclose(plain, with_gradient, rtol=1e-14)
    assert jnp.allclose(plain, with_tangent, rtol=1e-14)


@pytest.mark.parametrize("name", ADJOINTS)
def test_value_is_the_documented_one(name):
    args, _ = problem()
    solver = eqi.Picard(0.0, 1e-2)
    z = value(args, optx.ImplicitAdjoint(), solver)
    steps, damping = {"JFB": (1, 1.0), "Phantom": (5, 0.5)}.get(name, (0, 1.0))
    for _ in range(steps):
        z = damping * tanh_map(z, args) + (1 - damping) * z
    found = value(args, ADJOINTS[name](), solver)
    assert jnp.allclose(found, z, rtol=1e-13)


@pytest.mark.parametrize("name", ADJOINTS)
def test_gradients_of_a_batch_are_those_of_its_examples(name):
    (weight, x), g = problem()
    xs = jnp.stack([x, 0.1 * x, -2 * x])
    loss = lambda x: g @ value((weight, x), ADJOINTS[name]())
    each = jax.jit(jax.vmap(jax.grad(loss)))(xs)
    of_sum = jax.jit(jax.grad(lambda xs: jnp.sum(jax.vmap(loss)(xs))))(xs)
    for i, x in enumerate(xs):
        _, expected = linear_algebra((weight, x), g, INVERSES[name])
        assert jnp.allclose(each[i], expected, rtol=1e-8)
        assert jnp.allclose(of_sum[i], expected, rtol=1e-8)


@pytest.mark.parametrize("name", ADJOINTS)
def test_a_nan_example_harms_no_other(name):
    (weight, x), g = problem()
    slope = jax.grad(lambda x: g @ value((weight, x), ADJOINTS[name]()))
    slopes = jax.jit(jax.vmap(slope))
    clean = slopes(jnp.stack([x, x, -x]))
    poisoned = slopes(jnp.stack([x, jnp.full_like(x, jnp.nan), -x]))
    assert jnp.array_equal(clean[0], poisoned[0])
    assert jnp.array_equal(clean[2], poisoned[2])


@pytest.mark.parametrize(
    "adjoint",
    [
        *(make() for make in ADJOINTS.values()),
        eqi.ImplicitAdjoint(lx.BiCGStab(1e-8, 1e-8)),
        eqi.ImplicitAdjoint(throw=True),
    ],
    ids=[*ADJOINTS, "BiCGStab", "throw"],
)
def test_zero_cotangent_gives_zero_gradient(adjoint):
    (weight, x), g = problem()
    xs = jnp.stack([x, -x])

    @jax.jit
    @jax.grad
    def masked_gradient(weight, mask):
        losses = jax.vmap(lambda x: g @ value((weight, x), adjoint))(xs)
        return jnp.sum(jnp.where(mask, losses, 0.0))

    first, second, both, none = (
        masked_gradient(weight, jnp.array(mask))
        for mask in ([True, False], [False, True], [True, True], [False, False])
    )
    assert jnp.all(none == 0)
    assert jnp.linalg.norm(first) > 0.1
    assert jnp.allclose(first + second, both, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ADJOINTS)
def test_pytree_states_and_closures_over_traced_parameters(name):
    (weight, x), g = problem()

    def loss(args):
        weight, x = args

        def fn(z, _):  # closes over what is differentiated
            image = jnp.tanh(weight @ jnp.concatenate([z["a"], z["b"][:, 0]]) + x)
            return {"a": image[:2], "b": image[2:, None]}

        z0 = {"a": jnp.zeros(2), "b": jnp.zeros((SIZE - 2, 1))}
        z = value(None, ADJOINTS[name](), TIGHT, fn, z0)
        return g @ jnp.concatenate([z["a"], z["b"][:, 0]])

    found = jax.jit(jax.grad(loss))((weight, x))
    expected = linear_algebra((weight, x), g, INVERSES[name])
    assert relative_error(found, expected) < 1e-10


LEAVES = {"two leaves": ((2,), (2, 2)), "three leaves": ((2,), (3, 1), ())}
PATTERNS = [
    pytest.param(
        *(shapes, pattern),
        id=f"{count}-{pattern}",
        marks=pytest.mark.slow if len(shapes) == 3 else (),
    )
    for count, shapes in LEAVES.items()
    for pattern in itertools.product((0, 1), repeat=len(shapes))
]


def split(vector, shapes):
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [part.reshape(s) for part, s in zip(jnp.split(vector, ends), shapes)]


def join(leaves):
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


@pytest.mark.parametrize("shapes, pattern", PATTERNS)
@pytest.mark.parametrize("name", ADJOINTS)
def test_what_is_differentiated_may_enter_any_of_the_leaves(name, shapes, pattern):
    (weight, x), g = problem()
    constants = split(x, shapes)
    direction = jr.normal(jr.key(3), (SIZE,))

    def fn(z, xs):
        # Nothing is masked, so that JAX knows which leaves depend on `xs`.
        shifts = [xs[i] if pattern[i] else constants[i] for i in range(len(shapes))]
        image = split(weight @ join(z), shapes)
        return [jnp.tanh(a + b) for a, b in zip(image, shifts)]

    def solve(xs):
        z0 = split(jnp.zeros(SIZE), shapes)
        return value(xs, ADJOINTS[name](), TIGHT, fn, z0)

    def loss_of(leaves):
        weights = split(g, shapes)
        return lambda xs: sum(jnp.vdot(weights[i], solve(xs)[i]) for i in leaves)

    @jax.jit
    def derivatives(xs):
        _, tangent = jax.jvp(solve, (xs,), (split(direction, shapes),))
        of_first, of_all = (
            jax.grad(loss_of(leaves))(xs) for leaves in ([0], range(len(shapes)))
        )
        return join(tangent), join(of_first), join(of_all)

    _, jacobian, (_, jacobian_x) = solution((weight, x))
    owner = jnp.repeat(jnp.arange(len(shapes)), jnp.array([*map(math.prod, shapes)]))
    enters = jnp.diag(jnp.array(pattern, float)[owner])
    expected = INVERSES[name](jacobian) @ jacobian_x @ enters
    tangent, of_first, of_all = derivatives(constants)
    assert jnp.allclose(tangent, expected @ direction, rtol=0, atol=1e-10)
    assert jnp.allclose(
        of_first, jnp.where(owner == 0, g, 0) @ expected, rtol=0, atol=1e-10
    )
    assert jnp.allclose(of_all, g @ expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ADJOINTS)
def test_auxiliary_outputs_have_no_derivative(name):
    args, g = problem()

    def loss(args):
        fn = lambda z, a: (tanh_map(z, a), jnp.sum(z**2))
        sol = optx.fixed_point(
            fn, TIGHT, jnp.zeros(SIZE), args, has_aux=True, adjoint=ADJOINTS[name]()
        )
        return g @ sol.value + sol.aux + sol.stats["residual"], sol.aux

    found, aux = jax.jit(jax.grad(loss, has_aux=True))(args)
    z, _, _ = solution(args)
    assert jnp.allclose(aux, jnp.sum(z**2), rtol=1e-10)
    expected = linear_algebra(args, g, INVERSES[name])
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, jnp.bfloat16) for name in ADJOINTS)]
    + [("Implicit", jnp.float16), ("Implicit", jnp.float32), ("Phantom", jnp.float16)],
)
def test_low_precision_gradients_are_close_and_keep_their_dtype(name, dtype):
    args, g = problem(0.6)
    expected = linear_algebra(args, g, INVERSES[name])
    cast = lambda tree: jtu.tree_map(lambda x: x.astype(dtype), tree)
    eps = float(jnp.finfo(dtype).eps)
    found = gradient(
        cast(args),
        g.astype(dtype),
        ADJOINTS[name](),
        solver=eqi.Anderson(4 * eps, 4 * eps),
        z0=jnp.zeros(SIZE, dtype),
    )
    assert all(leaf.dtype == dtype for leaf in jtu.tree_leaves(found))
    found = jtu.tree_map(lambda x: x.astype(jnp.float64), found)
    assert relative_error(found, expected) < 20 * eps


def least_squares(adjoint):
    solver = optx.LevenbergMarquardt(1e-12, 1e-12)
    return lambda args: value(args, adjoint, solver)


def negative_root(adjoint):
    fn = lambda z, args: z - tanh_map(z, args)
    newton = optx.Newton(1e-12, 1e-12)
    return lambda args: (
        optx.root_find(fn, newton, jnp.zeros(SIZE), args, adjoint=adjoint).value
    )


def bare_root_finder(adjoint):
    return lambda args: value(args, adjoint, optx.Newton(1e-12, 1e-12))


REWRITTEN = {
    "least squares": least_squares,
    "negative root": negative_root,
    "root finder": bare_root_finder,
}


@pytest.mark.parametrize("rewritten", REWRITTEN)
@pytest.mark.parametrize("name", APPROXIMATE_ADJOINTS)
def test_rewritten_problems_are_refused_by_iterating_adjoints(name, rewritten):
    args, _ = problem()
    adjoint = APPROXIMATE_ADJOINTS[name]()
    with pytest.raises(ValueError, match=f"`{type(adjoint).__name__}` needs a fixed-p"):
        REWRITTEN[rewritten](adjoint)(args)


def test_a_fixed_point_solver_among_the_arguments_does_not_deceive_the_guard():
    args, _ = problem()
    fn = lambda z, args: tanh_map(z, args[0])
    with pytest.raises(ValueError, match="needs a fixed-point problem"):
        value((args, TIGHT), eqi.JFBAdjoint(), optx.Newton(1e-12, 1e-12), fn)


@pytest.mark.parametrize("rewritten", REWRITTEN)
def test_implicit_adjoint_accepts_rewritten_problems(rewritten):
    args, g = problem()
    expected = linear_algebra(args, g, INVERSES["Implicit"])
    solve = REWRITTEN[rewritten](eqi.ImplicitAdjoint(eqi.GMRES(1e-13, 0.0)))
    found = jax.jit(jax.grad(lambda args: g @ solve(args)))(args)
    assert relative_error(found, expected) < 1e-6


def test_tags_describe_the_jacobian_of_the_residual():
    # J - I is symmetric and negative definite, so that I - J suits conjugate gradients.
    weight = matrix_of_norm(jr.key(0), SIZE, 0.8)
    weight = (weight + weight.T) / 2
    x, g = jr.normal(jr.key(1), (2, SIZE))
    fn = lambda z, args: args[0] @ z + args[1]
    tags = frozenset({lx.symmetric_tag, lx.negative_semidefinite_tag})
    adjoint = eqi.ImplicitAdjoint(lx.CG(1e-12, 1e-12))
    found = gradient((weight, x), g, adjoint, fn=fn, tags=tags)[1]
    assert jnp.allclose(found, jnp.linalg.solve(jnp.eye(SIZE) - weight, g), rtol=1e-9)


def test_backward_solve_raises_only_on_demand():
    args, g = problem()
    short = eqi.GMRES(1e-12, 0.0, max_steps=2)
    found = gradient(args, g, eqi.ImplicitAdjoint(short))
    exact = linear_algebra(args, g, INVERSES["Implicit"])
    assert 1e-3 < relative_error(found, exact) < 1
    with pytest.raises(Exception, match="maximum number of"):
        jax.block_until_ready(gradient(args, g, eqi.ImplicitAdjoint(short, throw=True)))


@pytest.mark.usefixtures("all_optimisations")
def test_throwing_puts_a_host_callback_into_the_gradient():
    args, g = problem()
    adjoint = eqi.ImplicitAdjoint(throw=True)
    text = compiled_text(jax.grad(lambda a: g @ value(a, adjoint)), args)
    assert CALLBACK.search(text)


@pytest.mark.usefixtures("all_optimisations")
@pytest.mark.parametrize("name", ADJOINTS)
def test_a_gradient_has_no_host_callback_and_flat_memory(name):
    args, g = problem()

    def compiled(max_steps):
        loss = lambda a: g @ value(a, ADJOINTS[name](), max_steps=max_steps)
        return jax.jit(jax.grad(loss)).lower(args).compile()

    short, long = compiled(10), compiled(1000)
    assert not CALLBACK.search(long.as_text())
    memory = [c.memory_analysis().temp_size_in_bytes for c in (short, long)]
    assert memory[0] == memory[1]


@pytest.mark.parametrize(
    "make", [eqi.NeumannAdjoint, eqi.PhantomAdjoint], ids=["Neumann", "Phantom"]
)
def test_bad_approximation_orders_are_refused(make):
    for number in (0, -1, 2.0, True):
        with pytest.raises((ValueError, TypeError), match="num_(terms|steps)"):
            make(number)
    for damping in (0.0, -0.5):
        with pytest.raises(ValueError, match="`damping` must be positive"):
            make(2, damping)
    with pytest.raises(TypeError, match="dampng"):
        make(2, dampng=0.5)


def test_an_array_damping_is_not_trained():
    args, g = problem()
    for cls in (eqi.NeumannAdjoint, eqi.PhantomAdjoint):
        loss = lambda adjoint: g @ value(args, adjoint)
        slope = eqx.filter_grad(loss)(cls(3, jnp.array(0.5)))
        assert slope.damping == 0


def test_implicit_adjoint_refuses_anything_but_a_linear_solver():
    with pytest.raises((TypeError, Exception), match="linear_solver"):
        eqi.ImplicitAdjoint(eqi.Anderson(1e-3, 1e-3))  # pyright: ignore


@pytest.mark.parametrize("name", ADJOINTS)
def test_examples_coupled_through_a_mapped_axis_are_refused(name):
    (weight, x), _ = problem()
    fn = lambda z, args: tanh_map(z, args) + 0.1 * jax.lax.pmean(z, "batch")
    solve_one = lambda x: value((weight, x), ADJOINTS[name](), fn=fn)
    with pytest.raises(ValueError, match="communicates along the mapped axis 'batch'"):
        jax.vmap(solve_one, axis_name="batch")(jnp.stack([x, -x]))


def test_an_axis_that_is_only_looked_at_is_not_refused():
    (weight, x), _ = problem()
    fn = lambda z, args: (
        tanh_map(z, args) + 0.0 * jax.lax.axis_index("batch").astype(float)
    )
    solve_one = lambda x: value((weight, x), eqi.JFBAdjoint(), fn=fn)
    found = jax.vmap(solve_one, axis_name="batch")(jnp.stack([x, -x]))
    assert jnp.allclose(found[0], value((weight, x), eqi.JFBAdjoint()), atol=1e-12)


def test_a_truncated_series_has_no_second_derivative_in_the_exact_adjoint_either():
    (weight, x), g = problem()
    adjoint = eqi.ImplicitAdjoint(eqi.NeumannSeries(2))
    loss = lambda x: g @ value((weight, x), adjoint)
    with pytest.raises(RuntimeError, match="Derivatives of a derivative"):
        jax.jit(jax.hessian(loss))(x)


def test_a_solver_as_the_arguments_does_not_deceive_the_guard():
    fn = lambda z, solver: 5 * (z - solver.rtol)
    newton = optx.Newton(1e-8, 1e-8)
    with pytest.raises(ValueError, match="needs a fixed-point problem"):
        optx.root_find(
            fn, newton, jnp.zeros(2), eqi.Picard(1e-3, 1e-3), adjoint=eqi.JFBAdjoint()
        )


@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e7])
def test_backward_iteration_does_not_depend_on_the_scale_of_the_loss(scale):
    args, g = problem()
    solver = eqi.FixedPointLinearSolver(eqi.Anderson(1e-6, 1e-6))
    found = gradient(args, scale * g, eqi.ImplicitAdjoint(solver))
    expected = linear_algebra(args, scale * g, INVERSES["Implicit"])
    assert relative_error(found, expected) < 1e-5


def test_an_adjoint_finds_the_solver_and_how_it_went(getkey):
    """By the names that this package has for the arguments of `apply`."""
    seen = {}

    class Looking(optx.AbstractAdjoint):
        def apply(self, primal_fn, rewrite_fn, inputs, tags):
            value, residual = primal_fn((*inputs, while_loop))
            named = Inputs(*inputs)
            seen.update(solver=named.solver, max_steps=named.max_steps)
            return value + Outcome(*residual).num_steps.astype(value.dtype), residual

    solver = eqi.Picard(1e-8, 1e-8)
    args = matrix_of_norm(getkey(), 3, 0.5), jnp.ones(3)
    run = lambda adjoint: optx.fixed_point(
        tanh_map, solver, jnp.zeros(3), args, max_steps=77, adjoint=adjoint
    )
    solution = run(Looking())
    assert seen == {"solver": solver, "max_steps": 77}
    moved = solution.value - run(eqi.ImplicitAdjoint()).value
    assert jnp.allclose(moved, solution.stats["num_steps"].astype(float))
