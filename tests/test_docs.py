"""The pages of the documentation agree with the package, and their snippets run."""

import importlib
import pathlib
import re
import types

import pytest


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
def test_snippets_print_what_the_page_says(page, capsys):
    namespace = {"__name__": "snippet"}
    for code, printed in _snippet.findall((_docs / page).read_text(encoding="utf-8")):
        exec(compile(code, page, "exec"), namespace)
        assert capsys.readouterr().out == printed
