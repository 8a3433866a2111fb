"""The measurements on one split of the data, example by example."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vaekernels import ops
from vaekernels.collapse import decoder
from vaekernels.collapse.decoder import Codes
from vaekernels.collapse.estimate import TAIL, Bootstrap, Estimate, along_cycle, binomial_tail
from vaekernels.collapse.examples import Examples, count, take
from vaekernels.collapse.extras import Resampled, Samples
from vaekernels.collapse.information import compared, joint_bounds, mi_bounds
from vaekernels.collapse.metrics import ACTIVE_THRESHOLD
from vaekernels.collapse.model import Model, require_finite
from vaekernels.collapse.pairing import derangement, derangement_of
from vaekernels.collapse.strata import bounds_within, comparable, derangement_within, joint_within
from vaekernels.collapse.svi import Refinement, refine
from vaekernels.collapse.verdict import EPS_GLOBAL, Together

__all__ = ["Encoded", "Measurements"]

USE_PAIRS = 1 << 14  # evaluations for shuffling single dimensions: 1024 examples for 16 dims, 64 for 256
_USE_LEAST = 64
SHUFFLES, FEW = 8, 512
"""How often codes are shuffled where there are at most so few examples: each is then paired with 8 others, an
eighth of the noise of one pairing. On few examples one pairing also knows too little of its own noise: of 16
dimensions and 50 examples all intervals held the truth 69 times in 100, with 8 pairings 93 times."""
NEVER = 100.0
"""Nats by which a likelihood of 0 under another code counts as worse than under the own one."""
REFINED = 128
"""Examples on which inference is refined."""
LEAST_REFINED, LEAST_WEIGHTED = 16, 32
"""Of both, as few as a budget may leave."""
WEIGHTED = 512
"""Examples of the importance-weighted likelihood."""
CONTRASTED = 512
"""Examples of a train split for I_dec."""

OF_CLASSES = ("rate", "nll", "nelbo", "delta_shuffle")
"""What is also said of each class."""
SHOWN_DIMS = 16
_ROWS = 1 << 10
_COLUMNS = 1 << 12  # resampled at once: 32 MiB of means

# One stream of random numbers for each use, so that leaving one out changes no other.
_STREAMS = ("noise", "pairs", "bootstrap", "contrasts", "use", "refine", "importance", "codes", "select")


def stream(seed: int, name: str, number: int = 0) -> torch.Generator:
    """A generator of its own for one use of randomness on one split."""
    return torch.Generator().manual_seed((seed * 64 + number * 32 + _STREAMS.index(name)) % 2**63)


class Encoded(NamedTuple):
    """Per dimension: the rate, information and mismatch of all, by the columns' means."""

    rate: list[Estimate]
    lower: list[Estimate]
    upper: list[Estimate]
    mismatch: list[Estimate]


class Measurements:
    """Of one split: its examples, their codes, and in ``columns`` a float64 [n] for every measure, whose mean
    is the measure and which may be resampled as if the examples were independent. A measure of fewer examples
    has those of the first: single dimensions are measured on ``dims_n``, of which ``mu``, ``logvar`` and
    ``rates`` are."""

    def __init__(
        self,
        name: str,
        model: Model,
        x: Examples,
        seed: int,
        number: int,
        beta: float = 1.0,
        active_threshold: float = ACTIVE_THRESHOLD,
        strata: Tensor | None = None,
        groups: Tensor | None = None,
        hurried: bool = False,
    ) -> None:
        self.name = name
        self.model = model
        self.x = x
        self.n = count(x)
        self._strata, self._groups, self._hurried = strata, groups, hurried
        self.beta, self.active_threshold = beta, active_threshold
        self._seed, self._number = seed, number
        self.columns: dict[str, Tensor] = {}
        self.nll: dict[str, Tensor] = {}  # under its own code, a shuffled one, one of the prior
        self.bootstrap = self.subset(self.n)
        self.use_n = self.dims_n = self.n
        self.refined_n, self.weighted_n = min(self.n, REFINED), min(self.n, WEIGHTED)
        self.resampled: dict[str, Resampled] = {}
        self.caps: dict[str, float] = {}
        self.tau: tuple[float, float] | None = None
        self.contrasts: decoder.Contrasts | None = None
        self.impossible: dict[str, float] = {}

    def _stream(self, name: str) -> torch.Generator:
        return stream(self._seed, name, self._number)

    def encode(self, enough: Callable[[], bool] = lambda: False) -> None:
        """The codes, of fewer examples where it is ``enough`` after a batch."""
        mu, logvar = self.model.moments(self.x, enough)
        if len(mu) < self.n:
            self.x, self.n = take(self.x, slice(0, len(mu))), len(mu)
            self.bootstrap = self.subset(self.n)
        rate = torch.empty(self.n, dtype=torch.float64)
        for a in range(0, self.n, _ROWS):
            part = mu[a : a + _ROWS].cpu().double(), logvar[a : a + _ROWS].cpu().double()
            rate[a : a + _ROWS] = ops.gaussian_kl(*part, reduction="none")
        # The rate of NaN is NaN, and that of inf inf.
        require_finite(f"encode ({self.name})", rate)
        self.codes = Codes.draw(mu, logvar, self._stream("noise"))
        self.dims = mu.shape[1]
        self.use_n = self.examples_for(self.dims)
        if self._strata is None:
            self.bounds = mi_bounds(mu, logvar, self.codes.own(0, max(compared(self.n, self.dims))))
        else:
            n = comparable(self._strata[: self.n], self.dims)
            self.bounds = bounds_within(mu[:n], logvar[:n], self.codes.own(0, n), self._strata[:n])
        self.dims_n = len(self.bounds.lower_dims)
        self.mu, self.logvar = (part[: self.dims_n].cpu().double() for part in (mu, logvar))
        self.rates = ops.gaussian_kl(self.mu, self.logvar, reduction="elementwise")
        self.caps |= {"mi_lower": self.bounds.cap}
        self.columns |= {"rate": rate, "mi_lower": self.bounds.lower, "mi_upper": self.bounds.upper}

    def shuffle(self) -> None:
        permutations = self._all_pairs("pairs", self.n, self.shuffles())
        own = self._finite(self.model.nll(self.x, self.codes.own))
        self.nll["own"] = own
        found = []
        for permutation in permutations:

            def code(a: int, b: int, partners: Tensor = permutation) -> Tensor:
                return self.codes.shuffled(partners, a, b)

            found.append(self._floored("delta_shuffle", self.model.nll(self.x, code)))
        self.nll["shuffled"] = found[0]
        lost = torch.stack(found, dim=1) - own[:, None]
        self.columns |= {
            "nll": own,
            "nelbo": own + self.columns["rate"],
            "delta_shuffle": self._of_pairs(lost[:, None], permutations)[:, 0],
        }

    def decode_information(self, k: int, n: int) -> None:
        """I_dec on the first ``n`` examples."""
        x, codes = self.first(n), self.codes.first(n)
        self.contrasts = decoder.contrast(
            self.model,
            x,
            codes,
            k,
            self._stream("contrasts"),
            lambda nll: self._floored("i_dec", nll, own=nll[:, 0]),
            self._strata,
        )
        found = self.contrasts.infonce()
        self.tau = found.tau
        self.caps["i_dec"] = math.log(self.contrast_codes(n, k))
        self.columns["i_dec"] = self._finite(found.resample)

    def contrast_codes(self, n: int, k: int) -> int:
        """K of I_dec on ``n`` examples."""
        return decoder.contrasts(n, k, self._strata)

    def other_codes(self) -> None:
        own = self.nll["own"]
        self.nll["prior"] = self._floored("delta_prior", self.model.nll(self.x, self.codes.prior))
        mean = self._floored("delta_mean", self.model.nll(self.x, self.codes.mean))
        self.nll["zero"] = self._floored("z_free_gain", self.model.nll(self.x, self.codes.zero))
        self.columns |= {"delta_prior": self.nll["prior"] - own, "delta_mean": mean - own}

    def of_means(self, name: str, values: Tensor, function: Callable[[Tensor], Tensor]) -> Estimate:
        """``function`` of the column means of ``values`` [n, M], which takes [..., M] to [..., 1]."""
        bootstrap = self.subset(len(values))
        centre, resampled = function(values.double().mean(dim=0)), function(bootstrap.means(values))
        self.resampled[name] = Resampled(bootstrap.independent, resampled[:, 0])
        return bootstrap.interval(centre, resampled)[0]

    def z_free_gain(self) -> Estimate:
        """The NLL of the best of three models that the same decoder makes without an encoder (z of the prior,
        z = 0, z of another example), less the NELBO."""
        baselines = torch.stack([self.nll[name] for name in ("prior", "zero", "shuffled")], dim=1)
        gains = baselines - self.columns["nelbo"][:, None]
        return self.of_means("z_free_gain", gains, lambda means: means.min(dim=-1, keepdim=True).values)

    def shuffles(self) -> int:
        """How often codes are shuffled."""
        return self._often(self.n <= FEW)

    def shuffles_of_dims(self, n: int) -> int:
        """How often single dimensions of ``n`` examples are: no more evaluations than of many examples."""
        return self._often(SHUFFLES * n * self.dims <= USE_PAIRS)

    def _often(self, few: bool) -> int:
        return SHUFFLES if few and self._groups is None and not self._hurried else 1

    def lost(self, groups: list[Tensor], n: int) -> Tensor:
        """Nats lost when each group of dimensions is shuffled, on the first ``n`` examples: [n, groups,
        shuffles]."""
        x, codes = self.first(n), self.codes.first(n)
        nll = torch.stack(
            [
                decoder.shuffled_nll(self.model, x, codes, permutation, groups)
                for permutation in self._use_pairs(n)
            ],
            dim=2,
        )
        floored = self._floored("use", nll.flatten(1), slice(0, n)).view_as(nll)
        return floored - self.nll["own"][:n, None, None]

    def use_columns(self, lost: Tensor) -> Tensor:
        """What to resample by ``subset(len(lost))``, [n, groups], for the means of ``lost`` or of differences
        of its columns."""
        return self._of_pairs(lost, self._use_pairs(len(lost)))

    def _of_pairs(self, lost: Tensor, permutations: list[Tensor]) -> Tensor:
        """What to resample in place of ``lost`` [n, groups, shuffles], of the same means: [n, groups].

        Of several shuffles, for each example the mean of what it loses by others' codes, plus that of what
        its code costs others, less the mean: jackknife pseudo-values of a mean over pairs. Their variance is
        that of the mean over all pairs (Hoeffding 1948) and twice what the choice of pairs adds to it.
        """
        if len(permutations) == 1:
            return self._along(lost[:, :, 0], permutations[0])
        caused = torch.zeros_like(lost[:, :, 0])
        for number, permutation in enumerate(permutations):
            caused.index_add_(0, permutation, lost[:, :, number])
        own = lost.mean(dim=2)
        return own + caused / len(permutations) - own.mean(dim=0)

    def _along(self, differences: Tensor, permutation: Tensor) -> Tensor:
        if self._groups is None:
            return along_cycle(differences, permutation)
        return along_cycle(differences, permutation, self._groups[: len(differences)])

    def use_estimates(self, lost: Tensor) -> list[Estimate]:
        return self.subset(len(lost)).estimates(self.use_columns(lost))

    def _use_pairs(self, n: int) -> list[Tensor]:
        return self._all_pairs("use", n, self.shuffles_of_dims(n))

    def _all_pairs(self, name: str, n: int, number: int) -> list[Tensor]:
        generator = self._stream(name)
        return [self._pairs(n, generator) for _ in range(number)]

    def _pairs(self, n: int, generator: torch.Generator) -> Tensor:
        """Whose code each of the first ``n`` examples gets in the place of its own."""
        if self._strata is None:
            if self._groups is None:
                return derangement(n, generator=generator)
            return derangement_of(self._groups[:n], generator=generator)
        groups = None if self._groups is None else self._groups[:n]
        return derangement_within(self._strata[:n], generator, groups)

    def examples_for(self, groups: int) -> int:
        """On how many examples so many groups of dimensions are shuffled."""
        return min(self.n, max(_USE_LEAST, USE_PAIRS // max(groups, 1)))

    def together(self, dims: list[int], n: int) -> Together:
        """These dimensions as one code; their use on ``n`` examples, if not all of their rate is nothing."""
        of = torch.tensor(dims)
        rate = self.subset(self.dims_n).estimate(self.rates[:, of].sum(dim=1))
        if rate.high < EPS_GLOBAL:
            return Together(len(dims), rate, None, None, None)
        joint = min(self.dims_n, compared(self.dims_n, len(dims))[0])
        mu, logvar = self.mu[:joint, of], self.logvar[:joint, of]
        z = self.codes.own(0, joint)[:, of]
        if self._strata is None:
            lower, upper = joint_bounds(mu, logvar, z)
        else:
            lower, upper = joint_within(mu, logvar, z, self._strata[:joint])
        low, high = self.subset(joint).estimates(torch.stack([lower, upper], dim=1))
        return Together(len(dims), rate, low, high, self.use_estimates(self.lost([of], n))[0])

    def refine(self, n: int) -> Refinement:
        """On the first ``n`` examples."""
        self.refined_n = n
        start = self.mu[:n], self.logvar[:n]
        found = refine(self.model, self.first(n), *start, self._stream("refine"), self.beta)
        self._finite(found.at_posterior)
        at_prior = self._floored("svi_gain", found.at_prior, slice(0, n), found.at_posterior)
        return found._replace(at_prior=at_prior)

    def importance(self, k: int, n: int) -> None:
        """On the first ``n`` examples."""
        self.weighted_n = n
        x, codes = self.first(n), self.codes.first(n)
        found = decoder.importance(self.model, x, codes, k, self._stream("importance"), self.beta)
        self.nll["importance"] = self._finite(found.nll)
        own = self._floored("code_gap", found.own, slice(0, n))
        self.columns["code_gap"] = own + self.beta * self.columns["rate"][:n] - self._finite(found.least)

    def subset(self, n: int) -> Bootstrap:
        """For measures of the first ``n`` examples."""
        clusters = None if self._groups is None else self._groups[:n]
        return Bootstrap(n, generator=self._stream("bootstrap"), clusters=clusters)

    def independent(self, n: int) -> int:
        """Of the first ``n`` examples: those, or how many groups there are."""
        return n if self._groups is None else len(torch.unique(self._groups[:n]))

    def estimates(self, names: list[str]) -> dict[str, Estimate]:
        columns = torch.stack([self.columns[name] for name in names], dim=1)
        bootstrap = self.subset(len(columns))
        resampled = bootstrap.means(columns)
        found = bootstrap.interval_of_means(columns, resampled)
        for place, name in enumerate(names):
            self.resampled[name] = Resampled(bootstrap.independent, resampled[:, place])
        return {
            name: replace(estimate, saturated=self._saturated(name))
            for name, estimate in zip(names, found, strict=True)
        }

    def _saturated(self, name: str) -> bool:
        """Whether the lower bound that speaks for ``name`` is within a nat of its cap."""
        name = "mi_lower" if name == "mi_upper" else name
        return name in self.caps and self.columns[name].mean().item() > self.caps[name] - 1

    def picked(self) -> Estimate | None:
        """The share of the examples whose own code the decoder picks out, see `decoder.Contrasts.picked`. Its
        lower end is above 0 only where chance, which is right in 1 of K picks, gives so many with a
        probability below 0.025."""
        if self.contrasts is None:
            return None
        values, k = self.contrasts.picked(), self.contrasts.likelihoods[0].shape[1]
        found = self.subset(len(values)).estimate(values)
        right = int((values > 0.5).sum())
        wrong = round(-values[values < 0].sum().item() * (k - 1))
        chance = binomial_tail(right, right + wrong, 1 / k)
        # Few examples: the bootstrap has lower ends of 0 for one or two. The test of the picks decides.
        if chance >= TAIL:
            return replace(found, low=min(found.low, 0.0))
        return found if found.low > 0 else replace(found, low=min(found.value, 1 / self.n) / 2)

    def concentration(self) -> float | None:
        """The smallest share of the examples that bears half of all nats that a shuffled code costs."""
        if "shuffled" not in self.nll:
            return None
        costs = (self.nll["shuffled"] - self.nll["own"]).clamp_min(0).sort(descending=True).values
        total = costs.sum()
        if total <= 0:
            return None
        return (int((costs.cumsum(0) < total / 2).sum()) + 1) / len(costs)

    def by_class(self, numbers: Tensor, names: list[str]) -> dict[str, dict[str, Estimate]]:
        """What was measured of the examples of each class alone; nothing of a class of one."""
        measured = [name for name in OF_CLASSES if name in self.columns]
        columns = torch.stack([self.columns[name] for name in measured], dim=1)
        if "delta_shuffle" in measured:
            # The column is for the mean of all: what its codes cost the others is no matter of a class.
            columns[:, measured.index("delta_shuffle")] = self.nll["shuffled"] - self.nll["own"]
        found: dict[str, dict[str, Estimate]] = {}
        for number, label in enumerate(names):
            chosen = numbers[: self.n] == number
            rows = columns[chosen]
            clusters = None if self._groups is None else self._groups[: self.n][chosen]
            if len(rows) > 1 and (clusters is None or len(torch.unique(clusters)) > 1):
                bootstrap = Bootstrap(len(rows), generator=self._stream("bootstrap"), clusters=clusters)
                estimates = bootstrap.estimates(rows)
                found[label] = dict(zip(measured, estimates, strict=True))
        return found

    def apart(self, share: float) -> float:
        """How far the codes of this ``share`` of the examples lie from the median code at most: the largest
        difference of mu or logvar in any dimension."""
        far = torch.zeros(self.dims_n, dtype=torch.float64)
        for part in (self.mu, self.logvar):
            far = torch.maximum(far, (part - part.median(dim=0).values).abs().amax(dim=1))
        return float(far.sort().values[math.ceil(share * self.dims_n) - 1])

    def point(self) -> tuple[float, float]:
        """On the rate-distortion plane."""
        return self.columns["rate"].mean().item(), self.columns["nll"].mean().item()

    def aggregate_kl(self) -> tuple[Estimate, Estimate]:
        """KL(q(z) || p(z)) = rate - I between its bounds, and the share I / rate, which is 1 less that over
        the rate.

        Where the upper bound of I is lost to saturation, the lower one of the KL is that of the moments: of
        all distributions with these means and variances, the one nearest to N(0, I) is the Gaussian with
        independent dimensions.
        """
        saturated = self._saturated("mi_lower")
        n = len(self.columns["mi_lower"])
        values = torch.stack([self.columns[name][:n] for name in ("rate", "mi_lower", "mi_upper")], dim=1)
        bootstrap = self.subset(n)
        centre, resampled = values.mean(dim=0, keepdim=True), bootstrap.means(values)
        nearest = self._moment_kl() if saturated else (torch.zeros(1), torch.zeros(1))
        ends: list[Tensor] = []
        for means, least in ((centre, nearest[0]), (resampled, nearest[1])):
            rate, lower, upper = means.unbind(dim=1)
            most, low = rate - lower, least if saturated else rate - upper
            shares = [torch.where(rate > 0, kl / rate, 0.0) for kl in (low, most)]
            ends.append(torch.stack([low, most, 1 - shares[1], 1 - shares[0]], dim=1))
        for place, name in enumerate(("aggregate_kl", "information_share")):
            middle = ends[1][:, 2 * place : 2 * place + 2].mean(dim=1)
            self.resampled[name] = Resampled(bootstrap.independent, middle)
        found = [replace(each, saturated=saturated) for each in bootstrap.interval(ends[0][0], ends[1])]
        return bracket(*found[:2]), bracket(*found[2:])

    def parts(self) -> tuple[Estimate, Estimate]:
        """The total correlation, sum_d I(x; z_d) - I(x; z), and the dimension-wise KL, rate less
        sum_d I(x; z_d): with I(x; z) the parts of the rate (Chen et al. 2018). Between the bounds of the
        information."""
        bounds = self.bounds
        n = min(len(bounds.lower), self.dims_n)
        sums = bounds.lower_dims.sum(dim=1), bounds.upper_dims.sum(dim=1)
        columns = (self.columns["rate"], bounds.lower, bounds.upper, *sums)
        values = torch.stack([column[:n] for column in columns], dim=1)
        bootstrap = self.subset(n)
        ends: list[Tensor] = []
        for means in (values.mean(dim=0, keepdim=True), bootstrap.means(values)):
            rate, lower, upper, lower_dims, upper_dims = means.unbind(dim=1)
            ends.append(
                torch.stack([lower_dims - upper, upper_dims - lower, rate - upper_dims, rate - lower_dims], 1)
            )
        for place, name in enumerate(("total_correlation", "dimension_wise_kl")):
            self.resampled[name] = Resampled(
                bootstrap.independent, ends[1][:, 2 * place : 2 * place + 2].mean(dim=1)
            )
        saturated = self._saturated("mi_lower")
        found = [replace(each, saturated=saturated) for each in bootstrap.interval(ends[0][0], ends[1])]
        return bracket(*found[:2]), bracket(*found[2:])

    def _moment_kl(self) -> tuple[Tensor, Tensor]:
        """sum_d KL(N(m_d, s_d^2) || N(0, 1)) with the moments of the aggregate posterior: [1], and of the
        resamples [resamples]."""
        bootstrap = self.subset(self.dims_n)
        centre = torch.zeros(1, dtype=torch.float64)
        resampled = torch.zeros(bootstrap.resamples, dtype=torch.float64)
        second = self.mu.square() + torch.exp(self.logvar)
        for first, squares in zip(
            torch.split(self.mu, _COLUMNS, dim=1), torch.split(second, _COLUMNS, dim=1), strict=True
        ):
            values = torch.cat([first, squares], dim=1)
            centre += _gaussian_kl_of(values.mean(dim=0, keepdim=True))
            resampled += _gaussian_kl_of(bootstrap.means(values))
        return centre, resampled

    def active_units(self) -> Estimate:
        bootstrap = self.subset(self.dims_n)
        total, resampled = 0.0, torch.zeros(bootstrap.resamples, dtype=torch.float64)
        for part in torch.split(self.mu - self.mu.mean(dim=0), _COLUMNS, dim=1):
            means = bootstrap.means(torch.cat([part, part.square()], dim=1))
            first, second = means.chunk(2, dim=1)
            resampled += (second - first.square() > self.active_threshold).sum(dim=1)
            total += float((part.square().mean(dim=0) > self.active_threshold).sum())
        centre = torch.tensor([total], dtype=torch.float64)
        self.resampled["active_units"] = Resampled(bootstrap.independent, resampled)
        return bootstrap.interval(centre, resampled[:, None])[0]

    def per_dim(self) -> Encoded:
        bounds = self.bounds
        rate = self._by_columns(self.rates)
        lower, upper = self._by_columns(bounds.lower_dims), self._by_columns(bounds.upper_dims)
        lower = [replace(each, saturated=each.value > bounds.cap_dims - 1) for each in lower]
        least = self._by_columns(self.rates - bounds.upper_dims)
        most = self._by_columns(self.rates - bounds.lower_dims)
        mismatch = [
            at_most(b) if each.saturated else bracket(a, b)
            for a, b, each in zip(least, most, lower, strict=True)
        ]
        return Encoded(rate, lower, upper, mismatch)

    def shares(self, dims: list[int]) -> list[Estimate]:
        """The upper bound of I_d as a share of the rate."""
        found: list[Estimate] = []
        for part in torch.split(torch.tensor(dims), _COLUMNS):
            values = torch.cat([self.bounds.upper_dims[:, part], self.rates[:, part]], dim=1)
            found += self.subset(self.dims_n).of_means(values, _ratio)
        return found

    def samples(self) -> Samples:
        """What the pictures show beyond the estimates."""
        shown = self.rates.mean(dim=0).argsort(descending=True)[:SHOWN_DIMS].sort().values
        z = torch.cat([self.codes.own(a, a + _ROWS)[:, shown] for a in range(0, self.n, _ROWS)])
        return Samples(dict(self.nll), self.columns.get("nelbo"), self.resampled, shown.tolist(), z)

    def first(self, n: int) -> Examples:
        return take(self.x, slice(0, n)) if n < self.n else self.x

    def _by_columns(self, values: Tensor) -> list[Estimate]:
        parts = torch.split(values, _COLUMNS, dim=1)
        return [estimate for part in parts for estimate in self.subset(self.dims_n).estimates(part)]

    def _floored(
        self, name: str, nll: Tensor, rows: slice = slice(None), own: Tensor | None = None
    ) -> Tensor:
        """``nll`` under other codes than the examples' own, with a number where the likelihood is 0: 100 nats
        more than under the own code, and no less than any that is finite. Their share is kept in
        ``impossible``."""
        impossible = nll == torch.inf
        if not bool(impossible.any()):
            return self._finite(nll)
        own = self._finite(self.nll["own"][rows] if own is None else own)
        self._finite(torch.where(impossible, 0.0, nll))
        self.impossible[name] = impossible.double().mean().item()
        highest = nll[~impossible].max().item() if not bool(impossible.all()) else -math.inf
        worst = (own + NEVER).clamp_min(highest)
        return torch.where(impossible, worst if nll.dim() == 1 else worst[:, None], nll)

    def _finite(self, values: Tensor) -> Tensor:
        require_finite(f"log_likelihood ({self.name})", values)
        return values


def bracket(lower: Estimate, upper: Estimate) -> Estimate:
    """From a lower and an upper bound: their middle, whose bias is of second order, and the outer ends."""
    return Estimate((lower.value + upper.value) / 2, lower.low, upper.high, lower.saturated)


def at_most(upper: Estimate) -> Estimate:
    """Of a divergence whose lower bound is lost to saturation: from 0, which is one as well."""
    return Estimate(max(upper.value, 0.0) / 2, 0.0, max(upper.high, 0.0), saturated=True)


def _gaussian_kl_of(means: Tensor) -> Tensor:
    """From the means of z and z^2, [..., 2 D]: sum_d KL(N(m_d, s_d^2) || N(0, 1)), [...]."""
    first, second = means.chunk(2, dim=-1)
    return 0.5 * (second - 1 - torch.log(second - first.square())).sum(dim=-1)


def _ratio(means: Tensor) -> Tensor:
    information, rate = means.chunk(2, dim=-1)
    return information / rate
