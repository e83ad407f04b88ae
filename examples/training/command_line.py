"""What the command lines of the examples share."""

import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something that the user can put right. Its message is one line that says how."""


def run(main: Callable[[], Any]) -> None:
    """Calls `main`. Mistakes of the user's end with one line and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. The same command resumes the run.", file=sys.stderr)
        sys.exit(130)
