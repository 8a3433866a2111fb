"""VAEs of fully connected layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vaekernels.training.models.base import ArrayDecoder, ArrayVAE
from vaekernels.training.models.likelihoods import Gaussian, Likelihood
from vaekernels.training.models.posterior import Posterior

__all__ = ["MLPVAE", "LinearVAE", "mlp_encoder"]


def mlp_encoder(shape: tuple[int, ...], latent_dim: int, hidden: int, posterior: Posterior) -> nn.Sequential:
    """One hidden layer from data to moments."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), hidden),
        nn.Tanh(),
        nn.Linear(hidden, 2 * latent_dim),
        posterior,
    )


class MLPVAE(ArrayVAE):
    """One hidden layer each way (Kingma & Welling 2014)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        likelihood: Likelihood,
        posterior: Posterior,
        *,
        latent_dim: int,
        hidden: int,
    ) -> None:
        outputs = likelihood.width * math.prod(shape)
        net = nn.Sequential(nn.Linear(latent_dim, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
        encoder = mlp_encoder(shape, latent_dim, hidden, posterior)
        super().__init__(encoder, ArrayDecoder(net, likelihood, shape), latent_dim)


class _LinearEncoder(nn.Module):
    def __init__(self, inputs: int, latent_dim: int) -> None:
        super().__init__()
        self.to_mu = nn.Linear(inputs, latent_dim)
        self.logvar = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x: Tensor) -> Tensor:
        mu: Tensor = self.to_mu(x.flatten(1))
        return torch.cat([mu, self.logvar.to(mu.dtype).expand_as(mu)], dim=1)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.logvar)


class LinearVAE(ArrayVAE):
    """mu = V x + a with one log-variance for all x, p(x|z) = N(W z + b, sigma²): probabilistic PCA as a VAE
    (Lucas et al. 2019). Its optimum is known: #{eigenvalues of the data's covariance > beta sigma²}
    dimensions are active."""

    def __init__(self, shape: tuple[int, ...], likelihood: Gaussian, *, latent_dim: int) -> None:
        inputs = math.prod(shape)
        decoder = ArrayDecoder(nn.Linear(latent_dim, inputs), likelihood, shape)
        super().__init__(_LinearEncoder(inputs, latent_dim), decoder, latent_dim)
