"""What is in the latent, and does the decoder use it? In nats, on held-out examples.

Nothing here knows a model beyond two functions::

    encode(x) -> (mu, logvar)           # [B, D] each: q(z|x) = N(mu, diag exp(logvar))
    log_likelihood(x, z) -> Tensor[B]   # log p(x|z), summed over data dimensions

``x`` is a tensor with the examples along its first axis. Put the model in eval mode first. Everything runs
without gradients, in chunks of ``batch_size`` examples, and draws only from the generator it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vaekernels import ops

__all__ = [
    "ACTIVE_THRESHOLD",
    "Encode",
    "Estimate",
    "LogLikelihood",
    "active_units",
    "bootstrap_mean",
    "delta_shuffle",
    "derangement",
    "moments",
    "rate_per_dim",
    "shuffle_nll",
]

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
LogLikelihood = Callable[[Tensor, Tensor], Tensor]

ACTIVE_THRESHOLD = 0.01
"""Var_x(mu_d) above which Burda et al. (2016) call a dimension active."""

_BOOTSTRAP_CELLS = 1 << 22  # resampled indices held at a time (32 MiB)


@dataclass(frozen=True)
class Estimate:
    """A mean over examples with the ends of its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@torch.no_grad()
def moments(encode: Encode, x: Tensor, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """mu and logvar of every example, [N, D] each. ValueError if ``encode`` returns anything else."""
    chunks = [encode(part) for part in torch.split(x, batch_size)]
    mu = torch.cat([chunk[0] for chunk in chunks])
    logvar = torch.cat([chunk[1] for chunk in chunks])
    if mu.dim() != 2 or mu.shape != logvar.shape or len(mu) != len(x):
        raise ValueError(
            f"encode must return mu and logvar of shape [B, D] each; for {len(x)} examples it gave "
            f"{list(mu.shape)} and {list(logvar.shape)}; flatten the latent axes into one"
        )
    return mu, logvar


def rate_per_dim(mu: Tensor, logvar: Tensor) -> Tensor:
    """r_d = mean_x KL(q(z_d|x) || N(0, 1)), unclamped, [D]."""
    _, per_dim = ops.gaussian_kl(mu, logvar, return_per_group=True)
    return per_dim


def active_units(mu: Tensor, *, threshold: float = ACTIVE_THRESHOLD) -> Tensor:
    """Which dimensions have Var_x(mu_d) > ``threshold``: bool [D] (Burda et al. 2016).

    Reported because the field reports it; a near-dead dimension can be active, so it decides nothing.
    """
    return mu.cpu().double().var(dim=0, correction=0) > threshold


def derangement(n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """A random permutation of 0..n-1 that is one single cycle, so no element stays in place. int64 [n]."""
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}: one example has no other to trade places with")
    cycle = torch.randperm(n, generator=generator)
    permutation = torch.empty_like(cycle)
    permutation[cycle] = cycle.roll(1)
    return permutation


@torch.no_grad()
def shuffle_nll(
    encode: Encode,
    log_likelihood: LogLikelihood,
    x: Tensor,
    *,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """-log p(x_i|z_i) and -log p(x_i|z'_i) for every example, float64 [N] each, on the CPU.

    z_i = mu_i + sd_i eps_i, and z'_i = mu_j + sd_j eps_i takes its posterior from another example j = pi(i)
    but its noise from example i. With common noise an encoder that copies the prior has z' = z, and the two
    are equal exactly, however strong the decoder. ``generator`` is a CPU generator.
    """
    mu, logvar = moments(encode, x, batch_size=batch_size)
    other = derangement(len(x), generator=generator).to(mu.device)
    eps = torch.randn(mu.shape, generator=generator, dtype=mu.dtype).to(mu.device)
    sd = torch.exp(0.5 * logvar)
    own, shuffled = mu + sd * eps, mu[other] + sd[other] * eps

    def nll(z: Tensor) -> Tensor:
        pairs = zip(torch.split(x, batch_size), torch.split(z, batch_size), strict=True)
        values = torch.cat([-log_likelihood(part, code) for part, code in pairs])
        if values.shape != (len(x),):
            raise ValueError(
                f"log_likelihood must return one value per example, shape [{len(x)}], got "
                f"{list(values.shape)}; sum over the data dimensions"
            )
        return values.cpu().double()

    return nll(own), nll(shuffled)


def bootstrap_mean(
    values: Tensor, *, resamples: int = 1000, generator: torch.Generator | None = None
) -> Estimate:
    """Mean of ``values`` [N] with its 95% percentile interval over ``resamples`` resamples of the examples.

    For a paired comparison pass the N differences.
    """
    values = values.cpu().double()
    n = len(values)
    if values.dim() != 1 or n < 2:
        raise ValueError(
            f"values must be one-dimensional with at least 2 entries, got shape {list(values.shape)}"
        )
    rows = max(1, _BOOTSTRAP_CELLS // n)
    means = torch.cat(
        [
            values[torch.randint(n, (min(rows, resamples - start), n), generator=generator)].mean(dim=1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Estimate(values.mean().item(), low, high)


def delta_shuffle(
    encode: Encode,
    log_likelihood: LogLikelihood,
    x: Tensor,
    *,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> Estimate:
    """How much worse each example is explained by another example's z: mean of NLL(x, z') - NLL(x, z),
    paired.

    About 0: the decoder ignores z, or z holds nothing. A detector of use, not a quantity of information. See
    :func:`shuffle_nll` for z'.
    """
    own, shuffled = shuffle_nll(encode, log_likelihood, x, generator=generator, batch_size=batch_size)
    return bootstrap_mean(shuffled - own, resamples=resamples, generator=generator)
