"""Likelihoods under other codes, and refined ones, on a linear model whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planted import Linear, generator
from torch import Tensor, nn

from vaekernels import gaussian_kl
from vaekernels.collapse import decoder, derangement, svi
from vaekernels.collapse.decoder import Codes, importance_columns, importance_mean
from vaekernels.collapse.measurements import Measurements
from vaekernels.collapse.model import Model
from vaekernels.collapse.redundancy import clusters, cost, find_redundant

NATS = [0.8, 0.4, 0.0]


@pytest.fixture
def linear() -> tuple[Linear, Tensor]:
    model = Linear.worth(NATS, generator(0))
    return model, model.sample(300, generator(1))


def codes_of(model: Linear, x: Tensor) -> Codes:
    return Codes.draw(*model.encode(x), generator(2))


def evidence(model: Linear, x: Tensor) -> Tensor:
    """-log p(x) exactly."""
    covariance = (model.basis * model.w**2) @ model.basis.T + model.sd**2 * torch.eye(len(model.basis))
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(len(covariance)).double(), covariance.double()
    )
    return -normal.log_prob(x.double())


def test_shuffled_dimensions_by_definition(linear: tuple[Linear, Tensor]) -> None:
    model, x = linear
    codes, permutation = codes_of(model, x), derangement(300, generator=generator(3))
    behind = Model(model.encode, model.log_likelihood, batch_size=7)
    groups = [torch.tensor([0]), torch.tensor([2, 1]), torch.tensor([0, 1, 2])]
    found = decoder.shuffled_nll(behind, x, codes, permutation, groups)
    for column, group in enumerate(groups):
        z = codes.own(0, 300).clone()
        z[:, group] = (codes.mu[permutation] + codes.sd[permutation] * codes.eps)[:, group]
        torch.testing.assert_close(found[:, column], -model.log_likelihood(x, z.float()).double())


def test_infonce_codes_are_other_examples_of_the_same_half() -> None:
    # The decoder tells which code it was asked about: l_ik = -|i - k|, with z_i = i.
    n = 12
    x = torch.arange(float(n))[:, None]
    asked: list[tuple[int, int]] = []

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        asked.extend(zip(x[:, 0].int().tolist(), z[:, 0].int().tolist(), strict=True))
        return -(x - z).abs()[:, 0]

    codes = Codes(x.double(), torch.zeros(n, 1).double(), torch.zeros(n, 1).double())
    behind = Model(lambda x: (x, x), log_likelihood, batch_size=5)
    found = decoder.contrast(behind, x, codes, 4, generator(0), lambda nll: nll).infonce()
    assert len(asked) == 4 * n and len(set(asked)) == 4 * n
    assert all((i < 6) == (k < 6) for i, k in asked)
    assert asked[::4] == [(i, i) for i in range(n)]
    assert found.values.mean().item() > 0.5
    assert decoder.contrasts(5, 32) == 2


def test_importance_weighting_of_an_exact_posterior_is_the_evidence(linear: tuple[Linear, Tensor]) -> None:
    model, x = linear
    behind = Model(model.encode, model.log_likelihood)
    found = decoder.importance(behind, x, codes_of(model, x), 3, generator(4)).nll
    torch.testing.assert_close(found, evidence(model, x), rtol=1e-4, atol=1e-4)


def test_importance_weighting_of_a_wrong_posterior_tends_to_the_evidence(
    linear: tuple[Linear, Tensor],
) -> None:
    model, x = linear

    def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = model.encode(x)
        return 0.5 * mu, logvar + 0.3

    behind = Model(wrong, model.log_likelihood)
    codes = Codes.draw(*wrong(x), generator(2))
    truth = evidence(model, x).mean().item()
    few, many = (decoder.importance(behind, x, codes, k, generator(4)).nll.mean().item() for k in (1, 200))
    assert few > many + 0.1 and many == pytest.approx(truth, abs=0.03) and many > truth - 0.01


def test_importance_mean_by_hand() -> None:
    # NELBO 5, 7, 9; the importance-weighted NLL of the first two is 4 and 5: gaps 1 and 2.
    columns = importance_columns(torch.tensor([5.0, 7, 9]), torch.tensor([4.0, 5.0]))
    assert columns.tolist() == [[5, 1, 1], [7, 2, 1], [9, 0, 0]]
    assert importance_mean(columns.mean(dim=0)).tolist() == [7 - 1.5]


# --- refinement ---------------------------------------------------------------------------------------------


def refined(model: Model, x: Tensor) -> svi.Refinement:
    mu, logvar = model.moments(x)
    return svi.refine(model, x, mu, logvar, generator(5))


def test_refinement_finds_the_posterior(linear: tuple[Linear, Tensor]) -> None:
    model, x = linear
    x = x[:100]
    behind = Model(lambda x: (torch.zeros(len(x), 3), torch.zeros(len(x), 3)), model.log_likelihood)
    found = refined(behind, x)
    assert found.differentiable
    torch.testing.assert_close(found.at_posterior, found.at_prior)
    # 16 noises: the mean over 100 examples of NELBO - log p(x) is the KL from the posterior, near 0
    gap = (found.after - evidence(model, x)).mean().item()
    assert found.at_prior.mean().item() - found.after.mean().item() > 0
    assert gap == pytest.approx(0, abs=0.25)
    # The posterior's rate: that of the encoder that is exact
    mu, logvar = model.encode(x)
    rate = gaussian_kl(mu.double(), logvar.double().contiguous(), reduction="none")
    assert found.rate_after.mean().item() == pytest.approx(rate.mean().item(), rel=0.15)


@pytest.mark.parametrize(
    "log_likelihood, differentiable",
    [
        (lambda x, z: -(x**2).sum(dim=1), False),  # no graph at all
        (lambda x, z: -(x**2).sum(dim=1) + 0 * z.sum(dim=1), True),  # a path of slope 0
        (lambda x, z: -((x - z.detach()) ** 2).sum(dim=1), False),
        (torch.no_grad()(lambda x, z: -((x - z) ** 2).sum(dim=1)), False),
    ],
)
def test_without_a_gradient_refinement_sheds_the_rate(
    log_likelihood: Callable[..., Tensor], differentiable: bool
) -> None:
    x = torch.randn(20, 2, generator=generator(0))
    behind = Model(lambda x: (torch.full_like(x, 0.8), torch.full_like(x, -0.5)), log_likelihood)
    found = refined(behind, x)
    assert found.rate_after.mean().item() < 0.05
    assert found.differentiable == differentiable


def test_refinement_leaves_the_models_gradients_alone() -> None:
    layer = nn.Linear(2, 2)
    x = torch.randn(20, 2, generator=generator(0))
    behind = Model(lambda x: (x, 0 * x), lambda x, z: -((x - layer(z)) ** 2).sum(dim=1))
    with torch.no_grad():
        assert refined(behind, x).differentiable
    assert layer.weight.grad is None and layer.bias.grad is None


def test_cudnn_recurrent_nets_are_refined_with_cudnn_off() -> None:
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            if torch.backends.cudnn.enabled:
                raise RuntimeError("cudnn RNN backward can only be called in training mode")
            return grad

    x = torch.randn(20, 2, generator=generator(0))
    enabled = torch.backends.cudnn.enabled
    behind = Model(lambda x: (0 * x, 0 * x), lambda x, z: -2 * ((x - Refuses.apply(z)) ** 2).sum(dim=1))
    found = refined(behind, x)
    assert found.differentiable and (found.at_prior - found.after).mean().item() > 1
    assert torch.backends.cudnn.enabled == enabled

    def breaks(x: Tensor, z: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        refined(Model(lambda x: (x, x), breaks), x)


def test_clusters() -> None:
    rng = generator(0)
    a, b, c, d = torch.randn(4, 500, generator=rng)
    mu = torch.stack([a, b, a + 0.1 * c, d, -a, torch.zeros(500), b * b], dim=1)
    assert clusters(mu, [0, 1, 2, 3, 4]) == [[0, 2, 4], [1, 3]]  # those linked to none are one group
    assert clusters(mu, [0, 1]) == [[0, 1]]
    assert clusters(mu, [2, 4, 5]) == [[2, 4]]  # a constant column is linked to nothing
    assert clusters(mu, [3]) == []
    assert math.isnan(torch.corrcoef(mu.T)[5, 0].item())


def redundant(log_likelihood: Callable[[Tensor, Tensor], Tensor], groups: list[list[int]]) -> Any:
    """Of codes that are three noiseless copies of x0, and x1."""
    x = torch.randn(300, 2, generator=generator(0))

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu = torch.stack([x[:, 0], x[:, 0], x[:, 0], x[:, 1]], dim=1)
        return mu, torch.full_like(mu, -30.0)

    split = Measurements("heldout", Model(encode, log_likelihood), x, 0, 0)
    split.encode()
    split.shuffle()
    return find_redundant(split, groups)


def test_redundancy() -> None:
    def error(x: Tensor, z: Tensor) -> Tensor:
        return -((x[:, :1] - z) ** 2) / 0.02

    # Either of two copies is enough, and the third is not looked at.
    pair = redundant(lambda x, z: error(x, z[:, :2]).max(dim=1).values, [[0, 1, 2]])
    assert pair == {0: (1,), 1: (0,)}
    # Of three copies two must agree: none helps alone, so the part of all is what all do together.
    three = redundant(lambda x, z: error(x, z[:, :3].median(dim=1).values[:, None])[:, 0], [[0, 1, 2]])
    assert three == {0: (1, 2), 1: (0, 2), 2: (0, 1)}
    # No one looks.
    assert redundant(lambda x, z: -(x**2).sum(dim=1), [[0, 1, 2], [0, 3]]) == {}
    assert cost([[0, 1, 2], [0, 3]], 10) == 10 * (4 + 3)


def test_many_codes_keep_the_dtype_of_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory, the same numbers to rounding."""
    mu, logvar = torch.randn(40, 3, generator=generator(0)), torch.zeros(40, 3)
    in_double = Codes.draw(mu, logvar, generator(1))
    monkeypatch.setattr(decoder, "_DOUBLE", 100)
    monkeypatch.setattr(decoder, "_DRAWN", 16)
    kept = Codes.draw(mu, logvar, generator(1))
    assert in_double.eps.dtype == torch.float64 and {part.dtype for part in kept} == {torch.float32}
    rows = torch.tensor([3, 39])
    for a, b in ((kept.of(rows), in_double.of(rows)), (kept.prior(0, 40), in_double.prior(0, 40))):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
