"""Checks of the arguments of schedules and controllers."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

__all__ = ["Device", "at_least", "finite", "steps_of", "whole_number"]

Device = torch.device | str | None


def finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def at_least(name: str, value: float, least: float) -> float:
    if finite(name, value) < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")
    return float(value)


def whole_number(value: Any) -> int | None:
    """The int that `value` is, NumPy's integers included; None for anything else."""
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__index__"):
        return None
    return operator.index(value)


def steps_of(name: str, value: int, *, least: int = 1) -> int:
    whole = whole_number(value)
    if whole is None or whole < least:
        hint = "; use Constant for no ramp" if name == "steps" else ""
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}{hint}")
    return whole
