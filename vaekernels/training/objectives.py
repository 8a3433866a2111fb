"""What is minimised: one class for each way of weighing the KL. It states its loss, the schedules that move
it, its latent layers, and all of this in words."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vaekernels import schedules
from vaekernels.schedules import Constant, Controller, Schedule
from vaekernels.training.config import Config, ObjectiveConfig
from vaekernels.training.data import Batches, Data, Text
from vaekernels.training.latents import LatentOptions, Terms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Objective", "Reconstruction", "Task", "build", "weight_schedule"]

_DEFAULT_EPOCHS = {"linear": 10.0, "cosine": 10.0, "warmup": 1.0}


@dataclass(frozen=True)
class Task:
    """What an objective has to know of the run. ``epochs``: those in which its schedules move;
    ``data_dims``: of an example, in the mean; ``examples``: of the training data."""

    text: bool
    data_dims: float
    latent_dim: int
    examples: int
    epochs: int
    steps_per_epoch: int
    device: torch.device | str = "cpu"
    process_group: ProcessGroup | None = None

    @classmethod
    def of(cls, config: Config, data: Data, latent_dim: int) -> Task:
        return cls(
            text=isinstance(data, Text),
            data_dims=data.dims,
            latent_dim=latent_dim,
            examples=len(data.train),
            epochs=config.optim.epochs - config.strategy.pretrain_epochs,
            steps_per_epoch=len(Batches(data, batch_size=config.optim.batch_size, seed=config.engine.seed)),
        )


class Objective(ABC):
    """A loss with the schedules that move it. ``step`` belongs after the optimiser's step, with the means
    over all processes; evaluation calls neither.

    ``options``: of the latent layers that it needs. ``moving``: its schedules and controllers, whose state is
    its own.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        task: Task,
        moving: Mapping[str, Schedule | Controller],
        **options: Any,
    ) -> None:
        self.config, self.task = config, task
        self.moving = dict(moving)
        common = {"group": config.group, "balance": config.kl_balance, "process_group": task.process_group}
        self.options = LatentOptions(**common | options)

    @abstractmethod
    def loss(self, terms: Terms) -> Tensor: ...

    def kl(self, terms: Terms) -> Tensor:
        """The KL as the loss has it, before its weight, mean over the batch, 0-dim."""
        return terms.kl.sum()

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight of the KL where that of the NLL (a sum over data dimensions) is 1, 0-dim."""

    @property
    def effective_beta(self) -> float | None:
        """The last weight, known before training; None where it is set as training goes."""
        return None

    @property
    def warning(self) -> str | None:
        """What may not be meant, before training."""
        return None

    def describe(self) -> list[str]:
        """In words, before training: a line for the loss, one for the weight of the KL, and one for
        everything else that is done against collapse."""
        if self.config.kl_balance is None:
            return []
        return [f"KL balancing: {self.config.kl_balance:g} of the gradient goes to the learned prior"]

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

    def _nll_in_words(self) -> str:
        return f"NLL ({self.config.reconstruction} over {round(self.task.data_dims, 1):,.9g} data dims)"

    def _kl_in_words(self) -> str:
        return f"KL ({self.config.kl} over {self.task.latent_dim} latent dims)"


class Weighted(Objective):
    """scale_nll * NLL + scale_kl * w(t) * KL, the KL with free bits or without, and with its parts weighed:
    KL + (tc_beta - 1) total correlation + (mi_weight - 1) I(x; z)."""

    def __init__(self, config: ObjectiveConfig, task: Task) -> None:
        self._weight = weight_schedule(config, task)
        self._scale_nll = 1.0 if config.reconstruction == "sum" else 1.0 / task.data_dims
        self._scale_kl = 1.0 if config.kl == "sum" else 1.0 / task.latent_dim
        moving = {"weight": self._weight}
        free_bits: float | Schedule | None = config.free_bits
        if config.free_bits is not None and config.free_bits_decay_epochs is not None:
            ramp = math.ceil(config.free_bits_decay_epochs * task.steps_per_epoch)
            free_bits = schedules.FreeBits(config.free_bits, ramp=ramp, device=task.device)
            moving["free_bits"] = free_bits
        weighed = config.tc_beta is not None or config.mi_weight is not None
        super().__init__(
            config,
            task,
            moving,
            free_bits=free_bits,
            clamp=config.clamp,
            penalty=config.penalty,
            examples=task.examples if weighed else None,
        )

    def loss(self, terms: Terms) -> Tensor:
        return self._scale_nll * terms.nll + self._scale_kl * self._weight.value * self.kl(terms)

    def kl(self, terms: Terms) -> Tensor:
        kl = terms.kl
        if self.config.layer_balance:
            # Layers count in proportion to their own KL while the weight rises (Vahdat & Kautz 2020, without
            # their factor for the size of a layer).
            share = terms.rate.detach() / terms.rate.detach().mean().clamp(min=1e-12)
            kl = kl * torch.where(self._weight.value < self.config.beta, share, torch.ones_like(share))
        total = kl.sum()
        if terms.parts is not None:
            # The KL itself is exact; what is added to it is estimated from the batch.
            if self.config.tc_beta is not None:
                total = total + (self.config.tc_beta - 1.0) * terms.parts.total_correlation
            if self.config.mi_weight is not None:
                total = total + (self.config.mi_weight - 1.0) * terms.parts.mutual_information
        return total

    @property
    def weight(self) -> Tensor:
        return self._weight.value * (self._scale_kl / self._scale_nll)

    @property
    def effective_beta(self) -> float:
        return self.config.beta * self._factor

    @property
    def warning(self) -> str | None:
        """Where the two terms are reduced in different ways, with the setting that undoes it."""
        if self._factor == 1.0:
            return None
        config = self.config
        return (
            f"warning: the reconstruction is a {config.reconstruction} over "
            f"{round(self.task.data_dims, 1):,.9g} data dims, the KL a {config.kl} over "
            f"{self.task.latent_dim} latent dims, so beta {config.beta:g} acts like "
            f"{self.effective_beta:g}; with both as sums, objective.beta={self.effective_beta:g} "
            f"says so"
        )

    def describe(self) -> list[str]:
        config, task = self.config, self.task
        weight = f"weight: {self._course()}, so effective beta = {self.effective_beta:g}"
        last = self._weight.at(task.epochs * task.steps_per_epoch)
        if last < 0.99 * config.beta:
            weight += f" (only {last / config.beta:.2g} of it when the run ends)"
        lines = [f"loss = {self._nll_in_words()} + weight * {self._kl_in_words()}, nats", weight]
        if config.free_bits is not None:
            lines.append(self._floor(config.free_bits))
        if config.layer_balance:
            lines.append("while the weight rises, every layer's KL counts in proportion to itself")
        parts = {"total correlation": config.tc_beta, "information I(x; z)": config.mi_weight}
        said = [f"its {name} {weight:g} times" for name, weight in parts.items() if weight is not None]
        if said:
            lines.append(f"of the KL counts {', '.join(said)}, by the stratified estimate of a batch")
        return [*lines, *super().describe()]

    @property
    def _factor(self) -> float:
        """Effective beta / beta."""
        factor = self.task.data_dims if self.config.reconstruction == "mean" else 1.0
        return factor / self.task.latent_dim if self.config.kl == "mean" else factor

    def _course(self) -> str:
        schedule, beta = self._weight, f"{self.config.beta:g}"
        if isinstance(schedule, Constant):
            return f"{beta} throughout"
        if isinstance(schedule, schedules.Logistic):
            return f"logistic to {beta}, half of it at step {schedule.midpoint:g}"
        if isinstance(schedule, schedules.Warmup):
            return f"0 for {schedule.hold} steps, then {beta}"
        if isinstance(schedule, schedules.Cyclical):
            return f"{schedule.cycles} times 0 to {beta} in {schedule.steps} steps"
        assert isinstance(schedule, schedules.Linear | schedules.Cosine)
        shape = "linearly" if isinstance(schedule, schedules.Linear) else "as a cosine"
        return f"0 to {beta} {shape} over {schedule.steps} steps"

    def _floor(self, free_bits: float) -> str:
        config = self.config
        groups = {
            "dim": f"per dimension ({free_bits * self.task.latent_dim:g} in all)",
            "channel": "per channel",
            "all": "for all dimensions of a layer",
        }[config.group]
        moment = "after" if config.clamp == "batch" else "before"
        text = f"free bits: {free_bits:g} nats {groups}, {config.penalty}, {moment} the batch mean"
        if config.free_bits_decay_epochs is not None:
            text += f", falling to 0 over {config.free_bits_decay_epochs:g} epochs"
        return text


class CapacityTarget(Objective):
    """NLL + gamma * |rate - C(t)|, or the mean over examples of |KL - C(t)|."""

    def __init__(self, config: ObjectiveConfig, task: Task) -> None:
        assert config.capacity is not None
        gamma = config.capacity_gamma or (1.0 if task.text else 1000.0)
        steps = math.ceil(config.capacity_epochs * task.steps_per_epoch)
        self._capacity = schedules.Capacity(config.capacity, steps, gamma=gamma, device=task.device)
        moving = {"capacity": self._capacity}
        if config.clamp == "sample":  # each process has its own examples
            super().__init__(config, task, moving, per_example=True, process_group=None)
        else:
            super().__init__(config, task, moving)

    def loss(self, terms: Terms) -> Tensor:
        if not self.options.per_example:
            return terms.nll + self._capacity.penalty(terms.rate.sum())
        per_example = terms.kl.sum(dim=0)
        return terms.nll + self._capacity.penalty(per_example) * (len(per_example) / terms.examples)

    def kl(self, terms: Terms) -> Tensor:
        return terms.rate.sum()

    @property
    def weight(self) -> Tensor:
        return self._capacity.value.new_full((), self._capacity.gamma)

    def describe(self) -> list[str]:
        end = f"C: 0 to {self._capacity.final:g} nats over {self.config.capacity_epochs:g} epochs"
        return [
            f"loss = {self._nll_in_words()} + gamma * |{self._kl_in_words()} - C|, nats",
            f"{end}; effective beta = gamma where the rate is above C, -gamma below",
            *super().describe(),
        ]


class HeldRate(Objective):
    """NLL + w * KL, the weight moved by a PI controller so that the rate is the target."""

    def __init__(self, config: ObjectiveConfig, task: Task) -> None:
        assert config.pi_target is not None
        self._control = schedules.PIController(
            config.pi_target, kp=config.pi_kp, ki=config.pi_ki, high=config.pi_max, device=task.device
        )
        super().__init__(config, task, {"pi": self._control})

    def loss(self, terms: Terms) -> Tensor:
        return terms.nll + self._control.value * terms.kl.sum()

    @property
    def weight(self) -> Tensor:
        return self._control.value

    def describe(self) -> list[str]:
        return [
            f"loss = {self._nll_in_words()} + weight * {self._kl_in_words()}, nats",
            f"weight: by a PI controller that holds the rate at {self.config.pi_target:g} nats; effective "
            f"beta = the weight, 0 to {self.config.pi_max:g}",
            *super().describe(),
        ]

    def step(self, nll: Tensor, rate: Tensor) -> None:
        self._control.step(rate)


class HeldReconstruction(Objective):
    """KL + lambda * (NLL - target), lambda moved by GECO so that the NLL is the target."""

    def __init__(self, config: ObjectiveConfig, task: Task) -> None:
        assert config.geco_target is not None
        self._control = schedules.GECO(config.geco_target, speed=config.geco_speed, device=task.device)
        super().__init__(config, task, {"geco": self._control})

    def loss(self, terms: Terms) -> Tensor:
        return terms.kl.sum() + self._control.value * (terms.nll - self._control.target)

    @property
    def weight(self) -> Tensor:
        return 1.0 / self._control.value

    def describe(self) -> list[str]:
        return [
            f"loss = {self._kl_in_words()} + lambda * ({self._nll_in_words()} - {self._control.target:g}), "
            "nats",
            "lambda: by GECO, which holds the NLL at its target; effective beta = 1 / lambda",
            *super().describe(),
        ]

    def step(self, nll: Tensor, rate: Tensor) -> None:
        self._control.step(nll)


class Reconstruction(Objective):
    """The NLL alone, before the training for ``later``, which the latent layers are for."""

    def __init__(self, later: Objective) -> None:
        super().__init__(later.config, later.task, {})
        self._weight = torch.zeros((), device=later.task.device)

    def loss(self, terms: Terms) -> Tensor:
        return terms.nll

    def kl(self, terms: Terms) -> Tensor:
        return terms.rate.sum()

    @property
    def weight(self) -> Tensor:
        return self._weight


_OF_A_SETTING: dict[str, Callable[[ObjectiveConfig, Task], Objective]] = {
    "capacity": CapacityTarget,
    "pi_target": HeldRate,
    "geco_target": HeldReconstruction,
}


def build(config: ObjectiveConfig, task: Task) -> Objective:
    """That of the setting that is given, else ``Weighted``."""
    for setting, kind in _OF_A_SETTING.items():
        if getattr(config, setting) is not None:
            return kind(config, task)
    return Weighted(config, task)


def weight_schedule(config: ObjectiveConfig, task: Task) -> Schedule:
    """How the weight gets to ``config.beta``."""
    anneal, beta, device = config.anneal, config.beta, task.device
    if anneal == "none":
        return Constant(beta, device=device)
    if anneal == "logistic":
        return schedules.Logistic(
            beta, rate=config.logistic_rate, midpoint=config.logistic_midpoint, device=device
        )
    length = config.anneal_epochs or _DEFAULT_EPOCHS.get(anneal, float(task.epochs))
    steps = math.ceil(length * task.steps_per_epoch)
    if anneal == "cyclical":
        return schedules.Cyclical(beta, steps, cycles=config.cycles, ramp=config.cycle_ramp, device=device)
    if anneal == "warmup":
        return schedules.Warmup(beta, hold=steps, device=device)
    ramp = schedules.Linear if anneal == "linear" else schedules.Cosine
    return ramp(beta, steps, device=device)
