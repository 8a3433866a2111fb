"""Files that are whole at every moment."""

from __future__ import annotations

import os
from pathlib import Path

from vaekernels._leftovers import claim, remove_dead

__all__ = ["write_atomically"]


_TEMPORARY = ".vaekernels.tmp"


def write_atomically(path: Path, text: str) -> None:
    """Put ``text`` (UTF-8) at ``path``: at every moment the file there is the old one or the new one. OSError
    if that fails, with the old one in place. What a killed process had begun to write in that folder goes."""
    remove_dead(path.parent, ".", _TEMPORARY, lambda file: None)
    descriptor, name = claim(path.parent, f".{path.name}.", _TEMPORARY)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
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
