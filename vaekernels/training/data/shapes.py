"""The user's arrays as images or vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from vaekernels.training.data.base import Arrays, digest, split
from vaekernels.training.errors import DataError

__all__ = ["as_arrays"]

_COLOURS = (1, 3)
_CHANNELS = (1, 2, 3, 4)


def as_arrays(name: str, x: Tensor, where: str) -> Arrays:
    """[N, D] vectors, [N, H, W] grey images, [N, C, H, W] or [N, H, W, C] images: the last axis is the
    channels if it is 1 or 3 and the second is neither, or if it alone is at most 4. bool becomes 2 levels,
    uint8 256, floats stay real numbers; anything else is a DataError."""
    if x.dim() not in (2, 3, 4) or 0 in x.shape[1:]:
        raise DataError(
            f"{where}: shape {list(x.shape)}; takes [N, D] vectors, [N, H, W], [N, C, H, W] or [N, H, W, C] "
            f"images"
        )
    if x.dim() == 3:
        x = x.unsqueeze(1)
    elif x.dim() == 4 and _channels_last(x):
        x = x.permute(0, 3, 1, 2)
    if x.dtype == torch.bool:
        x, levels = x.to(torch.uint8), 2
    elif x.dtype == torch.uint8:
        levels = 256
    elif x.dtype.is_floating_point:
        x, levels = x.float(), None
        if not bool(x.isfinite().all()):
            first = (~x.flatten(1).isfinite().all(dim=1)).nonzero()[0].item()
            raise DataError(f"{where}: example {first} holds NaN, inf or a value beyond float32")
    else:
        raise DataError(f"{where}: dtype {str(x.dtype).removeprefix('torch.')}; takes uint8, bool or floats")
    train, heldout = split(x.contiguous(), where)
    return Arrays(name, train, heldout, digest(x), levels=levels)


def _channels_last(x: Tensor) -> bool:
    _, second, third, last = x.shape
    if last in _COLOURS and second not in _COLOURS:
        return True
    return last in _CHANNELS and second not in _CHANNELS and third not in _CHANNELS
