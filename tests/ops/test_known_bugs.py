"""Bugs that shipped in known VAE libraries, each as a test of the ops.

Those of trainers, schedules and metrics (annealing counters, anti-windup, active units, checkpoints) stand in
test_training.py, test_schedules.py and test_metrics.py.
"""

from __future__ import annotations

import math

import pytest
import torch

import vaekernels as vk

pytestmark = [pytest.mark.shim, pytest.mark.default_device]


@pytest.mark.parametrize(
    "shape", [(4,), (4, 6), (4, 6, 5), (4, 6, 5, 3), (4, 3, 2, 5, 2), (4, 2, 3, 2, 2, 2)]
)
def test_the_sum_runs_over_every_latent_axis(shape, backend):
    """A reduction over hardcoded dims [1, 2, 3] fails on [B, D] and leaves out an axis of 5-D video."""
    mu = torch.full(shape, 2.0)  # 2 nats an element
    rows = vk.gaussian_kl(mu, torch.zeros_like(mu), reduction="none")
    assert rows.shape == (4,)
    assert rows.tolist() == [2.0 * math.prod(shape[1:])] * 4
    assert vk.gaussian_kl(mu, torch.zeros_like(mu)) == 2.0 * math.prod(shape[1:])


def test_the_half_is_there(backend):
    assert vk.gaussian_kl(torch.full((1, 1), 2.0), torch.zeros(1, 1)) == 2.0
    kl = vk.gaussian_kl(
        torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), math.log(4.0), dtype=torch.float64)
    )
    assert math.isclose(kl, 0.5 * (4 - 1 - math.log(4.0)))


def test_a_kl_is_never_negative_and_the_log_ratio_has_the_right_sign(backend):
    """KL(N(0, 1) || N(0, 4)) = 1/2 (1/4 - 1 + ln 4) = 0.318; with the wrong sign of the logarithm -1.068."""
    zero, lp = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), math.log(4.0), dtype=torch.float64)
    assert math.isclose(vk.gaussian_kl(zero, zero, zero, lp), 0.5 * (0.25 - 1 + math.log(4.0)))
    assert math.isclose(vk.gaussian_kl(zero, lp, zero, zero), 0.5 * (4 - 1 - math.log(4.0)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        scale = 10.0 ** torch.linspace(-5, 0.7, 4000)
        mu, lv, mp, lp = (torch.randn(4000).mul(scale).to(dtype) for _ in range(4))
        for prior in ((), (mp, lp)):
            assert (vk.gaussian_kl(mu, lv, *prior, reduction="elementwise", batch_dims=0) >= 0).all()


def test_the_direction_is_posterior_to_prior(backend):
    """KL(q || p) and KL(p || q) differ; torch.distributions is the judge."""
    q, lq, p, lp = (torch.randn(5, 3, dtype=torch.float64) for _ in range(4))
    normals = [torch.distributions.Normal(m, torch.exp(v / 2)) for m, v in ((q, lq), (p, lp))]
    forward = torch.distributions.kl_divergence(*normals)
    assert not torch.allclose(forward, torch.distributions.kl_divergence(*reversed(normals)))
    torch.testing.assert_close(vk.gaussian_kl(q, lq, p, lp, reduction="elementwise"), forward)


def test_the_default_sums_over_dimensions_and_averages_over_the_batch(backend):
    """Averaging over dimensions while the reconstruction is summed is an unnoticed factor of D on beta."""
    for rows, dims in ((1, 1), (3, 1), (3, 10), (7, 100)):
        mu = torch.full((rows, dims), 2.0)
        assert vk.gaussian_kl(mu, torch.zeros_like(mu)) == 2.0 * dims
        assert vk.gaussian_kl(mu, torch.zeros_like(mu), reduction="sum") == 2.0 * dims * rows
        assert vk.gaussian_kl(mu, torch.zeros_like(mu), reduction="mean") == 2.0


@pytest.mark.parametrize("penalty", ["floor", "hinge", "mask"])
@pytest.mark.parametrize("clamp", ["batch", "sample"])
def test_the_rate_is_never_the_clamped_kl(clamp, penalty, backend):
    """Logging the clamped or masked KL as the rate hides a collapse: here the rate is 0."""
    mu = torch.zeros(4, 3)
    for threshold, expected in ((0.0, 0.0), (5.0, {"floor": 15.0}.get(penalty, 0.0))):
        _, kl, rate = vk.sample_kl(mu, mu, free_bits=threshold, clamp=clamp, penalty=penalty)
        assert kl == expected
        assert rate.tolist() == [0.0, 0.0, 0.0]


def test_no_half_gradient_at_a_tie(backend):
    """torch.max(kl, lambda) splits the gradient at a tie."""
    mu = torch.full((1, 1), 2.0, requires_grad=True)
    kl = vk.gaussian_kl(mu, torch.zeros(1, 1), free_bits=2.0)
    (ours,) = torch.autograd.grad(kl, mu)
    (split,) = torch.autograd.grad(torch.max(mu.pow(2).sum() / 2, torch.tensor(2.0)), mu)
    assert ours == 2.0 and split == 1.0


def test_no_cancellation_near_collapse(backend):
    """exp(lv) - 1 - lv is 0 for lv < 3e-4 in float32 and 4.7 % off at 1e-3."""
    for lv in (1e-6, 1e-5, 1e-4, 2e-4, 1e-3, 1e-2):
        logvar = torch.full((1, 1), lv)
        exact = 0.5 * (math.expm1(logvar.item()) - logvar.item())
        assert math.isclose(vk.gaussian_kl(torch.zeros(1, 1), logvar), exact, rel_tol=1e-5), lv
    usual = torch.tensor(2e-4).exp() - 1 - torch.tensor(2e-4)
    assert abs(float(usual) / 2e-8 - 1) > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_kl_is_not_zero(dtype, backend):
    """In bfloat16 the usual code gives 0 at lv = 0.1."""
    logvar = torch.full((1, 1), 0.1, dtype=dtype)
    exact = 0.5 * (math.expm1(logvar.item()) - logvar.item())
    assert math.isclose(vk.gaussian_kl(torch.zeros_like(logvar), logvar), exact, rel_tol=1e-5)


def test_float16_does_not_overflow_below_the_usual_clamp(backend):
    """exp(lv) overflows float16 at 11.1, although latent-diffusion clamps at 20 only."""
    logvar = torch.full((1, 1), 19.0, dtype=torch.float16, requires_grad=True)
    kl = vk.gaussian_kl(torch.zeros_like(logvar), logvar, logvar_bounds=(-30.0, 20.0))
    assert math.isclose(kl.item(), 0.5 * (math.exp(19.0) - 20.0), rel_tol=1e-5)
    z = vk.reparameterize(
        torch.zeros_like(logvar), logvar, rng=torch.tensor([1, 0]), logvar_bounds=(-30.0, 20.0)
    )
    assert torch.isfinite(z)  # std = exp(9.5) = 13360 is a float16


def test_free_bits_use_the_mean_of_all_rows(backend):
    """A clamp on the mean of each part of a batch is another objective: rates [8, 0] and the mean [4]."""
    mu = torch.tensor([[4.0], [0.0]])
    zero = torch.zeros_like(mu)
    whole = vk.gaussian_kl(mu, zero, free_bits=3.0)
    parts = [vk.gaussian_kl(mu[i : i + 1], zero[i : i + 1], free_bits=3.0) for i in range(2)]
    assert whole == 4.0 and sum(parts) / 2 == 5.5  # over processes: test_process_group.py


def test_padding_does_not_dilute_the_kl(backend):
    """A mask changes the divisor too: two valid frames of 2 nats are 2 nats a frame."""
    mu = torch.tensor([[[2.0], [2.0], [9.0], [9.0]]])
    mask = torch.tensor([[True, True, False, False]])
    for clamp in ("batch", "sample"):
        kl = vk.gaussian_kl(mu, torch.zeros_like(mu), batch_dims=2, weight=mask, free_bits=1.0, clamp=clamp)
        assert kl == 2.0


def test_the_sample_has_the_standard_deviation_and_not_the_variance(backend):
    """std = exp(logvar / 2): with logvar = 2 ln 3 the samples spread by 3."""
    mu, logvar = torch.full((200_000,), 10.0), torch.full((200_000,), 2 * math.log(3.0))
    z = vk.reparameterize(mu, logvar, rng=torch.tensor([1, 0]))
    assert abs(float(z.mean()) - 10) < 0.04 and abs(float(z.std()) - 3) < 0.03
    for parameterization, value in (
        ("log_std", math.log(3.0)),
        ("std", 3.0),
        ("softplus", math.log(math.expm1(3.0))),
    ):
        second = torch.full_like(logvar, value)
        same = vk.reparameterize(mu, second, rng=torch.tensor([1, 0]), parameterization=parameterization)
        torch.testing.assert_close(same, z)


def test_noise_is_not_shared_between_rows_or_calls(backend):
    mu = torch.zeros(64, 16)
    z = torch.cat([vk.reparameterize(mu, mu), vk.reparameterize(mu, mu)])
    assert len(set(map(tuple, z.tolist()))) == 128
    assert len(set(z.flatten().tolist())) > 2030  # 2048 float32 normals, hardly a value twice
