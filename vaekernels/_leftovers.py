"""Temporary files whose process was killed, and how the next one knows them.

A process locks a file that it makes for as long as it needs it. The system frees the lock when the process
ends, however that comes about: a file of ours that nobody holds is a dead one's.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["claim", "remove_dead"]


def claim(folder: Path, prefix: str, suffix: str) -> tuple[int, Path]:
    """A new file in `folder`, open and locked: this process's until the descriptor is closed."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=suffix)
        if _lock(descriptor) is not False and os.fstat(descriptor).st_nlink > 0:
            return descriptor, Path(name)
        # Another process's `remove_dead` came between the two lines, and removes it.
        os.close(descriptor)


def remove_dead(folder: Path, prefix: str, suffix: str, remove: Callable[[Path], None]) -> None:
    """Calls `remove` with each file in `folder` that `claim` made there for this user with this suffix and a
    prefix that begins so, and that no process holds any more; then removes the file."""
    ours = re.compile(re.escape(prefix) + r".*[a-z0-9_]{8}" + re.escape(suffix), re.DOTALL)
    for name in os.listdir(folder):
        if ours.fullmatch(name) is not None:
            _remove_if_dead(folder / name, remove)


def _remove_if_dead(file: Path, remove: Callable[[Path], None]) -> None:
    try:
        if not stat.S_ISREG(os.lstat(file).st_mode):
            return
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return
    try:
        status = os.fstat(descriptor)
        if status.st_uid == os.geteuid() and _lock(descriptor) and os.fstat(descriptor).st_nlink > 0:
            remove(file)
            file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the file is now locked by this process; None where files cannot be locked: none of them is then
    ever taken for a dead process's."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
