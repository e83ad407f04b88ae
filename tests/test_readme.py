"""The README's commands can be found by a script, and its example runs."""

import pathlib
import re


_root = pathlib.Path(__file__).parent.parent
_readme = (_root / "README.md").read_text(encoding="utf-8")


def test_each_set_up_command_appears_once():
    assert sorted(re.findall(r"<!--\s*command:\s*(.*?)\s*-->", _readme)) == [
        "run",
        "test",
    ]
    for name in ("run", "test"):
        marker = f"<!-- command: {name} -->"
        block = re.search(rf"^{marker}\n```bash\n(.*?)^```$", _readme, re.M | re.S)
        assert block is not None, f"no fenced block directly below {marker}"
        assert "pip install" in block[1]


def test_files_named_in_the_readme_exist():
    links = re.findall(r"\]\(([^)#\s]+)", _readme)
    links += re.findall(r'(?:src|href)="([^"#]+)"', _readme)
    for link in links:
        if "://" not in link:
            assert (_root / link).exists(), link
    for script in re.findall(r"python (\S+\.py)", _readme):
        assert (_root / script).exists(), script


def test_example_runs(capsys):
    snippets = re.findall(r"^```python\n(.*?)^```$", _readme, re.M | re.S)
    assert len(snippets) == 1
    exec(compile(snippets[0], "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out != ""
