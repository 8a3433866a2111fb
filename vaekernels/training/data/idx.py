"""idx files, the format of MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Data
from vaekernels.training.data.shapes import as_arrays
from vaekernels.training.errors import DataError

__all__ = ["load_idx", "read_idx"]

# Big-endian, by the third byte of the magic number.
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"


def load_idx(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``idx:PATH``: an idx file of images or vectors, plain or gzipped; unsigned bytes or real numbers."""
    path = Path(config.name.partition(":")[2])
    array = read_idx(path)
    if array.ndim == 1:
        raise DataError(f"{path} holds {len(array)} single numbers (labels?); give the file of the images")
    return as_arrays(config.name, torch.from_numpy(array.astype(array.dtype.newbyteorder("="))), str(path))


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file. DataError with the byte at which the file is not what it should be."""
    content = _content(path)
    if len(content) < 4:
        raise DataError(f"{path}: {len(content)} bytes, too short for the 4-byte magic number of an idx file")
    zero, kind, dims = struct.unpack(">HBB", content[:4])
    if zero or kind not in _TYPES or not dims:
        raise DataError(
            f"{path}, byte 0: wrong magic number 0x{content[:4].hex()}; an idx file begins with 0x0000, a "
            f"type (0x08 for unsigned bytes) and the number of dimensions, as 0x00000803 for MNIST's images"
        )
    start = 4 + 4 * dims
    if len(content) < start:
        raise DataError(f"{path}, byte {len(content)}: ends within the {dims} sizes of its dimensions")
    shape = struct.unpack(f">{dims}I", content[4:start])
    dtype = np.dtype(_TYPES[kind])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        rest = "is truncated there" if len(content) < expected else "goes on behind its data"
        raise DataError(
            f"{path}, byte {min(len(content), expected)}: {rest}; dimensions {list(shape)} of {dtype.name} "
            f"make {expected} bytes, the file has {len(content)}"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == _GZIP else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
