"""A VAE of two latent layers, the upper of which is the prior of the lower."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaekernels.training.models.base import VAE, LatentLayer, Sample
from vaekernels.training.models.likelihoods import Likelihood
from vaekernels.training.models.posterior import Posterior, committed, widened
from vaekernels.training.models.standardized import Standardized

__all__ = ["LadderVAE"]


class _Up(nn.Module):
    """Bottom up: the moments of the upper layer, and what the data say about the lower one."""

    def __init__(self, inputs: int, hidden: int, lower: int, upper: int, posterior: Posterior) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())
        self.to_lower = nn.Linear(hidden, 2 * lower)
        self.to_upper = nn.Sequential(nn.Linear(hidden, 2 * upper), posterior)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        return self.to_upper(self.second(h)), self.to_lower(h)


class _Down(nn.Module):
    """Top down: the prior p(z1|z2) and the likelihood p(x|z1)."""

    def __init__(
        self, lower: int, upper: int, hidden: int, likelihood: Likelihood, shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        outputs = likelihood.width * math.prod(shape)
        self.prior = nn.Sequential(nn.Linear(upper, hidden), nn.Tanh(), nn.Linear(hidden, 2 * lower))
        self.net = nn.Sequential(nn.Linear(lower, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
        self.likelihood = likelihood
        self.shape = shape
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The prior starts as N(0, I)."""
        last = self.prior[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def said(self, z1: Tensor) -> Tensor:
        said: Tensor = self.net(z1)
        return said.view(z1.shape[0], self.likelihood.width, *self.shape)


class LadderVAE(VAE):
    """p(z2) = N(0, I), p(z1|z2) = N(mp(z2), sp(z2)²), p(x|z1). The posterior of z1 joins what the data say,
    N(m(x), s(x)²), to the prior by their precisions (Sonderby et al. 2016).

    Seen from outside, z = (z2, u) with u = (z1 - mp(z2)) / sp(z2): the lower layer relative to its prior.
    Whatever z2 is, u ~ N(0, I) under the prior, so the prior of z is N(0, I); the likelihood of (z2, u) is
    that of z1 = mp(z2) + sp(z2) u; and the KL of the lower layer is, for every z2, that of u's posterior

        u | x, z2 ~ N((mq - mp) / sp, (sq / sp)²)

    against N(0, I), as the KL does not change under an affine map. This posterior depends on z2, and that of
    z as a whole has no diagonal. :meth:`encode` gives the diagonal Gaussian with u's moments at z2 = mu2(x):
    another, valid posterior for the same generative model, whose ELBO is a lower bound too. Training and
    evaluation use the model's own; the diagnosis uses this one.
    """

    encoder: _Up
    decoder: _Down

    def __init__(
        self,
        shape: tuple[int, ...],
        likelihood: Likelihood,
        posterior: Posterior,
        *,
        lower: int,
        upper: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.lower, self.upper = lower, upper
        self.latent_dim = lower + upper
        self.delta = posterior.delta
        self.encoder = _Up(math.prod(shape), hidden, lower, upper, posterior)
        self.decoder = _Down(lower, upper, hidden, likelihood, shape)
        self.inputs = Standardized(shape)

    @property
    def latent_layers(self) -> tuple[LatentLayer, ...]:
        return LatentLayer((self.upper,)), LatentLayer((self.lower,), learned_prior=True)

    def moments(self, x: Tensor) -> Tensor:
        top, data = self._up(x)
        mu2, logvar2 = top.chunk(2, dim=1)
        mu, logvar = self._relative(data, self._prior(mu2))
        return torch.cat([mu2, mu, logvar2, logvar], dim=1)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return self.decoder.likelihood.log_prob(x, self.decoder.said(self._lower(z)))

    def forward(self, x: Tensor, sample: Sample) -> Tensor:
        top, data = self._up(x)
        z2 = sample(top)
        prior = self._prior_moments(z2)
        mp, lp = prior.chunk(2, dim=1)
        mu, logvar = self._relative(data, (mp, lp))
        z1 = sample(torch.cat([mp + torch.exp(0.5 * lp) * mu, lp + logvar], dim=1), prior)
        return self.decoder.likelihood.log_prob(x, self.decoder.said(z1))

    @torch.no_grad()
    def generate(self, z: Tensor) -> Tensor:
        return self.decoder.likelihood.mean(self.decoder.said(self._lower(z)))

    def _up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, data = self.encoder(self.inputs(self.decoder.likelihood.features(x)))
        return widened(top), widened(data)

    def _prior_moments(self, z2: Tensor) -> Tensor:
        return widened(self.decoder.prior(z2))

    def _prior(self, z2: Tensor) -> tuple[Tensor, Tensor]:
        mp, lp = self._prior_moments(z2).chunk(2, dim=1)
        return mp, lp

    def _relative(self, data: Tensor, prior: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of u. With w = sp² / (s² + sp²): mq = w m + (1 - w) mp, sq² = (1 - w) sp²."""
        m, logvar = data.chunk(2, dim=1)
        mp, lp = prior
        mu = torch.sigmoid(lp - logvar) * (m - mp) * torch.exp(-0.5 * lp)
        logvar = F.logsigmoid(logvar - lp)
        return mu, logvar if self.delta is None else committed(logvar, self.delta)

    def _lower(self, z: Tensor) -> Tensor:
        z2, u = z[:, : self.upper], z[:, self.upper :]
        mp, lp = self._prior(z2)
        return mp + torch.exp(0.5 * lp) * u
