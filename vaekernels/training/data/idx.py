"""idx files, the format of MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Data
from vaekernels.training.data.files import Most, opened
from vaekernels.training.data.shapes import as_arrays
from vaekernels.training.errors import DataError

__all__ = ["load_idx", "read_idx"]

# Big-endian, by the third byte of the magic number.
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
_MOST_DIMS = 4


def load_idx(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``idx:PATH``: an idx file of images or vectors, plain or gzipped; unsigned bytes or real numbers."""
    path = Path(config.name.partition(":")[2])
    array = read_idx(path, Most(config))
    if array.ndim == 1:
        raise DataError(f"{path} holds {len(array)} single numbers (labels?); give the file of the images")
    return as_arrays(config.name, torch.from_numpy(array.astype(array.dtype.newbyteorder("="))), str(path))


def read_idx(path: Path, most: Most) -> np.ndarray:
    """The array in an idx file. DataError with the byte at which the file is not what it should be."""
    with opened(path) as file:
        compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        try:
            with gzip.GzipFile(fileobj=file) if compressed else file as content:
                return _array(path, content, most)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged gzip file ({error})") from error


def _array(path: Path, file: BinaryIO | gzip.GzipFile, most: Most) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4:
        raise DataError(f"{path}: {len(magic)} bytes, too short for the 4-byte magic number of an idx file")
    zero, kind, dims = struct.unpack(">HBB", magic)
    if zero or kind not in _TYPES or not dims:
        raise DataError(
            f"{path}, byte 0: wrong magic number 0x{magic.hex()}; an idx file begins with 0x0000, a "
            f"type (0x08 for unsigned bytes) and the number of dimensions, as 0x00000803 for MNIST's images"
        )
    if dims > _MOST_DIMS:
        raise DataError(f"{path}, byte 3: {dims} dimensions; takes 2, [N, D] vectors, 3 or 4, images")
    start = 4 + 4 * dims
    sizes = file.read(4 * dims)
    if len(sizes) < 4 * dims:
        raise DataError(f"{path}, byte {4 + len(sizes)}: ends within the {dims} sizes of its dimensions")
    shape = struct.unpack(f">{dims}I", sizes)
    dtype = np.dtype(_TYPES[kind])
    size = math.prod(shape) * dtype.itemsize
    made = f"dimensions {list(shape)} of {dtype.name} make {start + size} bytes"
    if not size:
        raise DataError(f"{path}, byte 4: {made}: there are no numbers in it")
    most.check(f"{path}, byte 4: dimensions {list(shape)}", size)
    values = file.read(size)
    if len(values) < size:
        there = start + len(values)
        raise DataError(f"{path}, byte {there}: is truncated there; {made}, the file has {there}")
    if file.read(1):
        raise DataError(f"{path}, byte {start + size}: goes on behind its data; {made}, the file has more")
    return np.frombuffer(values, dtype).reshape(shape)
