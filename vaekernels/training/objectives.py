"""From the terms of a batch to its loss: one class for each way of weighing the KL, with its schedules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vaekernels import schedules
from vaekernels.schedules import Constant, Controller, Schedule
from vaekernels.training.config import ObjectiveConfig
from vaekernels.training.latents import KLOptions, Terms

__all__ = ["Objective", "Reconstruction", "build", "weight_schedule"]

_DEFAULT_EPOCHS = {"linear": 10.0, "cosine": 10.0, "warmup": 1.0}


class Objective(ABC):
    """A loss with the schedules that move it. ``step`` belongs after the optimiser's step, with the means
    over all processes; evaluation calls neither."""

    def __init__(self, options: KLOptions, moving: Mapping[str, Schedule | Controller]) -> None:
        self.options = options
        self.moving = dict(moving)

    @abstractmethod
    def loss(self, terms: Terms) -> Tensor: ...

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight of the KL where that of the NLL (a sum over data dimensions) is 1, 0-dim."""

    def step(self, nll: Tensor, rate: Tensor) -> None:
        """One training step has been taken, with this NLL and this unclamped rate."""
        for part in self.moving.values():
            if isinstance(part, Schedule):
                part.step()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {name: dict(part.state_dict()) for name, part in self.moving.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        if state.keys() != self.moving.keys():
            raise ValueError(f"schedules {', '.join(state)} where {', '.join(self.moving)} are expected")
        for name, part in self.moving.items():
            part.load_state_dict(state[name])


class Weighted(Objective):
    """scale_nll * NLL + scale_kl * w(t) * KL, the KL with free bits or without."""

    def __init__(
        self,
        options: KLOptions,
        weight: Schedule,
        *,
        floor: Schedule | None = None,
        scale_nll: float = 1.0,
        scale_kl: float = 1.0,
        balanced_below: float | None = None,
    ) -> None:
        super().__init__(options, {"weight": weight} | ({} if floor is None else {"free_bits": floor}))
        self._weight = weight
        self._scale_nll, self._scale_kl = scale_nll, scale_kl
        self._balanced_below = balanced_below

    def loss(self, terms: Terms) -> Tensor:
        kl = terms.kl
        if self._balanced_below is not None:
            # Layers count in proportion to their own KL while the weight rises (Vahdat & Kautz 2020, without
            # their factor for the size of a layer).
            share = terms.rate.detach() / terms.rate.detach().mean().clamp(min=1e-12)
            kl = kl * torch.where(self._weight.value < self._balanced_below, share, torch.ones_like(share))
        return self._scale_nll * terms.nll + self._scale_kl * self._weight.value * kl.sum()

    @property
    def weight(self) -> Tensor:
        return self._weight.value * (self._scale_kl / self._scale_nll)


class CapacityTarget(Objective):
    """NLL + gamma * |rate - C(t)|, or the mean over examples of |KL - C(t)|."""

    def __init__(self, options: KLOptions, capacity: schedules.Capacity) -> None:
        super().__init__(options, {"capacity": capacity})
        self._capacity = capacity

    def loss(self, terms: Terms) -> Tensor:
        if not self.options.per_example:
            return terms.nll + self._capacity.penalty(terms.rate.sum())
        per_example = terms.kl.sum(dim=0)
        return terms.nll + self._capacity.penalty(per_example) * (len(per_example) / terms.examples)

    @property
    def weight(self) -> Tensor:
        return self._capacity.value.new_full((), self._capacity.gamma)


class HeldRate(Objective):
    """NLL + w * KL, the weight moved by a PI controller so that the rate is the target."""

    def __init__(self, options: KLOptions, control: schedules.PIController) -> None:
        super().__init__(options, {"pi": control})
        self._control = control

    def loss(self, terms: Terms) -> Tensor:
        return terms.nll + self._control.value * terms.kl.sum()

    @property
    def weight(self) -> Tensor:
        return self._control.value

    def step(self, nll: Tensor, rate: Tensor) -> None:
        self._control.step(rate)


class HeldReconstruction(Objective):
    """KL + lambda * (NLL - target), lambda moved by GECO so that the NLL is the target."""

    def __init__(self, options: KLOptions, control: schedules.GECO) -> None:
        super().__init__(options, {"geco": control})
        self._control = control

    def loss(self, terms: Terms) -> Tensor:
        return terms.kl.sum() + self._control.value * (terms.nll - self._control.target)

    @property
    def weight(self) -> Tensor:
        return 1.0 / self._control.value

    def step(self, nll: Tensor, rate: Tensor) -> None:
        self._control.step(nll)


class Reconstruction(Objective):
    """The NLL alone."""

    def __init__(self, options: KLOptions, device: torch.device | str) -> None:
        super().__init__(replace(options, free_bits=None), {})
        self._weight = torch.zeros((), device=device)

    def loss(self, terms: Terms) -> Tensor:
        return terms.nll

    @property
    def weight(self) -> Tensor:
        return self._weight


def build(
    config: ObjectiveConfig,
    options: KLOptions,
    *,
    text: bool,
    epochs: int,
    steps_per_epoch: int,
    data_dims: float,
    latent_dim: int,
    device: torch.device | str,
) -> Objective:
    """The objective of ``config``. ``options``: the process group; the rest of them comes from ``config``."""
    options = replace(options, group=config.group, balance=config.kl_balance)
    if config.capacity is not None:
        gamma = config.capacity_gamma or (1.0 if text else 1000.0)
        steps = math.ceil(config.capacity_epochs * steps_per_epoch)
        capacity = schedules.Capacity(config.capacity, steps, gamma=gamma, device=device)
        per_example = config.clamp == "sample"
        group = None if per_example else options.process_group
        return CapacityTarget(replace(options, per_example=per_example, process_group=group), capacity)
    if config.pi_target is not None:
        control = schedules.PIController(
            config.pi_target, kp=config.pi_kp, ki=config.pi_ki, high=config.pi_max, device=device
        )
        return HeldRate(options, control)
    if config.geco_target is not None:
        return HeldReconstruction(
            options, schedules.GECO(config.geco_target, speed=config.geco_speed, device=device)
        )
    floor: Schedule | None = None
    if config.free_bits is not None:
        if config.free_bits_decay_epochs is not None:
            ramp = math.ceil(config.free_bits_decay_epochs * steps_per_epoch)
            floor = schedules.FreeBits(config.free_bits, ramp=ramp, device=device)
        threshold = config.free_bits if floor is None else floor.value
        options = replace(options, free_bits=threshold, clamp=config.clamp, penalty=config.penalty)
    return Weighted(
        options,
        weight_schedule(config, epochs=epochs, steps_per_epoch=steps_per_epoch, device=device),
        floor=floor,
        scale_nll=1.0 if config.reconstruction == "sum" else 1.0 / data_dims,
        scale_kl=1.0 if config.kl == "sum" else 1.0 / latent_dim,
        balanced_below=config.beta if config.layer_balance else None,
    )


def weight_schedule(
    config: ObjectiveConfig, *, epochs: int, steps_per_epoch: int, device: torch.device | str | None = None
) -> Schedule:
    """How the weight gets to ``config.beta``."""
    anneal, beta = config.anneal, config.beta
    if anneal == "none":
        return Constant(beta, device=device)
    if anneal == "logistic":
        return schedules.Logistic(
            beta, rate=config.logistic_rate, midpoint=config.logistic_midpoint, device=device
        )
    length = config.anneal_epochs or _DEFAULT_EPOCHS.get(anneal, float(epochs))
    steps = math.ceil(length * steps_per_epoch)
    if anneal == "cyclical":
        return schedules.Cyclical(beta, steps, cycles=config.cycles, ramp=config.cycle_ramp, device=device)
    if anneal == "warmup":
        return schedules.Warmup(beta, hold=steps, device=device)
    ramp = schedules.Linear if anneal == "linear" else schedules.Cosine
    return ramp(beta, steps, device=device)
