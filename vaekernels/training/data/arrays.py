"""The user's arrays, as images or vectors: idx files (the format of MNIST) and npz files."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Arrays, Data, Most, digest, opened, split
from vaekernels.training.errors import DataError

__all__ = ["as_arrays", "load_idx", "load_npz", "native", "read_idx"]

_COLOURS = (1, 3)
_CHANNELS = (1, 2, 3, 4)


def as_arrays(name: str, x: Tensor, where: str, say: Callable[[str], None]) -> Arrays:
    """[N, D] vectors, [N, H, W] grey images, [N, C, H, W] or [N, H, W, C] images: the last axis is the
    channels if it is 1 or 3 and the second is neither, or if it alone is at most 4.

    Values that are all 0 or 1, of any type, and bytes that are all 0 or 255 become 2 levels; other bytes, and
    images of whole numbers from 0 to 255, become 256; everything else is real numbers. ``say`` is told where
    that does not follow from the type."""
    if x.dim() not in (2, 3, 4) or 0 in x.shape[1:]:
        raise DataError(
            f"{where}: shape {list(x.shape)}; takes [N, D] vectors, [N, H, W], [N, C, H, W] or [N, H, W, C] "
            f"images"
        )
    if x.dim() == 3:
        x = x.unsqueeze(1)
    elif x.dim() == 4 and _channels_last(x):
        x = x.permute(0, 3, 1, 2)
    x, levels = _levels(x, where, say)
    train, heldout = split(x.contiguous(), where)
    return Arrays(name, train, heldout, digest(x), levels=levels)


def _levels(x: Tensor, where: str, say: Callable[[str], None]) -> tuple[Tensor, int | None]:
    """``x`` as uint8 of 0 .. levels - 1, or as float32 and None."""
    if x.dtype == torch.bool:
        return x.to(torch.uint8), 2
    largest = 255 if x.dtype == torch.uint8 and bool((x > 1).any()) else 1
    if bool(((x == 0) | (x == largest)).all()) and bool((x != x.flatten()[0]).any()):
        say(f"all values are 0 or {largest}: data of two values")
        return (x == largest).to(torch.uint8), 2
    if x.dtype == torch.uint8:
        return x, 256
    if not x.dtype.is_floating_point and x.dim() == 4 and bool(((x >= 0) & (x <= 255)).all()):
        return x.to(torch.uint8), 256
    x = x.float()
    if not bool(x.isfinite().all()):
        first = (~x.flatten(1).isfinite().all(dim=1)).nonzero()[0].item()
        raise DataError(f"{where}: example {first} holds NaN, inf or a value beyond float32")
    return x, None


def native(array: np.ndarray, where: str) -> Tensor:
    """A tensor of the same values, in the byte order of this machine; integers that are no bytes as int64.
    DataError unless they are numbers."""
    if array.dtype.kind not in "buif":
        raise DataError(f"{where}: dtype {array.dtype}; takes bool, integers or floats")
    dtype = array.dtype.newbyteorder("=")
    if dtype.kind in "iu" and dtype != np.uint8:
        dtype = np.dtype(np.float64 if dtype == np.uint64 else np.int64)
    elif dtype.kind == "f" and dtype.itemsize > 8:  # long double, which torch has not
        dtype = np.dtype(np.float64)
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _channels_last(x: Tensor) -> bool:
    _, second, third, last = x.shape
    if last in _COLOURS and second not in _COLOURS:
        return True
    return last in _CHANNELS and second not in _CHANNELS and third not in _CHANNELS


# --- idx files

# Big-endian, by the third byte of the magic number.
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
_MOST_DIMS = 4


def load_idx(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``idx:PATH``: an idx file of images or vectors, plain or gzipped."""
    path = Path(config.name.partition(":")[2])
    array = read_idx(path, Most(config))
    if array.ndim == 1:
        raise DataError(f"{path} holds {len(array)} single numbers (labels?); give the file of the images")
    return as_arrays(config.name, native(array, str(path)), str(path), say)


def read_idx(path: Path, most: Most) -> np.ndarray:
    """The array in an idx file. DataError with the byte at which the file is not what it should be."""
    with opened(path) as file:
        compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        try:
            with gzip.GzipFile(fileobj=file) if compressed else file as content:
                return _read_array(path, content, most)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged gzip file ({error})") from error


def _read_array(path: Path, file: BinaryIO | gzip.GzipFile, most: Most) -> np.ndarray:
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


# --- npz files

_NPY = b"\x93NUMPY"


def load_npz(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``npz:PATH``: the array named ``config.array`` of a numpy archive."""
    path = Path(config.name.partition(":")[2])
    array = _read_npz(path, config.array, Most(config))
    where = f"{path}, array {config.array!r}"
    return as_arrays(config.name, native(array, where), where, say)


def _read_npz(path: Path, name: str, most: Most) -> np.ndarray:
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
