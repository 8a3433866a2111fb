"""What is trained when."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from vaekernels.training import models, objectives
from vaekernels.training.config import Config, StrategyConfig
from vaekernels.training.data import Batches
from vaekernels.training.models import VAE
from vaekernels.training.objectives import Objective, Reconstruction, Task
from vaekernels.training.progress import Step
from vaekernels.training.seeds import derive

__all__ = ["Aggressive", "Part", "Pretrained", "Strategy", "Update", "build", "describe"]

Part = Literal["all", "encoder", "decoder"]
Update = Callable[[Tensor, Part], Step]
"""One step on a batch (indices of its examples) that changes a part of the model."""


class Strategy:
    """Everything in every step. What the trainer asks of a strategy, and where others differ:"""

    trained: Part = "all"
    """The part of the model that an ordinary step changes."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def objective(self, epoch: int) -> Objective:
        """What is minimised in this epoch."""
        return self._objective

    def start_epoch(self, epoch: int, model: VAE, optimizer: Optimizer) -> str | None:
        """Before the first step of an epoch. Returns what the user should know of it."""
        return None

    def before_step(self, update: Update, batches: Batches) -> None:
        """Before an ordinary step; it may take steps of its own."""

    def end_epoch(self, information: float) -> str | None:
        """After an epoch. ``information``: the lower bound on I(x; z) on held-out data, nats. Returns what
        the user should know of it."""
        return None

    def describe(self) -> list[str]:
        """What it does against collapse, in words."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state != {}:
            raise ValueError(f"the strategy has no state, got {dict(state)!r}")


class Aggressive(Strategy):
    """The encoder catches up before every step of the decoder, as long as that tells it something (He et al.
    2019, "Lagging Inference Networks").

    An ordinary step changes the decoder alone, after up to ``inner_steps`` steps of the encoder alone on
    batches of their own, which end when their mean loss over ``check_every`` of them no longer falls. All of
    this ends after the first epoch in which the mutual information of x and z on held-out data is lower than
    in the one before. An information that is not finite is ignored, and counted in ``ignored``.
    """

    def __init__(self, objective: Objective, *, inner_steps: int, check_every: int) -> None:
        super().__init__(objective)
        self._inner_steps, self._check_every = inner_steps, check_every
        self._drawn = 0  # batches of the encoder's own
        self._information = -math.inf
        self.burning_in = True
        self.ignored = 0

    @property
    def trained(self) -> Part:  # type: ignore[override]
        return "decoder" if self.burning_in else "all"

    def before_step(self, update: Update, batches: Batches) -> None:
        if not self.burning_in:
            return
        best, total = math.inf, 0.0
        for step in range(1, self._inner_steps + 1):
            total += update(batches.extra(self._drawn), "encoder").loss
            self._drawn += 1
            if step % self._check_every == 0:
                mean, total = total / self._check_every, 0.0
                if mean >= best:
                    return
                best = mean

    def end_epoch(self, information: float) -> str | None:
        if not self.burning_in:
            return None
        if not math.isfinite(information):
            self.ignored += 1
            return (
                f"the mutual information is {information}: ignored ({self.ignored} so far), aggressive "
                "training goes on"
            )
        self.burning_in = information >= self._information
        self._information = information
        if self.burning_in:
            return None
        return f"aggressive training ends: the mutual information fell to {information:.2f} nats"

    def describe(self) -> list[str]:
        return [f"aggressive encoder: up to {self._inner_steps} steps of its own before each step"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": self._drawn,
            "information": self._information,
            "burning_in": self.burning_in,
            "ignored": self.ignored,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drawn = int(state["drawn"])
        self._information = float(state["information"])
        self.burning_in = bool(state["burning_in"])
        self.ignored = int(state["ignored"])


class Pretrained(Strategy):
    """``epochs`` epochs of the NLL alone; then the decoder starts anew, initialised from ``seed``, under the
    encoder that has learned to say something, and the objective's schedules begin (Li et al. 2019)."""

    def __init__(self, objective: Objective, *, epochs: int, seed: int) -> None:
        super().__init__(objective)
        self._epochs, self._seed = epochs, seed
        self._reconstruction = Reconstruction(objective)

    def objective(self, epoch: int) -> Objective:
        return self._reconstruction if epoch < self._epochs else self._objective

    def start_epoch(self, epoch: int, model: VAE, optimizer: Optimizer) -> str | None:
        if epoch != self._epochs:
            return None
        models.reset(model.decoder, derive(self._seed, "decoder"))
        for parameter in model.decoder.parameters():
            optimizer.state.pop(parameter, None)
        return "the encoder is pretrained: the decoder starts anew, the schedules begin"

    def describe(self) -> list[str]:
        return [f"first {self._epochs} epochs at weight 0, then a new decoder"]


def build(config: StrategyConfig, objective: Objective, *, seed: int) -> Strategy:
    if config.aggressive:
        return Aggressive(objective, inner_steps=config.inner_steps, check_every=config.check_every)
    if config.pretrain_epochs:
        return Pretrained(objective, epochs=config.pretrain_epochs, seed=seed)
    return Strategy(objective)


def describe(config: Config, task: Task) -> list[str]:
    """The whole training in words, as :meth:`Objective.describe`."""
    objective = objectives.build(config.objective, task)
    strategy = build(config.strategy, objective, seed=config.engine.seed)
    return [*objective.describe(), *models.describe(config.model), *strategy.describe()]
