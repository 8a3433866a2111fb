"""The models of the reference trainer, chosen by the kind of data."""

from __future__ import annotations

from vaekernels.training.config import ModelConfig
from vaekernels.training.data.base import Data, Images, Text
from vaekernels.training.models.base import ELBO, VAE, Terms
from vaekernels.training.models.image import MLPImageVAE
from vaekernels.training.models.text import GRUTextVAE

__all__ = ["ELBO", "VAE", "GRUTextVAE", "MLPImageVAE", "Terms", "build"]


def build(config: ModelConfig, data: Data) -> VAE:
    """A freshly initialised model for ``data``; draws from torch's default generator."""
    if isinstance(data, Text):
        return GRUTextVAE(
            len(data.vocabulary),
            latent_dim=config.latent_dim,
            hidden=config.hidden,
            embedding=config.embedding,
        )
    if isinstance(data, Images):
        return MLPImageVAE(data.train.shape[1], latent_dim=config.latent_dim, hidden=config.hidden)
    raise TypeError(f"no model for data of type {type(data).__name__}")
