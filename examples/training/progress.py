"""The bar that shows how far a training is."""

import contextlib
from collections.abc import Callable, Iterator

import tqdm


@contextlib.contextmanager
def bar(
    total: int, name: str, leave: bool = True, quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Gives a function `update(num_steps, **values)`, for after each step or several.

    Until the first call it says that it is compiling, and only from then on it
    estimates the time that is left.
    """
    with tqdm.tqdm(
        total=total,
        desc=f"{name}, compiling",
        unit=" steps",
        leave=leave,
        disable=quiet or None,
        dynamic_ncols=True,
    ) as shown:

        def update(num_steps: int = 1, **values: float) -> None:
            if shown.n == 0:
                shown.set_description(name)
                shown.unpause()
            shown.update(num_steps)
            if values:
                shown.set_postfix({k: f"{v:.2e}" for k, v in values.items()})

        yield update
