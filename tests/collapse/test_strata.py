"""Measurements within strata: classes, lengths, what the decoder is told beside z."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from planted import Linear, generator, normal
from torch import Tensor

from vaekernels import collapse
from vaekernels.collapse import strata as within
from vaekernels.collapse.estimate import Bootstrap, along_cycle
from vaekernels.collapse.examples import near_copies
from vaekernels.collapse.information import mi_bounds
from vaekernels.collapse.pairing import derangement_of


def diagnose(*arguments: Any, **settings: Any) -> collapse.Report:
    return collapse.diagnose(*arguments, **{"n": 512, "k": 16, "progress": False, **settings})


def test_examples_are_spread_over_their_strata() -> None:
    strata = torch.tensor([0] * 40 + [1] * 20 + [2] * 7)  # the last are too few
    kept = within.order(strata)
    assert sorted(kept.tolist()) == list(range(60))
    for m in (30, 15):
        counts = torch.bincount(strata[kept[:m]], minlength=2).tolist()
        assert counts == pytest.approx([2 * m / 3, m / 3], abs=1)


def test_places_are_traded_within_strata() -> None:
    strata = torch.randint(0, 5, (100,), generator=generator(0))
    strata[50] = 9  # alone
    permutation = within.derangement_within(strata, generator(1))
    assert sorted(permutation.tolist()) == list(range(100))
    assert torch.equal(strata[permutation], strata)
    assert (permutation == torch.arange(100)).nonzero().flatten().tolist() == [50]
    rows = within.contrast_rows_within(strata[:50], 4, generator(2))
    assert torch.equal(rows[:, 0], torch.arange(50)) and bool((strata[rows] == strata[:50, None]).all())
    assert all(len(set(row)) == 4 for row in rows.tolist())


def test_places_are_traded_within_strata_between_groups() -> None:
    groups = torch.arange(60) // 3
    strata = groups % 4  # 5 groups each
    strata[:3] = 9  # a group alone
    partners = within.derangement_within(strata, generator(0), groups)
    assert torch.equal(strata[partners], strata)
    assert (groups[partners] == groups).nonzero().flatten().tolist() == [0, 1, 2]
    for group in range(1, 20):
        assert len(set(groups[partners[groups == group]].tolist())) == 1


def test_information_within_strata() -> None:
    """mu = 5 c + 0.8 f: log 2 nats of the class, and 1/2 log(1 / 0.36) = 0.51 of f."""
    rng = generator(0)
    c, f = torch.arange(800) % 2, torch.randn(800, generator=rng, dtype=torch.float64)
    mu = (5.0 * c + 0.8 * f)[:, None]
    logvar = torch.full_like(mu, math.log(0.36))
    z = mu + 0.6 * torch.randn(800, 1, generator=rng, dtype=torch.float64)
    found = within.bounds_within(mu, logvar, z, c)
    assert found.lower.mean().item() == pytest.approx(0.51, abs=0.06)
    assert found.cap == pytest.approx(math.log(400))
    torch.testing.assert_close(found.lower_dims[:, 0], found.lower)
    even = mi_bounds(mu[::2], logvar[::2], z[::2])
    torch.testing.assert_close(found.upper[::2], even.upper)
    lower, _ = within.joint_within(mu, logvar, z, c)
    torch.testing.assert_close(lower, found.lower)
    assert mi_bounds(mu, logvar, z).lower.mean().item() == pytest.approx(0.51 + math.log(2), abs=0.1)


def test_only_strata_that_can_be_compared_are(monkeypatch: pytest.MonkeyPatch) -> None:
    strata = torch.tensor([0, 1, 0, 1, 0, 0])
    assert within.comparable(strata, 3) == 6
    monkeypatch.setattr(within, "compared", lambda n, dims: (2, 3, 3))
    assert within.comparable(strata, 3) == 4  # the third example of stratum 0 is in place 4


@pytest.mark.parametrize("seed", range(3))
def test_a_code_of_what_the_decoder_is_told_anyway(seed: int) -> None:
    """q(z|x, c) = N(m_c, I): collapsed onto the class, whose codes of others cost."""
    rng = generator(seed)
    c, table = torch.randint(0, 8, (512,), generator=rng), 1.2 * torch.randn(8, 4, generator=rng)
    x = torch.randn(512, 6, generator=rng)

    def encode(x: Any) -> tuple[Tensor, Tensor]:
        return table[x[1]], torch.zeros(len(x[1]), 4)

    def log_likelihood(x: Any, z: Tensor) -> Tensor:
        off = ((z - table[x[1]]).square().sum(dim=1) - 4).clamp_min(0)
        return normal(x[0], torch.zeros(()), 1.0) - 0.3 * off

    assert diagnose(encode, log_likelihood, (x, c), seed=seed).verdict == "informative"
    report = diagnose(encode, log_likelihood, (x, c), seed=seed, condition=c)
    assert report.verdict == "rate-only", report.reasons
    shuffled = report.metrics["delta_shuffle"]
    assert shuffled is not None and (shuffled.low, shuffled.high) == (0, 0)
    assert any("within the 8 strata of condition" in reason for reason in report.reasons)
    both = (table, torch.zeros(8, 4))
    prior = diagnose(
        encode, log_likelihood, (x, c), seed=seed, condition=c, prior=lambda x: (both[0][x[1]], both[1][x[1]])
    )
    assert prior.verdict == "collapsed"


def test_what_is_said_beyond_the_condition_is_found() -> None:
    """A linear model beside labels that say nothing: as without, but for the contrasts."""
    model = Linear.worth([0.8, 0.3, 0.0], generator(0))
    x, c = model.sample(512, generator(1)), torch.randint(0, 4, (512,), generator=generator(2))
    x_train, c_train = model.sample(512, generator(3)), torch.randint(0, 4, (512,), generator=generator(4))
    report = diagnose(model.encode, model.log_likelihood, x, train=x_train, condition=(c, c_train), classes=c)
    assert report.verdict == "informative" and report.overfit is False
    assert [dim.state for dim in report.dims[:2]] == ["active", "active"]
    lower, upper = report.metrics["mi_lower"], report.metrics["mi_upper"]
    assert lower is not None and upper is not None and lower.low < 1.1 < upper.high
    assert report.settings["strata"] == 4 and list(report.classes) == ["0", "1", "2", "3"]


def test_wrong_conditions_are_named() -> None:
    model = Linear.worth([0.8], generator(0))
    x = model.sample(64, generator(1))
    call = (model.encode, model.log_likelihood, x)
    with pytest.raises(ValueError, match="strata of 8 examples or more, got 64 examples in 64 strata"):
        diagnose(*call, condition=torch.arange(64))
    with pytest.raises(ValueError, match=r"a pair of labels, \(of heldout, of train\)"):
        diagnose(*call, train=x, condition=torch.zeros(64))
    with pytest.raises(ValueError, match="condition must have one label for each of the 64 examples"):
        diagnose(*call, condition=torch.zeros(63))


# --- examples that are not independent ----------------------------------------------------------------------


def test_groups_follow_one_another() -> None:
    ids = torch.tensor([3, 3, 7, 1, 1, 1, 7, 3, 9])
    partners = derangement_of(ids, generator=generator(0))
    following = {
        a: {int(ids[p]) for p, i in zip(partners, ids, strict=True) if int(i) == a} for a in (1, 3, 7, 9)
    }
    assert all(len(b) == 1 and a not in b for a, b in following.items())
    assert sorted(b.pop() for b in following.values()) == [1, 3, 7, 9]
    # as many members as there are take part
    assert len(set(partners[ids == 1].tolist())) == min(3, int((ids == ids[partners[3]]).sum()))


def test_copies_make_no_interval_narrower() -> None:
    model = Linear.worth([0.8, 0.3], generator(0))
    once = model.sample(100, generator(1))
    x, ids = once.repeat(10, 1), torch.arange(100).repeat(10)
    call = {"n": 1000, "k": 8}
    alone = diagnose(model.encode, model.log_likelihood, once, n=100, k=8)
    copied = diagnose(model.encode, model.log_likelihood, x, **call)
    grouped = diagnose(model.encode, model.log_likelihood, x, groups=ids, **call)

    def width(report: collapse.Report) -> float:
        rate = report.metrics["rate"]
        assert rate is not None
        return rate.high - rate.low

    assert width(copied) < 0.5 * width(alone)
    assert width(grouped) == pytest.approx(width(alone), rel=0.1)
    assert copied.checks["copies"] == pytest.approx(0.9) and grouped.settings["groups"] == 100
    assert any("90 % of the examples are exact copies" in reason for reason in copied.reasons)
    assert any("over the 100 groups of the 1000 examples" in reason for reason in grouped.reasons)
    assert alone.checks["copies"] == 0 and not any("copies" in reason for reason in alone.reasons)


@pytest.mark.parametrize("dims", [2, 6, 200])
@pytest.mark.parametrize("copies", [2, 20])
def test_near_copies_are_seen(dims: int, copies: int) -> None:
    rng = generator(dims)
    x = torch.randn(800 // copies, dims, generator=rng).repeat_interleave(copies, dim=0)
    x += 2e-4 * torch.randn(x.shape, generator=rng)
    assert near_copies(x) > 0.8
    assert near_copies((torch.zeros(800, 3, dtype=torch.int64), x[:, None])) > 0.8


@pytest.mark.parametrize("dims", [1, 2, 200])
def test_independent_examples_are_no_near_copies(dims: int) -> None:
    """With any density: normal, Cauchy, two clusters of all. In one dimension 1 / 50 have such a gap."""
    a, b = torch.randn(2, 800, dims, generator=generator(dims))
    for x in (a, a / b, a + 1e4 * (b[:, :1] > 0), a[:, 0]):
        assert near_copies(x) < 0.05
    assert near_copies(torch.zeros(60, 2)) == near_copies(torch.arange(60)) == 0


def test_near_copies_are_told() -> None:
    model = Linear.worth([0.8, 0.3], generator(0))
    x = model.sample(128, generator(1)).repeat_interleave(4, dim=0)
    x += 1e-4 * torch.randn(x.shape, generator=generator(2))
    call = (model.encode, model.log_likelihood, x)
    told = diagnose(*call)
    assert told.checks["near_copies"] > 0.9 and told.checks["copies"] == 0
    assert any("beside them, 50 times nearer than the next" in reason for reason in told.reasons)
    grouped = diagnose(*call, groups=torch.arange(512) // 4)
    assert not any("beside them" in reason for reason in grouped.reasons)


def test_a_cycle_of_groups() -> None:
    """f(i, pi(i)) = x_pi(i) has the same sum for every permutation: no interval at all, in groups as well."""
    values = torch.randn(60, generator=generator(0), dtype=torch.float64)
    ids = torch.arange(60) // 3
    partners = derangement_of(ids, generator=generator(1))
    differences = values[partners] - values
    scaled = along_cycle(differences, partners, ids)
    assert scaled.mean().item() == pytest.approx(differences.mean().item())
    assert scaled.std() < differences.std()


def test_one_group_is_no_sample() -> None:
    with pytest.raises(ValueError, match="clusters must be 2 or more, got 1 for 8 examples"):
        Bootstrap(8, clusters=torch.zeros(8))
