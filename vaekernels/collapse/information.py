"""How much the latent tells of the example, in nats: bounds from the encoder alone, and one from the
decoder."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vaekernels import ops

__all__ = ["InfoNCE", "MIBounds", "compared", "contrast_rows", "infonce", "joint_bounds", "mi_bounds"]

_PAIRS = 1 << 31
"""Densities of single dimensions, about 5 s on one CPU core. Beyond, fewer examples are compared."""
_JOINT_PAIRS = 1 << 33
"""Terms of densities of whole codes, which take a fifth of the time each."""
_LEAST_CODES = 256
_ENOUGH = 2048  # examples in an interval of single dimensions, before more codes are compared with
_LOG2_TAU = (-20.0, 10.0)


class MIBounds(NamedTuple):
    """Terms per example whose means are bounds on the mutual information, and their caps. Where there are too
    many pairs, only some examples have terms."""

    lower: Tensor
    """[R], of I(x; z)"""
    upper: Tensor
    lower_dims: Tensor
    """[S, D], of I(x; z_d)"""
    upper_dims: Tensor
    rows: Tensor
    """[max(R, S)]: the examples that have terms, in their order"""
    cap: float
    """log of the number of codes compared: no lower bound exceeds it"""
    cap_dims: float


@torch.no_grad()
def mi_bounds(mu: Tensor, logvar: Tensor, z: Tensor, *, generator: torch.Generator | None = None) -> MIBounds:
    """Bounds on I(x; z) and on every I(x; z_d), with z_i ~ q(z|x_i)::

        lower_i = log q(z_i|x_i) - log 1/N sum_j q(z_i|x_j)
        upper_i = log q(z_i|x_i) - log 1/(N-1) sum_{j != i} q(z_i|x_j)

    In expectation the means lie below and above the mutual information, by about the same amount while that
    is small (Poole et al. 2019, whose critic is here the density itself). The same z stands in both terms:
    with the entropy in closed form in the first, the estimate of a nearly collapsed model would be noise of
    either sign. The mean of lower never exceeds log N.

    The terms of different examples may be resampled as if they were independent. They share the mixture, but
    adding example k to it changes the others by E_z[q(z|x_k) / q(z)] - 1 = 0 on average.

    ``mu``, ``logvar``, ``z``: [N, D], in random order; float64 on mu's device (on the CPU where that has
    none), by `vaekernels.log_aggregate_posterior`. R = min(N, sqrt(2^33 / D)) examples are compared with one
    another (23,170 for D = 16, 5,792 for 256, 1,448 for 4,096), and for single dimensions S with as many or
    fewer (11,585, 2,896, and 2,048 with 256). These numbers do not fall as N grows, and neither do the
    bounds. They are the first of the examples (``z`` may lack the others), or, with ``generator``, drawn at
    random.
    """
    device = torch.device("cpu") if mu.device.type == "mps" else mu.device
    n, dims = mu.shape
    joint, codes, number = compared(n, dims)
    first = max(joint, number)
    rows = torch.arange(n) if first == n or generator is None else torch.randperm(n, generator=generator)
    rows = rows[:first]
    mu, logvar, z = (part[rows.to(part.device)].to(device).double() for part in (mu, logvar, z))
    if joint == codes == number:
        own = _log_density(mu, logvar, z)
        rest, rest_dims = ops.log_aggregate_posterior(z, mu, logvar, leave_one_out=True)
        whole = _bounds(own.sum(dim=1), rest, n - 1)
        single = _bounds(own, rest_dims, n - 1)
    else:
        whole = joint_bounds(mu[:joint], logvar[:joint], z[:joint])
        single = _single(mu[:number], logvar[:number], z[:number], codes)
    lower, upper, lower_dims, upper_dims = (column.cpu() for column in (*whole, *single))
    return MIBounds(lower, upper, lower_dims, upper_dims, rows, math.log(joint), math.log(codes))


@torch.no_grad()
def joint_bounds(mu: Tensor, logvar: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """``lower`` and ``upper`` of :func:`mi_bounds`, float64 [N] each, of all these examples."""
    rest, _ = ops.log_aggregate_posterior(z, mu, logvar, leave_one_out=True, per_dim=False)
    return _bounds(_log_density(mu, logvar, z).sum(dim=1), rest, len(z) - 1)


def compared(n: int, dims: int) -> tuple[int, int, int]:
    """How many examples are compared with one another; of single dimensions, with how many codes how many
    examples are. No one of them falls as ``n`` grows."""
    square = math.isqrt(_PAIRS // dims)
    codes = min(n, max(_LEAST_CODES, min(square, _PAIRS // (_ENOUGH * dims))))
    joint = min(n, max(_LEAST_CODES, math.isqrt(_JOINT_PAIRS // dims)))
    return joint, codes, min(n, max(codes, _PAIRS // (codes * dims)))


def _single(mu: Tensor, logvar: Tensor, z: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Of single dimensions, by comparison with the first ``codes``: these examples meet all of them but their
    own, the others meet them all."""
    rest = torch.empty_like(z)
    numbers = torch.full((len(z), 1), float(codes), dtype=torch.float64, device=z.device)
    numbers[:codes] -= 1
    _, rest[:codes] = ops.log_aggregate_posterior(z[:codes], mu[:codes], logvar[:codes], leave_one_out=True)
    if len(z) > codes:
        _, rest[codes:] = ops.log_aggregate_posterior(z[codes:], mu[:codes], logvar[:codes])
    return _bounds(_log_density(mu, logvar, z), rest, numbers)


def _log_density(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    """log q(z_d|x), [N, D]."""
    return -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))


def _bounds(own: Tensor, rest: Tensor, number: Tensor | int) -> tuple[Tensor, Tensor]:
    """Terms of the lower and the upper bound from log q(z_i|x_i) and the log of the mean over the others, of
    which there are ``number``."""
    others = torch.as_tensor(number, dtype=own.dtype, device=own.device)
    lower = own - (torch.logaddexp(rest + torch.log(others), own) - torch.log(others + 1))
    return lower, own - rest


def contrast_rows(n: int, k: int, *, generator: torch.Generator | None = None) -> Tensor:
    """For each of ``n`` examples its own index, then ``k`` - 1 others, all different: int64 [n, k].

    The examples lie on a random cycle, and the others are those at k - 1 random distances, the same for all:
    every code is a contrast exactly k - 1 times, and two examples rarely share two of them.
    """
    if not 2 <= k <= n:
        raise ValueError(f"k must be from 2 to the number of examples, {n}, got {k}")
    cycle = torch.randperm(n, generator=generator)
    distances = torch.cat([torch.zeros(1, dtype=torch.int64), _distances(n, k, generator)])
    place = torch.empty_like(cycle)
    place[cycle] = torch.arange(n)
    return cycle[(place[:, None] + distances) % n]


def _distances(n: int, k: int, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(n - 1, generator=generator)[: k - 1] + 1


class InfoNCE(NamedTuple):
    values: Tensor
    """[n], whose mean is the bound"""
    resample: Tensor
    """[n], of the same mean: what to bootstrap"""
    tau: tuple[float, float]
    """the temperature chosen on the one half, the other half"""


def infonce(likelihoods: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]) -> InfoNCE:
    """The InfoNCE bound on I(x; z) with the decoder as critic (van den Oord et al. 2018)::

        max_tau  mean_i [ tau l_i0 - log 1/K sum_k exp(tau l_ik) ],   l_ik = log p(x_i|z_k)

    A lower bound on the information that the decoder can read from z; its cap is log K. ``likelihoods`` are l
    of the two halves of the examples, [n/2, K] each, the example's own code first; ``rows`` are the examples
    in that half whose codes those are. tau is chosen on one half and the value taken on the other, both ways
    round, so that it stays a bound and every example counts. The maximum is over tau >= 0, where the
    objective is concave; at tau = 0 it is 0.

    A code is a contrast for K - 1 other examples, so the terms are not independent. ``resample`` holds
    jackknife pseudo-values: the term itself, plus how much the terms of the K - 1 others lose without this
    code, less the mean of that.
    """
    taus = _best_tau(likelihoods[0]), _best_tau(likelihoods[1])
    found = [
        infonce_terms(half * tau, partners)
        for half, partners, tau in zip(likelihoods, rows, reversed(taus), strict=True)
    ]
    values, resample = (torch.cat(parts) for parts in zip(*found, strict=True))
    return InfoNCE(values, resample, taus)


def infonce_terms(scaled: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``values`` and ``resample`` of :class:`InfoNCE` for one half, from tau l [n, K]."""
    k = scaled.shape[1]
    total = torch.logsumexp(scaled, dim=1)
    values = scaled[:, 0] - total + math.log(k)
    # log-mean-exp with a contrast less that without it. A share of 1 would leave nothing; own code is in the
    # rest.
    share = torch.exp(scaled[:, 1:] - total[:, None]).clamp_max(1 - 1e-12)
    influence = torch.zeros_like(values).index_add_(0, rows[:, 1:].flatten(), torch.log1p(-share).flatten())
    return values, values + influence - influence.mean()


def _best_tau(likelihoods: Tensor) -> float:
    def slope(tau: float) -> float:
        expected = (torch.softmax(tau * likelihoods, dim=1) * likelihoods).sum(dim=1)
        return (likelihoods[:, 0] - expected).mean().item()

    low, high = _LOG2_TAU
    if slope(2**low) <= 0:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(2**middle) > 0 else (low, middle)
    return float(2**low)
