"""Imports inside the package run one way, in the order of `_ranks`.

A file may import from any earlier rank. Within a folder, files may import each other
where nothing turns into a circle, and the folder's `__init__.py` may import them all.
"""

import ast
import graphlib
import pathlib

import pytest


_package = "eqimplicit"
_ranks: tuple[tuple[str, ...], ...] = (
    ("_custom_types",),
    ("_misc",),
    ("_solver",),
    ("_linear_solver",),
    ("_adjoint",),
    ("_parametrisation",),
    ("_nn",),
    ("_layer",),
    ("_residual",),
    ("_regularisation", "_diagnostics"),
    ("models",),
    ("__init__",),
)
_rank_of = {name: rank for rank, names in enumerate(_ranks) for name in names}


def _imported_modules(path: str, source: str, modules: set[str]) -> set[str]:
    """The modules of this package that the file at `path` imports, anywhere in it."""
    folder = path.removesuffix(".py").split("/")[:-1]
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                base = []
            else:
                base = folder[: len(folder) - (node.level - 1)]
            target = ".".join(base + ([] if node.module is None else [node.module]))
            for alias in node.names:
                # `from ._solver import base` imports a module, `from ._solver import
                # Picard` an object of one.
                submodule = f"{target}.{alias.name}"
                imported.add(submodule if submodule in modules else target)
    return {x for x in imported if x == _package or x.startswith(f"{_package}.")}


def _part(module: str) -> str:
    """The file or folder directly below the package that holds this module."""
    return "__init__" if module == _package else module.split(".")[1]


def _violations(sources: dict[str, str]) -> list[str]:
    """`sources` maps a path such as `eqimplicit/_solver/picard.py` to its text."""
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in sources
    }
    found = []
    siblings: dict[str, set[str]] = {}
    for path, source in sources.items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        part = _part(module)
        if part not in _rank_of:
            found.append(f"{path} has no place in the order")
            continue
        for target in sorted(_imported_modules(path, source, modules)):
            target_part = _part(target)
            if target_part not in _rank_of:
                found.append(f"{path} imports {target}, which has no place")
            elif target_part == part:
                if path.endswith("/__init__.py"):
                    continue
                if target == f"{_package}.{part}":
                    found.append(f"{path} imports its own folder")
                siblings.setdefault(module, set()).add(target)
            elif _rank_of[target_part] >= _rank_of[part]:
                found.append(f"{path} imports {target}, which comes later")
    try:
        graphlib.TopologicalSorter(siblings).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        paths = sorted(name.replace(".", "/") + ".py" for name in circle[:-1])
        found.append(f"{paths[0]} is part of a circle of imports: {circle}")
    return found


def _sources() -> dict[str, str]:
    root = pathlib.Path(__file__).parent.parent
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((root / _package).rglob("*.py"))
    }


def test_imports_run_one_way():
    sources = _sources()
    assert f"{_package}/__init__.py" in sources
    assert _violations(sources) == []


_good = {
    "eqimplicit/__init__.py": "from . import models as models\n"
    "from ._solver import Picard as Picard",
    "eqimplicit/_misc.py": "import jax\nfrom ._custom_types import Y",
    "eqimplicit/_custom_types.py": "from jaxtyping import PyTree",
    "eqimplicit/_solver/__init__.py": "from .picard import Picard as Picard",
    "eqimplicit/_solver/base.py": "from .._misc import norm",
    "eqimplicit/_solver/picard.py": "from . import base\nfrom .base import Loop",
    "eqimplicit/_solver/anderson.py": "from .. import _misc\n"
    "from .picard import Picard",
    "eqimplicit/_adjoint/base.py": "from .._solver import Picard",
    "eqimplicit/_regularisation.py": "from ._layer.deq import DEQ",
    "eqimplicit/_diagnostics.py": "",
    "eqimplicit/_layer/deq.py": "from eqimplicit._adjoint.base import guard",
    "eqimplicit/models/__init__.py": "from .jfb import JFBNet as JFBNet",
    "eqimplicit/models/jfb.py": "from .._layer.deq import DEQ",
}


def test_checker_accepts_the_right_order():
    assert _violations(_good) == []


@pytest.mark.parametrize(
    "path, statement",
    [
        ("eqimplicit/_misc.py", "from ._solver import Picard"),
        ("eqimplicit/_misc.py", "from . import _solver"),
        ("eqimplicit/_misc.py", "def f():\n    from ._solver.base import Loop"),
        ("eqimplicit/_solver/base.py", "from .picard import Picard"),
        ("eqimplicit/_solver/base.py", "from . import picard"),
        ("eqimplicit/_solver/anderson.py", "from .._solver import Picard"),
        ("eqimplicit/_solver/anderson.py", "from .._adjoint import base"),
        ("eqimplicit/_solver/anderson.py", "import eqimplicit._layer.deq"),
        ("eqimplicit/_solver/anderson.py", "import eqimplicit as eqi"),
        ("eqimplicit/_solver/anderson.py", "from eqimplicit import DEQ"),
        ("eqimplicit/_regularisation.py", "from ._diagnostics import gradient_report"),
        ("eqimplicit/models/jfb.py", "from eqimplicit import DEQ"),
        ("eqimplicit/_layer/deq.py", "from .._utils import helper"),
        ("eqimplicit/_utils.py", ""),
    ],
)
def test_checker_catches_a_violation(path, statement):
    found = _violations(_good | {path: statement})
    assert len(found) == 1
    assert found[0].startswith(path)
