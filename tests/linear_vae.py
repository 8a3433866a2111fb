"""The linear VAE: x ~ N(W z + m, sigma^2 I) with a diagonal Gaussian encoder that is linear in x.

Its ELBO has no local optima but saddles (Lucas et al. 2019): with sigma^2 fixed and the KL weighted by beta,
the optimum is probabilistic PCA with noise beta sigma^2. Latent d lies along the d-th eigenvector of the
data's covariance; it is active where its eigenvalue exceeds beta sigma^2, with a rate of 1/2 log(lambda /
(beta sigma^2)), and costs nothing elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vaekernels as vk


@dataclass(frozen=True)
class Truth:
    eigenvalues: Tensor
    """of the covariance, descending"""
    noise: float
    """beta sigma^2"""

    @property
    def active(self) -> int:
        return int((self.eigenvalues > self.noise).sum())

    @property
    def rates(self) -> Tensor:
        return 0.5 * torch.log(self.eigenvalues / self.noise).clamp_min(0)


class LinearVAE(nn.Module):
    """Centred data; a decoder matrix, an encoder matrix, one log-variance for each latent dimension."""

    def __init__(self, data: int, latent: int, sigma2: float) -> None:
        super().__init__()
        self.sigma2 = sigma2
        self.decoder = nn.Parameter(0.1 * torch.randn(data, latent))
        self.encoder = nn.Parameter(0.1 * torch.randn(latent, data))
        self.logvar = nn.Parameter(torch.zeros(latent))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = x @ self.encoder.T
        return mu, self.logvar.expand_as(mu).contiguous()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        squares = ((x - z @ self.decoder.T) ** 2).sum(dim=1)
        return -0.5 * (squares / self.sigma2 + x.shape[1] * math.log(2 * math.pi * self.sigma2))

    def set_to_optimum(self, x: Tensor, beta: float) -> Truth:
        """The global optimum in closed form."""
        truth, vectors = principal(x, self.logvar.numel(), beta * self.sigma2)
        gain = (truth.eigenvalues - truth.noise).clamp_min(0)
        with torch.no_grad():
            self.decoder.copy_(vectors * gain.sqrt())
            self.encoder.copy_((vectors * (gain.sqrt() / truth.eigenvalues.clamp_min(truth.noise))).T)
            self.logvar.copy_(-2 * truth.rates)
        return truth

    def fit(self, x: Tensor, beta: float, *, steps: int, rate: float = 0.02) -> None:
        """Adam on all of ``x``, with a rate that falls to nothing, on the fused sample and KL."""
        optimizer = torch.optim.Adam(self.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            z, kl, _ = vk.sample_kl(*self.encode(x))
            loss = beta * kl - self.log_likelihood(x, z).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def principal(x: Tensor, latent: int, noise: float) -> tuple[Truth, Tensor]:
    """The first ``latent`` eigenvalues of x'x / N, and their vectors in columns."""
    values, vectors = torch.linalg.eigh(x.double().T @ x.double() / len(x))
    values, vectors = values.flip(0)[:latent].float(), vectors.flip(1)[:, :latent].float()
    return Truth(values, noise), vectors
