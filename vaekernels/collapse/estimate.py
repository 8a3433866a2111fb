"""Means over examples, with bootstrap intervals that stay valid where examples share terms and dims are
many."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = [
    "Bootstrap",
    "Estimate",
    "along_cycle",
    "binomial_tail",
    "bootstrap_mean",
    "difference",
    "holm_high",
    "holm_low",
]

TAIL = 0.025
"""Probability left out at each end of an interval."""
RESAMPLES = 1000

_CELLS = 1 << 22  # counts held at a time: 32 MiB
_EXACT_T = 300  # degrees of freedom above which one term of the expansion of t about z is right to 3e-4


@dataclass(frozen=True)
class Estimate:
    """An estimate with the ends of its 95% interval.

    ``saturated``: the estimator is near its cap, so that the truth may lie far above it.
    """

    value: float
    low: float
    high: float
    saturated: bool = False

    def __str__(self) -> str:
        return self.show(2) + (" saturated" if self.saturated else "")

    def show(self, digits: int) -> str:
        """With so many decimals, from 100,000 on in powers of ten."""
        value, low, high = (_shown(each, digits) for each in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def _shown(number: float, digits: int) -> str:
    if abs(number) >= 1e5:
        return f"{number:.2e}"
    return f"{round(number, digits) + 0.0:.{digits}f}"  # adding 0.0 makes -0.00 a plain 0.00


class Bootstrap:
    """Resamples n examples with replacement, the same resamples for every quantity: differences are paired.

    The resamples are drawn anew from one seed whenever they are needed, 32 MiB of counts at a time. An
    interval has the ends of the percentile interval (Efron 1979), moved away from the estimate by t_{n-1}
    sqrt(n / (n - 1)) / z, the width that a percentile interval lacks on few examples (Hesterberg 2015): 1.87
    for n = 4, 1.001 for n = 2048. On the side of the longer tail the end moves further, by what a percentile
    interval lacks on skewed values: s g (z^2 + 2) / 6 of the resamples' standard deviation s and skewness g,
    which is that of the values over sqrt(n). A studentised mean is skewed by g (2 z^2 + 1) / 6 (Johnson 1978,
    Hall 1992), of which the percentiles have g (z^2 - 1) / 6. The other end stays: the term would move it
    inwards, which on few examples is right for a skewness that is known, not for one that an outlier made.
    Of plain means t has 2 n / (k - 1) degrees of freedom, n - 1 at most, with the kurtosis k of the values, 3
    of normal ones: as many as their variance is known with (Satterthwaite 1946). With ``clusters``, a number
    of each example, whole clusters are resampled, and n is how many there are.
    """

    def __init__(
        self,
        n: int,
        *,
        resamples: int = RESAMPLES,
        generator: torch.Generator | None = None,
        clusters: Tensor | None = None,
    ) -> None:
        if n < 2:
            raise ValueError(f"values must be one-dimensional with at least 2 entries, got {n}")
        self.n = n
        self._clusters = None if clusters is None else torch.unique(clusters, return_inverse=True)[1]
        self.independent = n if self._clusters is None else int(self._clusters.max()) + 1
        """What is resampled: examples, or clusters of them."""
        if self.independent < 2:
            raise ValueError(f"clusters must be 2 or more, got {self.independent} for {n} examples")
        self.resamples = resamples
        self._seed = int(torch.randint(2**62, (), generator=generator))

    def means(self, values: Tensor) -> Tensor:
        """The mean of every column of ``values`` [n, M] in every resample: float64 [resamples, M]."""
        if len(values) != self.n:
            raise ValueError(f"values must have {self.n} rows, got {len(values)}")
        values = values.cpu().double()
        centre = values.mean(dim=0)
        # Deviations are averaged, so that a constant has an interval of no more than its rounding.
        deviations = self._deviations(values)
        generator = torch.Generator().manual_seed(self._seed)
        n = self.independent
        sizes = torch.ones(n, dtype=torch.float64)
        if self._clusters is not None:
            sizes = torch.bincount(self._clusters).double()
        rows = max(1, _CELLS // n)
        parts: list[Tensor] = []
        for start in range(0, self.resamples, rows):
            drawn = torch.randint(n, (min(rows, self.resamples - start), n), generator=generator)
            counts = torch.zeros(drawn.shape, dtype=torch.float64)
            counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(drawn.shape))
            parts.append(counts @ deviations / (counts @ sizes)[:, None])
        return centre + torch.cat(parts)

    def _deviations(self, values: Tensor) -> Tensor:
        """From the mean, or the sums of those over clusters: [independent, M]."""
        deviations = values - values.mean(dim=0)
        if self._clusters is None:
            return deviations
        sums = torch.zeros(self.independent, values.shape[1], dtype=torch.float64)
        return sums.index_add_(0, self._clusters, deviations)

    def _freedom(self, values: Tensor) -> list[int]:
        """Degrees of freedom of the variance of every column."""
        squares = self._deviations(values.cpu().double()).square()
        variance = squares.mean(dim=0)
        excess = torch.where(variance > 0, squares.square().mean(dim=0) / variance.square() - 1, 0.0)
        most = self.independent - 1
        freedom = (2 * self.independent / excess.clamp_min(1e-9)).clamp(1, most)
        return [int(each) for each in freedom.tolist()]

    def estimates(self, values: Tensor) -> list[Estimate]:
        """The mean of every column of ``values`` [n, M]."""
        return self.interval_of_means(values, self.means(values))

    def interval_of_means(self, values: Tensor, resampled: Tensor) -> list[Estimate]:
        """:meth:`estimates`, from their :meth:`means`."""
        return self.interval(values.cpu().double().mean(dim=0), resampled, self._freedom(values))

    def estimate(self, values: Tensor) -> Estimate:
        """The mean of ``values`` [n]."""
        return self.estimates(values.unsqueeze(1))[0]

    def of_means(self, values: Tensor, function: Callable[[Tensor], Tensor]) -> list[Estimate]:
        """``function`` of the column means, which takes [..., M] to [..., P]."""
        return self.interval(function(values.cpu().double().mean(dim=0)), function(self.means(values)))

    def interval(
        self, centres: Tensor, resampled: Tensor, freedom: Sequence[int] | None = None
    ) -> list[Estimate]:
        """Estimates from the values [P] on the examples and [resamples, P] on the resamples. ``freedom``:
        degrees of freedom of each, n - 1 unless given."""
        ends = torch.quantile(resampled, torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64), dim=0)
        n, z = self.independent, z_quantile(TAIL)
        skewed = _skewed(resampled) * (z * z + 2) / 6
        ends += torch.stack([skewed.clamp_max(0), skewed.clamp_min(0)])
        t = [t_quantile(TAIL, each) for each in freedom or [n - 1] * len(centres)]
        stretch = torch.tensor(t, dtype=torch.float64) / z * math.sqrt(n / (n - 1))
        lows, highs = (centres + (ends - centres) * stretch).tolist()
        return [Estimate(*row) for row in zip(centres.tolist(), lows, highs, strict=True)]


def _skewed(resampled: Tensor) -> Tensor:
    """Standard deviation times skewness of every column, 0 of a constant one."""
    deviations = resampled - resampled.mean(dim=0)
    variance = deviations.square().mean(dim=0)
    return torch.where(variance > 0, deviations.pow(3).mean(dim=0) / variance, 0.0)


def difference(a: Bootstrap, x: Tensor, b: Bootstrap, y: Tensor) -> list[Estimate]:
    """Column means of ``x`` less those of ``y``, two independent samples, resampled by ``a`` and ``b``."""
    centre = x.mean(dim=0) - y.mean(dim=0)
    smaller = a if a.n <= b.n else b
    return smaller.interval(centre, a.means(x) - b.means(y))


def bootstrap_mean(
    values: Tensor, *, resamples: int = RESAMPLES, generator: torch.Generator | None = None
) -> Estimate:
    """Mean of ``values`` [N] with its 95% interval over ``resamples`` resamples of the examples
    (``Bootstrap``).

    For a paired comparison pass the N differences. The values must be independent; see ``along_cycle``.
    """
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(
            f"values must be one-dimensional with at least 2 entries, got shape {list(values.shape)}"
        )
    return Bootstrap(len(values), resamples=resamples, generator=generator).estimate(values)


def along_cycle(differences: Tensor, permutation: Tensor, clusters: Tensor | None = None) -> Tensor:
    """What to bootstrap in place of d_i = f(i, pi(i)), pi a derangement of one cycle: [n] or [n, M].

    d_i and d_pi(i) share the example pi(i), so their mean has the variance (g0 + 2 g1) / n, with g1 the
    covariance of neighbours on the cycle; a bootstrap of the d_i sees g0 / n. For (x - x')^2 / 2 of Gaussian
    x it covers the truth 89 times in 100, and where f depends on pi(i) alone, whose sum no permutation
    changes, it is too wide without bound. The deviations are scaled by sqrt(1 + 2 g1 / g0), which is held
    above 2 / sqrt(n), the standard error of what it is a root of. With ``clusters``, whole clusters follow
    one another on the cycle (`pairing.derangement_of`), and g0 and g1 are those of their means.
    """
    mean = differences.mean(dim=0)
    deviations = differences - mean
    units, following = deviations, permutation
    if clusters is not None:
        ids = torch.unique(clusters, return_inverse=True)[1]
        sizes = torch.bincount(ids).double()
        sums = torch.zeros(len(sizes), *deviations.shape[1:], dtype=torch.float64).index_add_(
            0, ids, deviations
        )
        units = sums / (sizes if sums.dim() == 1 else sizes[:, None])
        following = torch.empty(len(sizes), dtype=torch.int64)
        following[ids] = ids[permutation]
    variance = units.square().mean(dim=0)
    neighbours = (units * units[following]).mean(dim=0)
    # Where all are equal there is nothing to scale.
    correlation = torch.where(variance > 0, neighbours / variance, 0.0)
    floor = 2 / math.sqrt(len(units))
    return mean + deviations * (1 + 2 * correlation).clamp_min(floor).sqrt()


def holm_low(
    estimates: Sequence[Estimate], n: int | Sequence[int], null: float = 0.0, tail: float = TAIL
) -> list[float]:
    """Lower ends for all ``estimates`` at once: with probability 1 - ``tail`` every end that exceeds ``null``
    does so rightly (Holm 1979). ``n`` examples each, or those of each.

    Estimates are tested in the order of how many half widths they lie above ``null``, the r-th at the level
    tail / (m - r), until one fails; the rest keep its level. 1000 resamples do not resolve such tails, so
    the half width is that of the interval times the ratio of t quantiles, and more on the side of the longer
    tail, see ``_further``.
    """
    ends = [0.0] * len(estimates)
    numbers = [n] * len(estimates) if isinstance(n, int) else n
    order = sorted(range(len(estimates)), key=lambda i: _half_widths(estimates[i], null), reverse=True)
    remaining = len(estimates)
    for i in order:
        estimate = estimates[i]
        ends[i] = estimate.value - _further(estimate, tail / remaining, numbers[i] - 1)
        if ends[i] > null:
            remaining -= 1
    return ends


def _further(estimate: Estimate, tail: float, freedom: int) -> float:
    """The lower half width of ``estimate`` with probability ``tail`` in place of :data:`TAIL`.

    Half widths of a studentised mean are s (t +- g (2 t^2 + 1) / 6), of its standard error s and skewness g
    (``Bootstrap``). Those of the interval differ by s g z^2 / 2, which gives s g.
    """
    z, t, further = z_quantile(TAIL), t_quantile(TAIL, freedom), t_quantile(tail, freedom)
    lower, upper = estimate.value - estimate.low, estimate.high - estimate.value
    skewed = max(lower - upper, 0.0) * 2 / z**2
    return lower * further / t + skewed * (further - t) * (2 * t * further - 1) / (6 * t)


def holm_high(
    estimates: Sequence[Estimate], n: int | Sequence[int], null: float, tail: float = TAIL
) -> list[float]:
    """Upper ends for all ``estimates`` at once, as :func:`holm_low` gives lower ones."""
    mirrored = [Estimate(-e.value, -e.high, -e.low) for e in estimates]
    return [-end for end in holm_low(mirrored, n, -null, tail)]


def _half_widths(estimate: Estimate, null: float) -> float:
    above, width = estimate.value - null, estimate.value - estimate.low
    return above / width if width > 0 else math.copysign(math.inf, above) if above else 0.0


def binomial_tail(least: int, trials: int, chance: float) -> float:
    """P(at least ``least`` of ``trials`` succeed), each with probability ``chance``."""
    if least <= 0:
        return 1.0
    log_odds = math.log(chance), math.log1p(-chance)
    terms = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * log_odds[0]
        + (trials - k) * log_odds[1]
        for k in range(least, trials + 1)
    )
    return min(1.0, sum(map(math.exp, terms)))


def z_quantile(tail: float) -> float:
    """The value that a standard normal exceeds with probability ``tail``."""
    return -NormalDist().inv_cdf(tail)


@functools.lru_cache(maxsize=4096)
def t_quantile(tail: float, freedom: int) -> float:
    """The value that Student's t with ``freedom`` >= 1 degrees of freedom exceeds with probability
    ``tail``."""
    z = z_quantile(tail)
    if freedom > _EXACT_T:
        return z + (z**3 + z) / (4 * freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_tail(middle, freedom) > tail else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _t_tail(theta: float, freedom: int) -> float:
    """P(t > sqrt(freedom) tan(theta)): the finite series of Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    cosine2 = math.cos(theta) ** 2
    odd = freedom % 2
    term = math.sin(theta) * (math.cos(theta) if odd else 1.0)
    total = 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    inside = 2 / math.pi * (theta + total) if odd else total
    return (1 - inside) / 2
