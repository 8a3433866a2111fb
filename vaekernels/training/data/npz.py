"""Arrays in npz files."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Data
from vaekernels.training.data.files import Most, opened
from vaekernels.training.data.shapes import as_arrays
from vaekernels.training.errors import DataError

__all__ = ["load_npz"]

_NPY = b"\x93NUMPY"


def load_npz(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``npz:PATH``: the array named ``config.array`` of a numpy archive."""
    path = Path(config.name.partition(":")[2])
    array = _read(path, config.array, Most(config))
    where = f"{path}, array {config.array!r}"
    if array.dtype.kind not in "buif":
        raise DataError(f"{where}: dtype {array.dtype}; takes uint8, bool or floats")
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if native.dtype.kind == "f" and native.dtype.itemsize > 8:  # long double, which torch has not
        native = native.astype(np.float64)
    return as_arrays(config.name, torch.from_numpy(native), where)


def _read(path: Path, name: str, most: Most) -> np.ndarray:
    with opened(path) as file:
        start = file.read(len(_NPY))
        if start == _NPY:
            raise DataError(f"{path} is a single array; save it with numpy.savez(PATH, {name}=array)")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                if name not in archive.files:
                    raise DataError(
                        f"{path} has no array {name!r}; it has {', '.join(archive.files) or 'none'} "
                        f"(choose with --set data.array=NAME)"
                    )
                _check_size(archive.zip, name, f"{path}, array {name!r}", most)
                array: np.ndarray = archive[name]
                return array
        except (DataError, MemoryError):
            raise
        except Exception as error:  # zipfile and numpy raise a dozen types for damaged files
            raise DataError(f"{path}: damaged, or not an npz file of plain arrays ({error})") from error


def _check_size(archive: zipfile.ZipFile, name: str, where: str, most: Most) -> None:
    """DataError if the array is too large, ValueError if its header and the archive say different sizes:
    numpy takes the memory that the header says before it reads the first number."""
    member = name if name in archive.namelist() else f"{name}.npy"
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    size, stored = math.prod(shape) * dtype.itemsize, archive.getinfo(member).file_size - start
    most.check(f"{where}, {dtype} {list(shape)}", size)
    if size != stored:
        raise ValueError(f"its header says {dtype} {list(shape)}, {size} bytes, the archive {stored}")
