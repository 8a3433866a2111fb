"""Sentence VAEs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaekernels.training.data.base import BOS, EOS, PAD, UNK
from vaekernels.training.models.base import VAE
from vaekernels.training.models.posterior import Posterior

__all__ = ["TextVAE"]

State = Tensor | tuple[Tensor, Tensor]

_CELLS: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}


class _Encoder(nn.Module):
    def __init__(
        self, cell: str, vocabulary: int, embedding: int, hidden: int, latent_dim: int, posterior: Posterior
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.rnn = _CELLS[cell](embedding, hidden, batch_first=True)
        self.to_moments = nn.Linear(hidden, 2 * latent_dim)
        self.posterior = posterior

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(self.embed(x))
        last = (x != PAD).sum(dim=1) - 1
        moments: Tensor = self.posterior(
            self.to_moments(states[torch.arange(x.shape[0], device=x.device), last])
        )
        return moments


class _Decoder(nn.Module):
    def __init__(self, cell: str, vocabulary: int, embedding: int, hidden: int, latent_dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.to_state = nn.Linear(latent_dim, hidden)
        self.rnn = _CELLS[cell](embedding + latent_dim, hidden, batch_first=True)
        self.to_logits = nn.Linear(hidden, vocabulary)

    def start(self, z: Tensor) -> State:
        """tanh of a linear map of z; an LSTM's cell is the map itself."""
        cell = self.to_state(z).float().unsqueeze(0)
        return (torch.tanh(cell), cell) if isinstance(self.rnn, nn.LSTM) else torch.tanh(cell)

    def forward(self, tokens: Tensor, z: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits [B, T, vocabulary] of the tokens that follow ``tokens`` [B, T], and the last state."""
        joined = torch.cat([self.embed(tokens), z.unsqueeze(1).expand(-1, tokens.shape[1], -1)], dim=2)
        states, state = self.rnn(joined, state)
        return self.to_logits(states), state


class TextVAE(VAE):
    """GRU or LSTM encoder and decoder (Bowman et al. 2016).

    The posterior is read off the encoder's state at the last token. z enters the decoder twice: a map of it
    is the initial state, and it is joined to every input. A decoder this strong can model the text without z,
    which is what makes the model collapse. ``word_dropout``: the share of the decoder's input words that
    training replaces by the unknown word, so that it cannot lean on them alone.
    """

    encoder: _Encoder
    decoder: _Decoder

    def __init__(
        self,
        cell: str,
        vocabulary: int,
        posterior: Posterior,
        *,
        latent_dim: int,
        hidden: int,
        embedding: int,
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.word_dropout = word_dropout
        self.encoder = _Encoder(cell, vocabulary, embedding, hidden, latent_dim, posterior)
        self.decoder = _Decoder(cell, vocabulary, embedding, hidden, latent_dim)

    def moments(self, x: Tensor) -> Tensor:
        moments: Tensor = self.encoder(x)
        return moments

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        words = x[:, :-1]
        if self.training and self.word_dropout:
            hidden = torch.rand(words.shape, device=x.device) < self.word_dropout
            words = words.masked_fill(hidden & (words != PAD), UNK)
        inputs = torch.cat([torch.full_like(x[:, :1], BOS), words], dim=1)
        logits, _ = self.decoder(inputs, z, self.decoder.start(z))
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), x.flatten(), ignore_index=PAD, reduction="none"
        )
        return -losses.view(x.shape).sum(dim=1)

    @torch.no_grad()
    def generate(self, z: Tensor, *, length: int = 24) -> Tensor:
        """The most likely token at every position given those before it, int64 [B, <= length]; EOS, then
        PAD."""
        tokens: list[Tensor] = []
        for token, ended in self.greedy(z, length):
            tokens.append(token)
            if bool(ended.all()):
                break
        return torch.cat(tokens, dim=1)

    def greedy(self, z: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every position up to ``length`` the most likely token, int64 [B, 1], and whether the sentence
        has ended, bool [B, 1]."""
        token = torch.full((z.shape[0], 1), BOS, device=z.device)
        state = self.decoder.start(z)
        ended = torch.zeros_like(token, dtype=torch.bool)
        never = torch.zeros(self.decoder.to_logits.out_features, device=z.device)
        never[[PAD, BOS]] = -torch.inf  # never targets, so never learned
        for _ in range(length):
            logits, state = self.decoder(token, z, state)
            token = (logits + never).argmax(dim=2).masked_fill(ended, PAD)
            ended = ended | (token == EOS)
            yield token, ended
