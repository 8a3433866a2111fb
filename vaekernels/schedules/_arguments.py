"""Checks of the arguments of schedules and controllers."""

from __future__ import annotations

import math

import torch

from vaekernels._checks import whole_number

__all__ = ["Device", "at_least", "finite", "state_device", "steps_of"]

Device = torch.device | str | None


def state_device(device: Device) -> Device:
    """Where a state is kept: on `device`, else on the default one. A model that is built under
    ``torch.device("meta")`` and then filled has it on the CPU: it is no buffer that a checkpoint would fill,
    and a number without memory cannot be stepped."""
    # Not by `torch.get_default_device`, which in torch 2.6 does not see that context.
    return "cpu" if device is None and torch.empty(0).is_meta else device


def finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def at_least(name: str, value: float, least: float) -> float:
    if finite(name, value) < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")
    return float(value)


def steps_of(name: str, value: int, *, least: int = 1) -> int:
    whole = whole_number(value)
    if whole is None or whole < least:
        hint = "; use Constant for no ramp" if name == "steps" else ""
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}{hint}")
    return whole
