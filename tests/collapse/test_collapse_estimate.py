"""Intervals: tables that can be checked by hand, and SciPy's distributions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from vaekernels import collapse
from vaekernels.collapse.estimate import (
    Bootstrap,
    Estimate,
    along_cycle,
    difference,
    holm_high,
    holm_low,
    t_quantile,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 63, 300])
@pytest.mark.parametrize("tail", [0.025, 0.025 / 16, 1e-5])
def test_t_quantile_is_scipys(freedom: int, tail: float) -> None:
    assert t_quantile(tail, freedom) == pytest.approx(stats.t.isf(tail, freedom), rel=1e-9)


@pytest.mark.parametrize("freedom", [301, 2047, 10**6])
@pytest.mark.parametrize("tail", [0.025, 0.025 / 16, 1e-5])
def test_t_quantile_of_many_degrees_of_freedom(freedom: int, tail: float) -> None:
    assert t_quantile(tail, freedom) == pytest.approx(stats.t.isf(tail, freedom), rel=3e-4)


# Two examples, 0 and 6: a resample is (0, 0), (0, 6), (6, 0) or (6, 6), of mean 0, 3, 3, 6.
def test_bootstrap_of_two_examples_by_hand() -> None:
    bootstrap = Bootstrap(2, resamples=4000, generator=rng())
    means = bootstrap.means(torch.tensor([[0.0], [6.0]]))[:, 0]
    assert set(means.tolist()) == {0.0, 3.0, 6.0}
    # a quarter each at the ends; standard error sqrt(3/16/4000) = 0.007
    assert (means == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    # both percentiles are ends, 3 from the mean, moved by t_1 / z * sqrt(2) = 12.706 / 1.960 * 1.414
    estimate = bootstrap.estimate(torch.tensor([0.0, 6.0]))
    width = 3 * 12.706205 / 1.959964 * math.sqrt(2)
    # and a little further on one side, as 4000 resamples of a symmetric distribution are not quite symmetric
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 3 - width, 3 + width), rel=0.02)


# Five examples, 0, 0, 0, 0 and 5: mean 1, of the population the standard deviation 2, skewness 1.5 and
# kurtosis 3.25, whose 2 n / (k - 1) = 4.4 degrees of freedom are n - 1 = 4 at most. Resamples: the mean is
# binomial(5, 1/5), with P(0) = 0.33 and P(> 3) = 0.0067: percentiles 0 and 3; standard deviation
# 2 / sqrt(5) = 0.894, skewness 1.5 / sqrt(5) = 0.671. The upper end moves by 0.894 * 0.671 (z^2 + 2) / 6.
def test_a_skewed_interval_by_hand() -> None:
    values = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0])
    estimate = Bootstrap(5, resamples=20000, generator=rng()).estimate(values)
    stretch = 2.776445 / 1.959964 * math.sqrt(5 / 4)
    assert estimate.low == pytest.approx(1 - stretch)
    moved = 0.894427 * 0.670820 * (1.959964**2 + 2) / 6
    assert estimate.high == pytest.approx(1 + (3 - 1 + moved) * stretch, rel=0.02)
    mirrored = Bootstrap(5, resamples=20000, generator=rng()).estimate(-values)
    assert (mirrored.low, mirrored.high) == pytest.approx((-estimate.high, -estimate.low))


def test_heavy_tails_have_few_degrees_of_freedom() -> None:
    """One of 100 is 1: kurtosis (1 - 3 p q) / (p q) = 98, so 200 / 97 degrees of freedom."""
    values = torch.zeros(100, 1)
    values[0] = 1
    assert Bootstrap(100)._freedom(values) == [2]
    even = torch.tensor([-1.0, 1.0]).repeat(50)[:, None]  # kurtosis 1: infinitely many, 99 at most
    assert Bootstrap(100)._freedom(torch.cat([even, torch.ones(100, 1)], dim=1)) == [99, 99]
    assert Bootstrap(100, clusters=torch.arange(100) // 2)._freedom(even) == [49]


def test_an_end_further_out_by_hand() -> None:
    """Half widths s (t +- g (2 t^2 + 1) / 6) with s = 1 and g = 0.3, of the normal quantiles of 0.025 / 2."""
    z, further, g = 1.959964, 2.241403, 0.3
    interval = Estimate(0.0, -(z - g * (z**2 - 1) / 6), z + g * (2 * z**2 + 1) / 6)
    both = [interval, Estimate(-1.0, -2.0, 0.0)]
    assert holm_high(both, 10**6, -9.0)[0] == pytest.approx(further + g * (2 * further**2 + 1) / 6, abs=1e-4)


def test_bootstrap_of_many_normal_values_is_the_t_interval() -> None:
    values = torch.randn(5000, generator=rng(1), dtype=torch.float64)
    estimate = Bootstrap(5000, resamples=4000, generator=rng()).estimate(values)
    half = 1.96 * values.std().item() / math.sqrt(5000)
    # a percentile of 4000 resamples has a standard error of about 4% of the half width
    assert estimate.low == pytest.approx(values.mean().item() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean().item() + half, abs=0.15 * half)


def test_the_same_resamples_for_every_quantity() -> None:
    bootstrap = Bootstrap(50, generator=rng())
    a, b = (torch.randn(50, 1, generator=rng(seed), dtype=torch.float64) for seed in (1, 2))
    torch.testing.assert_close(bootstrap.means(a) - bootstrap.means(b), bootstrap.means(a - b))


def test_chunks_of_resamples_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(30, 2, generator=rng(1), dtype=torch.float64)
    whole = Bootstrap(30, resamples=100, generator=rng()).means(values)
    monkeypatch.setattr("vaekernels.collapse.estimate._CELLS", 7 * 30)
    torch.testing.assert_close(Bootstrap(30, resamples=100, generator=rng()).means(values), whole)


def test_bootstrap_of_a_constant_and_of_one() -> None:
    assert collapse.bootstrap_mean(torch.full((5,), 2.0)) == Estimate(2.0, 2.0, 2.0)
    tenth = collapse.bootstrap_mean(torch.full((7,), 0.1, dtype=torch.float64))  # no float is a tenth
    assert (tenth.value, tenth.low, tenth.high) == pytest.approx((0.1, 0.1, 0.1), rel=1e-15)
    with pytest.raises(ValueError, match="at least 2 entries"):
        collapse.bootstrap_mean(torch.zeros(1))
    with pytest.raises(ValueError, match="must have 5 rows, got 4"):
        Bootstrap(5).means(torch.zeros(4, 1))


@pytest.mark.parametrize("n", [5, 20, 200])
def test_bootstrap_interval_covers_the_mean(n: int) -> None:
    hits = 0
    for seed in range(200):
        values = torch.rand(n, generator=rng(seed))
        estimate = collapse.bootstrap_mean(values, resamples=400, generator=rng(1000 + seed))
        hits += estimate.low <= 0.5 <= estimate.high
    assert 180 <= hits <= 199  # 190 expected, standard deviation 3.1


def rare(n: int, number: int, generator: torch.Generator) -> Tensor:
    some = torch.rand(n, number, generator=generator) < 0.05
    return torch.where(some, 8 + 2 * torch.randn(n, number, generator=generator), 0.0)


def product(n: int, number: int, generator: torch.Generator) -> Tensor:
    return torch.randn(2, n, number, generator=generator).square().prod(dim=0)


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("values, truth", [(rare, 0.4), (product, 1.0)])
def test_intervals_of_skewed_values_cover_the_mean(
    values: Callable[[int, int, torch.Generator], Tensor], truth: float, n: int
) -> None:
    """400 samples. Percentile intervals cover 86 in 100 on 50 examples."""
    generator = rng(1)
    found = Bootstrap(n, generator=generator).estimates(values(n, 400, generator))
    covered = sum(each.low <= truth <= each.high for each in found) / 400
    assert 0.90 <= covered <= 0.99, covered


def test_difference_of_two_samples() -> None:
    x, y = (torch.randn(n, 1, generator=rng(n), dtype=torch.float64) for n in (4000, 1000))
    gap = difference(Bootstrap(4000, generator=rng(1)), x, Bootstrap(1000, generator=rng(2)), y)[0]
    assert gap.value == pytest.approx((x.mean() - y.mean()).item())
    half = 1.96 * math.sqrt(1 / 4000 + 1 / 1000)
    assert (gap.high - gap.low) / 2 == pytest.approx(half, rel=0.15)


# n = 10^6 examples, so that t is normal. Half widths of 1 at 97.5%: the level 0.025 / m stretches them by
# z(0.025 / m) / z(0.025): 1, 1.1436, 1.2214 for m = 1, 2, 3.
@pytest.mark.parametrize(
    "values, lows",
    [
        ([5.0], [4.0]),
        # in order 5, 1.16, 1.05: levels 3, 2, 1, all above 0
        ([1.05, 5.0, 1.16], [0.05, 5 - 1.2214, 1.16 - 1.1436]),
        # 1.1 fails at m = 2, and what follows keeps that level, though 1.05 would pass at m = 1
        ([1.05, 5.0, 1.1], [1.05 - 1.1436, 5 - 1.2214, 1.1 - 1.1436]),
        # the first fails: all at m = 3
        ([1.2, 1.05], [1.2 - 1.1436, 1.05 - 1.0]),
    ],
)
def test_holm_by_hand(values: list[float], lows: list[float]) -> None:
    estimates = [Estimate(value, value - 1, value + 2) for value in values]
    assert holm_low(estimates, 10**6) == pytest.approx(lows, abs=1e-3)
    mirrored = [Estimate(-value, -value - 2, -value + 1) for value in values]
    assert holm_high(mirrored, 10**6, 0.0) == pytest.approx([-low for low in lows], abs=1e-3)
    shifted = [Estimate(e.value + 0.3, e.low + 0.3, e.high + 0.3) for e in estimates]
    assert holm_low(shifted, 10**6, 0.3) == pytest.approx([low + 0.3 for low in lows], abs=1e-3)


def test_holm_of_exact_zeros() -> None:
    nothing = [Estimate(0.0, 0.0, 0.0)] * 3
    assert holm_low(nothing, 100) == [0.0, 0.0, 0.0]
    one = [Estimate(1.0, 0.5, 1.5)]
    assert holm_low(one, 50) == pytest.approx([0.5])
    assert holm_low(one * 2, [50, 4]) == pytest.approx([holm_low(one * 2, 50)[0], holm_low(one * 2, 4)[1]])
    # half the chance of being wrong once is half of it for each of two
    assert holm_low(one, 50, tail=0.0125) == pytest.approx(holm_low([*one, Estimate(0.0, -9.0, 9.0)], 50)[:1])
    assert holm_high(nothing, 100, 0.01) == [0.0, 0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12, unique=True), st.randoms(use_true_random=False))
def test_holm_does_not_depend_on_the_order(values: list[float], random: object) -> None:
    estimates = [Estimate(value, value - 0.5, value + 0.5) for value in values]
    ends = holm_low(estimates, 500)
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert holm_low([estimates[i] for i in order], 500) == pytest.approx([ends[i] for i in order])
    # never narrower than the interval of one, never wider than Bonferroni's
    widest = t_quantile(0.025 / len(values), 499) / t_quantile(0.025, 499) * 0.5
    for end, value in zip(ends, values, strict=True):
        assert value - widest - 1e-9 <= end <= value - 0.5 + 1e-9


def test_holm_controls_wrong_rejections_of_any() -> None:
    wrong = 0
    for seed in range(400):
        values = torch.randn(100, 16, generator=rng(seed), dtype=torch.float64)
        ends = holm_low(Bootstrap(100, resamples=200, generator=rng(seed)).estimates(values), 100)
        wrong += max(ends) > 0
    assert wrong <= 0.025 * 400 + 3 * math.sqrt(400 * 0.025 * 0.975)


def cycle_of(n: int, seed: int) -> Tensor:
    return collapse.derangement(n, generator=rng(seed))


def test_along_cycle_by_hand() -> None:
    # d along the cycle 0 -> 1 -> 2 -> 3 -> 0: deviations 1, 1, -1, -1; g0 = 1, g1 = (1 - 1 + 1 - 1) / 4 = 0
    permutation = torch.tensor([1, 2, 3, 0])
    d = torch.tensor([6.0, 6.0, 4.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(along_cycle(d, permutation), d)
    # deviations 1, -1, 1, -1: g1 = -1, and 1 + 2 g1 / g0 = -1, held at 2 / sqrt(4) = 1
    d = torch.tensor([6.0, 4.0, 6.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(along_cycle(d, permutation), d)
    # 8 examples, two blocks: g1 = (3 - 1 + 3 - 1) / 8 = 1/2, so deviations times sqrt(2)
    d = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1], dtype=torch.float64)
    torch.testing.assert_close(along_cycle(d, torch.arange(1, 9) % 8), d * math.sqrt(2))
    torch.testing.assert_close(along_cycle(torch.zeros(8), torch.arange(1, 9) % 8), torch.zeros(8))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: 0.5 * (x - y) ** 2,  # own and other roles agree: plain resampling is too narrow
        lambda x, y: y - 0.3 * x + 0.1 * x * y,  # they cancel: it is too wide
        lambda x, y: x * y,  # they are not correlated
    ],
)
def test_along_cycle_gives_the_spread_of_the_mean(function: object) -> None:
    n, means, widths = 400, [], []
    for seed in range(300):
        x = torch.randn(n, generator=rng(seed), dtype=torch.float64)
        permutation = cycle_of(n, seed)
        d = function(x, x[permutation])  # type: ignore[operator]
        means.append(d.mean())
        widths.append(along_cycle(d, permutation).std() / math.sqrt(n))
    truth = torch.stack(means).std().item()  # relative standard error sqrt(1 / 600) = 0.04
    assert torch.stack(widths).mean().item() == pytest.approx(truth, rel=0.13)


def test_estimates_are_shown_without_minus_zero() -> None:
    assert str(Estimate(-0.001, -0.004, 0.004)) == "0.00 [0.00, 0.00]"
    assert str(Estimate(2.5, 2.0, 3.0, saturated=True)) == "2.50 [2.00, 3.00] saturated"
    assert Estimate(2.345, 2.0, 3.0).show(1) == "2.3 [2.0, 3.0]"
