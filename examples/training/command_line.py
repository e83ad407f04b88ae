"""What the command lines of the examples share."""

import errno
import sys
from collections.abc import Callable
from typing import Any


_NOT_WRITABLE = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM


class UserError(Exception):
    """Something that the user can put right. Its message is one line that says how."""


def run(main: Callable[[], Any]) -> None:
    """Calls `main`. Mistakes of the user's end with one line and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # A full disk, or a folder that cannot be written: others are bugs.
        if error.errno not in _NOT_WRITABLE:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. The same command resumes the run.", file=sys.stderr)
        sys.exit(130)
