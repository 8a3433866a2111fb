"""What the decoder says of examples under their own codes and under others, in nats per example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from vaekernels.collapse.examples import Examples
from vaekernels.collapse.information import InfoNCE, contrast_rows, infonce
from vaekernels.collapse.model import Model
from vaekernels.collapse.strata import contrast_rows_within, contrasts_within

__all__ = [
    "Codes",
    "Contrasts",
    "contrast",
    "contrasts",
    "importance",
    "importance_columns",
    "importance_mean",
    "shuffled_nll",
]


SURE = 0.95
_DOUBLE = 1 << 24  # 128 MiB of float64
_DRAWN = 1 << 10  # examples; a multiple of 16, so that the numbers are those of a single draw

Floor: TypeAlias = Callable[[Tensor], Tensor]
"""Puts a finite NLL where it is inf, in [n, K] with the examples' own codes first."""


class Codes(NamedTuple):
    """z = mu + sd eps of every example, [N, D] each: float64 up to 2^24 numbers, beyond in the encoder's
    dtype. The codes of some examples are computed in float64.

    Codes in another's place keep the example's own eps. With common noise an encoder that copies the prior
    has the same code everywhere, and every difference is exactly zero, however strong the decoder.
    """

    mu: Tensor
    sd: Tensor
    eps: Tensor

    @classmethod
    def draw(cls, mu: Tensor, logvar: Tensor, generator: torch.Generator | None) -> Codes:
        dtype = torch.float64 if mu.numel() <= _DOUBLE else mu.dtype
        mu, logvar = mu.cpu().to(dtype), logvar.cpu().to(dtype)
        eps = torch.empty_like(mu)
        for rows in torch.split(eps, _DRAWN):
            # Drawn in float64: the numbers do not depend on the dtype that keeps them.
            rows.copy_(torch.randn(rows.shape, generator=generator, dtype=torch.float64))
        return cls(mu, torch.exp(0.5 * logvar), eps)

    def of(self, rows: Tensor | slice, noise: Tensor | slice | None = None) -> Tensor:
        """z of the examples ``rows``, with the eps of ``noise`` (None: their own)."""
        eps = self.eps[rows if noise is None else noise]
        return self.mu[rows].double() + self.sd[rows].double() * eps.double()

    def own(self, a: int, b: int) -> Tensor:
        return self.of(slice(a, b))

    def shuffled(self, permutation: Tensor, a: int, b: int) -> Tensor:
        """mu and sd of another example, eps of this one."""
        return self.of(permutation[a:b], slice(a, b))

    def prior(self, a: int, b: int) -> Tensor:
        return self.eps[a:b].double()

    def mean(self, a: int, b: int) -> Tensor:
        return self.mu[a:b].double()

    def zero(self, a: int, b: int) -> Tensor:
        return torch.zeros_like(self.prior(a, b))

    def first(self, n: int) -> Codes:
        return Codes(self.mu[:n], self.sd[:n], self.eps[:n])


def shuffled_nll(
    model: Model, x: Examples, codes: Codes, permutation: Tensor, groups: list[Tensor]
) -> Tensor:
    """-log p(x_i|z_i) with the dimensions of each group shuffled, the others its own: float64 [N, groups]."""
    n, number = len(codes.mu), len(groups)
    dims = codes.mu.shape[1]
    moved = torch.zeros(number, dims, dtype=torch.bool)
    for g, group in enumerate(groups):
        moved[g, group] = True

    def disturbed(a: int, b: int) -> Tensor:
        pairs = torch.arange(a, b)
        rows = pairs // number
        first = int(rows[0])
        last = int(rows[-1]) + 1
        own, other = codes.own(first, last), codes.shuffled(permutation, first, last)
        return torch.where(moved[pairs % number], other[rows - first], own[rows - first])

    def rows(a: int, b: int) -> Tensor:
        return torch.arange(a, b) // number

    return -model.log_likelihoods(x, n * number, rows, disturbed).view(n, number)


class Contrasts(NamedTuple):
    """log p(x_i|z_k) of both halves of the examples, and whose codes those are: see `information.infonce`."""

    likelihoods: tuple[Tensor, Tensor]
    rows: tuple[Tensor, Tensor]

    def infonce(self) -> InfoNCE:
        """The bound with the decoder as critic."""
        return infonce(self.likelihoods, self.rows)

    def picked(self) -> Tensor:
        """[n]: 1 where the own code has 95 % of the posterior over the K codes,
        p(x_i|z_k) / sum_l p(x_i|z_l), less 1 / (K - 1) where another has. The mean is 0 where z says nothing,
        however sure the decoder is, and otherwise the share of the examples whose code it picks out, at most
        that of the examples whose code it reads."""
        found = []
        for half in self.likelihoods:
            best = torch.softmax(half, dim=1) >= SURE
            found.append(best[:, 0].double() - best[:, 1:].sum(dim=1).double() / (half.shape[1] - 1))
        return torch.cat(found)

    def negated(self) -> InfoNCE:
        """The bound with -log p(x|z) as critic: above 0 only where the likelihood has the wrong sign."""
        first, second = self.likelihoods
        return infonce((-first, -second), self.rows)


def contrast(
    model: Model,
    x: Examples,
    codes: Codes,
    k: int,
    generator: torch.Generator | None,
    floor: Floor,
    strata: Tensor | None = None,
) -> Contrasts:
    """Likelihoods under K = ``k`` codes, or as many as half of the examples are; with ``strata`` under codes
    of the example's own."""
    n = len(codes.mu)
    k = contrasts(n, k, strata)
    halves = (0, n // 2), (n // 2, n)
    likelihoods, rows = [], []
    for a, b in halves:
        if strata is None:
            others = contrast_rows(b - a, k, generator=generator)
        else:
            others = contrast_rows_within(strata[a:b], k, generator)
        partners = (a + others).flatten()

        def example(i: int, j: int, start: int = a) -> Tensor:
            return start + torch.arange(i, j) // k

        def code(i: int, j: int, partners: Tensor = partners) -> Tensor:
            other = partners[i:j]
            return codes.of(other)

        found = model.log_likelihoods(x, len(partners), example, code).view(b - a, k)
        likelihoods.append(-floor(-found))
        rows.append(others)
    return Contrasts((likelihoods[0], likelihoods[1]), (rows[0], rows[1]))


def contrasts(n: int, k: int, strata: Tensor | None = None) -> int:
    """K of the InfoNCE bound on ``n`` examples: contrasts come from the example's own half, and stratum."""
    if strata is None:
        return min(k, n // 2)
    return min(contrasts_within(half, k) for half in (strata[: n // 2], strata[n // 2 : n]))


class Importance(NamedTuple):
    """float64 [N] each."""

    nll: Tensor
    """-log 1/k sum_j p(x_i|z_ij) p(z_ij) / q(z_ij|x_i), z_ij ~ q(z|x_i): an upper bound on -log p(x_i) that
    tightens with k (Burda et al. 2016)"""
    own: Tensor
    """the mean of -log p(x_i|z_ij)"""
    least: Tensor
    """-beta log 1/k sum_j p(x_i|z_ij)^(1/beta) p(z_ij) / q(z_ij|x_i): an upper bound, in the same way, on the
    least that any q of any form can make of E_q[-log p(x_i|z)] + beta KL(q || p)"""


def importance(
    model: Model, x: Examples, codes: Codes, k: int, generator: torch.Generator | None, beta: float = 1.0
) -> Importance:
    """What importance weighting with ``k`` codes of each example's own q gives."""
    n = len(codes.mu)
    ratios = torch.empty(n * k, dtype=torch.float64)

    def drawn(a: int, b: int) -> Tensor:
        rows = torch.arange(a, b) // k
        eps = torch.randn(b - a, codes.mu.shape[1], generator=generator, dtype=torch.float64)
        sd = codes.sd[rows].double()
        z = codes.mu[rows].double() + sd * eps
        ratios[a:b] = (0.5 * (eps.square() - z.square()) + torch.log(sd)).sum(dim=1)  # log p(z) / q(z|x)
        return z

    found = model.log_likelihoods(x, n * k, lambda a, b: torch.arange(a, b) // k, drawn).view(n, k)
    ratios = ratios.view(n, k)

    def weighted(beta: float) -> Tensor:
        if beta == 0:
            return -found.max(dim=1).values
        return -beta * (torch.logsumexp(found / beta + ratios, dim=1) - math.log(k))

    return Importance(weighted(1.0), -found.mean(dim=1), weighted(beta))


def importance_columns(nelbo: Tensor, importance: Tensor) -> Tensor:
    """[N, 3] whose means :func:`importance_mean` combines, from the NELBO of N examples and the
    importance-weighted NLL of the first of them."""
    known = torch.zeros_like(nelbo)
    known[: len(importance)] = 1
    gap = torch.zeros_like(nelbo)
    gap[: len(importance)] = nelbo[: len(importance)] - importance
    return torch.stack([nelbo, gap, known], dim=1)


def importance_mean(means: Tensor) -> Tensor:
    """The NELBO of all examples less the mean gap of those whose gap is known. The gap varies little from
    example to example, the NELBO much: 512 gaps serve as well as 2048 importance-weighted likelihoods."""
    nelbo, gap, known = means.unbind(dim=-1)
    return (nelbo - gap / known).unsqueeze(-1)
