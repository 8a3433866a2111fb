"""Metrics of the latent against cases whose truth is known without them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vaekernels import collapse


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [2, 3, 7, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_derangement_is_a_permutation_without_fixed_points(n: int, seed: int) -> None:
    permutation = collapse.derangement(n, generator=rng(seed))
    assert sorted(permutation.tolist()) == list(range(n))
    assert not (permutation == torch.arange(n)).any()


def test_derangement_is_random_and_reproducible() -> None:
    assert torch.equal(collapse.derangement(50, generator=rng(1)), collapse.derangement(50, generator=rng(1)))
    assert not torch.equal(
        collapse.derangement(50, generator=rng(1)), collapse.derangement(50, generator=rng(2))
    )


def test_derangement_of_one_is_impossible() -> None:
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        collapse.derangement(1)


def copies_prior(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(x), 3), torch.zeros(len(x), 3)


def sends_x(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.full_like(x, -4.0)


def gaussian(x: Tensor, z: Tensor) -> Tensor:
    """log N(x; z, 1), the decoder that trusts z entirely."""
    return -0.5 * ((x - z) ** 2 + math.log(2 * math.pi)).sum(dim=1)


def test_shuffling_changes_nothing_when_the_encoder_copies_the_prior() -> None:
    # The decoder depends on z strongly, so only noise that is common to both terms gives exactly zero.
    x = torch.randn(300, 3, generator=rng())
    own, shuffled = collapse.shuffle_nll(copies_prior, gaussian, x, generator=rng(1), batch_size=64)
    assert torch.equal(own, shuffled)
    assert own.std() > 0.5
    estimate = collapse.delta_shuffle(copies_prior, gaussian, x, generator=rng(1))
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 60), dims=st.integers(1, 5), scale=st.floats(1e-3, 1e6), seed=st.integers(0, 1000))
def test_copies_of_the_prior_cost_exactly_nothing_under_any_decoder(
    n: int, dims: int, scale: float, seed: int
) -> None:
    x = torch.randn(n, dims, generator=rng(seed))
    weight = scale * torch.randn(dims, dims, generator=rng(seed + 1))
    estimate = collapse.delta_shuffle(
        lambda x: (torch.zeros_like(x), torch.zeros_like(x)),
        lambda x, z: -((x - torch.sin(z) @ weight) ** 2).sum(dim=1),
        x,
        generator=rng(seed),
    )
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_shuffling_changes_nothing_when_the_decoder_ignores_z() -> None:
    x = torch.randn(300, 3, generator=rng())
    estimate = collapse.delta_shuffle(sends_x, lambda x, z: -(x**2).sum(dim=1), x, generator=rng(1))
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_shuffling_costs_what_it_must_on_a_gaussian() -> None:
    # z = x + sd eps: NLL(x, z') - NLL(x, z) = |x - x' - sd eps|^2 / 2 - |sd eps|^2 / 2, of mean D.
    x = torch.randn(4000, 3, generator=rng())
    estimate = collapse.delta_shuffle(sends_x, gaussian, x, generator=rng(1))
    assert estimate.low < 3.0 < estimate.high
    # |x - x'|^2 / 2 has the variance 2 D, and the covariance D / 2 with each of the two terms that share an
    # example; the interval is 2 * 1.96 standard errors wide
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * math.sqrt(9 / 4000), rel=0.1)


def test_chunks_do_not_change_the_result() -> None:
    x = torch.randn(100, 3, generator=rng())
    whole = collapse.shuffle_nll(sends_x, gaussian, x, generator=rng(1), batch_size=100)
    parts = collapse.shuffle_nll(sends_x, gaussian, x, generator=rng(1), batch_size=7)
    torch.testing.assert_close(whole, parts)


def test_active_units_is_the_variance_of_the_mean_over_the_split() -> None:
    mu = torch.zeros(1000, 4)
    mu[:, 0] = 5.0  # far from the prior, yet the same for every x
    mu[::2, 1], mu[1::2, 1] = 0.11, -0.11  # variance 0.0121
    mu[::2, 2], mu[1::2, 2] = 0.09, -0.09  # variance 0.0081
    assert collapse.active_units(mu).tolist() == [False, True, False, False]
    assert collapse.active_units(mu, threshold=0.005).tolist() == [False, True, True, False]


def test_rate_is_unclamped_and_by_dimension() -> None:
    mu = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    logvar = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(collapse.rate_per_dim(mu, logvar), torch.tensor([0.0, 2.5]))


def test_wrong_shapes_are_named() -> None:
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match=r"encode must return mu and logvar of shape \[B, D\]"):
        collapse.moments(lambda x: (x[:, :, None], x[:, :, None]), x)
    with pytest.raises(ValueError, match="log_likelihood must return one value per example"):
        collapse.shuffle_nll(sends_x, lambda x, z: -((x - z) ** 2), x)
