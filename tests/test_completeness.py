"""What is added to the package is tested, benchmarked and documented everywhere."""

import inspect
import pathlib

import pytest
import solvers as solver_benchmark

import eqimplicit as eqi
from eqimplicit._adjoint.base import AbstractFixedPointAdjoint
from eqimplicit._solver.iteration import AbstractFixedPointIteration

from .helpers import ADJOINTS, ITERATIONS, SOLVERS


_root = pathlib.Path(__file__).parent.parent
_docs = _root / "docs"
_benchmarks = [file.read_text() for file in (_root / "benchmarks").glob("*.py")]


def classes_of(base):
    exported = [getattr(eqi, name) for name in dir(eqi)]
    return [x for x in exported if inspect.isclass(x) and issubclass(x, base)]


def kinds(objects):
    return {type(x) for x in objects}


SOLVER_CLASSES = classes_of(AbstractFixedPointIteration)
ADJOINT_CLASSES = classes_of(AbstractFixedPointAdjoint)


def test_there_are_some():
    assert eqi.Anderson in SOLVER_CLASSES and eqi.JFBAdjoint in ADJOINT_CLASSES


@pytest.mark.parametrize("cls", SOLVER_CLASSES)
def test_a_solver_is_in_every_list(cls):
    assert cls in kinds(SOLVERS[name](1e-6, 1e-6) for name in ITERATIONS)
    assert cls in solver_benchmark.SOLVERS.values()


@pytest.mark.parametrize("cls", ADJOINT_CLASSES)
def test_an_adjoint_is_in_every_list(cls):
    assert cls in kinds(make() for make in ADJOINTS.values())
    assert any(f"eqi.{cls.__name__}(" in text for text in _benchmarks)


@pytest.mark.parametrize("cls", [*SOLVER_CLASSES, *ADJOINT_CLASSES])
def test_each_has_its_reference_and_is_weighed_against_the_others(cls):
    name = f"eqimplicit.{cls.__name__}"
    kind = "solvers" if cls in SOLVER_CLASSES else "adjoints"
    assert f"::: {name}\n" in (_docs / "api" / f"{kind}.md").read_text()
    assert name in (_docs / "how-to-choose.md").read_text()
