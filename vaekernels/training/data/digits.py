"""Handwritten digits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Arrays, Data, digest, split
from vaekernels.training.errors import DataError

__all__ = ["load_digits"]


def load_digits(config: DataConfig, say: Callable[[str], None]) -> Data:
    """The data set ``digits``: the 1797 handwritten 8x8 digits bundled with scikit-learn, pixels 0..16."""
    try:
        from sklearn import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            "digits come with scikit-learn, which is missing; pip install 'vaekernels[train]'"
        ) from error
    x = torch.from_numpy(datasets.load_digits().images).to(torch.uint8).unsqueeze(1)
    train, heldout = split(x)
    return Arrays("digits", train, heldout, digest(x), levels=17)
