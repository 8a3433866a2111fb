"""What every model of the trainer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

import vaekernels as vk
from vaekernels.training.config import ObjectiveConfig

__all__ = ["ELBO", "VAE", "Terms"]


class Terms(NamedTuple):
    """The two terms of the loss of a batch, and what they are before any clamp. 0-dim, nats per example."""

    nll: Tensor
    """-log p(x|z), summed over data dimensions, mean over the batch."""
    kl: Tensor
    """KL as the objective has it: with free bits, clamped."""
    rate: Tensor
    """KL before any clamp."""


class VAE(nn.Module, ABC):
    """q(z|x) = N(mu, diag exp(logvar)) with z of shape [B, latent_dim], prior N(0, I)."""

    latent_dim: int

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """mu, then logvar: [B, 2 * latent_dim]."""

    @abstractmethod
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), summed over data dimensions, [B]."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, [B, latent_dim] each."""
        mu, logvar = self.moments(x).chunk(2, dim=1)
        return mu, logvar


class ELBO(nn.Module):
    """The loss terms of ``model``: a module, so that Fabric sees the whole computation of a step."""

    def __init__(self, model: VAE, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, x: Tensor, generator: torch.Generator | None) -> Terms:
        """One sample of z per example; the noise comes from ``generator``."""
        objective = self.objective
        z, kl, per_group = vk.sample_kl_packed(
            self.model.moments(x),
            dim=1,
            free_bits=objective.free_bits,
            clamp=objective.clamp,
            group_dims=None if objective.group == "dim" else (),
            generator=generator,
        )
        return Terms(-self.model.log_likelihood(x, z).mean(), kl, per_group.detach().sum())
