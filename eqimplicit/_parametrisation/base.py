import abc
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree


class AbstractParametrisation(eqx.Module):
    """A node that stands in for a weight (or any part of a pytree) and computes it from
    other arrays, the ones that are trained.

    Put it in place of the weight, e.g. with `equinox.tree_at`. The layers of this
    package replace all such nodes by what they stand for once per solve, before the
    first evaluation; elsewhere call [`eqimplicit.resolve`][].
    """

    @abc.abstractmethod
    def resolve(self) -> PyTree[Any]:
        """What this node stands for. Nodes inside it have been resolved already."""


def _is_parametrisation(node: Any) -> bool:
    return isinstance(node, AbstractParametrisation)


def resolve(tree: PyTree[Any]) -> PyTree[Any]:
    """Replaces every [`eqimplicit.AbstractParametrisation`][] in a pytree, innermost
    first, by what it stands for.

    **Arguments:**

    - `tree`: any pytree, for example a Module some of whose weights are parametrised.

    **Returns:**

    The same pytree with ordinary arrays. It is differentiable with respect to the
    arrays inside the parametrisations.
    """

    def resolve_node(node):
        if not _is_parametrisation(node):
            return node
        inner = lambda x: x is not node and _is_parametrisation(x)
        return jtu.tree_map(resolve_node, node, is_leaf=inner).resolve()

    return jtu.tree_map(resolve_node, tree, is_leaf=_is_parametrisation)
