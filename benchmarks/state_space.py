"""A recurrent state-space model in the manner of Dreamer (Hafner et al. 2020, 2021), of vector observations:
a deterministic GRU state, a stochastic state with a learned prior at every step, KL balancing, free nats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from latent_ops import LatentOps
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DREAMER", "Sizes", "StateSpaceModel", "spring_chain"]

MIN_STD = 0.1
FREE_NATS = 1.0
BALANCE = 0.8  # the prior's share of the gradient
ACTIONS = 6


@dataclass(frozen=True)
class Sizes:
    observations: int = 24
    stochastic: int = 32
    deterministic: int = 200
    hidden: int = 200
    dense: int = 400


DREAMER = Sizes()


def _dense(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (inputs, hidden, hidden):
        layers += [nn.Linear(size, hidden), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class StateSpaceModel(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        stochastic, deterministic, hidden = sizes.stochastic, sizes.deterministic, sizes.hidden
        self.encoder = _dense(sizes.observations, sizes.dense, hidden)
        self.before = nn.Sequential(nn.Linear(stochastic + ACTIONS, hidden), nn.ELU())
        self.cell = nn.GRUCell(hidden, deterministic)
        self.prior = nn.Sequential(
            nn.Linear(deterministic, hidden), nn.ELU(), nn.Linear(hidden, 2 * stochastic)
        )
        self.posterior = nn.Sequential(
            nn.Linear(deterministic + hidden, hidden), nn.ELU(), nn.Linear(hidden, 2 * stochastic)
        )
        self.decoder = _dense(deterministic + stochastic, sizes.dense, sizes.observations)

    def forward(self, observations: Tensor, actions: Tensor, ops: LatentOps) -> Tensor:
        """The loss of sequences [T, B, observations] and [T, B, actions], nats per step."""
        embedded = self.encoder(observations)
        batch = observations.shape[1]
        z = observations.new_zeros(batch, self.sizes.stochastic)
        h = observations.new_zeros(batch, self.sizes.deterministic)
        states, moments = [], []
        for seen, action in zip(embedded, actions, strict=True):
            h = self.cell(self.before(torch.cat([z, action], dim=1)), h)
            prior = _gaussian(self.prior(h))
            mu, std = _gaussian(self.posterior(torch.cat([h, seen], dim=1)))
            z = ops.reparameterize(mu, std, parameterization="std")
            states.append(torch.cat([h, z], dim=1))
            moments.append((mu, std, *prior))
        kl = ops.gaussian_kl(
            *(torch.stack(given) for given in zip(*moments, strict=True)),
            free_bits=FREE_NATS,
            balance=BALANCE,
            batch_dims=2,
            group_dims=(),
            parameterization="std",
        )
        said = self.decoder(torch.stack(states))
        nll: Tensor = 0.5 * (said - observations).pow(2).sum(-1).mean()
        return nll + kl


def _gaussian(moments: Tensor) -> tuple[Tensor, Tensor]:
    mu, raw = moments.chunk(2, dim=1)
    return mu, F.softplus(raw) + MIN_STD


def spring_chain(steps: int, batch: int, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions and velocities of a chain of masses on springs, [steps, batch, observations], whose first
    masses are pushed at random, [steps, batch, ACTIONS]."""
    masses = sizes.observations // 2
    actions = torch.randn(steps, batch, ACTIONS, generator=generator)
    place, speed = torch.randn(2, batch, masses, generator=generator).unbind()
    seen = []
    for push in actions:
        left, right = F.pad(place, (1, 0))[:, :-1], F.pad(place, (0, 1))[:, 1:]
        speed = speed + 0.1 * (left + right - 2 * place - 0.1 * speed + F.pad(push, (0, masses - ACTIONS)))
        place = place + 0.1 * speed
        seen.append(torch.cat([place, speed], dim=1))
    return torch.stack(seen), actions
