"""The models of the reference trainer, made from settings and data."""

from __future__ import annotations

import os

import torch

from vaekernels.training.config import ModelConfig
from vaekernels.training.data.base import Arrays, Data, Text
from vaekernels.training.errors import ConfigError
from vaekernels.training.models.base import VAE, ArrayVAE, LatentLayer, Sample, reset
from vaekernels.training.models.conv import ConvVAE
from vaekernels.training.models.ladder import LadderVAE
from vaekernels.training.models.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
)
from vaekernels.training.models.mlp import MLPVAE, LinearVAE
from vaekernels.training.models.posterior import Posterior, committed, largest_logvar, widened
from vaekernels.training.models.row_gru import RowGRUVAE
from vaekernels.training.models.standardized import Standardized
from vaekernels.training.models.text import TextVAE

__all__ = [
    "MLPVAE",
    "VAE",
    "Bernoulli",
    "Categorical",
    "ConvVAE",
    "DiscretizedLogistic",
    "Gaussian",
    "LadderVAE",
    "LatentLayer",
    "Likelihood",
    "LinearVAE",
    "Posterior",
    "RowGRUVAE",
    "Sample",
    "TextVAE",
    "build",
    "committed",
    "describe",
    "largest_logvar",
    "reset",
    "widened",
]

_BYTES = 16  # of a parameter in training: itself, its gradient and Adam's two averages, in float32


def build(config: ModelConfig, data: Data) -> VAE:
    """A freshly initialised model for ``data``; draws from torch's default generator. ``config`` has passed
    :func:`vaekernels.training.config.combinations.resolve`, which takes the place of every "auto".
    ConfigError if the machine has too little memory to train it: nothing is allocated before."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in _build(config, data).parameters())
    needed, there = parameters * _BYTES, _memory()
    if there is not None and needed > there:
        raise ConfigError(
            f"the model has {parameters:,} parameters, which take {needed / 2**30:,.0f} GiB in training; "
            f"this machine has {there / 2**30:,.0f}; make model.hidden ({config.hidden}) or another size "
            f"smaller"
        )
    model = _build(config, data)
    if isinstance(model, ArrayVAE | LadderVAE) and len(data.train):
        likelihood = model.decoder.likelihood
        if isinstance(likelihood, Gaussian) and likelihood.columns is not None:
            likelihood.columns.fit(data.train, torch.Tensor.float)
        model.inputs.fit(data.train, likelihood.features)
    return model


def describe(config: ModelConfig) -> list[str]:
    """What the model does against collapse by its construction, a line each."""
    lines: list[str] = []
    if config.delta is not None:
        lines.append(f"log-variances bounded: at least {config.delta:g} nats in every dimension")
    if config.batch_norm is not None:
        lines.append(f"mu batch-normalised to scale {config.batch_norm:g}")
    if config.word_dropout:
        lines.append(f"word dropout: {config.word_dropout:g} of the decoder's input words are hidden")
    return lines


def _memory() -> int | None:
    """Bytes that the machine has, where the system tells."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _build(config: ModelConfig, data: Data) -> VAE:
    def posterior(dims: int) -> Posterior:
        return Posterior(dims, delta=config.delta, batch_norm=config.batch_norm)

    if isinstance(data, Text):
        return TextVAE(
            config.kind,
            len(data.vocabulary),
            posterior(config.latent_dim),
            latent_dim=config.latent_dim,
            hidden=config.hidden,
            embedding=config.embedding,
            word_dropout=config.word_dropout,
        )
    assert isinstance(data, Arrays)
    likelihood, dims, hidden = _likelihood(config, data), config.latent_dim, config.hidden
    if config.kind == "conv":
        return ConvVAE(
            data.shape,
            likelihood,
            posterior,
            latent_dim=dims,
            latent_channels=config.latent_channels,
            hidden=hidden,
        )
    if config.kind == "ladder":
        upper = config.top_dim or (dims + 1) // 2
        return LadderVAE(data.shape, likelihood, posterior(upper), lower=dims, upper=upper, hidden=hidden)
    if config.kind == "linear":
        assert isinstance(likelihood, Gaussian)
        return LinearVAE(data.shape, likelihood, latent_dim=dims)
    kind = RowGRUVAE if config.kind == "row-gru" else MLPVAE
    return kind(data.shape, likelihood, posterior(dims), latent_dim=dims, hidden=hidden)


def _likelihood(config: ModelConfig, data: Arrays) -> Likelihood:
    if config.likelihood == "gaussian":
        return Gaussian(data.levels, config.sigma, Standardized(data.shape) if data.standardize else None)
    if config.likelihood == "bernoulli":
        return Bernoulli(data.levels)
    assert data.levels is not None
    return (
        Categorical(data.levels) if config.likelihood == "categorical" else DiscretizedLogistic(data.levels)
    )
