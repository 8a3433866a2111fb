"""Files: those that are read must be regular ones, those that are written are whole at every moment."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from vaekernels._leftovers import claim, remove_dead

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


_TEMPORARY = ".vaekernels.tmp"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put ``content`` (text as UTF-8) at ``path``: at every moment the file there is the old one or the new
    one. OSError if that fails, with the old one in place. What a killed process had begun to write in that
    folder goes."""
    remove_dead(path.parent, ".", _TEMPORARY, lambda file: None)
    descriptor, name = claim(path.parent, f".{path.name}.", _TEMPORARY)
    try:
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            # `claim` makes files for the owner alone; this one has the permissions of any other.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            # While it is open it is claimed: nobody takes it for a dead process's.
            os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
