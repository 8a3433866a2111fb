"""What the commands on a trained model are given: sentences, images, arrays in files, held-out examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaekernels._files import lines_of
from vaekernels.training.data import OWN, Arrays, Data, Text
from vaekernels.training.data.arrays import native
from vaekernels.training.data.base import opened
from vaekernels.training.data.csv_tables import read_csv
from vaekernels.training.data.images import SUFFIXES, image_paths, read_image
from vaekernels.training.errors import DataError, InputError

__all__ = ["array", "codes", "example", "examples"]

HELD_OUT = "heldout:"


def example(data: Data, given: str, size: int | None = None) -> Any:
    """One example: a sentence, the path of an image file, or ``heldout:N``, number N of the held-out ones."""
    if given.startswith(HELD_OUT):
        if not len(data.heldout):
            raise InputError(f"{given!r}: the data of the run are not there")
        number = given.removeprefix(HELD_OUT)
        if not number.isdecimal() or int(number) >= len(data.heldout):
            raise InputError(f"{given!r}: takes heldout:0 to heldout:{len(data.heldout) - 1}")
        return data.heldout[int(number) : int(number) + 1]
    if isinstance(data, Text):
        return given
    if isinstance(data, Arrays) and data.is_image:
        return _image(Path(given), data, size)
    raise InputError(f"{given!r}: a model of vectors takes held-out examples here, heldout:0 and so on")


def examples(data: Data, given: str, size: int | None = None) -> Any:
    """All examples in a file, in its order: sentences, one per line; images of a folder or file; an array in
    an .npy, .npz or .csv file. The kind may stand before the path, as in the name of a data set."""
    kind, colon, rest = given.partition(":")
    path = Path(rest if colon and kind in OWN else given)
    if isinstance(data, Text):
        with opened(path) as file:
            text = file.read()
        try:
            lines = [line for line in lines_of(text.decode("utf-8-sig")) if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, byte {error.start}: not UTF-8") from error
        if not lines:
            raise DataError(f"{path}: no line holds a sentence")
        return lines
    assert isinstance(data, Arrays)
    if data.is_image and (path.is_dir() or path.suffix.lower() in SUFFIXES):
        paths = image_paths(path, lambda text: None) if path.is_dir() else [path]
        return torch.cat([_image(each, data, size) for each in paths])
    return array(path)


def codes(path: Path) -> Tensor:
    """The codes in a file: of what ``encode`` wrote mu, or an array [N, D]."""
    found = array(path)
    if found.dtype.names is not None:
        if "mu" not in found.dtype.names:
            raise DataError(f"{path} has no mu, it has {', '.join(found.dtype.names)}")
        found = found["mu"]
    return native(found, str(path)).float()


def array(path: Path) -> np.ndarray:
    """The array in an .npy file, the one named x in an .npz file, the table in a .csv file. DataError if
    there is none."""
    suffix = path.suffix.lower()
    with opened(path) as file:
        try:
            if suffix == ".csv":
                return _table(file.read().decode("utf-8-sig"), str(path))
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else loaded["x"]
        except KeyError as error:
            raise DataError(f"{path} has no array 'x'") from error
        except (DataError, MemoryError):
            raise
        except Exception as error:  # numpy and zipfile raise a dozen types for damaged files
            raise DataError(f"{path}: no .npy, .npz or .csv file of plain numbers ({error})") from error


def _table(text: str, where: str) -> np.ndarray:
    """[N, D]. With a header that names columns mu_0, mu_1, ... those alone."""
    array, columns = read_csv(text, where)
    named = [place for place, name in enumerate(columns) if name.startswith("mu_")]
    return array[:, named] if named else array


def _image(path: Path, data: Arrays, size: int | None) -> Tensor:
    """[1, C, H, W], in [0, 1]; resized and cropped where the data of the run were, to ``size``."""
    if data.levels is None:
        raise InputError(
            f"{path}: the data of this run are real numbers, of a range of their own: give an array"
        )
    channels, height, width = data.shape
    pixels = torch.from_numpy(np.array(read_image(path, size))).float() / 255
    if pixels.shape[:2] != (height, width):
        raise InputError(f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, the run takes {width}x{height}")
    pixels = pixels.movedim(-1, 0) if pixels.dim() == 3 else pixels.unsqueeze(0)
    if channels == 1 and len(pixels) == 3:
        pixels = pixels.mean(dim=0, keepdim=True)
    return pixels.expand(channels, height, width).unsqueeze(0).contiguous()
