"""An experiment: named settings, each tried with some seeds, in one folder."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from . import devices, options, results


One = TypeVar("One")


def each(
    names: Iterable[str], config: Any, one: Callable[[str, int], One]
) -> dict[str, list[One]]:
    """What `one(name, seed)` returns, for each name and each seed from `--seed` on."""
    if config.seeds < 1:
        options.refuse("seeds", config.seeds, "at least 1")
    seeds = range(config.seed, config.seed + config.seeds)
    return {name: [one(name, seed) for seed in seeds] for name in names}


def conclude(
    config: Any,
    run: Callable[..., tuple[dict[str, Any], Any]],
    report: Callable[[dict[str, Any]], None],
    draw: Callable[..., None],
) -> dict[str, Any]:
    """Runs an experiment in its folder `config.out`, prints its report, and writes its
    results and figures, in the first process alone.

    - `run(config)` returns the content of the results file, and what else is drawn.
    - `draw(config, content, more)` draws it.
    """
    with devices.claim(config.out):
        content, more = run(config)
        if devices.is_first():
            report(content)
            results.save(config.out, content)
            draw(config, content, more)
            print(f"The figures and results.json are in {config.out}.")
        return content


def result(
    title: str,
    config: Any,
    rows: list[dict[str, Any]],
    of_each: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """The content of a results file."""
    return {
        "experiment": title,
        "config": dataclasses.asdict(config),
        "rows": rows,
        "results": of_each,
        **more,
    }
