"""A 95% interval covers the truth 95 times in 100: counted over 200 independent data sets, or 100 of 2,000
examples each (slow).

The truth is a closed form of the linear model (`planted.Linear`) or of a Gaussian channel. The counts go to
benchmarks/results/interval-coverage.csv.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from planted import Linear, generator, normal
from torch import Tensor

from vaekernels.collapse.decoder import importance_columns, importance_mean
from vaekernels.collapse.diagnosis import A_FEW
from vaekernels.collapse.estimate import Bootstrap, Estimate
from vaekernels.collapse.information import mi_bounds
from vaekernels.collapse.measurements import Measurements, bracket
from vaekernels.collapse.model import Model
from vaekernels.collapse.strata import order
from vaekernels.collapse.verdict import EPS_INFO, EPS_USE, USE_TAIL, answers

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "interval-coverage.csv"
# Binomial(200, 0.95) lies within 90% and 99% with probability 0.998, Binomial(100, 0.95) above 88%.
LEAST, MOST = 0.90, 0.99


def seeds_of(n: int) -> int:
    return 200 if n < 2000 else 100


def least(n: int) -> float:
    return LEAST if n < 2000 else 0.88


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def record(name: str, n: int, counts: dict[str, tuple[float, int]], seeds: int) -> None:
    """Replaces the rows of one study in the table."""
    rows: list[list[str]] = []
    if RESULTS.exists():
        with open(RESULTS, newline="") as file:
            rows = [row for row in csv.reader(file) if row[:2] != [name, str(n)]][1:]
    rows += [
        [name, str(n), key, f"{truth:.4f}", str(seeds), f"{hit / seeds:.3f}"]
        for key, (truth, hit) in counts.items()
    ]
    with open(RESULTS, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["study", "examples", "measure", "truth", "samples", "covered"], *sorted(rows)]
        )


def linear_truths(model: Linear, nats: list[float]) -> dict[str, float]:
    """Closed forms of `planted.Linear`. Its posterior is exact, so the NELBO and the importance-weighted NLL
    are -log p(x), and its aggregate posterior is the prior. Shuffling z_d costs rho^2 / (1 - rho^2)."""
    variances = torch.cat([model.w**2, torch.zeros(2)]) + model.sd**2
    nelbo = 0.5 * torch.log(2 * math.pi * math.e * variances).sum().item()
    use = [(w / model.sd) ** 2 for w in model.w.tolist()]
    truths = {
        "rate": sum(nats),
        "mi_lower": sum(nats),
        "mi_upper": sum(nats),
        "mi bracket": sum(nats),
        "nelbo": nelbo,
        "nll": nelbo - sum(nats),
        "iwae_nll": nelbo,
        "delta_shuffle": sum(use),
    }
    for d, (worth, cost) in enumerate(zip(nats, use, strict=True)):
        truths |= {f"rate {d}": worth, f"information {d}": worth, f"use {d}": cost}
    return truths


def measured(model: Linear, n: int, seed: int) -> dict[str, Estimate]:
    """With the ends that hold for all dimensions together as "all information 0", "all use 0" ..."""
    x = model.sample(n, generator(10_000 + seed))
    split = Measurements("heldout", Model(model.encode, model.log_likelihood), x, seed, 0)
    split.encode()
    split.shuffle()
    split.decode_information(32, n)
    split.importance(4, min(n, 512))
    found = split.estimates(["rate", "mi_lower", "mi_upper", "nelbo", "nll", "delta_shuffle", "i_dec"])
    columns = importance_columns(split.columns["nelbo"], split.nll["importance"])
    found["iwae_nll"] = split.bootstrap.of_means(columns, importance_mean)[0]
    found["mi bracket"] = bracket(found["mi_lower"], found["mi_upper"])
    dims = split.per_dim()
    use = split.use_estimates(split.lost([torch.tensor([d]) for d in range(len(model.w))], split.use_n))
    together = {
        "information": answers(dims.lower, dims.upper, n, EPS_INFO),
        "use": answers(use, use, split.use_n, EPS_USE, USE_TAIL),
    }
    for d in range(len(model.w)):
        found |= {
            f"rate {d}": dims.rate[d],
            f"information {d}": bracket(dims.lower[d], dims.upper[d]),
            f"use {d}": use[d],
        } | {f"all {name} {d}": answer[d].estimate for name, answer in together.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 200, 2000])
def test_intervals_on_a_linear_model(n: int) -> None:
    nats, seeds = [0.8, 0.4, 0.2, 0.05], seeds_of(n)
    model = Linear.worth(nats, generator(0))
    truths = linear_truths(model, nats)
    if n == 50:  # too few for the bounds to be as good as unbiased: the bracket is what they claim
        del truths["mi_lower"], truths["mi_upper"]
    estimates = [measured(model, n, seed) for seed in range(seeds)]
    # What the decoder can read has no closed form; its interval is for the mean of the bound itself.
    truths["i_dec"] = sum(each["i_dec"].value for each in estimates) / seeds
    hits = Counter(key for each in estimates for key, truth in truths.items() if covers(each[key], truth))
    for name in ("information", "use"):
        hits[f"all {name}"] = sum(
            all(covers(each[f"all {name} {d}"], truths[f"{name} {d}"]) for d in range(len(nats)))
            for each in estimates
        )
        truths[f"all {name}"] = math.nan
    record("linear model", n, {key: (truth, hits[key]) for key, truth in truths.items()}, seeds)
    # "all": 97.5 % of each end. On few examples the heavy tails that were not seen cost some, and what is
    # done about them costs width.
    wrong = {
        key: hits[key] / seeds
        for key in truths
        if not least(n) <= hits[key] / seeds <= (1.0 if key.startswith("all") or n < 2000 else MOST)
    }
    assert not wrong


def rarely(share: float, n: int, seed: int) -> tuple[Measurements, Tensor]:
    """x is -1 or 1, and of those with a flag the code holds it: q(z|x) = N(sqrt(1 - v) x, v) with v = 1/9.
    Another code costs them (1 - v) / v = 8 nats."""
    rng, v = generator(20_000 + seed), 1 / 9
    x = 2.0 * torch.randint(0, 2, (n, 2), generator=rng) - 1
    x[:, 1] = torch.rand(n, generator=rng) < share

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 1:] * math.sqrt(1 - v) * x[:, :1], x[:, 1:] * math.log(v)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        read = normal(x[:, :1], math.sqrt(1 - v) * z, math.sqrt(v))
        return torch.where(x[:, 1] > 0, read, normal(x[:, :1], torch.zeros(()), 1.0))

    split = Measurements("heldout", Model(encode, log_likelihood), x, seed, 0)
    split.encode()
    split.shuffle()
    return split, x[:, 1]


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 200, 2000])
def test_rare_use_is_covered_or_said_to_be_open(n: int) -> None:
    """Where nobody was seen to use z the interval is at 0, and the report says "use by fewer than 3/n of the
    examples is not excluded"; where a few were, that so few hardly tell."""
    counts: dict[str, tuple[float, int]] = {}
    seeds = seeds_of(n)
    for share in (0.02, 0.05):
        hits: Counter[str] = Counter()
        truth = 8 * share
        for seed in range(seeds):
            split, users = rarely(share, n, seed)
            interval = split.estimates(["delta_shuffle"])["delta_shuffle"]
            covered, seen = covers(interval, truth), bool(users.any())
            few = 0 < round((split.concentration() or 0) * n) < A_FEW
            hits["covered"] += covered
            hits["seen"] += seen
            hits["told"] += covered or (share < 3 / n if not seen else few)
            assert interval.low <= truth or covered or n > 200, "no use is claimed that there is not"
        for key in ("covered", "seen", "told"):
            label = "delta_shuffle" if key == "covered" else f"delta_shuffle, {key}"
            counts[f"{label}, {100 * share:.0f} % use"] = (truth, hits[key])
        assert hits["told"] >= least(n) * seeds
        if n * share >= 10:
            assert hits["covered"] >= least(n) * seeds
        assert hits["covered"] >= 0.75 * hits["seen"]
    record("rare use", n, counts, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("n, copies", [(50, 2), (200, 4), (2000, 20)])
def test_intervals_over_near_copies_within_strata(n: int, copies: int) -> None:
    """Copies that differ by a thousandth, with their labels, told as groups: 25, 50 and 100 of them."""
    nats, seeds = [0.8, 0.4, 0.2, 0.05], seeds_of(n)
    model = Linear.worth(nats, generator(0))
    names = ["rate", "nll", "nelbo", "delta_shuffle"]
    truths = {name: truth for name, truth in linear_truths(model, nats).items() if name in names}
    hits: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for seed in range(seeds):
        rng = generator(30_000 + seed)
        once = model.sample(n // copies, rng)
        x = once.repeat_interleave(copies, dim=0)
        x += 0.001 * torch.randn(x.shape, generator=rng)
        groups = torch.arange(n) // copies
        strata = torch.randint(0, 2, (n // copies,), generator=rng).repeat_interleave(copies)
        kept = order(strata)
        for told in (True, False):
            split = Measurements(
                "heldout",
                Model(model.encode, model.log_likelihood),
                x[kept],
                seed,
                0,
                strata=strata[kept],
                groups=groups[kept] if told else None,
            )
            split.encode()
            split.shuffle()
            for name, estimate in split.estimates(names).items():
                hits[told][name] += covers(estimate, truths[name])
    record(
        "near-copies in strata",
        n,
        {f"{name}, {copies} of each, groups": (truths[name], hits[True][name]) for name in names}
        | {f"{name}, {copies} of each": (truths[name], hits[False][name]) for name in names},
        seeds,
    )
    wrong = {name: hits[True][name] / seeds for name in names if hits[True][name] < least(n) * seeds}
    assert not wrong


# Unsaturated at N = 2048, whose cap is 7.6 nats. Bias of the bounds: 0.15 standard errors at 2 nats in 4
# dims.
CHANNELS = [(0.02, 1), (0.5, 1), (2.0, 1), (0.02, 4), (0.5, 4), (2.0, 4), (0.5, 16), (2.0, 16)]


@pytest.mark.slow
def test_information_intervals_on_gaussian_channels() -> None:
    """Both bounds' intervals and the bracket, against the channel's mutual information."""
    n, counts, seeds = 2048, dict[str, tuple[float, int]](), 200
    for nats, dims in CHANNELS:
        rho2 = 1 - math.exp(-2 * nats / dims)
        hits: Counter[str] = Counter()
        for seed in range(seeds):
            rng = generator(seed)
            mu = math.sqrt(rho2) * torch.randn(n, dims, generator=rng)
            z = mu + math.sqrt(1 - rho2) * torch.randn(n, dims, generator=rng)
            bounds = mi_bounds(mu, torch.full_like(mu, math.log(1 - rho2)), z)
            lower, upper = Bootstrap(n, generator=rng).estimates(
                torch.stack([bounds.lower, bounds.upper], dim=1)
            )
            hits["lower"] += covers(lower, nats)
            hits["upper"] += covers(upper, nats)
            hits["bracket"] += covers(bracket(lower, upper), nats)
        for name in ("lower", "upper", "bracket"):
            counts[f"{name}, {nats:g} nats in {dims} dims"] = (nats, hits[name])
    record("Gaussian channel", n, counts, seeds)
    # The bracket reaches from the lower end of one to the upper end of the other, so it may cover more.
    wrong = {
        key: hit / seeds
        for key, (_, hit) in counts.items()
        if not LEAST <= hit / seeds <= (1.0 if "bracket" in key else MOST)
    }
    assert not wrong
