"""Grey images as zeros and ones, so that a Bernoulli likelihood is a probability of the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vaekernels.training.data.base import Arrays, Data, digest
from vaekernels.training.errors import DataError

__all__ = ["binarized"]

_SEED = 0  # of the one draw: the data are the same in every run


def binarized(data: Data, how: Literal["threshold", "sample"]) -> Arrays:
    """``data`` with two levels: at half of the largest level, or drawn once, a grey value being the
    probability of a 1. DataError unless it has levels."""
    if not isinstance(data, Arrays) or data.levels is None:
        raise DataError(f"data.binarize is for images of grey levels, {data.name!r} is {data.described}")
    if data.levels == 2:
        return data
    levels, generator = data.levels, torch.Generator().manual_seed(_SEED)

    def of(x: Tensor) -> Tensor:
        if how == "threshold":
            return (2 * x.int() >= levels - 1).to(torch.uint8)
        return (torch.rand(x.shape, generator=generator) * (levels - 1) < x).to(torch.uint8)

    train, heldout = of(data.train), of(data.heldout)
    return replace(data, train=train, heldout=heldout, sha256=digest(torch.cat([train, heldout])), levels=2)
