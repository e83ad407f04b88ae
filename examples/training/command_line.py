"""What the command lines of the examples share."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax


_NOT_WRITABLE = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM


class UserError(Exception):
    """Something that the user can put right. Its message is one line that says how."""


def run(main: Callable[[], Any]) -> None:
    """Calls `main`. Mistakes of the user's end with one line and exit status 2."""
    try:
        main()
    except UserError as error:
        _end(f"error: {error}", 2)
    except OSError as error:
        # A full disk, or a folder that cannot be written: others are bugs.
        if error.errno not in _NOT_WRITABLE:
            raise
        _end(f"error: {error.filename or 'a file'}: {error.strerror}", 2)
    except KeyboardInterrupt:
        _end("Interrupted. The same command resumes the run.", 130)


def _end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # JAX would wait for the other processes, which wait for this one.
    (os._exit if jax.distributed.is_initialized() else sys.exit)(status)
