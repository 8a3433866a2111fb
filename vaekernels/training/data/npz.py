"""Arrays in npz files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Data
from vaekernels.training.data.shapes import as_arrays
from vaekernels.training.errors import DataError

__all__ = ["load_npz"]


def load_npz(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``npz:PATH``: the array named ``config.array`` of a numpy archive."""
    path = Path(config.name.partition(":")[2])
    array = _read(path, config.array)
    where = f"{path}, array {config.array!r}"
    if array.dtype.kind not in "buif":
        raise DataError(f"{where}: dtype {array.dtype}; takes uint8, bool or floats")
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if native.dtype.kind == "f" and native.dtype.itemsize > 8:  # long double, which torch has not
        native = native.astype(np.float64)
    return as_arrays(config.name, torch.from_numpy(native), where)


def _read(path: Path, name: str) -> np.ndarray:
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{path} is a single array; save it with numpy.savez(PATH, {name}=array)")
        with archive:
            if name not in archive.files:
                raise DataError(
                    f"{path} has no array {name!r}; it has {', '.join(archive.files) or 'none'} "
                    f"(choose with --set data.array=NAME)"
                )
            array: np.ndarray = archive[name]
            return array
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged, or not an npz file of plain arrays ({error})") from error
