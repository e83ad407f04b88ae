"""Files that are written whole or not at all, and read only if they are files; folders
that one run at a time may use.
"""

import contextlib
import errno
import io
import os
import pathlib
import stat
from collections.abc import Iterator

import filelock

from .command_line import UserError


LOCK, PART = ".lock", ".part"


def write(path: pathlib.Path, content: bytes) -> None:
    """Puts a file in place of another, if there is one. The content is on the disk, and
    was read back, before it gets the name: whatever fails, the old file stays.
    """
    part = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What a killed run left, or a link, which would be followed.
        part.unlink(missing_ok=True)
        try:
            _write_new(part, content)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # Not every file system can.
            _flush_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}), and is left as it was. Make "
            "room for it, and the same command goes on, or give another --out"
        ) from error


def _open_new(path):
    return path.open("xb")


def _write_new(path, content):
    with _open_new(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if path.read_bytes() != content:
        raise OSError(errno.EIO, "what was written is not what is read")


def _flush_folder(folder):
    """Else the new name may be lost when the machine stops."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_plain(path: pathlib.Path) -> io.BufferedReader:
    """Opens a file for reading. A pipe or a device, which may have no end, is an
    `OSError`."""
    # Without waiting for what writes into a pipe.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is no plain file", str(path))


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder that can be written, and keeps other runs out of it. If nothing is
    written into it, none is left.

    In this process a folder may be claimed again while it is claimed.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    lock = filelock.FileLock(folder / LOCK, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(
            f"{folder} is in use by another run. Wait for its end, or give another "
            "--out"
        ) from error
    except OSError as error:
        _remove_empty(new)
        raise UserError(
            f"{folder} cannot be used ({error.strerror}). Give another --out"
        ) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # Who waits for the lock notices.
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
        lock.release()
        _remove_empty(new)


def _remove_empty(folders):
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
