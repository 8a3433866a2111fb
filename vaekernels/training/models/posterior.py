"""From features to the moments of q(z|x), with the two countermeasures that are built into them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Posterior", "committed", "largest_logvar", "widened"]


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 at least: near collapse the KL is lost in the 8 bits of a bfloat16's mantissa."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def largest_logvar(delta: float) -> float:
    """The log-variance l < 0 with 1/2 (exp(l) - 1 - l) = ``delta`` nats.

    KL(N(mu, exp(l)) || N(0, 1)) is at least that whatever mu is, and falls in l for l < 0. So with every
    log-variance at or below this one the rate of every dimension is at least ``delta``: a committed rate
    (Razavi et al. 2019, there for an autoregressive prior). Rounded down by one part in a million, more than
    float32 arithmetic loses.
    """
    # exp(l) - 1 - l - 2 delta is convex, falls for l < 0 and is positive here: Newton comes from the left.
    logvar = -1.0 - 2.0 * delta
    for _ in range(50):
        logvar -= (math.expm1(logvar) - logvar - 2.0 * delta) / math.expm1(logvar)
    return logvar * (1.0 + 1e-6)


def committed(logvar: Tensor, delta: float) -> Tensor:
    """``logvar``, smoothly kept below the bound that makes the rate at least ``delta``, in float32 at least:
    hi - softplus(hi - logvar), which is logvar far below the bound. Smooth, since a hard clamp has gradient 0
    above it, where training starts, and would never let go."""
    bound = largest_logvar(delta)
    return bound - F.softplus(bound - widened(logvar))


class Posterior(nn.Module):
    """Splits what an encoder's last layer gives into mu and logvar, and applies what is set:

    ``batch_norm``: mu <- gamma * BN(mu) + b with gamma fixed and b learned, per dimension or channel (BN-VAE,
    Zhu et al. 2020). The mean rate of a dimension over a training batch is then at least (gamma² + b²) / 2,
    but for the epsilon of BN.

    ``delta``: logvar is kept so low that the rate of every dimension is at least delta (:func:`committed`).

    Moments are packed along axis 1, before and after.
    """

    def __init__(self, dims: int, *, delta: float | None = None, batch_norm: float | None = None) -> None:
        super().__init__()
        self.delta = delta
        self.gamma = batch_norm
        if batch_norm is not None:
            self.norm = nn.BatchNorm1d(dims, affine=False)
            self.offset = nn.Parameter(torch.zeros(dims))

    def forward(self, moments: Tensor) -> Tensor:
        if self.delta is None and self.gamma is None:
            return moments
        mu, logvar = moments.chunk(2, dim=1)
        if self.gamma is not None:
            # [B, D] or, for a latent with positions, [B, C, positions]
            flat = widened(mu.flatten(2) if mu.dim() > 2 else mu)
            offset = self.offset.view(-1, *[1] * (flat.dim() - 2))
            mu = (self.gamma * self.norm(flat) + offset).view(mu.shape)
        if self.delta is not None:
            logvar = committed(logvar, self.delta)
        return torch.cat([widened(mu), widened(logvar)], dim=1)

    def reset_parameters(self) -> None:
        if self.gamma is not None:
            nn.init.zeros_(self.offset)
