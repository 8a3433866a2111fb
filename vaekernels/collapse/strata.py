"""Measurements within strata: classes, lengths, or whatever else the decoder is given beside z. What z says
of the stratum itself does not count there."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vaekernels.collapse.information import MIBounds, compared, contrast_rows, joint_bounds, mi_bounds
from vaekernels.collapse.pairing import derangement, derangement_of

__all__ = [
    "LEAST",
    "bounds_within",
    "comparable",
    "contrast_rows_within",
    "contrasts_within",
    "derangement_within",
    "joint_within",
    "order",
    "rows_of",
]

LEAST = 8
"""Examples of a stratum, below which it is left out."""


def order(strata: Tensor) -> Tensor:
    """The examples, by their places, of the strata of 8 or more, such that every stratum is spread evenly:
    the first m examples have their share of it."""
    key = torch.full(strata.shape, math.inf, dtype=torch.float64)
    for rows in rows_of(strata):
        if len(rows) >= LEAST:
            key[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return key.argsort(stable=True)[: int(key.isfinite().sum())]


def rows_of(strata: Tensor) -> Iterator[Tensor]:
    """The examples of each stratum."""
    for number in torch.unique(strata).tolist():
        yield (strata == number).nonzero()[:, 0]


def derangement_within(
    strata: Tensor, generator: torch.Generator | None, groups: Tensor | None = None
) -> Tensor:
    """Whose place each example takes, one of its stratum, and with ``groups`` one of another group: whole
    groups follow one another, see :func:`pairing.derangement_of`. An example alone in its stratum, or with
    its group alone, keeps its own place."""
    permutation = torch.arange(len(strata))
    for rows in rows_of(strata):
        if groups is not None and len(torch.unique(groups[rows])) > 1:
            permutation[rows] = rows[derangement_of(groups[rows], generator=generator)]
        elif groups is None and len(rows) > 1:
            permutation[rows] = rows[derangement(len(rows), generator=generator)]
    return permutation


def contrasts_within(strata: Tensor, k: int) -> int:
    """How many contrast codes there are for every example: as many as the smallest stratum has, at most
    ``k``."""
    return min(k, min(len(rows) for rows in rows_of(strata)))


def contrast_rows_within(strata: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """:func:`information.contrast_rows` within strata of at least ``k``: [n, k]."""
    found = torch.empty(len(strata), k, dtype=torch.int64)
    for rows in rows_of(strata):
        found[rows] = rows[contrast_rows(len(rows), k, generator=generator)]
    return found


def comparable(strata: Tensor, dims: int) -> int:
    """How many of the first examples are compared: all up to where a stratum has more than can be compared
    with one another."""
    most = min(compared(2**62, dims)[:2])
    too_many = [int(rows[most]) for rows in rows_of(strata) if len(rows) > most]
    return min(too_many, default=len(strata))


def bounds_within(mu: Tensor, logvar: Tensor, z: Tensor, strata: Tensor) -> MIBounds:
    """Bounds on I(x; z | stratum) and on every I(x; z_d | stratum), the terms in the order of the examples.
    The caps are the means of those of the strata."""
    n, dims = z.shape
    lower, upper = torch.empty(2, n, dtype=torch.float64)
    lower_dims, upper_dims = torch.empty(2, n, dims, dtype=torch.float64)
    cap = 0.0
    for rows in rows_of(strata):
        found = mi_bounds(mu[rows], logvar[rows], z[rows])
        lower[rows], upper[rows] = found.lower, found.upper
        lower_dims[rows], upper_dims[rows] = found.lower_dims, found.upper_dims
        cap += len(rows) / n * found.cap
    return MIBounds(lower, upper, lower_dims, upper_dims, torch.arange(n), cap, cap)


def joint_within(mu: Tensor, logvar: Tensor, z: Tensor, strata: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`information.joint_bounds` within strata."""
    lower, upper = torch.empty(2, len(z), dtype=torch.float64)
    for rows in rows_of(strata):
        lower[rows], upper[rows] = joint_bounds(mu[rows], logvar[rows], z[rows])
    return lower, upper
