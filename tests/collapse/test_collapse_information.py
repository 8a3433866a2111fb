"""Bounds on mutual information: by hand, against loops over the definition, and on known channels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import generator
from torch import Tensor

from vaekernels.collapse import information
from vaekernels.collapse.estimate import Bootstrap
from vaekernels.collapse.information import contrast_rows, infonce, infonce_terms, mi_bounds


def by_definition(mu: Tensor, logvar: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Terms of the lower and the upper bound, one example at a time."""
    n = len(mu)
    lower, upper = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        density = torch.distributions.Normal(mu, torch.exp(logvar / 2)).log_prob(z[i]).sum(dim=1).exp()
        others = torch.cat([density[:i], density[i + 1 :]])
        lower[i] = torch.log(density[i] / density.mean())
        upper[i] = torch.log(density[i] / others.mean())
    return lower, upper


def posterior(n: int, dims: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator(seed)
    mu, logvar, eps = (torch.randn(n, dims, generator=rng, dtype=torch.float64) for _ in range(3))
    return mu, 0.3 * logvar - 1, mu + torch.exp(0.15 * logvar - 0.5) * eps


def channel(n: int, dims: int, nats: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """z = x + noise with ``nats`` of mutual information in all."""
    rng = generator(seed)
    rho2 = 1 - math.exp(-2 * nats / dims)
    mu = math.sqrt(rho2) * torch.randn(n, dims, generator=rng, dtype=torch.float64)
    logvar = torch.full_like(mu, math.log(1 - rho2))
    return mu, logvar, mu + math.sqrt(1 - rho2) * torch.randn(n, dims, generator=rng, dtype=torch.float64)


def test_two_examples_by_hand() -> None:
    # mu = 0 and 2, sd = 1; z = 0.5 and 2. Log densities without the constant, own / other:
    #   z = 0.5: -0.125 / -1.125     z = 2: 0 / -2
    mu = torch.tensor([[0.0], [2.0]])
    bounds = mi_bounds(mu, torch.zeros(2, 1), torch.tensor([[0.5], [2.0]]))
    assert bounds.upper.tolist() == pytest.approx([1.0, 2.0])
    lower = [-math.log((1 + math.exp(-1)) / 2), -math.log((1 + math.exp(-2)) / 2)]
    assert bounds.lower.tolist() == pytest.approx(lower)
    assert bounds.cap == pytest.approx(math.log(2))
    torch.testing.assert_close(bounds.lower_dims[:, 0], bounds.lower)
    torch.testing.assert_close(bounds.upper_dims[:, 0], bounds.upper)


@pytest.mark.parametrize("n, dims", [(2, 1), (5, 3), (40, 2)])
def test_bounds_are_their_definition(n: int, dims: int) -> None:
    mu, logvar, z = posterior(n, dims, seed=n)
    bounds = mi_bounds(mu, logvar, z)
    lower, upper = by_definition(mu, logvar, z)
    torch.testing.assert_close(bounds.lower, lower, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bounds.upper, upper, rtol=1e-10, atol=1e-10)
    for d in range(dims):
        one = mu[:, d : d + 1], logvar[:, d : d + 1], z[:, d : d + 1]
        lower, upper = by_definition(*one)
        torch.testing.assert_close(bounds.lower_dims[:, d], lower, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(bounds.upper_dims[:, d], upper, rtol=1e-10, atol=1e-10)


def test_fewer_codes_when_there_are_too_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    mu, logvar, z = channel(400, 2, 1.0, seed=3)
    monkeypatch.setattr(information, "_PAIRS", 200 * 2 * 100)
    monkeypatch.setattr(information, "_JOINT_PAIRS", 2 * 200**2)
    monkeypatch.setattr(information, "_LEAST_CODES", 10)
    monkeypatch.setattr(information, "_ENOUGH", 200)
    bounds = mi_bounds(mu, logvar, z)
    assert (bounds.cap, bounds.cap_dims) == pytest.approx((math.log(200), math.log(100)))
    assert bounds.rows.tolist() == list(range(200)) and bounds.lower_dims.shape == (200, 2)
    lower, upper = by_definition(mu[:200], logvar[:200], z[:200])
    torch.testing.assert_close(bounds.lower, lower, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bounds.upper, upper, rtol=1e-10, atol=1e-10)
    for i in (7, 150):  # one of the codes that are compared with, and another
        rows = [i, *(j for j in range(100) if j != i)]
        lower, upper = by_definition(mu[rows, :1], logvar[rows, :1], z[rows, :1])
        assert bounds.lower_dims[i, 0].item() == pytest.approx(lower[0].item())
        assert bounds.upper_dims[i, 0].item() == pytest.approx(upper[0].item())
    at_random = mi_bounds(mu, logvar, z, generator=generator(0))
    some = torch.randperm(400, generator=generator(0))[:200]
    assert torch.equal(at_random.rows, some)
    torch.testing.assert_close(at_random.lower, by_definition(mu[some], logvar[some], z[some])[0])


@pytest.mark.parametrize("dims", [1, 16, 256, 4096, 1 << 20])
def test_more_examples_are_never_compared_with_fewer(dims: int) -> None:
    sizes = [information.compared(n, dims) for n in (2, 100, 500, 2048, 10_000, 50_000, 10**6)]
    for fewer, more in itertools.pairwise(sizes):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))
    joint, codes, number = sizes[-1]
    least = information._LEAST_CODES**2 * dims
    assert joint * joint * dims <= max(information._JOINT_PAIRS, least)
    assert codes <= number and codes * number * dims <= max(information._PAIRS, least)


@pytest.mark.parametrize("nats, dims", [(0.1, 1), (1.0, 1), (1.0, 4), (3.32, 4), (3.32, 16)])
def test_bounds_bracket_a_known_channel(nats: float, dims: int) -> None:
    n = 1024
    bounds = mi_bounds(*channel(n, dims, nats, seed=dims))
    lower, upper = Bootstrap(n, generator=generator(0)).estimates(
        torch.stack([bounds.lower, bounds.upper], dim=1)
    )
    assert lower.low <= nats <= upper.high
    assert lower.value < upper.value
    # Their biases are opposite, so that the middle has next to none: 4 standard errors.
    assert (lower.value + upper.value) / 2 == pytest.approx(nats, abs=(upper.high - lower.low))
    assert lower.value < bounds.cap - 1


def test_a_saturated_channel() -> None:
    # 12 nats among 512 examples, of which no more than log 512 = 6.24 can be seen
    bounds = mi_bounds(*channel(512, 4, 12.0, seed=0))
    assert bounds.cap - 1 < bounds.lower.mean().item() <= bounds.cap
    assert bounds.upper.mean().item() > 12.0


def test_copies_of_the_prior_tell_nothing() -> None:
    z = torch.randn(300, 3, generator=generator(0))
    bounds = mi_bounds(torch.zeros(300, 3), torch.zeros(300, 3), z)
    for part in bounds[:4]:
        assert part.abs().max().item() < 1e-13  # the rounding of a sum of 300 equal terms


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 25), dims=st.integers(1, 4), scale=st.floats(0.01, 30), seed=st.integers(0, 1000))
def test_properties_of_the_bounds(n: int, dims: int, scale: float, seed: int) -> None:
    mu, logvar, z = posterior(n, dims, seed)
    mu, z = mu * scale, mu * (scale - 1) + z
    bounds = mi_bounds(mu, logvar, z)
    assert bounds.lower.max().item() <= math.log(n) + 1e-9
    assert bounds.lower_dims.max().item() <= math.log(n) + 1e-9
    # With u = exp(-upper), lower = -log of 1/N + u (N - 1)/N, so it lies between 0 and upper.
    assert bool((bounds.lower <= bounds.upper.clamp_min(0) + 1e-9).all())
    assert bool((bounds.lower >= bounds.upper.clamp_max(0) - 1e-9).all())
    order = torch.randperm(n, generator=generator(seed))
    swapped = mi_bounds(mu[order], logvar[order], z[order])
    torch.testing.assert_close(swapped.lower, bounds.lower[order], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(swapped.upper, bounds.upper[order], rtol=1e-7, atol=1e-9)
    columns = torch.randperm(dims, generator=generator(seed))
    turned = mi_bounds(mu[:, columns], logvar[:, columns], z[:, columns])
    torch.testing.assert_close(turned.lower_dims, bounds.lower_dims[:, columns], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(turned.upper_dims, bounds.upper_dims[:, columns], rtol=1e-7, atol=1e-9)


# Three examples, K = 3, so that all are contrasts of all; exp(l):
#   row 0: own 4, others 2, 2     row 1: own 3, others 3, 3      row 2: own 1, others 2, 3
LIKELIHOODS = torch.log(torch.tensor([[4.0, 2, 2], [3, 3, 3], [1, 2, 3]], dtype=torch.float64))
ROWS = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1]])


def test_infonce_of_three_examples_by_hand() -> None:
    values, resample = infonce_terms(LIKELIHOODS, ROWS)
    assert values.tolist() == pytest.approx([math.log(12 / 8), 0.0, math.log(3 / 6)])
    # Without a contrast, log-mean-exp changes by log((S - e) / S) and a constant that the mean takes away.
    # Example 0 is a contrast in row 1 (3 of 9) and in row 2 (2 of 6); 1 in row 0 (2 of 8) and row 2 (3 of 6);
    # 2 in row 0 (2 of 8) and row 1 (3 of 9).
    influence = [2 * math.log(2 / 3), math.log(3 / 4) + math.log(1 / 2), math.log(3 / 4) + math.log(2 / 3)]
    mean = sum(influence) / 3
    expected = [value + each - mean for value, each in zip(values.tolist(), influence, strict=True)]
    assert resample.tolist() == pytest.approx(expected)
    assert resample.mean().item() == pytest.approx(values.mean().item())


def test_tau_is_chosen_on_the_other_half() -> None:
    good = torch.log(torch.tensor([[4.0, 1, 1], [4, 1, 1], [1, 2, 1]], dtype=torch.float64))
    bad = torch.log(torch.tensor([[1.0, 3, 3], [1, 1, 2], [1, 2, 3]], dtype=torch.float64))
    found = infonce((good, bad), (ROWS, ROWS))
    # On `bad` any tau > 0 loses, so `good` is read with 0; on `good` some tau > 0 is best, and `bad` pays.
    assert found.tau[1] == 0.0 and found.tau[0] > 0
    assert found.values[:3].tolist() == [0.0, 0.0, 0.0]
    assert found.values[3:].mean().item() < 0
    grid = [
        infonce_terms(good * tau, ROWS)[0].mean().item() for tau in torch.linspace(0.01, 5, 2000).tolist()
    ]
    best = 0.01 + grid.index(max(grid)) * (4.99 / 1999)
    assert found.tau[0] == pytest.approx(best, abs=0.005)


def test_infonce_ignores_what_depends_on_x_alone() -> None:
    shift = torch.tensor([[5.0], [-700.0], [1e4]], dtype=torch.float64)
    for part, other in zip(
        infonce_terms(LIKELIHOODS, ROWS), infonce_terms(LIKELIHOODS + shift, ROWS), strict=True
    ):
        torch.testing.assert_close(part, other)


@pytest.mark.parametrize("n, k", [(2, 2), (5, 3), (7, 7), (64, 32)])
def test_contrast_rows(n: int, k: int) -> None:
    rows = contrast_rows(n, k, generator=generator(n))
    assert rows.shape == (n, k)
    assert rows[:, 0].tolist() == list(range(n))
    assert all(len(set(row)) == k for row in rows.tolist())
    assert torch.bincount(rows.flatten(), minlength=n).tolist() == [k] * n  # every code serves equally often


def test_contrast_rows_rarely_share_two_codes() -> None:
    # Random pairs of 200 examples with 10 codes each share 0.5 codes on average, and two with chance 0.08.
    rows = contrast_rows(200, 10, generator=generator(0))
    used = torch.zeros(200, 200).scatter_(1, rows, 1.0)
    shared = used @ used.T
    shared.fill_diagonal_(0)
    assert (shared >= 3).double().mean().item() < 0.03


def test_too_many_contrasts() -> None:
    with pytest.raises(ValueError, match="from 2 to the number of examples, 4, got 5"):
        contrast_rows(4, 5)
