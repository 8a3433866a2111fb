"""The user's arrays, as images or vectors: idx files (the format of MNIST) and npz files."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Arrays, Data, Most, digest, file_size, opened, split
from vaekernels.training.errors import DataError

__all__ = ["as_arrays", "load_idx", "load_npy", "load_npz", "native", "read_idx"]

_COLOURS = (1, 3)
_NAMED = 8  # columns, in a message
_CHANNELS = (1, 2, 3, 4)


def as_arrays(
    config: DataConfig, x: Tensor, where: str, say: Callable[[str], None], columns: Sequence[str] = ()
) -> Arrays:
    """[N, D] vectors, [N, H, W] grey images, [N, C, H, W] or [N, H, W, C] images: the last axis is the
    channels if it is 1 or 3 and the second is neither, or if it alone is at most 4.

    Values that are all 0 or 1, of any type, and bytes that are all 0 or 255 become 2 levels; other bytes, and
    images of whole numbers from 0 to 255, become 256; everything else is real numbers. ``say`` is told where
    that does not follow from the type, of constant columns, and of missing values that were filled in.
    ``columns``: the names of the columns of a table."""
    if x.dim() not in (2, 3, 4) or 0 in x.shape[1:]:
        raise DataError(
            f"{where}: shape {list(x.shape)}; takes [N, D] vectors, [N, H, W], [N, C, H, W] or [N, H, W, C] "
            f"images"
        )
    if x.dim() == 3:
        x = x.unsqueeze(1)
    elif x.dim() == 4 and _channels_last(x):
        x = x.permute(0, 3, 1, 2)
    if x.dim() == 2:
        x = _filled(x, config, where, say, columns)
    x, levels = _levels(x, where, say)
    train, heldout = split(x.contiguous(), where)
    if x.dim() == 2:
        constant = (train == train[0]).all(dim=0).nonzero().flatten().tolist()
        if constant:
            say(f"constant over the training data: {_columns(constant, columns)}")
    table = x.dim() == 2 and levels is None
    if config.standardize == "yes" and not table:
        raise DataError(f"data.standardize is for vectors of real numbers, {where} holds {list(x.shape[1:])}")
    standardize = table and config.standardize != "no"
    return Arrays(config.name, train, heldout, digest(x), levels=levels, standardize=standardize)


def _filled(
    x: Tensor, config: DataConfig, where: str, say: Callable[[str], None], columns: Sequence[str]
) -> Tensor:
    """The table with the mean of the training data in the place of every NaN, where the settings ask for
    that. DataError with the column if they do not."""
    missing = x.isnan()
    if not bool(missing.any()):
        return x
    hit = missing.any(dim=0).nonzero().flatten().tolist()
    found = f"{int(missing.sum()):,} of {x.numel():,} values are missing (NaN), in {_columns(hit, columns)}"
    if config.missing == "abort":
        row = int(missing.any(dim=1).nonzero()[0])
        raise DataError(
            f"{where}: {found}; the first is in example {row}. --set data.missing=mean puts the mean of the "
            f"column in their place"
        )
    means = split(x, where)[0].nanmean(dim=0)
    if bool(means.isnan().any()):
        empty = means.isnan().nonzero().flatten().tolist()
        raise DataError(f"{where}: all values of the training data are missing in {_columns(empty, columns)}")
    say(f"{found}: the mean of the column is put in their place")
    return torch.where(missing, means, x)


def _columns(numbers: Sequence[int], names: Sequence[str]) -> str:
    """Columns by their names, or, where they have none, by their numbers from 0 on."""
    shown = [repr(names[number]) if names else str(number) for number in numbers[:_NAMED]]
    more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
    return f"column{'s' if len(numbers) > 1 else ''} {', '.join(shown)}{more}"


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
    return as_arrays(config, native(array, str(path)), str(path), say)


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


# --- npy and npz files

_NPY = b"\x93NUMPY"


def load_npy(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``npy:PATH``: a single array of numpy."""
    path = Path(config.name.partition(":")[2])
    with opened(path) as file:
        if file.read(len(_NPY)) != _NPY:
            raise DataError(f"{path}: no .npy file; an archive of arrays is npz:{path}")
        file.seek(0)
        try:
            _check_header(file, file_size(file), str(path), Most(config))
            file.seek(0)
            array = np.load(file, allow_pickle=False)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # numpy raises a dozen types for damaged files
            raise DataError(f"{path}: damaged, or not an array of plain numbers ({error})") from error
    return as_arrays(config, native(array, str(path)), str(path), say)


def load_npz(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``npz:PATH``: the array named ``config.array`` of a numpy archive."""
    path = Path(config.name.partition(":")[2])
    array = _read_npz(path, config.array, Most(config))
    where = f"{path}, array {config.array!r}"
    return as_arrays(config, native(array, where), where, say)


def _read_npz(path: Path, name: str, most: Most) -> np.ndarray:
    with opened(path) as file:
        start = file.read(len(_NPY))
        if start == _NPY:
            raise DataError(f"{path} is a single array; name it npy:{path}")
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
    member = name if name in archive.namelist() else f"{name}.npy"
    with archive.open(member) as file:
        _check_header(file, archive.getinfo(member).file_size, where, most)


def _check_header(file: IO[bytes], length: int, where: str, most: Most) -> None:
    """DataError if the array is too large, ValueError if its header and the ``length`` of the file say
    different sizes: numpy takes the memory that the header says before it reads the first number."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    size, stored = math.prod(shape) * dtype.itemsize, length - file.tell()
    most.check(f"{where}, {dtype} {list(shape)}", size)
    if size != stored:
        raise ValueError(f"its header says {dtype} {list(shape)}, {size} bytes, the file has {stored}")
