"""A small VAE on scikit-learn's digits, for tests of what watches a training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vaekernels as vk

LATENT = 8
BATCH = 64


def digits() -> tuple[Tensor, Tensor]:
    """1397 to train on, 400 held out, 64 pixels in [0, 1] each."""
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16.0
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[400:]], images[order[:400]]


class DigitsVAE(nn.Module):
    """Bernoulli MLP. At beta = 8 it collapses at once, at beta = 1 it uses z."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return mu, logvar

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(1)

    def loss(self, x: Tensor) -> Tensor:
        z, kl, _ = vk.sample_kl_packed(self.encoder(x))
        return self.beta * kl - self.log_likelihood(x, z).mean()
