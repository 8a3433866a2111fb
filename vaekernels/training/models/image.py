"""Image VAEs."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vaekernels.training.models.base import VAE

__all__ = ["MLPImageVAE"]


class MLPImageVAE(VAE):
    """One hidden layer each way over flat binary pixels, Bernoulli likelihood (Kingma & Welling 2014)."""

    def __init__(self, pixels: int, *, latent_dim: int, hidden: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def moments(self, x: Tensor) -> Tensor:
        moments: Tensor = self.encoder(x)
        return moments

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(dim=1)
