"""The objective in words, before training: what is minimised, and what beta means in it."""

from __future__ import annotations

from vaekernels.schedules import Constant, Logistic, Schedule
from vaekernels.training.config import Config, ObjectiveConfig
from vaekernels.training.objectives import weight_schedule

__all__ = ["describe", "effective_beta", "mismatch"]


def describe(config: Config, *, latent_dim: int, data_dims: float, steps_per_epoch: int) -> list[str]:
    """A line for the loss, one for the weight, and one for everything else that is done against collapse."""
    objective, model, strategy = config.objective, config.model, config.strategy
    lines = [_loss(objective, latent_dim, data_dims), _weight(config, latent_dim, data_dims, steps_per_epoch)]
    if objective.free_bits is not None:
        lines.append(_floor(objective, latent_dim))
    if objective.kl_balance is not None:
        lines.append(f"KL balancing: {objective.kl_balance:g} of the gradient goes to the learned prior")
    if objective.layer_balance:
        lines.append("while the weight rises, every layer's KL counts in proportion to itself")
    if model.delta is not None:
        lines.append(f"log-variances bounded: at least {model.delta:g} nats in every dimension")
    if model.batch_norm is not None:
        lines.append(f"mu batch-normalised to scale {model.batch_norm:g}")
    if model.word_dropout:
        lines.append(f"word dropout: {model.word_dropout:g} of the decoder's input words are hidden")
    if strategy.aggressive:
        lines.append(f"aggressive encoder: up to {strategy.inner_steps} steps of its own before each step")
    if strategy.pretrain_epochs:
        lines.append(f"first {strategy.pretrain_epochs} epochs at weight 0, then a new decoder")
    return lines


def mismatch(objective: ObjectiveConfig, *, latent_dim: int, data_dims: float) -> str | None:
    """A warning where the two terms are reduced in different ways, with the setting that undoes it."""
    factor = _factor(objective, latent_dim, data_dims)
    if factor == 1.0:
        return None
    return (
        f"warning: the reconstruction is a {objective.reconstruction} over {data_dims:.4g} data dims, the KL "
        f"a {objective.kl} over {latent_dim} latent dims, so beta {objective.beta:g} acts like "
        f"{objective.beta * factor:g}; with both as sums, objective.beta={objective.beta * factor:g} says so"
    )


def effective_beta(objective: ObjectiveConfig, *, latent_dim: int, data_dims: float) -> float | None:
    """The final weight of a KL that is a sum beside an NLL that is one; None where a controller or a capacity
    sets it as training goes."""
    moving = (objective.capacity, objective.pi_target, objective.geco_target)
    if any(target is not None for target in moving):
        return None
    return objective.beta * _factor(objective, latent_dim, data_dims)


def _factor(objective: ObjectiveConfig, latent_dim: int, data_dims: float) -> float:
    """Effective beta / beta."""
    factor = data_dims if objective.reconstruction == "mean" else 1.0
    return factor / latent_dim if objective.kl == "mean" else factor


def _loss(objective: ObjectiveConfig, latent_dim: int, data_dims: float) -> str:
    kl = f"KL ({objective.kl} over {latent_dim} latent dims)"
    nll = f"NLL ({objective.reconstruction} over {data_dims:.4g} data dims)"
    if objective.capacity is not None:
        return f"loss = {nll} + gamma * |{kl} - C|, nats"
    if objective.geco_target is not None:
        return f"loss = {kl} + lambda * ({nll} - {objective.geco_target:g}), nats"
    return f"loss = {nll} + weight * {kl}, nats"


def _weight(config: Config, latent_dim: int, data_dims: float, steps_per_epoch: int) -> str:
    objective = config.objective
    if objective.capacity is not None:
        end = f"C: 0 to {objective.capacity:g} nats over {objective.capacity_epochs:g} epochs"
        return f"{end}; effective beta = gamma where the rate is above C, -gamma below"
    if objective.pi_target is not None:
        return (
            f"weight: by a PI controller that holds the rate at {objective.pi_target:g} nats; effective beta "
            f"= the weight, 0 to {objective.pi_max:g}"
        )
    if objective.geco_target is not None:
        return "lambda: by GECO, which holds the NLL at its target; effective beta = 1 / lambda"
    epochs = config.optim.epochs - config.strategy.pretrain_epochs
    schedule = weight_schedule(objective, epochs=epochs, steps_per_epoch=steps_per_epoch)
    effective = objective.beta * _factor(objective, latent_dim, data_dims)
    text = f"weight: {_course(objective, schedule)}, so effective beta = {effective:g}"
    last = schedule.at(epochs * steps_per_epoch)
    if last < 0.99 * objective.beta:
        text += f" (only {last / objective.beta:.2g} of it when the run ends)"
    return text


def _course(objective: ObjectiveConfig, schedule: Schedule) -> str:
    beta = f"{objective.beta:g}"
    if isinstance(schedule, Constant):
        return f"{beta} throughout"
    if isinstance(schedule, Logistic):
        return f"logistic to {beta}, half of it at step {schedule.midpoint:g}"
    if objective.anneal == "warmup":
        return f"0 for {getattr(schedule, 'hold', 0)} steps, then {beta}"
    steps = getattr(schedule, "steps", 0)
    if objective.anneal == "cyclical":
        return f"{objective.cycles} times 0 to {beta} in {steps} steps"
    shape = {"linear": "linearly", "cosine": "as a cosine"}[objective.anneal]
    return f"0 to {beta} {shape} over {steps} steps"


def _floor(objective: ObjectiveConfig, latent_dim: int) -> str:
    assert objective.free_bits is not None
    groups = {
        "dim": f"per dimension ({objective.free_bits * latent_dim:g} in all)",
        "channel": "per channel",
        "all": "for all dimensions of a layer",
    }[objective.group]
    moment = "after" if objective.clamp == "batch" else "before"
    text = f"free bits: {objective.free_bits:g} nats {groups}, {objective.penalty}, {moment} the batch mean"
    if objective.free_bits_decay_epochs is not None:
        text += f", falling to 0 over {objective.free_bits_decay_epochs:g} epochs"
    return text
