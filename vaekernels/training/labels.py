"""Labels of the examples of a data set: factors they were made from, lengths of sentences, or a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vaekernels.training import inputs
from vaekernels.training.config import DataConfig
from vaekernels.training.data import Data, Text
from vaekernels.training.data.arrays import native, read_idx
from vaekernels.training.data.base import Most, opened, split
from vaekernels.training.errors import InputError, nearest

__all__ = ["LENGTH", "find", "names"]

LENGTH = "length"
_ARRAYS = (".npy", ".npz", ".csv")
_IDX = (b"\0\0", b"\x1f\x8b")  # how idx files begin, plain and gzipped


def names(data: Data) -> list[str]:
    """Of the labels that ``data`` has itself: the length of a sentence in tokens, and known factors."""
    factors = getattr(data, "factors", None)
    return [*([LENGTH] if isinstance(data, Text) else []), *([] if factors is None else factors.names)]


def find(data: Data, given: str, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Whole numbers, int64, one for each training example and for each held-out one. ``given``: one of
    :func:`names`, or the path of a .npy, .npz, .csv or idx file with one number for each example, in the
    order in which the data have them.

    InputError if there are no such labels or not as many, DataError if the file cannot be read."""
    if given == LENGTH and isinstance(data, Text):
        return data.lengths(data.train), data.lengths(data.heldout)
    if given in names(data):
        factors = getattr(data, "factors")  # noqa: B009 (of two classes of data)
        place = factors.names.index(given)
        train, heldout = factors.train[:, place], factors.heldout[:, place]
        return _whole(given, train), _whole(given, heldout)
    path = Path(given)
    if not path.is_file():
        known = names(data)
        own = f"{nearest(given, known)}; or" if known else "it takes"
        raise InputError(f"no labels {given!r} in {data.name}; {own} the path of a file of labels")
    labels = _whole(given, _read(path, config))
    examples = len(data.train) + len(data.heldout)
    if labels.dim() != 1 or len(labels) != examples:
        raise InputError(
            f"{given} holds {list(labels.shape)} labels, {data.name} has {examples:,} examples; it takes one "
            f"for each, in their order"
        )
    return split(labels)


def _read(path: Path, config: DataConfig) -> Tensor:
    if path.suffix.lower() in _ARRAYS:
        array = inputs.array(path)
    else:
        with opened(path) as file:
            idx = file.read(2) in _IDX
        if not idx:
            raise InputError(f"{path}: takes labels in a .npy, .npz, .csv or idx file")
        array = read_idx(path, Most(config))
    return native(np.squeeze(array, axis=1) if array.ndim == 2 and array.shape[1] == 1 else array, str(path))


def _whole(where: str, labels: Tensor) -> Tensor:
    values = labels.double()
    if not bool((values == values.round()).all()):
        raise InputError(f"the labels {where} are not whole numbers: number the classes 0, 1, 2, ...")
    return values.to(torch.int64)
