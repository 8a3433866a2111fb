"""Dimensions that say the same: none is missed when shuffled alone, all are when shuffled together."""

from __future__ import annotations

import torch
from torch import Tensor

from vaekernels.collapse.measurements import Measurements
from vaekernels.collapse.verdict import EPS_USE, REDUNDANCY_TAIL, answers

__all__ = ["clusters", "cost", "find_redundant"]

CORRELATED = 0.5
"""Correlation of the posterior means from which two dimensions are looked at together."""


def clusters(mu: Tensor, candidates: list[int]) -> list[list[int]]:
    """``candidates`` in groups connected by correlations of 0.5 or more between their columns of ``mu`` [N,
    D]; those connected to none make up one more group, since redundancy need not be linear. Groups of one are
    left out: what they do alone is known."""
    if len(candidates) < 2:
        return []
    linked = torch.corrcoef(mu[:, candidates].T).abs() >= CORRELATED  # False for NaN: a constant column
    unseen = set(range(len(candidates)))
    groups: list[list[int]] = []
    while unseen:
        group, edge = set[int](), {min(unseen)}
        while edge:
            group |= edge
            reached = linked[sorted(edge)].any(dim=0).nonzero().flatten().tolist()
            edge = set(reached) - group
        unseen -= group
        groups.append(sorted(group))
    single = [group[0] for group in groups if len(group) == 1]
    groups = [group for group in groups if len(group) > 1] + ([single] if len(single) > 1 else [])
    return [[candidates[i] for i in group] for group in groups]


def cost(groups: list[list[int]], n: int) -> int:
    """Evaluations on ``n`` examples, if every group turns out to be used."""
    return n * sum(1 + len(group) for group in groups)


def find_redundant(split: Measurements, groups: list[list[int]]) -> dict[int, tuple[int, ...]]:
    """Dimensions that are used though not alone -> those they are used with: which of ``groups`` matter when
    shuffled together, and which members have a part in that.

    A member has one if keeping it, while the others are shuffled, saves nats. Where no single member saves
    any (a majority of three copies is needed, say), all of them have.
    """
    n = split.examples_for(cost(groups, 1))
    together = split.lost([torch.tensor(group) for group in groups], n)
    estimates = split.use_estimates(together)
    said = answers(estimates, estimates, n, EPS_USE, REDUNDANCY_TAIL)
    used = [g for g, answer in enumerate(said) if answer.yes]
    if not used:
        return {}
    members = [(g, dim) for g in used for dim in groups[g]]
    without = split.lost([torch.tensor([d for d in groups[g] if d != dim]) for g, dim in members], n)
    saved = together[:, [g for g, _ in members]] - without
    estimates = split.use_estimates(saved)
    kept = answers(estimates, estimates, n, EPS_USE, REDUNDANCY_TAIL)
    found: dict[int, tuple[int, ...]] = {}
    for g in used:
        helping = [
            dim for (group, dim), answer in zip(members, kept, strict=True) if group == g and answer.yes
        ]
        for dim in helping or groups[g]:
            found[dim] = tuple(other for other in helping or groups[g] if other != dim)
    return found
