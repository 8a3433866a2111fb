"""Sentence VAEs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaekernels.training.data.base import BOS, EOS, PAD
from vaekernels.training.models.base import VAE

__all__ = ["GRUTextVAE"]


class GRUTextVAE(VAE):
    """GRU encoder and decoder (Bowman et al. 2016, with GRUs).

    The posterior is read off the encoder's state at the last token. z enters the decoder twice: tanh of a
    linear map of it is the initial state, and it is joined to every input. A decoder this strong can model
    the text without z, which is what makes the model collapse.
    """

    def __init__(self, vocabulary: int, *, latent_dim: int, hidden: int, embedding: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.embed_source = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.encoder = nn.GRU(embedding, hidden, batch_first=True)
        self.to_moments = nn.Linear(hidden, 2 * latent_dim)
        self.embed_target = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.to_state = nn.Linear(latent_dim, hidden)
        self.decoder = nn.GRU(embedding + latent_dim, hidden, batch_first=True)
        self.to_logits = nn.Linear(hidden, vocabulary)

    def moments(self, x: Tensor) -> Tensor:
        states, _ = self.encoder(self.embed_source(x))
        last = (x != PAD).sum(dim=1) - 1
        moments: Tensor = self.to_moments(states[torch.arange(len(x), device=x.device), last])
        return moments

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        inputs = torch.cat([torch.full_like(x[:, :1], BOS), x[:, :-1]], dim=1)
        logits, _ = self._decode(inputs, z, self._initial(z))
        losses = F.cross_entropy(logits.flatten(0, 1), x.flatten(), ignore_index=PAD, reduction="none")
        return -losses.view(x.shape).sum(dim=1)

    @torch.no_grad()
    def greedy(self, z: Tensor, *, length: int = 24) -> Tensor:
        """The most likely token at every position given those before it, int64 [B, <= length]; EOS, then
        PAD."""
        token = torch.full((len(z), 1), BOS, device=z.device)
        state = self._initial(z)
        ended = torch.zeros_like(token, dtype=torch.bool)
        tokens: list[Tensor] = []
        for _ in range(length):
            logits, state = self._decode(token, z, state)
            logits[..., [PAD, BOS]] = -torch.inf  # never targets, so never learned
            token = logits.argmax(dim=2).masked_fill(ended, PAD)
            tokens.append(token)
            ended |= token == EOS
            if bool(ended.all()):
                break
        return torch.cat(tokens, dim=1)

    def _initial(self, z: Tensor) -> Tensor:
        return torch.tanh(self.to_state(z)).unsqueeze(0)

    def _decode(self, tokens: Tensor, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, vocabulary] of the tokens that follow ``tokens`` [B, T], and the last state."""
        joined = torch.cat([self.embed_target(tokens), z.unsqueeze(1).expand(-1, tokens.shape[1], -1)], dim=2)
        states, state = self.decoder(joined, state)
        return self.to_logits(states), state
