"""Free bits as other projects write them, and the arguments that reproduce each.

The tables are small enough to check by hand: with logvar = 0 the KL of an element is mu^2 / 2, so mu = 2
costs 2 nats, mu = 1 half a nat and mu = 0 nothing. Every objective is written out as its project's code
computes it, and compared in value and, off a tie, in gradient.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import vaekernels as vk

pytestmark = [pytest.mark.shim, pytest.mark.default_device]

# rows b, dimensions d: KL[b, d] = [[2, 0.5, 0], [2, 0, 0.5], [8, 0.5, 0]]
TABLE = [[2.0, 1.0, 0.0], [-2.0, 0.0, 1.0], [4.0, -1.0, 0.0]]
KL = [[2.0, 0.5, 0.0], [2.0, 0.0, 0.5], [8.0, 0.5, 0.0]]
# rate per dimension: [4, 1/3, 1/6]; KL per row: [2.5, 2.5, 8.5]


def table() -> tuple[Tensor, Tensor]:
    mu = torch.tensor(TABLE, dtype=torch.float64, requires_grad=True)
    return mu, torch.zeros_like(mu, requires_grad=True)


def elements(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())


def same(ours, theirs, inputs, value: float | None = None, compare_values: bool = True) -> None:
    if compare_values:
        torch.testing.assert_close(ours, theirs)
    if value is not None:
        assert math.isclose(ours.item(), value, rel_tol=1e-12), ours.item()
    mine = torch.autograd.grad(ours, inputs, retain_graph=True)
    for a, b in zip(mine, torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_table_is_what_it_says(backend):
    mu, logvar = table()
    got = vk.gaussian_kl(mu, logvar, reduction="elementwise")
    assert torch.equal(got, torch.tensor(KL, dtype=torch.float64))


def test_iaf_channel_means(backend):
    """openai/iaf: sum_c max(lambda, mean_b sum_hw KL). Two channels of 1x2: [[2.5, 0], [2, .5], ...]."""
    mu = torch.tensor([[[[2.0, 1.0]], [[0.0, 0.0]]], [[[2.0, 0.0]], [[1.0, 0.0]]]], dtype=torch.float64)
    mu.requires_grad_()
    logvar = torch.zeros_like(mu, requires_grad=True)
    theirs = elements(mu, logvar).sum(dim=(2, 3)).mean(0).clamp(min=0.6).sum()  # channel means [2.25, 0.25]
    same(vk.gaussian_kl(mu, logvar, free_bits=0.6, group_dims=1), theirs, (mu, logvar), 2.25 + 0.6)


def test_kingma_per_dimension(backend):
    """Kingma et al. 2016: sum_d max(lambda, mean_b KL_bd), the defaults: max([4, 1/3, 1/6], 0.25)."""
    mu, logvar = table()
    theirs = torch.clamp(elements(mu, logvar).mean(0), min=0.25).sum()
    same(vk.gaussian_kl(mu, logvar, free_bits=0.25), theirs, (mu, logvar), 4 + 1 / 3 + 0.25)


@pytest.mark.parametrize("free_nats, value", [(3.0, 4.5), (5.0, 5.0)])
def test_dreamer_whole_latent(free_nats, value, backend):
    """Dreamer, STORM: max(lambda, mean_b sum_d KL); the mean over rows is 4.5."""
    mu, logvar = table()
    theirs = torch.clamp(elements(mu, logvar).sum(-1).mean(), min=free_nats)
    ours = vk.gaussian_kl(mu, logvar, free_bits=free_nats, group_dims=())
    same(ours, theirs, (mu, logvar), value)


def test_ladder_per_row_per_layer(backend):
    """boilr, ladder-vae, BIVA: mean_b sum_l max(lambda, KL_bl), a call each. Rows: [2.5, 2.5, 8.5]."""
    mu, logvar = table()
    layers = [(mu, logvar), (mu * 0.5, logvar)]
    theirs = torch.stack([elements(*layer).sum(-1) for layer in layers], 1).clamp(min=3.0).sum(1).mean()
    ours = sum(vk.gaussian_kl(*layer, free_bits=3.0, clamp="sample", group_dims=()) for layer in layers)
    same(ours, theirs, (mu, logvar), (3 + 3 + 8.5) / 3 + 3.0)


def test_li_per_row_per_dimension(backend):
    """Li et al. 2019, hvae-oodd: mean_b sum_d max(lambda, KL_bd)."""
    mu, logvar = table()
    theirs = torch.clamp(elements(mu, logvar), min=0.25).sum(1).mean()
    ours = vk.gaussian_kl(mu, logvar, free_bits=0.25, clamp="sample")
    same(ours, theirs, (mu, logvar), (2.75 + 2.75 + 8.75) / 3)


def test_optimus_mask_per_dimension(backend):
    """The code of Li et al. 2019 (fb=2), bn-vae, Optimus: a mask (KL_bd > lambda) times KL_bd: the gradient
    of the floor, another value logged."""
    mu, logvar = table()
    kl = elements(mu, logvar)
    theirs = ((kl > 0.25).double() * kl).sum(1).mean()
    ours = vk.gaussian_kl(mu, logvar, free_bits=0.25, clamp="sample", penalty="mask")
    same(ours, theirs, (mu, logvar), 13.5 / 3)
    floor = vk.gaussian_kl(mu, logvar, free_bits=0.25, clamp="sample")
    same(ours, floor, (mu, logvar), compare_values=False)


def test_li_mask_per_row(backend):
    """The code of Li et al. 2019 (fb=1): mean_b 1[KL_b > lambda] KL_b."""
    mu, logvar = table()
    kl = elements(mu, logvar).sum(1)
    theirs = ((kl > 3.0).double() * kl).mean()
    ours = vk.gaussian_kl(mu, logvar, free_bits=3.0, clamp="sample", group_dims=(), penalty="mask")
    same(ours, theirs, (mu, logvar), 8.5 / 3)


def test_musicvae_hinge_in_bits(backend):
    """MusicVAE, PlaNet: mean_b max(KL_b - lambda, 0); MusicVAE counts lambda in bits."""
    mu, logvar = table()
    free_nats = 4 * math.log(2.0)
    theirs = torch.maximum(
        elements(mu, logvar).sum(1) - free_nats, torch.zeros(3, dtype=torch.float64)
    ).mean()
    ours = vk.gaussian_kl(mu, logvar, free_bits=free_nats, clamp="sample", group_dims=(), penalty="hinge")
    same(ours, theirs, (mu, logvar), (8.5 - free_nats) / 3)


def test_svg_vae_hinge_on_the_mean(backend):
    """svg_vae: mean_b max(mean_d KL_bd - lambda, 0). Means of the rows: [2.5, 2.5, 8.5] / 3."""
    mu, logvar = table()
    theirs = (elements(mu, logvar).mean(1) - 1.0).clamp(min=0.0).mean()
    hinge = {"clamp": "sample", "group_dims": (), "penalty": "hinge"}
    ours = vk.gaussian_kl(mu, logvar, free_bits=1.0 * 3, reduction="mean", **hinge)
    same(ours, theirs, (mu, logvar), (8.5 / 3 - 1.0) / 3)


def test_world_models_budget_for_the_total(backend):
    """World Models: kl_tolerance * z_size as the floor of each row's total."""
    mu, logvar = table()
    tolerance, size = 1.0, 3
    theirs = torch.maximum(
        elements(mu, logvar).sum(1), torch.tensor(tolerance * size, dtype=torch.float64)
    ).mean()
    ours = vk.gaussian_kl(mu, logvar, free_bits=tolerance * size, clamp="sample", group_dims=())
    same(ours, theirs, (mu, logvar), (3 + 3 + 8.5) / 3)


@pytest.mark.parametrize("mix", [0.8, 0.1])
def test_dreamer_v2_balance(mix, backend):
    """DreamerV2/V3: mix KL(sg q || p) + (1 - mix) KL(q || sg p) trains the prior with share mix."""
    q, lq, p, lp = (torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(4))

    def divergence(m, lv, pm, plv):
        q, p = (torch.distributions.Normal(a, torch.exp(b / 2)) for a, b in ((m, lv), (pm, plv)))
        return torch.distributions.kl_divergence(q, p).sum(-1).mean()

    theirs = mix * divergence(q.detach(), lq.detach(), p, lp) + (1 - mix) * divergence(
        q, lq, p.detach(), lp.detach()
    )
    same(vk.gaussian_kl(q, lq, p, lp, balance=mix), theirs, (q, lq, p, lp))


def test_burgess_capacity(backend):
    """Burgess et al. 2018: gamma |mean_b KL - C|, from the rates; mean_b KL = 4.5."""
    mu, logvar = table()
    theirs = 10.0 * (elements(mu, logvar).sum(1).mean() - 5.0).abs()
    _, _, rate = vk.sample_kl(mu, logvar)
    same(10.0 * (rate.sum() - 5.0).abs(), theirs, (mu, logvar), 5.0)


def test_pythae_capacity_per_row(backend):
    """pythae: gamma mean_b |KL_b - C|, from the rows: |2.5 - 5| + |2.5 - 5| + |8.5 - 5| = 8.5."""
    mu, logvar = table()
    theirs = 10.0 * (elements(mu, logvar).sum(1) - 5.0).abs().mean()
    rows = vk.gaussian_kl(mu, logvar, reduction="none")
    same(10.0 * (rows - 5.0).abs().mean(), theirs, (mu, logvar), 10 * 8.5 / 3)


def test_nvae_layer_coefficients(backend):
    """NVAE, Efficient-VDVAE: kappa_l ~ mean_b |KL_l|, a constant of the loss, from the rates."""
    mu, logvar = table()
    layers = [(mu, logvar), (mu * 0.5, logvar)]

    def weighted(rates: list[Tensor]) -> Tensor:
        kappa = torch.stack([rate.detach().abs() for rate in rates])
        return sum(k * rate for k, rate in zip(kappa / kappa.mean(), rates, strict=True))

    theirs = weighted([elements(*layer).sum(1).mean() for layer in layers])
    ours = weighted([vk.gaussian_kl(*layer, group_dims=(), return_per_group=True)[1] for layer in layers])
    same(ours, theirs, (mu, logvar))


def test_sketch_rnn_mean_over_batch_and_dimensions(backend):
    """sketch-rnn, tensor2tensor: the mean over everything; a floor on it is lambda * D on the sum."""
    mu, logvar = table()
    kl = elements(mu, logvar)
    same(vk.gaussian_kl(mu, logvar, reduction="mean"), kl.mean(), (mu, logvar), 1.5)
    for tolerance, value in ((1.0, 1.5), (2.0, 2.0)):
        theirs = torch.clamp(elements(mu, logvar).mean(), min=tolerance)
        ours = vk.gaussian_kl(mu, logvar, free_bits=tolerance * 3, group_dims=(), reduction="mean")
        same(ours, theirs, (mu, logvar), value)


def test_clamping_before_and_after_the_batch_mean_differ(backend):
    mu, logvar = table()
    after = vk.gaussian_kl(mu, logvar, free_bits=0.25)
    before = vk.gaussian_kl(mu, logvar, free_bits=0.25, clamp="sample")
    assert math.isclose(after.item(), 4 + 1 / 3 + 0.25) and math.isclose(before.item(), 4.75)


# --- parameterisations and shapes in use --------------------------------------------------------------------


def test_diffusers_posterior(backend):
    """Packed moments on dim 1, logvar clamped to [-30, 20], the KL of a row summed over all of C, H, W."""
    moments = torch.randn(2, 8, 3, 3, dtype=torch.float64) * 20
    mean, logvar = torch.chunk(moments, 2, dim=1)
    logvar = torch.clamp(logvar, -30.0, 20.0)
    theirs = 0.5 * torch.sum(mean.pow(2) + logvar.exp() - 1.0 - logvar, dim=[1, 2, 3])
    ours = vk.gaussian_kl_packed(moments, reduction="none", logvar_bounds=(-30.0, 20.0))
    torch.testing.assert_close(ours, theirs)


def test_vits_masked_frames(backend):
    """VITS: log std, [B, C, T] with a mask over T; the sum over valid frames divided by their number."""
    m, logs, mp, logsp = (torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(4))  # [B, T, C]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    kl = logsp - logs - 0.5 + 0.5 * (torch.exp(2 * logs) + (m - mp) ** 2) * torch.exp(-2 * logsp)
    theirs = (kl * mask[..., None]).sum() / mask.sum()
    ours = vk.gaussian_kl(m, logs, mp, logsp, batch_dims=2, weight=mask, parameterization="log_std")
    torch.testing.assert_close(ours, theirs)


def test_iwae_samples_stand_first(backend):
    """[K, B, D] from one read of mu and logvar."""
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    z = vk.reparameterize(mu, logvar, num_samples=6)
    assert z.shape == (6, 4, 3) and len({float(x) for x in z[:, 0, 0]}) == 6


def test_soft_clamp_and_offset_variance_compose(backend):
    """NVAE's 5 tanh(x/5) and scvi's exp(.) + 1e-4 variance are made before the call."""
    x = torch.randn(4, 3, dtype=torch.float64)
    soft = 5 * torch.tanh(x / 5)
    torch.testing.assert_close(vk.gaussian_kl(soft, soft), elements(soft, soft).sum(1).mean())
    std = (torch.exp(x) + 1e-4).sqrt()
    q, p = torch.distributions.Normal(x, std), torch.distributions.Normal(0.0, 1.0)
    theirs = torch.distributions.kl_divergence(q, p).sum(1).mean()
    torch.testing.assert_close(vk.gaussian_kl(x, std, parameterization="std"), theirs)


def test_rave_softplus_with_offset(backend):
    """RAVE: std = softplus(s) + 1e-4, given as "std"."""
    mu, s = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    std = torch.nn.functional.softplus(s) + 1e-4
    theirs = 0.5 * (mu * mu + std * std - torch.log(std * std) - 1).sum(1).mean()
    torch.testing.assert_close(vk.gaussian_kl(mu, std, parameterization="std"), theirs)
