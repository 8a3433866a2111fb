"""Shuffled batches whose order is a function of seed and epoch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaekernels.training.data.base import Data
from vaekernels.training.seeds import derive

__all__ = ["Batches"]


class Batches:
    """Batches of ``batch_size`` examples or one fewer, of examples of equal or nearly equal length.

    The order of an epoch is a function of (seed, epoch) alone, so a position in the data is two numbers.
    """

    def __init__(self, data: Data, *, batch_size: int, seed: int) -> None:
        self._x = data.train
        self._lengths = data.lengths(data.train)
        self._batch_size = batch_size
        self._seed = seed
        self._stream: tuple[int, list[Tensor]] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self._x) / self._batch_size)

    def order(self, epoch: int) -> list[Tensor]:
        """The batches of an epoch, each as the indices of its examples."""
        return self._order(epoch)

    def extra(self, number: int) -> Tensor:
        """Batch ``number`` of an endless stream beside the epochs, for steps that are not part of one."""
        epoch, position = divmod(number, len(self))
        if self._stream is None or self._stream[0] != epoch:
            self._stream = epoch, self._order("extra", epoch)
        return self._stream[1][position]

    def take(self, batch: Tensor) -> Tensor:
        """The examples of a batch; text is cut to the longest of them."""
        rows = self._x[batch]
        if self._x.dtype == torch.int64:
            rows = rows[:, : int(self._lengths[batch].max())]
        return rows

    def _order(self, *key: str | int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(derive(self._seed, *key))
        shuffled = torch.randperm(len(self._x), generator=generator)
        by_length = shuffled[torch.sort(self._lengths[shuffled], stable=True).indices]
        batches = torch.tensor_split(by_length, len(self))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
