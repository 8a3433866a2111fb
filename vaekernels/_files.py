"""Files that are whole at every moment, and text as lines."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["lines_of", "write_atomically"]


def lines_of(text: str) -> list[str]:
    """The lines of ``text``, which end at ``\\n`` or ``\\r\\n`` and nowhere else. ``str.splitlines`` also ends them
    at form feeds, U+0085, U+2028 and more, which stand inside lines of real text."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


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
