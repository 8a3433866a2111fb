"""Data made from known factors: sprites and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import EOS, SPECIALS, Arrays, Data, Factors, Text, digest, split

__all__ = ["SIDE", "draw", "load_sprites", "load_synthetic_text"]

# --- sprites: white shapes on black (in the manner of dSprites, Matthey et al. 2017)

SIDE = 32  # pixels
SHAPES = ("square", "ellipse", "triangle")
SCALES = (0.7, 1.0, 1.3)
SYMMETRY = (4, 2, 3)  # a shape looks the same after a whole turn divided by this
TURNS = 8  # orientations, over the turn after which a shape looks the same
PLACES = 8  # positions along each axis
NAMES = ("shape", "scale", "orientation", "x", "y")

_RADIUS = 6.0  # pixels, of a shape of scale 1
_MARGIN = 9.0  # pixels, from the centre of a shape to the border: none is cut off


def load_sprites(config: DataConfig, say: Callable[[str], None]) -> Data:
    """The data set ``sprites``: all 4608 combinations of 3 shapes, 3 scales, 8 orientations and 8x8
    positions."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in (len(SHAPES), len(SCALES), TURNS, PLACES, PLACES)))
    x = draw(grid)
    train, heldout = split(x)
    factors = Factors(NAMES, *split(grid.float()))
    return Arrays("sprites", train, heldout, digest(x), levels=2, factors=factors)


def draw(factors: Tensor) -> Tensor:
    """Binary images, uint8 [N, 1, 32, 32], of int64 factors [N, 5] (indices, in the order of ``NAMES``)."""
    kind, scale, turn, column, row = factors.unbind(dim=1)
    pixels = torch.arange(SIDE, dtype=torch.float64) + 0.5
    step = (SIDE - 2 * _MARGIN) / (PLACES - 1)

    def away(place: Tensor) -> Tensor:
        return pixels - (_MARGIN + step * place.double()).unsqueeze(1)

    size = _RADIUS * torch.tensor(SCALES, dtype=torch.float64)[scale].view(-1, 1, 1)
    angle = (2 * math.pi * turn.double() / (TURNS * torch.tensor(SYMMETRY)[kind])).view(-1, 1, 1)
    dx, dy = away(column).unsqueeze(1) / size, away(row).unsqueeze(2) / size
    u = torch.cos(angle) * dx + torch.sin(angle) * dy
    v = -torch.sin(angle) * dx + torch.cos(angle) * dy
    inside = torch.stack(
        [
            (u.abs() <= 0.8) & (v.abs() <= 0.8),
            u**2 + (2 * v) ** 2 <= 1,
            (v >= -0.5) & (math.sqrt(3) * u.abs() + v <= 1),
        ]
    )
    return inside[kind, torch.arange(len(factors))].to(torch.uint8).unsqueeze(1)


# --- sentences from a random LSTM with a known latent (He et al. 2019, "Lagging Inference Networks")

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
