"""z, kl and the rate against the float64 oracle, over every pair of options and layouts."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import COVERING, DTYPES, FACTORS, check_values, combinations, problem_of
from designs import name_of

import vaekernels as vk

pytestmark = pytest.mark.shim


@pytest.mark.parametrize("case", COVERING, ids=name_of)
def test_covering_design(case, device, backend):
    check_values(problem_of(case, device))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", FACTORS["op"])
def test_every_combination(op, dtype, device, backend):
    wrong = []
    for case in combinations(op, dtype, backend):
        try:
            check_values(problem_of(case, device))
        except AssertionError as error:
            wrong.append(f"{name_of(case)}: {error}")
    assert not wrong, f"{len(wrong)} combinations, the first ones:\n" + "\n".join(wrong[:10])


SIZES = [0, 1, 3, 4, 5, 127, 128, 129, 1023, 4097, 10**6 + 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_one_row(size, dtype, device, backend):
    _check_size((1, size), dtype, device)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_one_column(size, device, backend):
    _check_size((size, 1), torch.float32, device)


@pytest.mark.parametrize(
    "shape",
    [(0, 5), (0, 2, 3, 4), (4, 0), (3, 4, 0, 5), (257, 129), (65, 3, 17, 5), (67, 513), (33, 2500)],
    ids=str,
)
def test_sizes_other_shapes(shape, device, backend):
    _check_size(shape, torch.float32, device, group_dims=1)
    _check_size(shape, torch.float32, device, group_dims=())


def _check_size(shape, dtype, device, group_dims=None):
    mu = torch.randn(shape, device=device).to(dtype)
    logvar = torch.randn(shape, device=device).to(dtype)
    rng = torch.tensor([5, 4], device=device)
    ours = vk.sample_kl(mu, logvar, free_bits=0.05, group_dims=group_dims, rng=rng)
    eps = vk.reparameterize(torch.zeros_like(mu.float()), torch.zeros_like(mu.float()), rng=rng)
    options = {"free_bits": 0.05, "group_dims": group_dims}
    exact = oracle.objective(mu.double(), logvar.double(), eps=eps.double(), **options)
    eager = oracle.objective(mu.float(), logvar.float(), eps=eps, usual=True, **options)
    accuracy = oracle.accuracy(device, dtype)
    errors = oracle.errors(mu.double(), logvar.double(), eps=eps.double(), accuracy=accuracy, **options)
    oracle.assert_accurate(ours.z, exact.z, eager.z, errors.z, what="z")
    oracle.assert_accurate(ours.kl, exact.kl, eager.kl, errors.kl, what="kl")
    oracle.assert_accurate(ours.kl_per_group, exact.rate, eager.rate, errors.rate, what="kl_per_group")


def test_an_empty_batch_gives_nan_and_sum_gives_zero(device, backend):
    for columns in (3, 0):
        mu = torch.zeros(0, columns, device=device)
        for options in ({}, {"free_bits": 1.0}, {"free_bits": 1.0, "clamp": "sample"}, {"reduction": "mean"}):
            assert vk.gaussian_kl(mu, mu, **options).isnan(), (columns, options)
            assert vk.gaussian_kl(mu, mu, **(options | {"reduction": "sum"})) == 0.0, (columns, options)
    mu = torch.zeros(0, 3, device=device)
    assert vk.gaussian_kl(mu, mu, return_per_group=True)[1].isnan().tolist() == [True] * 3
    assert vk.gaussian_kl(mu, mu, reduction="none").shape == (0,)
    assert vk.gaussian_kl(mu, mu, reduction="elementwise").shape == (0, 3)
    assert vk.reparameterize(mu, mu).shape == (0, 3)


def test_weights_that_sum_to_zero_are_an_empty_batch(device, backend):
    mu = torch.ones(2, 3, device=device)
    weight = torch.zeros(2, device=device)
    assert vk.gaussian_kl(mu, mu, weight=weight).isnan()
    assert vk.gaussian_kl(mu, mu, weight=weight, free_bits=1.0, clamp="sample").isnan()
    assert vk.gaussian_kl(mu, mu, weight=weight, reduction="sum") == 0.0


def test_a_latent_without_elements_costs_nothing(device, backend):
    mu = torch.zeros(4, 0, device=device)
    kl, rate = vk.gaussian_kl(mu, mu, return_per_group=True)
    assert kl == 0.0 and rate.shape == (0,)


@pytest.mark.parametrize(
    ("samples", "shape"),
    [
        (0, (5, 3)),
        (1, (5, 3)),
        (2, (5, 3)),
        (5, (5, 3)),
        (700, (1, 1)),
        (70, (10, 30)),
        (5, (36, 13)),
        (4, (50, 10)),
        (3, (1, 512)),
        (3, (1, 513)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_num_samples_are_the_consecutive_draws_of_one_longer_tensor(samples, shape, dtype, device, backend):
    """Sample k follows sample k-1 in the stream: K samples of [5, 3] use the normals of one [K*5, 3]."""
    mu, logvar = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)
    rng = torch.tensor([77, 12], device=device)
    z = vk.reparameterize(mu, logvar, num_samples=samples, rng=rng)
    assert z.shape == (samples, *shape)
    long = vk.reparameterize(mu.repeat(samples, 1), logvar.repeat(samples, 1), rng=rng)
    assert torch.equal(z.reshape(-1, shape[1]), long)
    drawn, kl, _ = vk.sample_kl(mu, logvar, num_samples=samples, rng=rng)
    assert torch.equal(z, drawn)
    assert torch.equal(kl, vk.gaussian_kl(mu, logvar))


# --- accuracy near collapse ---------------------------------------------------------------------------------

NEAR_COLLAPSE = [sign * 10.0**e for e in range(-6, 1) for sign in (1, -1)] + [2e-4, -3e-4, 0.03, -0.3, 0.7]


@pytest.mark.parametrize("parameterization", ["logvar", "log_std"])
@pytest.mark.parametrize("logvar", NEAR_COLLAPSE)
def test_relative_error_near_collapse(logvar, parameterization, device, backend):
    second = (
        oracle.second_of(torch.full((1, 1), logvar, dtype=torch.float64), parameterization).float().to(device)
    )
    exact = oracle.objective(
        torch.zeros_like(second).double(), second.double(), parameterization=parameterization
    )
    kl = vk.gaussian_kl(torch.zeros_like(second), second, parameterization=parameterization)
    assert exact.kl > 0
    assert abs(float(kl) / float(exact.kl) - 1) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relative_error_of_small_means_and_variances(dtype, device, backend):
    scale = 10.0 ** torch.linspace(-6, 0, 200)
    if dtype == torch.float16:
        scale = scale.clamp(min=1e-4)
    mu, logvar = (scale * torch.randn(200)).to(device, dtype), (scale * torch.randn(200)).to(device, dtype)
    exact = oracle.objective(mu.double(), logvar.double(), batch_dims=0, reduction="elementwise").kl
    ours = vk.gaussian_kl(mu, logvar, batch_dims=0, reduction="elementwise").double()
    keep = logvar.abs().double() >= 1e-6
    assert ((ours / exact - 1).abs()[keep] <= 1e-5).all()


def test_relative_error_of_the_gradient_near_collapse(device, backend):
    """d KL / d logvar = (exp(logvar) - 1) / 2 keeps its digits too."""
    logvar = torch.tensor([NEAR_COLLAPSE], device=device, requires_grad=True)
    vk.gaussian_kl(torch.zeros_like(logvar), logvar).backward()
    exact = torch.expm1(logvar.detach().double()) / 2
    assert ((logvar.grad.double() / exact - 1).abs() <= 1e-5).all()


def test_posterior_equal_to_a_learned_prior_has_no_kl(device, backend):
    mu, logvar = torch.randn(8, 5, device=device), torch.randn(8, 5, device=device)
    assert vk.gaussian_kl(mu, logvar, mu.clone(), logvar.clone()) == 0.0


# --- the ends of the range ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"free_bits": 0.5}, {"free_bits": 0.5, "clamp": "sample"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["mu", "logvar"])
def test_nan_and_inf_come_out(which, value, options, device, backend):
    tensors = {"mu": torch.zeros(2, 3, device=device), "logvar": torch.zeros(2, 3, device=device)}
    tensors[which][1, 1] = value
    leaves = [t.requires_grad_() for t in tensors.values()]
    rng = torch.tensor([1, 0], device=device)
    z, kl, rate = vk.sample_kl(*leaves, rng=rng, **options)
    eps = vk.reparameterize(torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device), rng=rng)
    eager_z = leaves[0] + torch.exp(0.5 * leaves[1]) * eps
    assert torch.equal(z.isnan(), eager_z.isnan())
    assert torch.equal(z.isinf(), eager_z.isinf())
    expected = float("nan") if value != value else float("inf")
    assert str(kl.item()) == str(expected)
    assert str(rate[1].item()) == str(expected)
    assert rate[0] == 0 and rate[2] == 0
    (kl + z.sum() * 0).backward()
    bad = leaves[("mu", "logvar").index(which)].grad[1, 1]
    assert not torch.isfinite(bad) or value == float("-inf")


def test_a_floor_never_hides_a_nan(device, backend):
    mu = torch.zeros(4, 3, device=device)
    mu[2, 0] = float("nan")
    zero = torch.zeros_like(mu)
    for clamp in ("batch", "sample"):
        for penalty in ("floor", "hinge", "mask"):
            kl = vk.gaussian_kl(mu, zero, free_bits=100.0, clamp=clamp, penalty=penalty)
            assert kl.isnan(), (clamp, penalty)
            if clamp == "sample":
                rows = vk.gaussian_kl(
                    mu, zero, free_bits=100.0, clamp=clamp, penalty=penalty, reduction="none"
                )
                assert rows.isnan().tolist() == [False, False, True, False]


def test_a_weight_of_zero_times_a_nan_is_nan(device, backend):
    mu = torch.zeros(2, 3, device=device)
    mu[0, 0] = float("nan")
    kl = vk.gaussian_kl(mu, torch.zeros_like(mu), weight=torch.tensor([0.0, 1.0], device=device))
    assert kl.isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_inf_before_the_true_value_is_near_overflow(dtype, device, backend):
    """KL in the compute dtype: finite where the true value is below a quarter of the largest number."""
    limit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max / 4
    top = torch.finfo(dtype).max
    log_limit = float(torch.tensor(limit, dtype=torch.float64).log())
    mus = [0.0, 1.0, -1e4, min(top, (2 * limit) ** 0.5 * 0.99)]
    logvars = [0.0, 11.5, 20.0, -60.0, -1e4, min(log_limit, top), min(log_limit + 0.6, top)]
    cells = [(m, v) for m in mus for v in logvars]
    mu = torch.tensor([c[0] for c in cells], dtype=torch.float64).to(device, dtype)
    logvar = torch.tensor([c[1] for c in cells], dtype=torch.float64).to(device, dtype)
    exact = oracle.objective(mu.double(), logvar.double(), batch_dims=0, reduction="elementwise").kl
    below = exact < limit
    assert below.sum() >= 16
    ours = vk.gaussian_kl(mu, logvar, batch_dims=0, reduction="elementwise").double()
    assert torch.isfinite(ours[below]).all()
    # exp turns the rounding of its argument into a relative error of |argument| ULP, in eager as well
    tolerance = 1e-3 if dtype != torch.float64 else 1e-10
    assert ((ours / exact - 1).abs()[below & (exact > 0)] < tolerance).all()


def test_a_learned_prior_does_not_overflow_early(device, backend):
    """(mu - mp)^2 = 1e40 is beyond float32, exp(-lp) = 1e-40 brings it back: the KL is of order one."""
    mu = torch.full((1, 1), 1e20, device=device)
    lp = torch.full((1, 1), 92.1, device=device)
    kl = vk.gaussian_kl(mu, lp.clone(), torch.zeros_like(mu), lp)
    exact = oracle.objective(mu.double(), lp.double(), torch.zeros_like(mu).double(), lp.double()).kl
    assert torch.isfinite(kl) and abs(float(kl / exact) - 1) < 1e-4


def test_half_precision_computes_beyond_its_own_range(device, backend):
    """exp(20) overflows float16 (its limit is exp(11.09)), but the KL is float32."""
    logvar = torch.full((1, 1), 20.0, dtype=torch.float16, device=device)
    exact = oracle.objective(torch.zeros_like(logvar).double(), logvar.double()).kl
    kl = vk.gaussian_kl(torch.zeros_like(logvar), logvar)
    assert kl.dtype == torch.float32 and abs(float(kl / exact) - 1) < 1e-5


def test_softplus_has_no_switch_over_and_a_negative_std_is_nan(device, backend):
    raw = torch.tensor([[-80.0, -20.0, 0.0, 19.9, 20.1, 80.0]], device=device)
    rng = torch.tensor([3, 0], device=device)
    zero = torch.zeros_like(raw)
    eps = vk.reparameterize(zero, zero, rng=rng).double()
    z = vk.reparameterize(zero, raw, rng=rng, parameterization="softplus").double()
    std = torch.log1p(torch.exp(raw.double()))
    assert ((z / (std * eps) - 1).abs() < 1e-5).all()
    kl = vk.gaussian_kl(zero, raw, parameterization="softplus", reduction="elementwise").double()
    exact = 0.5 * (std**2 - 1 - 2 * std.log())
    assert ((kl - exact).abs() <= 1e-5 * exact.abs().clamp(min=1)).all()
    negative = torch.full_like(zero, -0.5)
    assert vk.gaussian_kl(zero, negative, parameterization="std").isnan()
    assert vk.reparameterize(zero, negative, parameterization="std").isnan().all()


def test_logvar_bounds_hold_in_the_value_of_both_z_and_kl(device, backend):
    logvar = torch.tensor([[-40.0, -30.0, 0.0, 20.0, 40.0]], device=device)
    zero = torch.zeros_like(logvar)
    rng = torch.tensor([3, 0], device=device)
    bounded = vk.sample_kl(zero, logvar, rng=rng, logvar_bounds=(-30.0, 20.0))
    by_hand = vk.sample_kl(zero, logvar.clamp(-30.0, 20.0), rng=rng)
    assert torch.equal(bounded.z, by_hand.z)
    assert bounded.kl == by_hand.kl
