import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._custom_types import Y
from .._layer.base import SolveOptions
from .._misc import as_state
from .base import (
    AbstractResidualLayer,
    add,
    as_time,
    check_residual_layer,
    explicit_solution,
    prepare,
)


class _AbstractExplicitLayer(AbstractResidualLayer):
    """A layer whose two-part state is stepped by formulas, forwards and backwards."""

    def __check_init__(self):
        check_residual_layer(self.vector_field, self.step_size)

    @abc.abstractmethod
    def forwards(
        self, field: Callable, y: PyTree[Array], t: Any, args: PyTree[Any]
    ) -> PyTree[Array]:
        """The state one step later."""

    @abc.abstractmethod
    def backwards(
        self, field: Callable, y: PyTree[Array], t: Any, args: PyTree[Any]
    ) -> PyTree[Array]:
        """The state at `t`, from that at `t + step_size`."""

    def solve(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        del z0
        return _apply(self, y, as_time(t), args, True)

    def invert(
        self, y: Y, t: Any = 0.0, args: PyTree[Any] = None, z0: Y | None = None
    ) -> optx.Solution:
        del z0
        return _apply(self, y, as_time(t), args, False)


@eqx.filter_jit
def _apply(layer: _AbstractExplicitLayer, y, t, args, is_forwards):
    name = type(layer).__name__
    if not isinstance(y, tuple) or len(y) != 2:
        raise ValueError(
            f"The state of a {name} must be a tuple of two parts. Got the structure "
            f"{jtu.tree_structure(y)}."
        )
    y = as_state(y)
    field, _ = prepare(layer, y if layer.is_one_step else y[0], t, args)
    step = layer.forwards if is_forwards else layer.backwards
    options = SolveOptions(None, None, 1, False, name)
    return explicit_solution(step(field, y, t, args), options)


class VerletLayer(_AbstractExplicitLayer):
    r"""An explicit, reversible layer: one step of the Verlet method for a partitioned
    field $\dot y = \Phi_1(t, z)$, $\dot z = \Phi_2(t, y)$,

    $$y_{1/2} = y + \tfrac h 2 \Phi_1(t, z), \quad
    z' = z + h \Phi_2(t + \tfrac h 2, y_{1/2}), \quad
    y' = y_{1/2} + \tfrac h 2 \Phi_1(t + h, z')$$

    Of second order, symmetric and symplectic. Conditionally stable: on an oscillation
    of angular frequency $\omega$ for $h \omega \le 2$.

    The state is a tuple `(y, z)`. $\Phi_1$ is the first part of the vector field and
    must not depend on `y`, $\Phi_2$ the second and must not depend on `z`; what the
    field computes of the other part is not used, and removed by `jax.jit`.

    ??? cite "References"

        ```bibtex
        @article{haber2017stable,
            author = {Haber, Eldad and Ruthotto, Lars},
            title = {Stable Architectures for Deep Neural Networks},
            journal = {Inverse Problems},
            volume = {34},
            number = {1},
            year = {2017},
        }
        ```
    """

    vector_field: Callable
    step_size: float | Float[Array, ""] = 1.0

    @property
    def order(self) -> int:
        return 2

    def forwards(self, field, y, t, args):
        return self._step(field, y, t, args, self.step_size)

    def backwards(self, field, y, t, args):
        return self._step(field, y, t + self.step_size, args, -self.step_size)

    def _step(self, field, state, t, args, h):
        y, z = state
        y = add(y, h / 2, field(t, (y, z), args)[0])
        z = add(z, h, field(t + h / 2, (y, z), args)[1])
        return add(y, h / 2, field(t + h, (y, z), args)[0]), z


class RevNetLayer(_AbstractExplicitLayer):
    r"""The layer of a reversible residual network (RevNet), the symplectic Euler method
    for the field of a [`eqimplicit.VerletLayer`][]:

    $$y' = y + h \Phi_1(t, z), \qquad z' = z + h \Phi_2(t, y')$$

    Of first order, and symplectic. The state is a tuple `(y, z)`.

    ??? cite "References"

        ```bibtex
        @inproceedings{gomez2017reversible,
            author = {Gomez, Aidan N. and Ren, Mengye and Urtasun, Raquel and Grosse,
                      Roger B.},
            title = {The Reversible Residual Network: Backpropagation Without Storing
                     Activations},
            booktitle = {Advances in Neural Information Processing Systems},
            year = {2017},
        }
        ```
    """

    vector_field: Callable
    step_size: float | Float[Array, ""] = 1.0

    @property
    def order(self) -> int:
        return 1

    def forwards(self, field, y, t, args):
        y, z = y
        y = add(y, self.step_size, field(t, (y, z), args)[0])
        return y, add(z, self.step_size, field(t, (y, z), args)[1])

    def backwards(self, field, y, t, args):
        y, z = y
        z = add(z, -self.step_size, field(t, (y, z), args)[1])
        return add(y, -self.step_size, field(t, (y, z), args)[0]), z


class LeapfrogLayer(_AbstractExplicitLayer):
    r"""An explicit, reversible layer for a field of second order, $\ddot y = F(t, y)$:

    $$y_{n+1} = 2 y_n - y_{n-1} + h^2 F(t_n, y_n)$$

    Of second order. The state is the tuple $(y_n, y_{n-1})$, where `t` is the time of
    $y_n$; a start from rest is $(y_0, y_0 + \tfrac{h^2}{2} F(t_0, y_0))$.

    ??? cite "References"

        ```bibtex
        @inproceedings{chang2018reversible,
            author = {Chang, Bo and Meng, Lili and Haber, Eldad and Ruthotto, Lars and
                      Begert, David and Holtham, Elliot},
            title = {Reversible Architectures for Arbitrarily Deep Residual Neural
                     Networks},
            booktitle = {AAAI Conference on Artificial Intelligence},
            year = {2018},
        }
        ```
    """

    vector_field: Callable
    step_size: float | Float[Array, ""] = 1.0

    is_one_step: ClassVar[bool] = False

    def forwards(self, field, y, t, args):
        current, previous = y
        return self._other(field, t, current, previous, args), current

    def backwards(self, field, y, t, args):
        following, current = y
        return current, self._other(field, t, current, following, args)

    def _other(self, field, t, current, neighbour, args):
        mirrored = jtu.tree_map(lambda a, b: 2 * a - b, current, neighbour)
        return add(mirrored, self.step_size**2, field(t, current, args))


class MidpointLayer(_AbstractExplicitLayer):
    r"""An explicit, reversible layer, the two-step midpoint method for
    $\dot y = F(t, y)$:

    $$y_{n+1} = y_{n-1} + 2 h F(t_n, y_n)$$

    Of second order. Stable only for imaginary eigenvalues with $|h \lambda| \le 1$: any
    dissipation makes it grow. The state is the tuple $(y_n, y_{n-1})$, where `t` is the
    time of $y_n$; a start is $(y_0, y_0 - h F(t_0, y_0))$. (The implicit midpoint rule
    is [`eqimplicit.ThetaLayer`][].)

    ??? cite "References"

        ```bibtex
        @inproceedings{chang2018reversible,
            author = {Chang, Bo and Meng, Lili and Haber, Eldad and Ruthotto, Lars and
                      Begert, David and Holtham, Elliot},
            title = {Reversible Architectures for Arbitrarily Deep Residual Neural
                     Networks},
            booktitle = {AAAI Conference on Artificial Intelligence},
            year = {2018},
        }
        ```
    """

    vector_field: Callable
    step_size: float | Float[Array, ""] = 1.0

    is_one_step: ClassVar[bool] = False

    def forwards(self, field, y, t, args):
        current, previous = y
        return add(previous, 2 * self.step_size, field(t, current, args)), current

    def backwards(self, field, y, t, args):
        following, current = y
        return current, add(following, -2 * self.step_size, field(t, current, args))


_doc = """**Arguments:**

- `vector_field`: a callable, as a rule a Module, `vector_field(t, y, args)`{signature}.
- `step_size`: $h$, in the units of `t`. A Python float, or a scalar array, which is
    differentiated.

**Raises:** a `TypeError` if `vector_field` is not callable, a `ValueError` if
`step_size` is not positive.
"""
for _layer in (VerletLayer, RevNetLayer):
    _layer.__init__.__doc__ = _doc.format(
        signature=" of\n    the whole state `y`, as in Diffrax"
    )
for _layer in (LeapfrogLayer, MidpointLayer):
    _layer.__init__.__doc__ = _doc.format(signature=" of\n    one part of the state")
