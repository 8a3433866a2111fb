"""Whose code takes the place of whose."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["derangement"]


def derangement(n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """A random permutation of 0..n-1 that is one single cycle, so no element stays in place. int64 [n]."""
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}: one example has no other to trade places with")
    cycle = torch.randperm(n, generator=generator)
    permutation = torch.empty_like(cycle)
    permutation[cycle] = cycle.roll(1)
    return permutation
