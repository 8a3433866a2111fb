"""What a model makes of its latent, to look at: reconstructions, prior samples, lines between codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vaekernels import collapse
from vaekernels.training.data import Arrays, Data, Text
from vaekernels.training.data.base import UNK
from vaekernels.training.models import VAE

__all__ = ["REACHED", "Images", "Sentences", "look"]

_SEED = 0
_SAMPLES = 200
_SHOWN = 8  # originals with their reconstructions
_LINES = 3
_STEPS = 7  # codes on a line, the ends included
_REACH = 2.5  # of a traversal, in standard deviations of the prior
REACHED = (-_REACH, 0.0, _REACH)  # of sentences
_TRAVERSED = 8  # dimensions, those with the highest rates


@dataclass(frozen=True)
class Sentences:
    """Greedy decodings. ``interpolations``: each on a straight line from the mu of one sentence to that of
    another; ``traversals``: one dimension of a code at :data:`REACHED`, the others stay."""

    originals: list[str]
    reconstructions: list[str]
    samples: list[str]
    interpolations: list[list[str]]
    traversals: list[list[str]]
    traversed: list[int]

    @property
    def distinct(self) -> int:
        """How many of the samples of the prior are different."""
        return len(set(self.samples))


@dataclass(frozen=True)
class Images:
    """Values in [0, 1], [..., C, H, W] with C 1 or 3. ``interpolations``, ``traversals``: [rows, steps, ...];
    a traversal moves one dimension of a code while the others stay."""

    originals: Tensor
    reconstructions: Tensor
    samples: Tensor
    interpolations: Tensor
    traversals: Tensor
    traversed: list[int]

    @property
    def distinct(self) -> int:
        """How many of the samples of the prior are different as 8-bit images."""
        levels = (255 * self.samples).round().to(torch.uint8)
        return len(torch.unique(levels.flatten(1), dim=0))


@torch.no_grad()
def look(model: VAE, data: Data, device: torch.device) -> Sentences | Images | None:
    """None for vectors, which have no picture. Has a generator of its own; ``model`` is in eval mode."""
    if isinstance(data, Arrays) and not data.is_image:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(_SAMPLES, model.latent_dim, generator=generator).to(device)
    x = _examples(data).to(device)
    mu, logvar = model.encode(x)
    ends = min(_LINES, len(x) // 2)
    share = torch.linspace(0, 1, _STEPS, device=device).view(1, -1, 1)
    lines = torch.lerp(mu[:ends].unsqueeze(1), mu[ends : 2 * ends].unsqueeze(1), share)
    rates = collapse.rate_per_dim(mu, logvar)
    traversed = sorted(rates.topk(min(_TRAVERSED, model.latent_dim)).indices.tolist())
    values = torch.tensor(REACHED) if isinstance(data, Text) else torch.linspace(-_REACH, _REACH, _STEPS)
    codes = mu[0].repeat(len(traversed), len(values), 1)
    for row, dim in enumerate(traversed):
        codes[row, :, dim] = values.to(codes)
    if isinstance(data, Text):
        moved = _sentences(model, data, codes.flatten(0, 1))
        between = _sentences(model, data, lines.flatten(0, 1))
        return Sentences(
            [data.sentence(row) for row in x],
            _sentences(model, data, mu),
            _sentences(model, data, noise),
            [between[start : start + _STEPS] for start in range(0, len(between), _STEPS)],
            [moved[start : start + len(values)] for start in range(0, len(moved), len(values))],
            traversed,
        )
    assert isinstance(data, Arrays)
    low, high = _range(data)

    def pictures(generated: Tensor) -> Tensor:
        shown = generated if generated.shape[1] == 3 else generated[:, :1]
        return ((shown.float() - low) / (high - low)).clamp(0, 1).cpu()

    return Images(
        pictures(x.float() if data.levels is None else x.float() / (data.levels - 1)),
        pictures(model.generate(mu)),
        pictures(model.generate(noise)),
        _rows(pictures(model.generate(lines.flatten(0, 1))), _STEPS),
        _rows(pictures(model.generate(codes.flatten(0, 1))), _STEPS),
        traversed,
    )


def _examples(data: Data) -> Tensor:
    """The first held-out examples; of sentences those made of known words only before others."""
    rows = list(data.heldout)
    if isinstance(data, Text):
        rows = sorted(rows, key=lambda row: bool((row == UNK).any()))
    return torch.stack(rows[:_SHOWN])


def _sentences(model: VAE, data: Text, z: Tensor) -> list[str]:
    return [data.sentence(tokens) for tokens in model.generate(z).cpu()]


def _rows(images: Tensor, columns: int) -> Tensor:
    """[rows * columns, ...] as [rows, columns, ...]."""
    return images.reshape(-1, columns, *images.shape[1:])


def _range(data: Arrays) -> tuple[float, float]:
    """Black and white: 0 and 1 in the units of the decoder, for real numbers the extremes of the data."""
    if data.levels is not None:
        return 0.0, 1.0
    low, high = data.heldout.min().item(), data.heldout.max().item()
    return low, max(high, low + 1e-6)
