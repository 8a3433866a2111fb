"""Small images."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Data, Images, digest, split
from vaekernels.training.errors import DataError

__all__ = ["load_digits"]


def load_digits(config: DataConfig, say: Callable[[str], None]) -> Data:
    """The data set ``digits``: the 1797 handwritten 8x8 digits bundled with scikit-learn.

    Pixels are 0..16 and become 1 from 8 up: a fixed threshold, so that the Bernoulli likelihood is a
    probability of the data and the NLL can be compared between runs (grey values as targets have neither
    property).
    """
    try:
        from sklearn import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            "digits come with scikit-learn, which is missing; pip install 'vaekernels[train]'"
        ) from error
    pixels = torch.from_numpy(datasets.load_digits().data)
    x = (pixels >= 8).float()
    train, heldout = split(x)
    return Images("digits", train, heldout, digest(x), (8, 8))
