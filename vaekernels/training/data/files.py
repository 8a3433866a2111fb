"""The user's files, opened: which are read, and how large they may be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vaekernels._files import open_regular
from vaekernels.training.config import DataConfig
from vaekernels.training.errors import DataError

__all__ = ["Most", "file_size", "opened"]


@dataclass(frozen=True)
class Most:
    """The most bytes that data may take, by ``config.max_gib``: a file of a few kB can unpack to, or claim to
    hold, more than any machine has."""

    config: DataConfig

    def check(self, where: str, size: int) -> None:
        """DataError that begins with ``where`` if ``size`` bytes are too many."""
        if size > self.config.max_gib * 2**30:
            raise DataError(
                f"{where}: {size / 2**30:,.1f} GiB, more than data.max_gib {self.config.max_gib:g}; if that "
                f"is right and fits into memory twice, raise the limit with --set data.max_gib=GIB"
            )


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file. DataError if it cannot be opened or read."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def file_size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size
