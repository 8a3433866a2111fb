"""Single measures of the latent, for use in any training loop; :func:`vaekernels.collapse.diagnose` has them
all.

In nats, on held-out examples. Nothing here knows a model beyond two functions::

    encode(x) -> (mu, logvar)           # [B, D] each: q(z|x) = N(mu, diag exp(logvar))
    log_likelihood(x, z) -> Tensor[B]   # log p(x|z), summed over data dimensions

``x`` is a tensor with the examples along its first axis, or a tuple of such tensors. Put the model in eval
mode first. Everything runs without gradients, in chunks of ``batch_size`` examples, and draws only from the
generator it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaekernels import ops
from vaekernels.collapse.decoder import Codes
from vaekernels.collapse.estimate import RESAMPLES, Estimate, along_cycle, bootstrap_mean
from vaekernels.collapse.examples import Encode, Examples, LogLikelihood, count
from vaekernels.collapse.model import BATCH, Model, moments
from vaekernels.collapse.pairing import derangement

__all__ = [
    "ACTIVE_THRESHOLD",
    "active_units",
    "delta_shuffle",
    "derangement",
    "moments",
    "rate_per_dim",
    "shuffle_nll",
]

ACTIVE_THRESHOLD = 0.01
"""Var_x(mu_d) above which Burda et al. (2016) call a dimension active."""


def rate_per_dim(mu: Tensor, logvar: Tensor) -> Tensor:
    """The rates r_d = mean_x KL(q(z_d|x) || N(0, 1)), unclamped, in nats: [D]."""
    _, per_dim = ops.gaussian_kl(mu, logvar, return_per_group=True)
    return per_dim


def active_units(mu: Tensor, *, threshold: float = ACTIVE_THRESHOLD) -> Tensor:
    """Which dimensions have Var_x(mu_d) > ``threshold``: bool [D] (Burda et al. 2016).

    Reported because the field reports it; a near-dead dimension can be active, so it decides nothing.
    """
    return mu.cpu().double().var(dim=0, correction=0) > threshold


def shuffle_nll(
    encode: Encode,
    log_likelihood: LogLikelihood,
    x: Examples,
    *,
    generator: torch.Generator | None = None,
    batch_size: int = BATCH,
) -> tuple[Tensor, Tensor]:
    """-log p(x_i|z_i) and -log p(x_i|z'_i) for every example, float64 [N] each, on the CPU.

    z_i = mu_i + sd_i eps_i, and z'_i = mu_j + sd_j eps_i takes its posterior from another example j = pi(i)
    but its noise from example i. With common noise an encoder that copies the prior has z' = z, and the two
    are equal exactly, however strong the decoder. ``generator`` is a CPU generator.
    """
    own, shuffled, _ = _shuffle(encode, log_likelihood, x, generator, batch_size)
    return own, shuffled


def delta_shuffle(
    encode: Encode,
    log_likelihood: LogLikelihood,
    x: Examples,
    *,
    resamples: int = RESAMPLES,
    generator: torch.Generator | None = None,
    batch_size: int = BATCH,
) -> Estimate:
    """How much worse each example is explained by another example's z: mean of NLL(x, z') - NLL(x, z),
    paired.

    About 0: the decoder ignores z, or z holds nothing. A detector of use, not a quantity of information. See
    :func:`shuffle_nll` for z', ``along_cycle`` in ``vaekernels.collapse.estimate`` for the interval.
    """
    own, shuffled, permutation = _shuffle(encode, log_likelihood, x, generator, batch_size)
    return bootstrap_mean(along_cycle(shuffled - own, permutation), resamples=resamples, generator=generator)


def _shuffle(
    encode: Encode,
    log_likelihood: LogLikelihood,
    x: Examples,
    generator: torch.Generator | None,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    model = Model(encode, log_likelihood, batch_size=batch_size)
    mu, logvar = model.moments(x)
    permutation = derangement(count(x), generator=generator)
    codes = Codes.draw(mu, logvar, generator)
    own = model.nll(x, codes.own)
    return own, model.nll(x, lambda a, b: codes.shuffled(permutation, a, b)), permutation
