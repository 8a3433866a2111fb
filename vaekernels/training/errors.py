"""What the trainer tells the user in one line instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InputError",
    "Interrupted",
    "NonFiniteError",
    "TrainingError",
    "nearest",
]


class TrainingError(Exception):
    """Base of the errors whose message is meant for the user of the command line."""


class ConfigError(TrainingError, ValueError):
    """A setting that is unknown or out of range."""


class DataError(TrainingError):
    """Data that is missing or cannot be read."""


class InputError(TrainingError, ValueError):
    """What a trained model was asked to encode or decode, and does not take."""


class CheckpointError(TrainingError):
    """A run's folder or checkpoint that is missing, unreadable, of another run or in use."""


class Interrupted(TrainingError):
    """The user asked to stop; everything is saved."""


class NonFiniteError(TrainingError, ArithmeticError):
    """A loss, gradient or evaluation that is NaN or inf."""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """'did you mean ...?' where something known is near, else the list of the known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
