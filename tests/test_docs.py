"""The pages of the documentation agree with the package, and their snippets run."""

import functools
import importlib
import inspect
import pathlib
import re
import shlex
import textwrap
import types
from typing import Any

import diffrax
import equinox as eqx
import jax
import pytest
import tyro

import eqimplicit as eqi


_docs = pathlib.Path(__file__).parent.parent / "docs"
_directive = re.compile(r"^ *::: (\S+)\n((?:    .*\n?)*)", re.MULTILINE)
_snippet = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.M | re.S)


def _entries():
    """Triples of page, documented name, and options, for all pages."""
    return [
        (page.name, name, options)
        for page in sorted(_docs.rglob("*.md"))
        for name, options in _directive.findall(page.read_text(encoding="utf-8") + "\n")
    ]


def _public_names():
    return {
        f"{module}.{name}": value
        for module in ("eqimplicit", "eqimplicit.models")
        for name, value in vars(importlib.import_module(module)).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_every_public_name_has_exactly_one_entry():
    names = [name for _, name, _ in _entries()]
    assert sorted(names) == sorted(_public_names())


def test_entries_of_classes_list_their_members():
    public = _public_names()
    for page, name, options in _entries():
        if isinstance(public.get(name), type):
            assert "members:" in options, f"{name} on {page}"


@pytest.mark.parametrize(
    "page",
    [
        page.relative_to(_docs).as_posix()
        for page in sorted(_docs.rglob("*.md"))
        if _snippet.search(page.read_text(encoding="utf-8"))
    ],
)
@pytest.mark.slow
def test_snippets_print_what_the_page_says(page, capsys):
    namespace = {"__name__": "snippet"}
    for code, printed in _snippet.findall((_docs / page).read_text(encoding="utf-8")):
        standard = jax.numpy_dtype_promotion("standard")  # as readers have it
        with standard, jax.numpy_rank_promotion("allow"):
            exec(compile(code, page, "exec"), namespace)
        assert capsys.readouterr().out == printed


class _Field(eqx.Module):
    mlp: Any

    def __call__(self, t, y, args):
        return self.mlp(y)


def _names_of_examples():
    """What the examples in docstrings take for granted."""
    field = lambda t, y, args: -y
    cell = lambda z, x: 0.5 * z + x
    return {
        **{"eqi": eqi, "eqx": eqx, "jax": jax, "jr": jax.random, "ft": functools},
        **{"diffrax": diffrax, "key": jax.random.key(0)},
        **{"field": field, "make_field": lambda key: field, "MyField": _Field},
        "keys": jax.random.split(jax.random.key(1), 2),
        **{"x": jax.numpy.ones(3), "xs": jax.numpy.ones((3, 2)), "jnp": jax.numpy},
        **{"cell": cell, "deq": eqi.DEQ(cell)},
    }


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in sorted(_public_names().items())
        if "```python" in (inspect.getdoc(value) or "")
    ],
)
def test_examples_in_docstrings_run(name):
    shape = (2, 32, 32, 3) if name.endswith("mdeq") else (2, 28, 28, 1)
    docstring = inspect.getdoc(_public_names()[name])
    (code,) = re.findall(r"^ *```python\n(.*?)^ *```$", docstring, re.M | re.S)

    def run(images):
        exec(textwrap.dedent(code), _names_of_examples() | {"images": images})

    # Traced, which is enough to find a mistake, and takes no compilation.
    jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jax.numpy.result_type(float)))


_command = re.compile(r"^python examples/(\w+)\.py(.*)$", re.M)


@pytest.mark.parametrize(
    "script, options",
    sorted(
        {
            command
            for page in [*_docs.rglob("*.md"), _docs.parent / "README.md"]
            for command in _command.findall(page.read_text(encoding="utf-8"))
        }
    ),
)
def test_commands_have_these_options(script, options):
    config = importlib.import_module(script).Config
    tyro.cli(config, args=shlex.split(options.replace("HOST", "127.0.0.1")))


@pytest.mark.parametrize(
    "script",
    [page.stem for page in (_docs / "examples").glob("*.md") if page.stem != "results"],
)
def test_the_time_needed_is_told(script):
    told = importlib.import_module(script).Config.__doc__
    page = (_docs / "examples" / f"{script}.md").read_text(encoding="utf-8")
    for text in (told, page):
        assert re.search(r"(second|minute)s? on two cores|half on two cores", text)
