"""Controllers: weights that answer to what the model did in the step before."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from vaekernels._checks import whole_number
from vaekernels.schedules._arguments import Device, at_least, finite, state_device

__all__ = ["GECO", "Controller", "PIController"]


class Controller(ABC):
    """A weight that is moved by a measured quantity. Its state is 0-dim tensors, changed in place by tensor
    operations alone, so that ``step`` never waits for the device and can be captured in a CUDA graph.

    ``ignored`` (int64) counts the measurements that were not finite, in float32. They move nothing: a step
    that AMP skips reports inf or NaN once, and taken in, that number would stay in the state for good.
    """

    def __init__(self, value: float, *, device: Device = None) -> None:
        device = state_device(device)
        self.value: Tensor = torch.full((), value, dtype=torch.float32, device=device)
        self.ignored: Tensor = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def step(self, measured: Tensor | float) -> None:
        """Take in what a training step measured, the mean over its batch, and move ``value``. A measurement
        that is NaN or inf changes nothing but ``ignored``."""
        error = self._error(measured)
        finite = error.isfinite()
        for tensor, moved in self._moved(error):
            tensor.copy_(torch.where(finite, moved, tensor))
        self.ignored.add_(finite.logical_not())

    @abstractmethod
    def _error(self, measured: Tensor | float) -> Tensor:
        """How far ``measured`` is from the target."""

    @abstractmethod
    def _moved(self, error: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The tensors of the state, each with what it becomes after ``error``. Nothing is changed yet."""

    @abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """The tensors that make up the state, without ``ignored``."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs, as numbers (float32 values, exact; ``ignored`` is an int). Gains and
        limits are configuration."""
        return {name: tensor.item() for name, tensor in (self._state() | {"ignored": self.ignored}).items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from ``state``. ValueError if it is not the state of this kind of controller."""
        own = self._state()
        ignored = whole_number(state.get("ignored"))
        if (
            ignored is None
            or ignored < 0
            or state.keys() != own.keys() | {"ignored"}
            or not all(hasattr(x, "__float__") and math.isfinite(x) for x in state.values())
        ):
            raise ValueError(
                f"the state of a {type(self).__name__} is finite numbers for {', '.join(own)}, and the count "
                f"ignored; got {dict(state)!r}"
            )
        for name, tensor in own.items():
            tensor.fill_(state[name])
        self.ignored.fill_(ignored)

    def __repr__(self) -> str:
        ignored = int(self.ignored)
        told = f", ignored {ignored} measurements that were not finite" if ignored else ""
        return f"{type(self).__name__}(now {self.value.item():g}{told})"

    def _scalar(self, name: str, measured: Tensor | float) -> Tensor:
        if isinstance(measured, Tensor):
            if measured.dim() != 0:
                raise ValueError(
                    f"{name} must be one number, the mean over the batch; got shape {list(measured.shape)}"
                )
            return measured.detach().to(self.value)
        # torch refuses a number beyond float32; a tensor of one becomes inf, and so does this.
        within = abs(measured) <= torch.finfo(torch.float32).max
        return self.value.new_full((), measured if within else math.inf)


class PIController(Controller):
    """The weight of the KL that holds the rate at ``target`` nats (ControlVAE, Shao et al. 2020)::

        e = target - rate,   w = clip(kp / (1 + exp(e)) - ki * sum(e), low, high)

    A rate above the target raises the weight, one below it lowers it. ``step`` takes the rate of the training
    step, unclamped, mean over the batch. The loss is ``nll + w * kl``, with the unclamped KL; ``target`` may
    be the ``value`` of a schedule.

    Anti-windup: the sum grows no further than takes the weight to its limit. Without that the sum of a long
    saturation has to be worked off before the weight can leave the limit again.

    >>> control = PIController(target=4.0)
    >>> for _ in range(100):
    ...     control.step(6.0)   # 2 nats too many
    >>> control.value
    tensor(0.2088)
    """

    def __init__(
        self,
        target: float | Tensor,
        *,
        kp: float = 0.01,
        ki: float = 0.001,
        low: float = 0.0,
        high: float = 1.0,
        device: Device = None,
    ) -> None:
        self.target = target if isinstance(target, Tensor) else at_least("target", target, 0.0)
        self.kp = at_least("kp", kp, 0.0)
        self.ki = at_least("ki", ki, 0.0)
        self.low = at_least("low", low, 0.0)
        self.high = finite("high", high)
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        super().__init__(self.low, device=device)
        self._integral = torch.zeros_like(self.value)

    def _error(self, measured: Tensor | float) -> Tensor:
        return self.target - self._scalar("rate", measured)

    def _moved(self, error: Tensor) -> list[tuple[Tensor, Tensor]]:
        proportional = self.kp * torch.sigmoid(-error)
        # The sum goes no further than the limit needs, and from beyond it (proportional has moved) only back.
        least = torch.minimum(self._integral, self.low - proportional)
        most = torch.maximum(self._integral, self.high - proportional)
        integral = (self._integral - self.ki * error).clamp(least, most)
        value = (proportional + integral).clamp(self.low, self.high)
        return [(self._integral, integral), (self.value, value)]

    def _state(self) -> dict[str, Tensor]:
        return {"value": self.value, "integral": self._integral}


class GECO(Controller):
    """The multiplier that holds the reconstruction at ``target`` nats (Rezende & Viola 2018)::

        m <- decay * m + (1 - decay) * (nll - target),   lambda <- clip(lambda * exp(speed * m), low, high)

    ``step`` takes the NLL of the training step, mean over the batch. The loss is
    ``kl + lambda * (nll - target)``, so the weight of the KL beside a weight of 1 for the NLL is 1 / lambda.
    The first step sets m to its own constraint. ``speed`` and the limits are ours: the paper
    leaves them open; the limits keep a target out of reach from driving lambda to inf.

    >>> multiplier = GECO(target=90.0, speed=0.01)
    >>> multiplier.step(100.0)   # 10 nats too bad
    >>> multiplier.value
    tensor(1.1052)
    """

    def __init__(
        self,
        target: float,
        *,
        speed: float = 0.001,
        decay: float = 0.99,
        low: float = 1e-3,
        high: float = 1e3,
        device: Device = None,
    ) -> None:
        self.target = finite("target", target)
        self.speed = at_least("speed", speed, 0.0)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.low, self.high = finite("low", low), finite("high", high)
        if not 0.0 < low <= 1.0 <= high:
            raise ValueError(f"lambda starts at 1, so 0 < low <= 1 <= high; got {low} and {high}")
        super().__init__(1.0, device=device)
        self._average = torch.zeros_like(self.value)
        self._started = torch.zeros_like(self.value)  # 0 before the first step, 1 after it

    def _error(self, measured: Tensor | float) -> Tensor:
        return self._scalar("nll", measured) - self.target

    def _moved(self, error: Tensor) -> list[tuple[Tensor, Tensor]]:
        decay = self.decay * self._started
        average = decay * self._average + (1.0 - decay) * error
        value = (self.value * torch.exp(self.speed * average)).clamp(self.low, self.high)
        return [
            (self._average, average),
            (self._started, torch.ones_like(self._started)),
            (self.value, value),
        ]

    def _state(self) -> dict[str, Tensor]:
        return {"value": self.value, "average": self._average, "started": self._started}
