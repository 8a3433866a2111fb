"""What settings say to each other: combinations without sense are an error that names both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from vaekernels.training.config.schema import Config, ModelConfig, ObjectiveConfig
from vaekernels.training.data.base import Arrays, Data, Text
from vaekernels.training.errors import ConfigError

__all__ = ["SET_THE_WEIGHT", "check", "resolve"]

Chosen = Literal["auto", "bernoulli", "gaussian", "discretized-logistic", "categorical"]

SET_THE_WEIGHT = ("capacity", "pi_target", "geco_target")
_OF_THE_WEIGHT = (
    "beta", "anneal", "free_bits", "layer_balance", "tc_beta", "mi_weight", "reconstruction", "kl",
)  # fmt: skip

_CONV_FROM = 16  # pixels along the shorter side

_NEEDS = {
    # A setting that has no effect without another one.
    "objective.anneal_epochs": "objective.anneal",
    "objective.penalty": "objective.free_bits",
    "objective.free_bits_decay_epochs": "objective.free_bits",
    "objective.layer_balance": "objective.anneal",
    "objective.capacity_gamma": "objective.capacity",
    "objective.capacity_epochs": "objective.capacity",
    "objective.pi_kp": "objective.pi_target",
    "objective.pi_ki": "objective.pi_target",
    "objective.pi_max": "objective.pi_target",
    "objective.geco_speed": "objective.geco_target",
    "strategy.inner_steps": "strategy.aggressive",
    "strategy.check_every": "strategy.aggressive",
}

_NEEDS_VALUE = {
    # A setting that has an effect with one value of another one only.
    "objective.cycles": ("objective.anneal", "cyclical"),
    "objective.cycle_ramp": ("objective.anneal", "cyclical"),
    "objective.logistic_rate": ("objective.anneal", "logistic"),
    "objective.logistic_midpoint": ("objective.anneal", "logistic"),
    "objective.kl_balance": ("model.kind", "ladder"),
    "objective.layer_balance": ("model.kind", "ladder"),
    "model.top_dim": ("model.kind", "ladder"),
    "model.latent_channels": ("model.kind", "conv"),
}

_PARTS = "the parts are those of the KL of one latent layer to the prior N(0, I)"
_CLASH = (
    # Two settings that take away each other's meaning, and why.
    ("model.batch_norm", "model.kind", ("ladder", "linear"), "it scales mu against the prior N(0, I)"),
    ("model.delta", "model.kind", ("linear",), "its log-variances are what its theory is about"),
    ("objective.tc_beta", "model.kind", ("ladder",), _PARTS),
    ("objective.mi_weight", "model.kind", ("ladder",), _PARTS),
)


def check(config: Config) -> None:
    """ConfigError, naming both settings, if two of them make no sense together whatever the data."""
    for message in _problems(config):
        raise ConfigError(message)


def resolve(config: Config, data: Data) -> Config:
    """``config`` with every "auto" of the model decided for ``data``. ConfigError if they do not fit."""
    _check_batches(config, len(data.train))
    model = config.model
    kind = model.kind
    if isinstance(data, Text):
        kind = "gru" if kind == "auto" else kind
        if kind not in ("gru", "lstm"):
            raise ConfigError(f"model.kind {kind!r} is for images and vectors, data {data.name!r} is text")
        if model.likelihood not in ("auto", "categorical"):
            raise ConfigError(f"model.likelihood {model.likelihood!r} is not for text, as {data.name!r} is")
        resolved = replace(model, kind=kind, likelihood="categorical")
    else:
        assert isinstance(data, Arrays)
        if kind == "auto":
            kind = "conv" if data.is_image and min(data.shape[1:]) >= _CONV_FROM else "mlp"
        _check_arrays(replace(model, kind=kind), data)
        resolved = replace(model, kind=kind, likelihood=_likelihood(model, kind, data))
    if resolved.sigma is not None and resolved.likelihood != "gaussian":
        raise ConfigError(
            f"model.sigma is of the gaussian likelihood, model.likelihood is {resolved.likelihood!r}"
        )
    return replace(config, model=resolved)


def _problems(config: Config) -> Iterator[str]:
    objective, strategy = config.objective, config.strategy
    given = [name for name in SET_THE_WEIGHT if getattr(objective, name) is not None]
    if len(given) > 1:
        yield f"objective.{given[0]} and objective.{given[1]} each set the weight of the KL; choose one"
    for name in _OF_THE_WEIGHT:
        if given and getattr(objective, name) != getattr(ObjectiveConfig(), name):
            yield (
                f"objective.{name} has no meaning with objective.{given[0]}, which by itself sets how much "
                f"the KL counts"
            )
    for name, needed in _NEEDS.items():
        if _changed(config, name) and not _changed(config, needed):
            yield f"{name} has no effect without {needed}"
    for name, (needed, value) in _NEEDS_VALUE.items():
        if _changed(config, name) and _value(config, needed) != value:
            yield f"{name} is for {needed} {value!r}, which is {_value(config, needed)!r}"
    for name, other, values, reason in _CLASH:
        if _changed(config, name) and _value(config, other) in values:
            yield f"{name} does not go with {other} {_value(config, other)!r}: {reason}"
    if objective.clamp != "batch" and objective.free_bits is None and objective.capacity is None:
        yield "objective.clamp has no effect without objective.free_bits or objective.capacity"
    if objective.group != "dim" and objective.free_bits is None:
        yield "objective.group has no effect without objective.free_bits"
    if (objective.group == "channel") and config.model.latent_channels is None:
        yield "objective.group 'channel' is for latents with positions: set model.latent_channels"
    for name in ("tc_beta", "mi_weight"):
        if getattr(objective, name) is not None and config.optim.batch_size < 2:
            yield f"objective.{name} compares examples of a batch: optim.batch_size must be at least 2, got 1"
    if strategy.aggressive and strategy.pretrain_epochs:
        yield "strategy.aggressive and strategy.pretrain_epochs are two strategies; choose one"
    if strategy.pretrain_epochs >= config.optim.epochs:
        yield (
            f"strategy.pretrain_epochs {strategy.pretrain_epochs} leaves nothing of optim.epochs "
            f"{config.optim.epochs} for the training that follows"
        )
    if config.engine.devices > config.optim.batch_size:
        yield (
            f"optim.batch_size {config.optim.batch_size} is spread over engine.devices "
            f"{config.engine.devices}: give at least one example to each"
        )
    if config.engine.devices > 1 and config.model.batch_norm is not None and config.engine.device == "cpu":
        yield "model.batch_norm over several engine.devices needs GPUs: torch averages its means only there"


def _check_batches(config: Config, examples: int) -> None:
    """A variance needs two examples in every batch: those of an epoch are equal but for one example. Those of
    a latent with positions are over its positions as well."""
    model, asked = config.model, config.optim.batch_size
    smallest = examples // math.ceil(examples / asked) if examples else asked
    if model.batch_norm is not None and model.latent_channels is None and smallest < 2:
        raise ConfigError(
            f"model.batch_norm needs 2 examples in every batch: with optim.batch_size {asked} the "
            f"{examples:,} training examples make batches of one; set optim.batch_size to "
            f"{max(3, asked + 1)} or more"
        )


def _check_arrays(model: ModelConfig, data: Arrays) -> None:
    if model.kind in ("gru", "lstm"):
        raise ConfigError(f"model.kind {model.kind!r} is for text, data {data.name!r} is {data.described}")
    if model.kind in ("conv", "row-gru") and not data.is_image:
        raise ConfigError(f"model.kind {model.kind!r} is for images, data {data.name!r} is {data.described}")
    if model.kind == "conv" and min(data.shape[1:]) < 4:
        raise ConfigError(
            f"model.kind 'conv' needs images of 4x4 and more, data {data.name!r} is {data.described}"
        )
    if model.word_dropout:
        raise ConfigError(f"model.word_dropout is for text, data {data.name!r} is {data.described}")


def _likelihood(model: ModelConfig, kind: str, data: Arrays) -> Chosen:
    chosen = model.likelihood
    if chosen == "auto":
        if data.levels is None or kind == "linear":
            chosen = "gaussian"
        else:
            chosen = "bernoulli" if data.levels == 2 else "discretized-logistic"
    if kind == "linear" and chosen != "gaussian":
        raise ConfigError(f"model.kind 'linear' needs model.likelihood 'gaussian', got {chosen!r}")
    if data.levels is None and chosen in ("discretized-logistic", "categorical"):
        raise ConfigError(f"model.likelihood {chosen!r} is for whole numbers, data {data.name!r} is real")
    if data.levels is None and chosen == "bernoulli":
        _require_binary(data)
    if data.levels not in (None, 2) and chosen == "bernoulli":
        raise ConfigError(
            f"model.likelihood 'bernoulli' is for data of two values, data {data.name!r} has "
            f"{data.levels}: set data.binarize, or choose another likelihood"
        )
    return chosen


def _require_binary(data: Arrays) -> None:
    for split, x in (("training", data.train), ("held-out", data.heldout)):
        other = ((x != 0) & (x != 1)).flatten(1).any(dim=1)
        if bool(other.any()):
            row = int(torch.nonzero(other)[0])
            raise ConfigError(
                f"model.likelihood 'bernoulli' is for zeros and ones, data {data.name!r} has other values "
                f"(first in {split} example {row}): grey values have no probability under it; use "
                f"gaussian, or save them as uint8"
            )


def _value(config: Config, name: str) -> object:
    table, _, key = name.partition(".")
    return getattr(getattr(config, table), key)


def _changed(config: Config, name: str) -> bool:
    """Whether the setting is not at its default."""
    table, _, key = name.partition(".")
    defaults = {f.name: f.default for f in dataclasses.fields(getattr(config, table))}
    return bool(_value(config, name) != defaults[key])
