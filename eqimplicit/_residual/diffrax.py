from typing import TYPE_CHECKING

from .base import AbstractImplicitLayer, AbstractResidualLayer
from .runge_kutta import RungeKuttaLayer
from .theta import ThetaLayer


if TYPE_CHECKING:
    import diffrax


def diffrax_solver(layer: AbstractResidualLayer) -> "diffrax.AbstractSolver":
    r"""The scheme of a residual layer as a solver of Diffrax, with an estimate of its
    error: so with adaptive steps, outputs at any times, events, and the adjoints of
    Diffrax. (Diffrax itself has no fully implicit Runge-Kutta method.)

    The field is that of the term, and the steps are those of `diffeqsolve`: the layer's
    own `vector_field` and `step_size` are not used. (Diffrax resolves no
    parametrisations: pass `eqimplicit.resolve(field)`, or the `vector_field` of an
    [`eqimplicit.ODEBlock`][].)

    The equation of a step is solved by Newton's method to the tolerances of the step
    size controller, unknown by unknown, and the iterate that follows is returned, as in
    [`eqimplicit.default_solver`][]. If the layer has a `solver`, by that; with constant
    steps it must have one, since there are no tolerances. Where a step is not found,
    an adaptive controller tries a shorter one.

    - The schemes of Gauss, Radau IIA and SDIRK have an embedded method of order $s$,
      and between the steps the polynomial through the slopes of their stages.
    - All others are compared with Simpson's rule: [`eqimplicit.ThetaLayer`][],
      [`eqimplicit.VerletLayer`][], [`eqimplicit.RevNetLayer`][], and tableaux that have
      the slope at the start among their stages. So the order of the estimate is one
      more than that of the scheme, at most 5. Between the steps lies Hermite's cubic
      polynomial, for schemes of first order a line.

    The embedded method has the slope $F_0$ at the start of the step as another stage,
    with the weight $\gamma$ of the real eigenvalue of $A$ if there is one, and weights
    $\hat b$ that integrate polynomials of degree $s - 1$:

    $$e = (I - h \gamma J)^{-1} h \Big(\gamma F_0 + \sum_i (\hat b_i - b_i) k_i\Big)$$

    For Radau IIA it is that of Hairer and Wanner. Simpson's rule takes for its middle
    the cubic polynomial of Hermite,

    $$e = (I - h \theta J)^{-2} \left(y_0 + \tfrac h 6 \Big(F_0 + 4 F\big(\tfrac{y_0 +
    y_1} 2 + \tfrac h 8 (F_0 - F_1)\big) + F_1\Big) - y_1\right)$$

    The matrices, with the Jacobian $J$ at the start of the step, take out what a stiff
    field makes of small deviations; explicit schemes have none. On stiff fields take
    Radau IIA, SDIRK or $\theta = 1$: methods that do not damp the fast modes, such as
    the midpoint rule, follow them with very small steps.

    !!! example

        ```python
        layer = eqi.RungeKuttaLayer(field, eqi.ButcherTableau.radau_iia(3))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            eqi.diffrax_solver(layer),
            t0=0.0,
            t1=10.0,
            dt0=0.01,
            y0=jax.numpy.ones(2),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-9),
        )
        ```

    Costs, besides the solve, the Jacobian and a factorisation (more than 64 unknowns:
    GMRES) for the estimate, and evaluations of $F$, of which the last serves the next
    step: none with stages of which the last is the new state (Radau IIA, SDIRK), one
    with others, two by Simpson's rule. The estimate has no derivative.

    **Arguments:**

    - `layer`: a residual layer of one step, whose order is known.

    **Returns:**

    A [`diffrax.AbstractSolver`][] for a single [`diffrax.ODETerm`][].

    **Raises:** an `ImportError` without Diffrax; a `TypeError` if `layer` is no
    residual layer; a `ValueError` for layers whose state is that of two times
    ([`eqimplicit.LeapfrogLayer`][], [`eqimplicit.MidpointLayer`][]), and for those that
    do not tell their order.

    ??? cite "References"

        ```bibtex
        @book{hairer1996solving,
            author = {Hairer, Ernst and Wanner, Gerhard},
            title = {Solving Ordinary Differential Equations {II}: Stiff and
                     Differential-Algebraic Problems},
            publisher = {Springer},
            year = {1996},
        }
        ```
    """
    if not isinstance(layer, AbstractResidualLayer):
        raise TypeError(
            "`layer` must be an `eqimplicit.AbstractResidualLayer`, for example an "
            "`eqimplicit.RungeKuttaLayer`, or the `layer` of an `eqimplicit.ODEBlock`. "
            f"Got {layer!r}."
        )
    if not layer.is_one_step or layer.order is None:
        raise ValueError(
            f"A {type(layer).__name__} is no solver of Diffrax: its state must be that "
            "of one time, and its `order` known."
        )
    from .as_diffrax import LayerSolver, NewtonLayerSolver, of_stages, OfEnds

    if not isinstance(layer, AbstractImplicitLayer) or layer.is_explicit:
        return LayerSolver(layer, OfEnds(layer.order, 0.0))
    dense_output = OfEnds(layer.order, 0.5)
    if isinstance(layer, ThetaLayer):
        dense_output = OfEnds(layer.order, layer.theta)
    elif isinstance(layer, RungeKuttaLayer):
        dense_output = of_stages(layer.tableau) or dense_output
    if layer.options.solver is None:
        return NewtonLayerSolver(layer, dense_output)
    return LayerSolver(layer, dense_output)
