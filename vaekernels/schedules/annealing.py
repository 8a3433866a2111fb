"""Schedules: numbers that are a function of the count of training steps taken."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from vaekernels._checks import whole_number
from vaekernels.schedules._arguments import Device, at_least, finite, state_device, steps_of

__all__ = [
    "Capacity",
    "Constant",
    "Cosine",
    "Cyclical",
    "FreeBits",
    "Linear",
    "Logistic",
    "Schedule",
    "Warmup",
]


class Schedule(ABC):
    """A number that is a function of the count of training steps taken.

    ``step()`` changes ``value`` in place, so it belongs after ``backward()``: autograd refuses a backward
    pass through a tensor that changed since the forward pass.
    """

    def __init__(self, *, device: Device = None) -> None:
        self._steps = 0
        self.value: Tensor = torch.empty((), dtype=torch.float32, device=state_device(device))
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
        steps = whole_number(state.get("steps"))
        if steps is None or steps < 0 or len(state) != 1:
            raise ValueError(f"a schedule's state is {{'steps': n}} with n >= 0, got {dict(state)!r}")
        self._steps = steps
        self._write()

    def _write(self) -> None:
        self.value.fill_(self.at(self._steps))


class Constant(Schedule):
    """The same value at every step: beta of the beta-VAE (Higgins et al. 2017).

    >>> beta = Constant(4.0)
    >>> beta.step()
    >>> beta.value
    tensor(4.)
    """

    def __init__(self, final: float, *, device: Device = None) -> None:
        self.final = finite("final", final)
        super().__init__(device=device)

    def at(self, step: int) -> float:
        return self.final


class _Ramp(Schedule):
    """From ``start`` at step 0 to ``final`` at step ``steps``, then ``final``; ``shape`` maps [0, 1] to
    itself."""

    def __init__(self, final: float, steps: int, *, start: float = 0.0, device: Device = None) -> None:
        self.final = finite("final", final)
        self.steps = steps_of("steps", steps)
        self.start = finite("start", start)
        super().__init__(device=device)

    def at(self, step: int) -> float:
        if step >= self.steps:
            return self.final
        return self.start + (self.final - self.start) * self.shape(step / self.steps)

    @staticmethod
    @abstractmethod
    def shape(fraction: float) -> float: ...


class Linear(_Ramp):
    """``start + (final - start) * min(1, t / steps)``: linear KL annealing (Bowman et al. 2016).

    Ten epochs is the usual length.

    >>> weight = Linear(1.0, steps=4)
    >>> for _ in range(3):
    ...     weight.step()
    >>> weight.value
    tensor(0.7500)
    """

    @staticmethod
    def shape(fraction: float) -> float:
        return fraction


class Cosine(_Ramp):
    """``start + (final - start) * (1 - cos(pi * min(1, t / steps))) / 2``: a ramp that is flat at both ends.

    >>> weight = Cosine(1.0, steps=4)
    >>> weight.step()
    >>> weight.value
    tensor(0.1464)
    """

    @staticmethod
    def shape(fraction: float) -> float:
        return 0.5 * (1.0 - math.cos(math.pi * fraction))


class Logistic(Schedule):
    """``final / (1 + exp(-rate * (t - midpoint)))``: sigmoid KL annealing; the defaults are those of Bowman
    et al. (2016): half of ``final`` at step 2500, 0.998 of it at step 5000.

    >>> weight = Logistic(1.0, rate=1.0, midpoint=2)
    >>> weight.step()
    >>> weight.step()
    >>> weight.value
    tensor(0.5000)
    """

    def __init__(
        self, final: float, *, rate: float = 0.0025, midpoint: float = 2500.0, device: Device = None
    ) -> None:
        self.final = finite("final", final)
        self.rate = at_least("rate", rate, 0.0)
        self.midpoint = finite("midpoint", midpoint)
        super().__init__(device=device)

    def at(self, step: int) -> float:
        x = self.rate * (step - self.midpoint)
        # exp of a negative number only: the other form overflows far from the midpoint.
        weight = 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
        return self.final * weight


class Cyclical(Schedule):
    """``final * min(1, frac(t * cycles / steps) / ramp)`` for ``t < steps``, then ``final``: in every cycle
    the weight rises from 0 during the first share ``ramp`` and stays for the rest (Fu et al. 2019, whose
    defaults these are; ``steps`` is the whole training).

    >>> weight = Cyclical(1.0, steps=8, cycles=2)
    >>> [weight.at(t) for t in range(9)]
    [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """

    def __init__(
        self, final: float, steps: int, *, cycles: int = 4, ramp: float = 0.5, device: Device = None
    ) -> None:
        self.final = finite("final", final)
        self.steps = steps_of("steps", steps)
        self.cycles = steps_of("cycles", cycles)
        if not 0.0 < ramp <= 1.0:
            raise ValueError(f"ramp is the share of a cycle in which the weight rises, in (0, 1]; got {ramp}")
        self.ramp = ramp
        super().__init__(device=device)

    def at(self, step: int) -> float:
        if step >= self.steps:
            return self.final
        position = (step * self.cycles % self.steps) / self.steps  # integers: no step is lost to rounding
        return self.final * min(1.0, position / self.ramp)


class Warmup(Schedule):
    """``start`` for ``hold`` steps, then in a straight line to ``final`` over ``ramp`` steps, then ``final``.
    With ``ramp=0`` a constant that is switched on after ``hold`` steps.

    >>> weight = Warmup(1.0, hold=2)
    >>> [weight.at(t) for t in range(4)]
    [0.0, 0.0, 1.0, 1.0]
    >>> [Warmup(1.0, hold=2, ramp=2).at(t) for t in range(6)]
    [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    """

    def __init__(
        self, final: float, *, hold: int, ramp: int = 0, start: float = 0.0, device: Device = None
    ) -> None:
        self.final = finite("final", final)
        self.hold = steps_of("hold", hold, least=0)
        self.ramp = steps_of("ramp", ramp, least=0)
        self.start = finite("start", start)
        super().__init__(device=device)

    def at(self, step: int) -> float:
        risen = step - self.hold
        if risen < 0:
            return self.start
        if risen >= self.ramp:
            return self.final
        return self.start + (self.final - self.start) * (risen / self.ramp)


class Capacity(Linear):
    """The rate C(t), in nats, that the latent may hold: 0 to 25 linearly (Burgess et al. 2018, over 100,000
    steps). The loss is ``nll + capacity.penalty(rate)``.

    ``gamma``: 1000 for images, 1 for text.

    >>> capacity = Capacity(steps=100, gamma=10.0)
    >>> capacity.step()
    >>> capacity.value, capacity.penalty(torch.tensor(1.25))
    (tensor(0.2500), tensor(10.))
    """

    def __init__(
        self,
        final: float = 25.0,
        steps: int = 100_000,
        *,
        start: float = 0.0,
        gamma: float = 1000.0,
        device: Device = None,
    ) -> None:
        self.gamma = at_least("gamma", gamma, 0.0)
        super().__init__(at_least("final", final, 0.0), steps, start=start, device=device)

    def penalty(self, rate: Tensor) -> Tensor:
        """``gamma * abs(rate - C(t))``, the mean of it where ``rate`` holds one value per example."""
        return self.gamma * (rate - self.value).abs().mean()


class FreeBits(Warmup):
    """A floor under the rate that is held and then lowered: ``start`` nats per group for ``hold`` steps, then
    in a straight line to ``final`` over ``ramp`` steps. Give ``value`` to an op as ``free_bits``.

    The default floor is Kingma et al.'s (2016) 0.25 nats per dimension; one group for the whole latent wants
    4 to 8.

    >>> floor = FreeBits(hold=1, ramp=2)
    >>> [floor.at(t) for t in range(4)]
    [0.25, 0.25, 0.125, 0.0]
    """

    def __init__(
        self, start: float = 0.25, *, hold: int = 0, ramp: int = 0, final: float = 0.0, device: Device = None
    ) -> None:
        super().__init__(
            at_least("final", final, 0.0),
            hold=hold,
            ramp=ramp,
            start=at_least("start", start, 0.0),
            device=device,
        )
