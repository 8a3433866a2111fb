"""The latent layer as most code bases have it, with the random numbers of the fused one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vaekernels as vk


def sample_kl_packed(
    moments: Tensor,
    dim: int = 1,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    free_bits: float | Tensor | None = None,
    clamp: str = "batch",
    group_dims: Any = None,
    **ignored: Any,
) -> vk.SampleKL:
    """z = mu + sd * eps and the KL in plain PyTorch, of [B, 2 D] moments; a floor per dimension or on all."""
    assert group_dims in (None, ()), "what the tests use"
    mu, logvar = moments.chunk(2, dim=dim)
    eps = vk.reparameterize_packed(torch.zeros_like(moments), dim, generator=generator)
    z = mu + torch.exp(0.5 * logvar) * eps
    if prior_mu is None or prior_logvar is None:
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    else:
        ratio = logvar - prior_logvar
        kl = 0.5 * ((mu - prior_mu) ** 2 / prior_logvar.exp() + ratio.exp() - 1 - ratio)
    if group_dims == ():
        kl = kl.sum(dim=1, keepdim=True)
    rate = kl.mean(dim=0)
    shown = rate.squeeze() if group_dims == () else rate
    if free_bits is None:
        return vk.SampleKL(z, rate.sum(), shown)
    clamped = rate if clamp == "batch" else kl
    loss = clamped.clamp(min=float(free_bits))
    return vk.SampleKL(z, loss.sum() if clamp == "batch" else loss.sum(dim=1).mean(), shown)
