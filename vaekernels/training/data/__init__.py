"""Data sets that every machine has, each with its hash and a fixed split into train and held-out."""

from __future__ import annotations

from collections.abc import Callable

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Batches, Data, Images, Text
from vaekernels.training.data.docstrings import load_docstrings
from vaekernels.training.data.images import load_digits
from vaekernels.training.data.synthetic import load_synthetic_text
from vaekernels.training.errors import DataError

__all__ = ["DATASETS", "Batches", "Data", "Images", "Text", "check_known", "load"]

DATASETS: dict[str, Callable[[DataConfig, Callable[[str], None]], Data]] = {
    "docstrings": load_docstrings,
    "digits": load_digits,
    "synthetic-text": load_synthetic_text,
}


def check_known(name: str) -> None:
    """DataError that lists the known data sets, unless ``name`` is one."""
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")


def load(config: DataConfig, say: Callable[[str], None]) -> Data:
    """Load a data set by name. ``say`` is told, in a sentence, what takes long or differs from the usual."""
    check_known(config.name)
    return DATASETS[config.name](config, say)
