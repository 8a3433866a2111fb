"""What is trained when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from vaekernels.training import models
from vaekernels.training.config import StrategyConfig
from vaekernels.training.objective import Objective, Reconstruction
from vaekernels.training.seeds import derive

if TYPE_CHECKING:
    from vaekernels.training.evaluate import Evaluation
    from vaekernels.training.loop import Trainer

__all__ = ["Aggressive", "Part", "Pretrained", "Strategy", "build"]

Part = Literal["all", "encoder", "decoder"]


class Strategy:
    """Everything in every step. What the loop asks of a strategy, and where others differ:"""

    trained: Part = "all"
    """The part of the model that an ordinary step changes."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def objective(self, epoch: int) -> Objective:
        """What is minimised in this epoch."""
        return self._objective

    def start_epoch(self, trainer: Trainer) -> None:
        """Before the first step of an epoch."""

    def before_step(self, trainer: Trainer) -> None:
        """Before an ordinary step; it may take steps of its own."""

    def end_epoch(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """After the evaluation that ends an epoch."""

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

    def before_step(self, trainer: Trainer) -> None:
        if not self.burning_in:
            return
        best, total = math.inf, 0.0
        for step in range(1, self._inner_steps + 1):
            total += trainer.update(trainer.batches.extra(self._drawn), "encoder").loss
            self._drawn += 1
            if step % self._check_every == 0:
                mean, total = total / self._check_every, 0.0
                if mean >= best:
                    return
                best = mean

    def end_epoch(self, trainer: Trainer, evaluation: Evaluation) -> None:
        if not self.burning_in:
            return
        information = evaluation.mi_lower.value
        if not math.isfinite(information):
            self.ignored += 1
            trainer.console.print(
                f"the mutual information is {information}: ignored ({self.ignored} so far), aggressive "
                "training goes on"
            )
            return
        self.burning_in = information >= self._information
        self._information = information
        if not self.burning_in:
            trainer.console.print(
                f"aggressive training ends: the mutual information fell to {information:.2f} nats"
            )

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
    """``epochs`` epochs of the NLL alone; then the decoder starts anew under the encoder that has learned to
    say something, and the objective's schedules begin (Li et al. 2019)."""

    def __init__(self, objective: Objective, *, epochs: int) -> None:
        super().__init__(objective)
        self._epochs = epochs
        self._reconstruction = Reconstruction(objective.options, objective.weight.device)

    def objective(self, epoch: int) -> Objective:
        return self._reconstruction if epoch < self._epochs else self._objective

    def start_epoch(self, trainer: Trainer) -> None:
        if trainer.progress.epoch != self._epochs:
            return
        decoder = trainer.model.decoder
        models.reset(decoder, derive(trainer.config.engine.seed, "decoder"))
        for parameter in decoder.parameters():
            trainer.optimizer.optimizer.state.pop(parameter, None)
        trainer.console.print("the encoder is pretrained: the decoder starts anew, the schedules begin")


def build(config: StrategyConfig, objective: Objective) -> Strategy:
    if config.aggressive:
        return Aggressive(objective, inner_steps=config.inner_steps, check_every=config.check_every)
    if config.pretrain_epochs:
        return Pretrained(objective, epochs=config.pretrain_epochs)
    return Strategy(objective)
