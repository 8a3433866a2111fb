"""Weights that change while a model trains.

A schedule is usable alone, in anybody's loop::

    weight = Linear(final=1.0, steps=10 * steps_per_epoch, device=device)
    for x in loader:
        ...
        (nll + weight.value * kl).backward()
        optimizer.step()
        weight.step()          # after backward, and only here: evaluation never advances it

``value`` is one 0-dim tensor for the life of the schedule, changed in place: compiled code does not recompile
and a replayed CUDA graph sees the new number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Constant", "Linear", "Schedule"]


class Schedule(ABC):
    """A number that is a function of the count of training steps taken.

    ``step()`` changes ``value`` in place, so it belongs after ``backward()``: autograd refuses a backward
    pass through a tensor that changed since the forward pass.
    """

    def __init__(self, *, device: torch.device | str | None = None) -> None:
        self._steps = 0
        self.value: Tensor = torch.empty((), dtype=torch.float32, device=device)
        self._write()

    @abstractmethod
    def at(self, step: int) -> float:
        """The value after ``step`` training steps."""

    def step(self) -> None:
        """Count one training step."""
        self._steps += 1
        self._write()

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs: the number of steps taken. The shape of the schedule is configuration."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from ``state``. ValueError if it is not the state of a schedule."""
        steps = state.get("steps")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0 or len(state) != 1:
            raise ValueError(f"a schedule's state is {{'steps': n}} with n >= 0, got {dict(state)!r}")
        self._steps = steps
        self._write()

    def _write(self) -> None:
        self.value.fill_(self.at(self._steps))


class Constant(Schedule):
    """The same value at every step."""

    def __init__(self, value: float, *, device: torch.device | str | None = None) -> None:
        self.final = _finite("value", value)
        super().__init__(device=device)

    def at(self, step: int) -> float:
        return self.final


class Linear(Schedule):
    """From ``start`` to ``final`` in a straight line over ``steps`` steps, then ``final``:
    ``start + (final - start) * min(1, t / steps)`` (KL annealing, Bowman et al. 2016)."""

    def __init__(
        self, final: float, steps: int, *, start: float = 0.0, device: torch.device | str | None = None
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}; use Constant for no ramp")
        self.start = _finite("start", start)
        self.final = _finite("final", final)
        self.steps = steps
        super().__init__(device=device)

    def at(self, step: int) -> float:
        if step >= self.steps:
            return self.final
        return self.start + (self.final - self.start) * (step / self.steps)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
