"""Collects the results of all experiments below some folders into one table, in
Markdown: what the paper has, the authors' code where it is known, and ours, with the
mean of the seeds and their range.

    python examples/collect_results.py runs
"""

import dataclasses
import json
import pathlib
from typing import Any

import tyro
from training import command_line, files, results
from training.command_line import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Collect results.json files into one table."""

    folders: tyro.conf.Positional[tuple[pathlib.Path, ...]] = (pathlib.Path("runs"),)
    """Where to look, in their subfolders too."""

    out: pathlib.Path | None = None
    """A file for the table, which is printed else."""


def read(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict) or "rows" not in content:
        raise UserError(f"{path} is not the results file of an example")
    return content


def collect(folders: tuple[pathlib.Path, ...]) -> str:
    lines = ["| experiment | quantity | paper | authors' code | ours | seeds |"]
    lines.append("|" + "---|" * 6)
    paths = sorted({path for one in folders for path in one.rglob("results.json")})
    if not paths:
        raise UserError(
            f"there is no results.json below {', '.join(map(str, folders))}"
        )
    for path in paths:
        content = read(path)
        title = content["experiment"]
        for row in content["rows"]:
            cells = [
                title,
                row["quantity"],
                row["paper"],
                row["code"],
                results.spread(row["ours"]),
                str(len(row["ours"])),
            ]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
            title = ""
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=args)
    table = collect(config.folders)
    if config.out is None:
        print(table, end="")
    else:
        files.write(config.out, table.encode())


if __name__ == "__main__":
    command_line.run(main)
