"""An image VAE whose decoder looks back at what it has drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vaekernels.training.models.base import ArrayDecoder, ArrayVAE
from vaekernels.training.models.likelihoods import Likelihood
from vaekernels.training.models.mlp import mlp_encoder
from vaekernels.training.models.posterior import Posterior

__all__ = ["RowGRUVAE"]


class _RowGRU(nn.Module):
    def __init__(self, latent_dim: int, hidden: int, row: int, outputs: int) -> None:
        super().__init__()
        self.to_state = nn.Linear(latent_dim, hidden)
        self.gru = nn.GRU(row + latent_dim, hidden, batch_first=True)
        self.to_row = nn.Linear(hidden, outputs)

    def start(self, z: Tensor) -> Tensor:
        return torch.tanh(self.to_state(z).float()).unsqueeze(0)

    def forward(self, rows: Tensor, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What follows each of ``rows`` [B, T, row]: [B, T, outputs], and the last state."""
        joined = torch.cat([rows, z.unsqueeze(1).expand(-1, rows.shape[1], -1)], dim=2)
        states, state = self.gru(joined, state)
        return self.to_row(states), state


class RowGRUVAE(ArrayVAE):
    """A GRU that draws the image row by row, given z and the rows above; the pixels of a row are independent
    given those. z enters as in the sentence VAE. It needs no z to draw well, so it collapses."""

    def __init__(
        self,
        shape: tuple[int, ...],
        likelihood: Likelihood,
        posterior: Posterior,
        *,
        latent_dim: int,
        hidden: int,
    ) -> None:
        channels, _, width = shape
        row = channels * width
        gru = _RowGRU(latent_dim, hidden, row, likelihood.width * row)
        encoder = mlp_encoder(shape, latent_dim, hidden, posterior)
        super().__init__(encoder, ArrayDecoder(gru, likelihood, shape), latent_dim)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        rows = self.decoder.likelihood.features(x).transpose(1, 2).flatten(2)  # [B, H, C * W]
        above = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], dim=1)
        gru = self._gru
        said, _ = gru(above, z, gru.start(z))
        return self.decoder.likelihood.log_prob(x, self._as_image(said))

    @torch.no_grad()
    def generate(self, z: Tensor) -> Tensor:
        """The likeliest row under those already drawn, row by row."""
        channels, height, width = self.decoder.shape
        gru, likelihood = self._gru, self.decoder.likelihood
        row, state = z.new_zeros(z.shape[0], 1, channels * width), gru.start(z)
        rows: list[Tensor] = []
        for _ in range(height):
            said, state = gru(row, z, state)
            drawn = likelihood.mode(self._as_image(said))  # [B, C, 1, W]
            rows.append(drawn)
            row = drawn.transpose(1, 2).flatten(2)
        return torch.cat(rows, dim=2)

    @property
    def _gru(self) -> _RowGRU:
        assert isinstance(self.decoder.net, _RowGRU)
        return self.decoder.net

    def _as_image(self, said: Tensor) -> Tensor:
        """[B, T, width * C * W] -> [B, width, C, T, W]."""
        channels, _, width = self.decoder.shape
        parts = said.view(*said.shape[:2], self.decoder.likelihood.width, channels, width)
        return parts.permute(0, 2, 3, 1, 4)
