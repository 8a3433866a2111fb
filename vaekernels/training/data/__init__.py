"""Data sets, each with its hash and a fixed split into train and held-out: four that every machine has, and
the user's own.

A new one is a loader in one of the modules here and its entry in ``DATASETS`` or ``OWN``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vaekernels.training.config import DataConfig
from vaekernels.training.data.arrays import load_idx, load_npy, load_npz
from vaekernels.training.data.base import Arrays, Data, Factors, Text, without_examples
from vaekernels.training.data.batches import Batches
from vaekernels.training.data.csv_tables import load_csv
from vaekernels.training.data.images import binarized, load_digits, load_images
from vaekernels.training.data.synthetic import load_sprites, load_synthetic_text
from vaekernels.training.data.text import load_docstrings, load_text
from vaekernels.training.errors import DataError

__all__ = [
    "DATASETS",
    "OWN",
    "Arrays",
    "Batches",
    "Data",
    "Factors",
    "Text",
    "is_own",
    "load",
    "located",
    "path_of",
    "without_examples",
]

Loader = Callable[[DataConfig, Callable[[str], None]], Data]

DATASETS: dict[str, Loader] = {
    "docstrings": load_docstrings,
    "synthetic-text": load_synthetic_text,
    "digits": load_digits,
    "sprites": load_sprites,
}

OWN: dict[str, Loader] = {
    "idx": load_idx,
    "text": load_text,
    "images": load_images,
    "npz": load_npz,
    "npy": load_npy,
    "csv": load_csv,
}
"""The user's own data, named ``KIND:PATH``."""


def is_own(name: str) -> bool:
    """Whether ``name`` is of the form ``KIND:PATH``."""
    kind, colon, _ = name.partition(":")
    return bool(colon) and kind in OWN


def path_of(name: str) -> Path | None:
    """Where the user's own data lie; None of named data sets."""
    return Path(name.partition(":")[2]) if is_own(name) else None


def located(config: DataConfig) -> DataConfig:
    """``config`` with the path of the user's own data absolute, so that a run finds them from any folder."""
    path = path_of(config.name)
    if path is None or not path.parts:
        return config
    return replace(config, name=f"{config.name.partition(':')[0]}:{path.absolute()}")


def load(config: DataConfig, say: Callable[[str], None]) -> Data:
    """Load a data set. ``say`` is told, in a sentence, what takes long or differs from the usual. DataError
    if there is no such data, or if it is not what it should be, with the file and the place in it."""
    data = _load(config, say)
    return data if config.binarize == "no" else binarized(data, config.binarize)


def _load(config: DataConfig, say: Callable[[str], None]) -> Data:
    if config.name in DATASETS:
        return DATASETS[config.name](config, say)
    kind, _, path = config.name.partition(":")
    if not is_own(config.name):
        raise DataError(
            f"unknown data set {config.name!r}; known: {', '.join(DATASETS)}, "
            f"{', '.join(f'{own}:PATH' for own in OWN)}"
        )
    if not path:
        raise DataError(f"{config.name!r} names no file; it takes {kind}:PATH")
    return OWN[kind](config, say)
