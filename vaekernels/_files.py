"""Files: those that are read must be regular ones, those that are written are whole at every moment."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

__all__ = ["lines_of", "open_regular", "write_atomically"]


def lines_of(text: str) -> list[str]:
    """The lines of ``text``, which end at a newline, with or without a carriage return, and nowhere else.
    ``str.splitlines`` also ends them at form feeds, U+0085, U+2028 and more, which stand inside lines of real
    text."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def open_regular(path: Path) -> BinaryIO:
    """``path`` opened to be read. OSError if that fails, and if it is a device, which may have no end, or a
    pipe, which may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # of NUL in the path
        raise OSError(errno.EINVAL, f"no path: {error}", str(path)) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # open() says what is wrong with a folder
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def write_atomically(path: Path, text: str) -> None:
    """Put ``text`` (UTF-8) at ``path``: at every moment the file there is the old one or the new one. OSError
    if that fails, with the old one in place."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; this one has the permissions of any other.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
