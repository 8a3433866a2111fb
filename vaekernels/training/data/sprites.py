"""White shapes on black, drawn from known factors (in the manner of dSprites, Matthey et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Arrays, Data, Factors, digest, split

__all__ = ["SIDE", "draw", "load_sprites"]

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
