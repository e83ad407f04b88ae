"""What the command lines of the examples share."""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax


_NOT_WRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG),
)
_INTERRUPTED = "Interrupted. The same command resumes the run."


class UserError(Exception):
    """Something that the user can put right. Its message is one line that says how."""


def run(main: Callable[[], Any]) -> None:
    """Calls `main`. Mistakes of the user's end with one line and exit status 2."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, _interrupt) if is_main_thread else None
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
        _end(_INTERRUPTED, 130)
    finally:
        if is_main_thread:
            signal.signal(signal.SIGINT, before)


def _interrupt(number, frame):
    """At once, since an exception may be raised where it is ignored, and JAX may be at
    work. Files are whole at any time."""
    _say(_INTERRUPTED)
    os._exit(130)


def _say(message):
    # No line of a file or of another process is a second one.
    with contextlib.suppress(OSError, AttributeError):
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.flush()


def _end(message: str, status: int) -> NoReturn:
    _say(message)
    # JAX would wait for the other processes, which wait for this one.
    (os._exit if jax.distributed.is_initialized() else sys.exit)(status)
