"""Collects the results of all experiments below some folders into one table, in
Markdown: what the paper has, the authors' code where it is known, and ours, with the
mean of the seeds and their range.

    python examples/collect_results.py runs
"""

import dataclasses
import json
import pathlib

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


def read(path: pathlib.Path) -> list[list[str]]:
    """The cells of each row."""
    try:
        with files.open_plain(path) as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__})") from error
    try:
        titles = [content["experiment"], *[""] * len(content["rows"])]
        return [
            [
                title,
                row["quantity"],
                row["paper"],
                row["code"],
                results.spread(row["ours"]),
                str(len(row["ours"])),
            ]
            for title, row in zip(titles, content["rows"])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the results file of an example") from error


def collect(folders: tuple[pathlib.Path, ...]) -> str:
    lines = ["| experiment | quantity | paper | authors' code | ours | seeds |"]
    lines.append("|" + "---|" * 6)
    paths = sorted({path for one in folders for path in one.rglob("results.json")})
    if not paths:
        raise UserError(
            f"there is no results.json below {', '.join(map(str, folders))}"
        )
    for cells in (cells for path in paths for cells in read(path)):
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
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
