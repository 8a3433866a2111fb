"""Whose code takes the place of whose."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["derangement", "derangement_of"]


def derangement(n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """A random permutation of 0..n-1 that is one single cycle, so no element stays in place. int64 [n]."""
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}: one example has no other to trade places with")
    cycle = torch.randperm(n, generator=generator)
    permutation = torch.empty_like(cycle)
    permutation[cycle] = cycle.roll(1)
    return permutation


def derangement_of(clusters: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """For each example one of another cluster, int64 [n]: the clusters lie on one cycle, and the members of
    each get those of the next, as often as these are."""
    ids, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)[1:]
    following = derangement(len(sizes), generator=generator)
    members = ids.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(members)
    rank[members] = torch.arange(len(members)) - starts[ids[members]]
    partner = following[ids]
    found: Tensor = members[starts[partner] + rank % sizes[partner]]
    return found
