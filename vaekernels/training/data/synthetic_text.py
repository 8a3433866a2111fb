"""Sentences from a random LSTM whose latent variable is known (He et al. 2019, "Lagging Inference
Networks")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import EOS, SPECIALS, Data, Factors, Text, digest, split

__all__ = ["load_synthetic_text"]

_SEED = 2019
_SENTENCES = 20_000
_WORDS = 1000
_LENGTH = 10
_UNITS = 100


def load_synthetic_text(config: DataConfig, say: Callable[[str], None]) -> Data:
    """The data set ``synthetic-text``: 20,000 sentences of 10 words out of 1000; their z is in ``factors``.
    ``config.vocabulary`` does not apply."""
    tokens, z = _generate()
    x = torch.cat([tokens + len(SPECIALS), torch.full((_SENTENCES, 1), EOS)], dim=1)
    vocabulary = (*SPECIALS, *(f"w{i}" for i in range(_WORDS)))
    train, heldout = split(x)
    factors = Factors(("z0", "z1"), *split(z))
    return Text("synthetic-text", train, heldout, digest(x, vocabulary), vocabulary, factors)


@torch.no_grad()
def _generate() -> tuple[Tensor, Tensor]:
    """Words, int64 [sentences, length], and their z, [sentences, 2]. z is drawn from four unit Gaussians at
    (±2, ±2); the logits of a word are an affine function of the LSTM's state plus a linear one of z. LSTM and
    embedding weights are uniform in ±1, those from z in ±5, as in the paper."""
    generator = torch.Generator().manual_seed(_SEED)

    def uniform(bound: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    centres = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    component = torch.randint(4, (_SENTENCES,), generator=generator)
    z = centres[component] + torch.randn(_SENTENCES, 2, generator=generator)

    gates = 4 * _UNITS
    lstm = [
        uniform(1.0, gates, _UNITS),
        uniform(1.0, gates, _UNITS),
        uniform(1.0, gates),
        uniform(1.0, gates),
    ]
    embedding = uniform(1.0, _WORDS + 1, _UNITS)  # the last row starts a sentence
    from_state, bias, from_z = uniform(1.0, _UNITS, _WORDS), uniform(1.0, _WORDS), uniform(5.0, 2, _WORDS)

    bias_z = bias + z @ from_z
    h, c = torch.zeros(_SENTENCES, _UNITS), torch.zeros(_SENTENCES, _UNITS)
    word = torch.full((_SENTENCES,), _WORDS)
    words: list[Tensor] = []
    for _ in range(_LENGTH):
        h, c = torch.lstm_cell(embedding[word], (h, c), *lstm)
        probabilities = torch.softmax(h @ from_state + bias_z, dim=1)
        word = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        words.append(word)
    return torch.stack(words, dim=1), z
