"""A convolutional image VAE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vaekernels.training.models.base import ArrayDecoder, ArrayVAE, LatentLayer
from vaekernels.training.models.likelihoods import Likelihood
from vaekernels.training.models.posterior import Posterior

__all__ = ["ConvVAE"]


class _Upsample(nn.Module):
    """From the smallest to the middle to the full size, whatever odd sizes lie between."""

    def __init__(self, hidden: int, outputs: int, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes
        self.up1 = nn.ConvTranspose2d(hidden, hidden // 2, 3, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(hidden // 2, hidden // 2, 3, stride=2, padding=1)
        self.last = nn.Conv2d(hidden // 2, outputs, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        full, half, _ = self.sizes
        h = torch.relu(self.up1(torch.relu(h), output_size=list(half)))
        h = torch.relu(self.up2(h, output_size=list(full)))
        said: Tensor = self.last(h)
        return said


class ConvVAE(ArrayVAE):
    """Two strided convolutions down to a quarter of the size, and back. The latent is a vector, or, with
    ``latent_channels``, has a value per channel and position, [B, C, H/4, W/4], as in image compression and
    latent diffusion; from outside it is seen flattened, [B, C * H/4 * W/4]."""

    def __init__(
        self,
        shape: tuple[int, ...],
        likelihood: Likelihood,
        posterior: Callable[[int], Posterior],
        *,
        latent_dim: int,
        latent_channels: int | None,
        hidden: int,
    ) -> None:
        channels, height, width = shape
        sizes = [(height, width)]
        for _ in range(2):
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        positions = sizes[2][0] * sizes[2][1]
        down: list[nn.Module] = [
            nn.Conv2d(channels, hidden // 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden // 2, hidden, 3, stride=2, padding=1),
            nn.ReLU(),
        ]
        if latent_channels is None:
            self.latent_shape: tuple[int, ...] = (latent_dim,)
            down += [nn.Flatten(), nn.Linear(hidden * positions, 2 * latent_dim)]
            start: list[nn.Module] = [
                nn.Linear(latent_dim, hidden * positions),
                nn.Unflatten(1, (hidden, *sizes[2])),
            ]
        else:
            self.latent_shape = (latent_channels, *sizes[2])
            latent_dim = latent_channels * positions
            down += [nn.Conv2d(hidden, 2 * latent_channels, 1)]
            start = [nn.Conv2d(latent_channels, hidden, 3, padding=1)]
        net = nn.Sequential(*start, _Upsample(hidden, likelihood.width * channels, sizes))
        encoder = nn.Sequential(*down, posterior(self.latent_shape[0]))
        super().__init__(encoder, ArrayDecoder(net, likelihood, shape), latent_dim)

    @property
    def latent_layers(self) -> tuple[LatentLayer, ...]:
        return (LatentLayer(self.latent_shape),)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return super().log_likelihood(x, z.reshape(-1, *self.latent_shape))

    @torch.no_grad()
    def generate(self, z: Tensor) -> Tensor:
        return super().generate(z.reshape(-1, *self.latent_shape))
