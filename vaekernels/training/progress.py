"""What a step measured, and how far a run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

__all__ = ["Progress", "Step"]


class Step(NamedTuple):
    """What a step measured, over all processes; nats, means over the batch. ``kl``: as in the loss."""

    loss: float
    nll: float
    rate: float
    kl: float
    weight: float
    stop: bool
    """Whether a process was asked to stop."""


@dataclass
class Progress:
    """How far the run is. ``batch`` is the next batch of ``epoch``; the sums are over the epoch so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(
        default_factory=lambda: {"examples": 0.0, "nll": 0.0, "rate": 0.0, "kl": 0.0}
    )

    def count(self, step: Step, examples: int) -> None:
        self.batch += 1
        self.step += 1
        self.sums["examples"] += examples
        for name in ("nll", "rate", "kl"):
            self.sums[name] += getattr(step, name) * examples

    def mean(self, name: str) -> float:
        return self.sums[name] / max(self.sums["examples"], 1.0)

    def next_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums = dict.fromkeys(self.sums, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """ValueError or TypeError unless ``state`` is that of a checkpoint."""
        progress, fresh = cls(**state), cls()
        if len(state) < len(fields(cls)):
            raise ValueError(f"progress has {', '.join(state) or 'nothing'} only")
        numbers = [
            (getattr(progress, f.name), getattr(fresh, f.name)) for f in fields(cls) if f.name != "sums"
        ]
        numbers += [(progress.sums[name], value) for name, value in fresh.sums.items()]
        for value, like in numbers:
            if type(value) is not type(like) or not value >= 0:
                raise ValueError(f"progress holds {value!r}")
        return progress
