"""Models whose collapse was planted: what the diagnosis must find is known without it.

Every case is linear or a look-up, so that its truth can be written down; the seed draws the data, the weights
and the order of the dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vaekernels import collapse

N = 2048  # the default of diagnose; every split has as many


@dataclass(frozen=True)
class Planted:
    """A model, its data, and the truth."""

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    log_likelihood: Callable[[Tensor, Tensor], Tensor]
    heldout: Tensor
    train: Tensor
    verdict: str
    states: list[str]
    subtype: str | None = None
    overfit: bool = False
    redundant: frozenset[int] = frozenset()
    rate: float | None = None
    information: float | None = None
    findings: frozenset[str] = frozenset()
    open: frozenset[str] = frozenset()
    """findings that lie too near to their threshold to tell"""

    def diagnose(self, seed: int) -> collapse.Report:
        return collapse.diagnose(
            self.encode, self.log_likelihood, self.heldout, train=self.train, seed=seed, progress=False
        )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(x: Tensor, mean: Tensor, sd: float) -> Tensor:
    """log N(x; mean, sd^2 I), summed over the last axis."""
    return -0.5 * (((x - mean) / sd) ** 2 + math.log(2 * math.pi * sd**2)).sum(dim=-1)


def rotation(size: int, rng: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=rng))
    return q * r.diagonal().sign()


@dataclass(frozen=True)
class Linear:
    """x = rotation [w z; 0] + sd noise, z ~ N(0, I), with its exact posterior: z_d is worth -1/2 log(1 -
    rho_d^2) nats, and as its aggregate posterior is the prior, that is its rate too. Probabilistic PCA
    (Tipping & Bishop 1999) at its optimum has this form."""

    basis: Tensor
    w: Tensor
    sd: float

    @classmethod
    def worth(cls, nats: list[float], rng: torch.Generator, sd: float = 0.7) -> Linear:
        """With that much information in every dimension, 0 for none."""
        rho2 = 1 - torch.exp(-2 * torch.tensor(nats))
        w = sd * torch.sqrt(rho2 / (1 - rho2))
        return cls(rotation(len(nats) + 2, rng)[:, : len(nats)], w, sd)

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        z = torch.randn(n, len(self.w), generator=rng)
        noise = torch.randn(n, len(self.basis), generator=rng)
        return (z * self.w) @ self.basis.T + self.sd * noise

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.w**2 + self.sd**2
        mu = (x @ self.basis) * (self.w / variance)
        return mu, torch.log(self.sd**2 / variance).expand_as(mu)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return normal(x, (z * self.w) @ self.basis.T, self.sd)

    def splits(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.sample(N, rng), self.sample(N, rng)


def permuted(nats: list[float], rng: torch.Generator) -> list[float]:
    return [nats[i] for i in torch.randperm(len(nats), generator=rng).tolist()]


def copy_prior(seed: int) -> Planted:
    """The encoder gives the prior for every x. The decoder would use z, so what is at fault is inference."""
    rng = generator(seed)
    model = Linear.worth([0.8] * 5, rng)
    heldout, train = model.splits(rng)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x), 5), torch.zeros(len(x), 5)

    return Planted(
        encode,
        model.log_likelihood,
        heldout,
        train,
        "collapsed",
        ["pruned"] * 5,
        subtype="inference lag",
        rate=0.0,
        information=0.0,
    )


def blind_copy_prior(seed: int) -> Planted:
    """The encoder gives the prior and the decoder ignores z: the model itself has collapsed."""
    rng = generator(seed)
    model = Linear.worth([0.8] * 5, rng)
    heldout, train = model.splits(rng)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x), 5), torch.zeros(len(x), 5)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return normal(x, torch.zeros(()), 1.0)

    return Planted(
        encode,
        log_likelihood,
        heldout,
        train,
        "collapsed",
        ["pruned"] * 5,
        subtype="model collapse",
        rate=0.0,
        information=0.0,
    )


def constant_offset(seed: int) -> Planted:
    """Some dimensions have a rate, the same for every x: it holds nothing."""
    rng = generator(seed)
    model = Linear.worth([0.8] * 6, rng)
    heldout, train = model.splits(rng)
    mu = torch.tensor(permuted([0.7, -1.0, 0.5, 0.0, 0.0, 0.0], rng))
    logvar = torch.where(mu != 0, -0.5, 0.0)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return mu.expand(len(x), 6), logvar.expand(len(x), 6)

    rate = 0.5 * (mu**2 + torch.exp(logvar) - 1 - logvar).sum().item()
    states = ["rate-only" if value != 0 else "pruned" for value in mu.tolist()]
    return Planted(
        encode, model.log_likelihood, heldout, train, "rate-only", states, rate=rate, information=0.0
    )


def blind_decoder(seed: int) -> Planted:
    """An informative encoder, and a decoder that looks at another part of z alone."""
    rng = generator(seed)
    nats = permuted([1.2, 0.6, 0.3, 0.0, 0.0], rng)
    model = Linear.worth(nats, rng)
    heldout, train = model.splits(rng)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return normal(x, torch.zeros(()), 1.2)

    states = ["encoder-only" if worth else "pruned" for worth in nats]
    return Planted(
        model.encode, log_likelihood, heldout, train, "encoder-only", states, rate=2.1, information=2.1
    )


def duplicated(seed: int) -> Planted:
    """Two dimensions say the same, each with noise of its own, and the decoder averages them."""
    rng = generator(seed)
    x = torch.randn(2 * N, 3, generator=rng)
    order = torch.randperm(5, generator=rng)  # z[order]: two copies of x0, x1, x2, nothing
    place = torch.argsort(order)
    sd = torch.tensor([0.5, 0.5, 0.4, 0.6, 1.0])

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu = torch.stack([x[:, 0] * 0.8, x[:, 0] * 0.8, x[:, 1] * 0.9, x[:, 2] * 0.8, 0 * x[:, 0]], dim=1)
        logvar = (2 * torch.log(sd)).expand_as(mu)
        return mu[:, place], logvar[:, place]

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        z = z[:, order]
        mean = torch.stack([(z[:, 0] + z[:, 1]) / 1.8, z[:, 2], z[:, 3]], dim=1)
        return normal(x, mean, 0.5)

    states = [["active", "active", "active", "active", "pruned"][i] for i in place.tolist()]
    return Planted(encode, log_likelihood, x[:N], x[N:], "informative", states)


def majority(seed: int) -> Planted:
    """Three dimensions say the same, and the decoder takes their median: none is missed alone."""
    rng = generator(seed)
    x = torch.randn(2 * N, 2, generator=rng)
    order = torch.randperm(5, generator=rng)  # z[order]: three copies of x0, x1, nothing
    place = torch.argsort(order)
    sd = torch.tensor([0.03, 0.03, 0.03, 0.5, 1.0])

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu = torch.stack([*[x[:, 0]] * 3, x[:, 1] * 0.8, 0 * x[:, 0]], dim=1)
        logvar = (2 * torch.log(sd)).expand_as(mu)
        return mu[:, place], logvar[:, place]

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        z = z[:, order]
        mean = torch.stack([z[:, :3].median(dim=1).values, z[:, 3]], dim=1)
        return normal(x, mean, 0.5)

    states = [["active", "active", "active", "active", "pruned"][i] for i in place.tolist()]
    copies = frozenset(place.argsort()[:3].tolist())
    return Planted(
        encode,
        log_likelihood,
        x[:N],
        x[N:],
        "informative",
        states,
        redundant=copies,
        findings=frozenset({"aggregate_kl", "z_free_gain"}),
        open=frozenset({"information_share", "svi_gain"}),
    )


def memoriser(seed: int) -> Planted:
    """The code is a hash of x, and the decoder a table of the training examples: nothing carries over."""
    rng = generator(seed)
    x = torch.randn(2 * N, 8, generator=rng)
    hashing = 25 * torch.randn(8, 4, generator=rng)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu = 1.4 * torch.sin(x @ hashing)
        return mu, torch.full_like(mu, 2 * math.log(0.05))

    table, codes = x[N:], encode(x[N:])[0]

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        remembered = table[torch.cdist(z, codes).argmin(dim=1)]
        parts = torch.stack([normal(x, remembered, 0.3), normal(x, torch.zeros(()), 1.0)])
        return torch.logsumexp(parts, dim=0) - math.log(2)

    return Planted(encode, log_likelihood, x[:N], x[N:], "encoder-only", ["memorised"] * 4, overfit=True)


def linear_gaussian(seed: int) -> Planted:
    """Exact inference in a linear model: strong, weak and unused dimensions."""
    rng = generator(seed)
    nats = permuted([1.5, 1.0, 0.5, 0.2, 0.06, 0.05, 0.0, 0.0], rng)
    model = Linear.worth(nats, rng)
    heldout, train = model.splits(rng)
    states = ["active" if worth >= 0.1 else "low-rate" if worth else "pruned" for worth in nats]
    return Planted(
        model.encode,
        model.log_likelihood,
        heldout,
        train,
        "informative",
        states,
        rate=sum(nats),
        information=sum(nats),
    )


def floored(seed: int) -> Planted:
    """Two dimensions work; six more pay for an offset, as under a floor for each dimension."""
    rng = generator(seed)
    nats = permuted([1.0, 0.7] + [0.0] * 6, rng)
    model = Linear.worth(nats, rng)
    heldout, train = model.splits(rng)
    offset = torch.tensor([0.0 if worth else 0.7 for worth in nats])

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = model.encode(x)
        return mu + offset, logvar

    states = ["active" if worth else "rate-only" for worth in nats]
    rate = 1.7 + 6 * 0.245
    return Planted(
        encode,
        model.log_likelihood,
        heldout,
        train,
        "partial",
        states,
        rate=rate,
        information=1.7,
        findings=frozenset({"aggregate_kl", "svi_gain"}),
    )


def nearly(seed: int) -> Planted:
    """One dimension holds less than counts as something for the whole, and is used: not quite collapsed."""
    rng = generator(seed)
    nats = permuted([0.06, 0.0, 0.0, 0.0], rng)
    model = Linear.worth(nats, rng)
    heldout, train = model.splits(rng)
    states = ["low-rate" if worth else "pruned" for worth in nats]
    return Planted(
        model.encode,
        model.log_likelihood,
        heldout,
        train,
        "near-collapsed",
        states,
        rate=0.06,
        information=0.06,
    )


def spread(seed: int) -> Planted:
    """A hundred dimensions say the same with a lot of noise each, and the decoder averages them: one alone
    holds 0.002 nats, all together log(1 + 100 SNR) / 2 = 0.17."""
    rng = generator(seed)
    x, dims, share = torch.randn(2 * N, 1, generator=rng), 100, 0.004
    snr = share / (1 - share)
    variance = 1 / (1 + dims * snr)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu = share**0.5 * x.expand(-1, dims)
        return mu, torch.full_like(mu, math.log(1 - share))

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        mean = variance * snr / share**0.5 * z.sum(dim=1, keepdim=True)
        return normal(x, mean, variance**0.5)

    information = 0.5 * math.log1p(dims * snr)
    rate = -dims * 0.5 * math.log1p(-share)
    return Planted(
        encode, log_likelihood, x[:N], x[N:], "informative", ["low-rate"] * dims, rate=rate,
        information=information,
    )  # fmt: skip


def few_of_many(seed: int) -> Planted:
    """Three of 48 dimensions work."""
    rng = generator(seed)
    nats = permuted([0.7] * 3 + [0.0] * 45, rng)
    model = Linear.worth(nats, rng)
    heldout, train = model.splits(rng)
    states = ["active" if worth else "pruned" for worth in nats]
    return Planted(
        model.encode, model.log_likelihood, heldout, train, "informative", states, rate=2.1, information=2.1
    )


def ring(seed: int) -> Planted:
    """mu on a circle of radius 6 with sd e^-2: I = log(12 pi / (sqrt(2 pi e) sd)), and most of the rate is
    the distance of the aggregate posterior from the prior."""
    angle = 2 * math.pi * torch.rand(2 * N, 1, generator=generator(seed))

    def circle(angle: Tensor) -> Tensor:
        return 6 * torch.cat([angle.cos(), angle.sin()], dim=1)

    def encode(angle: Tensor) -> tuple[Tensor, Tensor]:
        return circle(angle), torch.full((len(angle), 2), -4.0)

    def log_likelihood(angle: Tensor, z: Tensor) -> Tensor:
        return normal(circle(angle), z, 0.05**0.5)

    return Planted(
        encode,
        log_likelihood,
        angle[:N],
        angle[N:],
        "informative",
        ["active"] * 2,
        rate=18 + math.exp(-4) - 1 + 4,
        information=math.log(12 * math.pi) - 0.5 * math.log(2 * math.pi * math.e) + 2,
        findings=frozenset({"information_share", "aggregate_kl"}),
    )


CASES: dict[str, Callable[[int], Planted]] = {
    case.__name__.replace("_", "-"): case
    for case in (
        copy_prior,
        blind_copy_prior,
        constant_offset,
        blind_decoder,
        duplicated,
        majority,
        memoriser,
        linear_gaussian,
        floored,
        nearly,
        spread,
        few_of_many,
        ring,
    )
}
