from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from jaxtyping import Array, Float, PyTree


Y = TypeVar("Y")
Aux = TypeVar("Aux")
History = TypeVar("History")

Norm: TypeAlias = Callable[[PyTree[Array]], Float[Array, ""]]
Vector: TypeAlias = Float[Array, " size"]
LinearMap: TypeAlias = Callable[[PyTree[Any]], PyTree[Any]]
# Absolute tolerances: one number, or a pytree with one for each leaf or each unknown.
Tolerances: TypeAlias = float | PyTree[float | Float[Array, "..."]]
