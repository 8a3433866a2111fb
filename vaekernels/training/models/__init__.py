"""The models of the reference trainer, made from settings and data."""

from __future__ import annotations

from vaekernels.training.config import ModelConfig
from vaekernels.training.data.base import Arrays, Data, Text
from vaekernels.training.models.base import VAE, Sample, reset
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
    "Likelihood",
    "LinearVAE",
    "Posterior",
    "RowGRUVAE",
    "Sample",
    "TextVAE",
    "build",
    "committed",
    "largest_logvar",
    "reset",
    "widened",
]


def build(config: ModelConfig, data: Data) -> VAE:
    """A freshly initialised model for ``data``; draws from torch's default generator. ``config`` has passed
    :func:`vaekernels.training.combinations.resolve`, which takes the place of every "auto"."""

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
        return Gaussian(data.levels, config.sigma)
    if config.likelihood == "bernoulli":
        return Bernoulli(data.levels)
    assert data.levels is not None
    return (
        Categorical(data.levels) if config.likelihood == "categorical" else DiscretizedLogistic(data.levels)
    )
