"""The aggregate posterior: values and gradients against dense float64 code, known truths, special values."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vaekernels as vk
from vaekernels import _native, reference

NAN, INF = math.nan, math.inf


# --- the oracle: every density of every pair, in the dtype of what it is given ------------------------------


def log_variance(s: Tensor, parameterization: str, bounds: tuple[float, float] | None) -> Tensor:
    held = {
        "logvar": lambda: s,
        "log_std": lambda: 2 * s,
        "std": lambda: 2 * torch.log(s),
        "softplus": lambda: 2 * torch.log(torch.nn.functional.softplus(s)),
    }[parameterization]()
    return held if bounds is None else held.clamp(*bounds)


def weights(n: int, m: int, log_weight=None, leave_one_out: bool = False) -> Tensor:
    """The log-weights [n, m], from Chen et al. 2018 (appendix C), in their words: M = m - 1."""
    if leave_one_out:
        lw = torch.full((n, m), -math.log(m - 1), dtype=torch.float64)
        return lw.fill_diagonal_(-INF)
    if isinstance(log_weight, tuple):
        N, M = log_weight[1], m - 1
        w = torch.full((n, m), 1 / M, dtype=torch.float64)
        for i in range(n):
            w[i, i] = 1 / N
            w[i, (i + 1) % m] = (N - M) / (N * M)
        return w.log()
    return torch.full((n, m), -math.log(m * (log_weight or 1)), dtype=torch.float64)


def dense(z, mu, logvar, parameterization="logvar", logvar_bounds=None, per_dim=True, **weighting):
    lv = log_variance(logvar, parameterization, logvar_bounds)
    t = -0.5 * ((z[:, None] - mu) ** 2 * torch.exp(-lv) + lv + math.log(2 * math.pi))
    lw = weights(len(z), len(mu), **weighting).to(z.dtype).to(z.device)
    log_qz = torch.logsumexp(t.sum(2) + lw, 1)
    return log_qz, torch.logsumexp(t + lw[:, :, None], 1) if per_dim else log_qz.new_empty(0)


class Found(NamedTuple):
    values: list[Tensor]
    grads: list[Tensor]


def evaluate(function, tensors, upstream, **options) -> Found:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = [t for t in function(*leaves, **options) if t.numel() or not len(leaves[0])]
    used = [(o, g.to(o.dtype)) for o, g in zip(out, upstream, strict=False) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used])
    return Found([o.detach() for o in out], list(grads))


def problem(n: int, m: int, d: int, *, seed: int = 0, spread: float = 1.0, device: str = "cpu"):
    """z, mu, logvar, and gradients of both results, in float64; sample i is drawn from posterior i mod m."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    mu, logvar = normal(m, d), normal(m, d) * spread - 1
    near = mu[torch.arange(n) % m] + torch.exp(0.5 * logvar[torch.arange(n) % m]) * normal(n, d)
    upstream = [normal(n) / n, normal(n, d) / n]
    return [t.to(device) for t in (near, mu, logvar)], [t.to(device) for t in upstream]


def close(
    got: Tensor, expected: Tensor, usual: Tensor, what: str, floor: float = 4e-6, terms: Tensor | None = None
) -> None:
    """As near to the truth as twice what the usual code is, or `floor` of the largest number. Numbers that
    are sums of `terms` are compared with the largest of these too."""
    got, usual = got.double().cpu(), usual.double().cpu()
    expected = expected.cpu()
    scale = max(t.abs().max().cpu().clamp(min=1e-30) for t in (expected, terms) if t is not None)
    error, allowed = (got - expected).abs().max(), 2 * (usual - expected).abs().max() + floor * scale
    assert error <= allowed, f"{what}: off by {error:.3g} of {scale:.3g}, allowed are {allowed:.3g}"


def check(function, tensors, upstream, dtype=torch.float32, **options) -> Found:
    given = [t.to(dtype) for t in tensors]
    exact = evaluate(dense, [t.double() for t in given], upstream, **options)
    usual = evaluate(dense, [t.float() if dtype != torch.float64 else t for t in given], upstream, **options)
    got = evaluate(function, given, upstream, **options)
    for value, truth, name in zip(got.values, exact.values, ("log_qz", "log_qz_dims"), strict=False):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        error = (value.double() - truth).abs() - 1e-5 * truth.abs()
        assert error.max() <= 1e-5, f"{name} is off by {error.max():.3g} beyond 1e-5 of it"
    eps = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for name, grad, truth, other in zip(
        ("z", "mu", "logvar"), got.grads, exact.grads, usual.grads, strict=True
    ):
        assert grad.dtype == dtype
        # What goes to the means adds up to z's gradient, and may cancel: 27 parts of 0.08 made 0.004.
        terms = exact.grads[1] if name == "z" else None
        close(grad, truth, other, f"the gradient of {name}", eps, terms)
    return got


# --- values and gradients -----------------------------------------------------------------------------------

# (N, M, D): each size of each axis, with large ones of the others where the oracle's memory allows it.
SHAPES = [
    (1, 1, 1), (1, 2, 3), (2, 1, 16), (2, 2, 1000), (31, 31, 3), (31, 257, 16), (257, 31, 128), (257, 257, 1),
    (31, 2, 1000), (2, 31, 1000), (1, 4096, 16), (4096, 1, 16), (4096, 31, 3), (31, 4096, 3), (257, 257, 16),
    (130, 140, 33),
]  # fmt: skip


@pytest.mark.shim
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, backend, device):
    if backend == "shim":
        shape = tuple(min(size, 1030) for size in shape)  # 4096 rows take half a minute there
    tensors, upstream = problem(*shape, device=device)
    check(vk.log_aggregate_posterior, tensors, upstream)


@pytest.mark.slow
def test_values_and_gradients_of_thousands(backend, device):
    tensors, upstream = problem(4096, 4096, 3, device=device)
    check(vk.log_aggregate_posterior, tensors, upstream)


@pytest.mark.shim
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 150, 5), (19, 31, 70)], ids=str)
def test_dtypes(shape, dtype, backend, device):
    tensors, upstream = problem(*shape, device=device)
    check(vk.log_aggregate_posterior, tensors, upstream, dtype)


WEIGHTS = {
    "uniform": {},
    "minibatch": {"log_weight": 1000},
    "stratified": {"log_weight": ("stratified", 1000)},
    "leave_one_out": {"leave_one_out": True},
}


@pytest.mark.shim
@pytest.mark.parametrize("per_dim", [True, False])
@pytest.mark.parametrize("n", [2, 31, 257])
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_weights(weighting, n, per_dim, backend, device):
    tensors, upstream = problem(n, n, 5, device=device)
    check(vk.log_aggregate_posterior, tensors, upstream, per_dim=per_dim, **WEIGHTS[weighting])


def test_weights_of_a_batch_that_is_the_data_set():
    lw = weights(6, 6, ("stratified", 6))
    torch.testing.assert_close(lw.exp().sum(1), torch.ones(6, dtype=torch.float64))


@pytest.mark.shim
@pytest.mark.parametrize("bounds", [None, (-1.5, 0.5)])
@pytest.mark.parametrize("parameterization", ["log_std", "std", "softplus"])
def test_parameterizations(parameterization, bounds, backend, device):
    (z, mu, s), upstream = problem(33, 40, 6, device=device)
    s = s.abs() + 0.1 if parameterization == "std" else s
    options = {"parameterization": parameterization, "logvar_bounds": bounds}
    check(vk.log_aggregate_posterior, (z, mu, s), upstream, **options)


@pytest.mark.shim
def test_bounds_are_where_the_gradient_ends(backend, device):
    lv = torch.tensor([[-3.0], [-2.0], [0.0], [1.0], [2.0]], device=device, requires_grad=True)
    z = torch.zeros(2, 1, device=device)
    out, _ = vk.log_aggregate_posterior(
        z, torch.full((5, 1), 2.0, device=device), lv, logvar_bounds=(-2.0, 1.0)
    )
    (grad,) = torch.autograd.grad(out.sum(), lv)
    assert [bool(g) for g in grad[:, 0]] == [False, True, True, True, False]


@pytest.mark.shim
@pytest.mark.parametrize("used", [0, 1])
def test_the_gradient_of_one_result_alone(used, backend, device):
    tensors, upstream = problem(20, 150, 7, device=device)
    leaves = [t.float().requires_grad_() for t in tensors]
    got = torch.autograd.grad(vk.log_aggregate_posterior(*leaves)[used], leaves, upstream[used].float())
    doubles = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(dense(*doubles)[used], doubles, upstream[used])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.shim
def test_without_single_dimensions_there_are_none(backend, device):
    (z, mu, logvar), _ = problem(5, 7, 3, device=device)
    both = vk.log_aggregate_posterior(z, mu, logvar)
    whole = vk.log_aggregate_posterior(z, mu, logvar, per_dim=False)
    torch.testing.assert_close(whole[0], both[0])
    assert whole[1].shape == (0,) and both[1].shape == (5, 3)


# --- special values -----------------------------------------------------------------------------------------


@pytest.mark.shim
@pytest.mark.parametrize("logvar", [-60.0, -30.0, -10.0, 0.0, 10.0, 20.0])
def test_a_sample_on_a_mean(logvar, backend, device):
    (_, mu, lv), upstream = problem(31, 31, 3, device=device)
    mu = mu.float().double()  # so that the difference is 0 in float32 too
    check(vk.log_aggregate_posterior, (mu, mu, torch.full_like(lv, logvar)), upstream)


@pytest.mark.shim
def test_log_variances_from_small_to_large(backend, device):
    (z, mu, lv), upstream = problem(40, 40, 4, device=device)
    lv = torch.linspace(-30, 20, lv.numel(), dtype=torch.float64, device=device).view_as(lv)
    noise = (z - mu).clamp(-3, 3)
    mu = mu.float().double()
    check(vk.log_aggregate_posterior, (mu + torch.exp(0.5 * lv) * noise, mu, lv), upstream, torch.float64)
    got = vk.log_aggregate_posterior(mu.float(), mu.float(), lv.float())
    for a, b in zip(got, dense(mu, mu, lv.float().double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.shim
def test_all_far_apart(backend, device):
    """Every pair but the own one underflows, or all do; the gradients are finite."""
    far = torch.arange(20.0, device=device)[:, None] * 1e6
    for shift in (0.0, 3e5, 1e15):
        z, mu, lv = (far + shift, far, torch.zeros_like(far))
        leaves = [t.clone().requires_grad_() for t in (z, mu, lv)]
        log_qz, dims = vk.log_aggregate_posterior(*leaves)
        expected, _ = dense(z.double(), mu.double(), lv.double())
        torch.testing.assert_close(log_qz.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(log_qz, dims[:, 0])
        (log_qz.sum() + dims.sum()).backward()
        assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.shim
def test_densities_that_overflow_are_minus_infinity_and_give_no_gradient(backend, device):
    z = torch.full((3, 2), 1e30, device=device, requires_grad=True)
    mu = torch.zeros(5, 2, device=device, requires_grad=True)
    log_qz, dims = vk.log_aggregate_posterior(z, mu, torch.zeros(5, 2, device=device))
    assert (log_qz == -INF).all() and (dims == -INF).all()
    if backend != "reference":  # where logsumexp has the gradient NaN
        grads = torch.autograd.grad(log_qz.sum() + dims.sum(), (z, mu))
        assert all((g == 0).all() for g in grads)


@pytest.mark.shim
def test_one_outlier_does_not_lose_the_others(backend, device):
    (z, mu, lv), upstream = problem(300, 300, 2, device=device)
    z[7] = 1e12
    mu[150] = -1e9
    got = evaluate(vk.log_aggregate_posterior, [t.float() for t in (z, mu, lv)], upstream)
    exact = evaluate(dense, [t.float().double() for t in (z, mu, lv)], upstream)
    rest = torch.arange(300, device=device) != 7
    for a, b in zip(got.values, exact.values, strict=True):
        torch.testing.assert_close(a[rest].double(), b[rest], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.grads[0][rest].double(), exact.grads[0][rest], rtol=1e-4, atol=1e-6)


@pytest.mark.shim
def test_nan_shows(backend, device):
    (z, mu, lv), _ = problem(6, 200, 3, device=device)
    mu[150, 1] = NAN
    log_qz, dims = vk.log_aggregate_posterior(z, mu, lv)
    assert log_qz.isnan().all() and dims[:, 1].isnan().all() and not dims[:, ::2].isnan().any()
    mu[150, 1], z[2, 0] = 0.0, NAN
    log_qz, dims = vk.log_aggregate_posterior(z, mu, lv)
    assert log_qz.isnan().tolist() == [False, False, True, False, False, False]
    assert dims.isnan().nonzero().tolist() == [[2, 0]]
    log_qz, _ = vk.log_aggregate_posterior(z[:2], mu, torch.full_like(lv, -1.0), parameterization="std")
    assert log_qz.isnan().all()


@pytest.mark.shim
def test_a_posterior_that_is_left_out_may_be_anything(backend, device):
    (z, mu, lv), _ = problem(4, 4, 2, device=device)
    expected, _ = vk.log_aggregate_posterior(z[:1], mu[1:], lv[1:])
    mu[0] = NAN
    log_qz, _ = vk.log_aggregate_posterior(z, mu, lv, leave_one_out=True)
    torch.testing.assert_close(log_qz[:1], expected)
    assert log_qz[1:].isnan().all()


@pytest.mark.shim
def test_nothing(backend, device):
    z, mu = torch.zeros(0, 3, device=device, requires_grad=True), torch.ones(4, 3, device=device)
    log_qz, dims = vk.log_aggregate_posterior(z, mu, mu)
    assert log_qz.shape == (0,) and dims.shape == (0, 3)
    (log_qz.sum() + dims.sum()).backward()
    assert z.grad.shape == (0, 3)
    no_dims = torch.zeros(4, 0, device=device)
    log_qz, dims = vk.log_aggregate_posterior(no_dims, no_dims, no_dims)
    torch.testing.assert_close(log_qz, torch.zeros(4, device=device), rtol=0, atol=1e-6)
    assert dims.shape == (4, 0)


@pytest.mark.shim
def test_tensors_that_are_not_contiguous(backend, device):
    (z, mu, lv), upstream = problem(12, 20, 6, device=device)
    strided = [t.float().t().contiguous().t() for t in (z, mu, lv)]
    got = evaluate(vk.log_aggregate_posterior, strided, upstream)
    same = evaluate(vk.log_aggregate_posterior, [t.contiguous() for t in strided], upstream)
    for a, b in zip(got.values + got.grads, same.values + same.grads, strict=True):
        torch.testing.assert_close(a, b)
    expanded = torch.zeros(1, 6, device=device).expand(20, 6)
    vk.log_aggregate_posterior(strided[0], expanded, expanded)


# --- results depend on the arguments alone ------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_threads(kernels):
    tensors, upstream = problem(300, 700, 40)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(evaluate(vk.log_aggregate_posterior, [t.float() for t in tensors], upstream))
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert all(
            torch.equal(a, b)
            for a, b in zip(found[0].values + found[0].grads, other.values + other.grads, strict=True)
        )


@pytest.mark.shim
def test_a_sample_does_not_depend_on_the_others(backend, device):
    (z, mu, lv), _ = problem(70, 200, 5, device=device)
    z, mu, lv = z.float(), mu.float(), lv.float()
    whole = vk.log_aggregate_posterior(z, mu, lv)
    alone = vk.log_aggregate_posterior(z[65:66], mu, lv)
    if backend != "reference":
        assert torch.equal(whole[0][65:66], alone[0]) and torch.equal(whole[1][65:66], alone[1])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**20), st.floats(0, 4))
@example(1, 27, 1, 13731, 0.5)
def test_any_shape(n, m, d, seed, spread):
    tensors, upstream = problem(n, m, d, seed=seed, spread=spread)
    check(vk.log_aggregate_posterior, tensors, upstream)


# --- derivatives of derivatives -----------------------------------------------------------------------------


@pytest.mark.shim
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_gradcheck(weighting, backend, device):
    (z, mu, lv), _ = problem(4, 4, 2, device=device)
    leaves = [t.clone().requires_grad_() for t in (z, mu, lv)]
    for per_dim in (True, False):

        def function(*a, per_dim=per_dim):
            out = vk.log_aggregate_posterior(*a, per_dim=per_dim, **WEIGHTS[weighting])
            return out if per_dim else out[0]

        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


def test_torch_func():
    (z, mu, lv), _ = problem(5, 6, 3)
    jacobian = torch.func.jacrev(lambda m: vk.log_aggregate_posterior(z, m, lv)[0])(mu)
    forward = torch.func.jacfwd(lambda m: vk.log_aggregate_posterior(z, m, lv)[0])(mu)
    expected = torch.autograd.functional.jacobian(lambda m: dense(z, m, lv)[0], mu)
    torch.testing.assert_close(jacobian, expected)
    torch.testing.assert_close(forward, expected)
    each = torch.func.vmap(lambda z: vk.log_aggregate_posterior(z, mu, lv)[0])(torch.stack([z, z + 1]))
    torch.testing.assert_close(each[1], dense(z + 1, mu, lv)[0])


def test_the_reference_in_chunks_is_the_reference(monkeypatch):
    tensors, upstream = problem(20, 30, 4)
    whole = evaluate(lambda *a, **o: reference.aggregate(*a, **o)[:2], tensors, upstream, leave_one_out=False)
    monkeypatch.setattr(reference, "PAIRS", 30 * 4 * 3)
    parts = evaluate(lambda *a, **o: reference.aggregate(*a, **o)[:2], tensors, upstream, leave_one_out=False)
    for a, b in zip(whole.values + whole.grads, parts.values + parts.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    leaves = [t[:8].clone().requires_grad_() for t in tensors]
    monkeypatch.setattr(reference, "PAIRS", 8 * 4 * 3)
    options = {"log_weight": "stratified", "examples": 50}
    assert torch.autograd.gradgradcheck(lambda *a: reference.aggregate(*a, **options)[0], leaves)


# --- errors -------------------------------------------------------------------------------------------------

TWO = torch.zeros(2, 3)
BAD = {
    "z_list": ({"z": [1.0]}, TypeError, "z must be a torch.Tensor, got list"),
    "z_integer": (
        {"z": TWO.long()},
        TypeError,
        "z must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "z_dtype": ({"z": TWO.double()}, TypeError, "z and mu must have one dtype, got torch.float64 and"),
    "z_device": ({"z": TWO.to("meta")}, ValueError, "z and mu must be on one device, got meta and cpu; move"),
    "z_dims": (
        {"z": torch.zeros(2, 4)},
        ValueError,
        r"dimensions of mu, whose shape is \[2, 3\], got \[2, 4\]",
    ),
    "z_vector": ({"z": torch.zeros(3)}, ValueError, r"z must be \[samples, dimensions\] .* got \[3\]"),
    "shapes": ({"mu": torch.zeros(3, 3)}, ValueError, r"mu and logvar must have one shape, got \[3, 3\] and"),
    "images": (
        {"mu": torch.zeros(2, 3, 1), "logvar": torch.zeros(2, 3, 1)},
        ValueError,
        r"mu must be \[posteriors, dimensions\], got shape \[2, 3, 1\]; flatten",
    ),
    "no_posterior": (
        {"mu": torch.zeros(0, 3), "logvar": torch.zeros(0, 3)},
        ValueError,
        r"mu must have at least one posterior, got shape \[0, 3\]",
    ),
    "bounds": ({"logvar_bounds": (1, 0)}, ValueError, r"logvar_bounds must be \(lo, hi\) with lo <= hi, got"),
    "parameterization": ({"parameterization": "var"}, ValueError, "parameterization must be one of 'logvar'"),
    "stratified_alone": (
        {"log_weight": "stratified"},
        TypeError,
        r"number of examples of the data set, or \('stratified', that number\), got 'stratified'",
    ),
    "float_examples": ({"log_weight": 10.0}, TypeError, "log_weight must be None, the number .* got 10.0"),
    "no_examples": ({"log_weight": 0}, ValueError, "log_weight must have at least 1 example, got 0"),
    "few_examples": ({"log_weight": ("stratified", 1)}, ValueError, "at least as many examples .* 2, got 1"),
    "both": (
        {"log_weight": 5, "leave_one_out": True},
        ValueError,
        "leave_one_out must be False with log_weight",
    ),
    "left_out_of_one": (
        {"z": TWO[:1], "mu": TWO[:1], "logvar": TWO[:1], "leave_one_out": True},
        ValueError,
        r"leave_one_out needs at least two posteriors, got mu of shape \[1, 3\]",
    ),
    "own_posterior": (
        {"z": TWO[:1], "leave_one_out": True},
        ValueError,
        "leave_one_out needs the posterior of each row of z, got 1 samples and 2 posteriors",
    ),
    "own_stratum": (
        {"z": TWO[:1], "log_weight": ("stratified", 9)},
        ValueError,
        "log_weight='stratified' needs the posterior of each row of z",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name, backend):
    changed, error, message = BAD[name]
    given = {"z": TWO, "mu": TWO, "logvar": TWO} | changed
    with pytest.raises(error, match=message):
        vk.log_aggregate_posterior(given.pop("z"), given.pop("mu"), given.pop("logvar"), **given)


OPERATOR_BAD = {
    "z_dtype": ({"z": TWO.double()}, TypeError, "z and mu must have one dtype"),
    "z_integer": ({"z": TWO.long()}, TypeError, "z must be float32"),
    "z_device": ({"z": TWO.to("meta")}, ValueError, "z and mu must be on one device"),
    "z_dims": (
        {"z": torch.zeros(2, 4)},
        ValueError,
        r"dimensions of mu, whose shape is \[2, 3\], got \[2, 4\]",
    ),
    "images": (
        {"mu": torch.zeros(2, 3, 1), "logvar": torch.zeros(2, 3, 1)},
        ValueError,
        r"mu must be \[posteriors, dimensions\], got shape \[2, 3, 1\]; flatten",
    ),
    "no_posterior": ({"mu": TWO[:0], "logvar": TWO[:0]}, ValueError, "mu must have at least one posterior"),
    "bounds": ({"logvar_bounds": [1.0, 0.0]}, ValueError, "logvar_bounds must be"),
    "parameterization": ({"parameterization": "var"}, ValueError, "parameterization must be one of"),
    "log_weight": (
        {"log_weight": "mws"},
        ValueError,
        "log_weight must be one of 'uniform', 'minibatch', 'strat",
    ),
    "examples": ({"log_weight": "minibatch"}, ValueError, "log_weight must have at least 1 example, got 0"),
    "few": ({"log_weight": "stratified", "examples": 1}, ValueError, "at least as many examples .* 2, got 1"),
    "both": (
        {"log_weight": "minibatch", "examples": 5, "leave_one_out": True},
        ValueError,
        "leave_one_out must be False with log_weight",
    ),
    "one": (
        {"z": TWO[:1], "mu": TWO[:1], "logvar": TWO[:1], "leave_one_out": True},
        ValueError,
        "leave_one_out needs at least two posteriors",
    ),
    "behind": (
        {"leave_one_out": True, "first": 1},
        ValueError,
        "got 2 samples from number 1 on and 2 posteriors",
    ),
    "before": (
        {"leave_one_out": True, "first": -1},
        ValueError,
        "got 2 samples from number -1 on and 2 post",
    ),
}


@pytest.mark.parametrize("name", OPERATOR_BAD)
def test_the_operators_refuse_what_does_not_fit(name, kernels):
    changed, error, message = OPERATOR_BAD[name]
    for device in ("cpu", "meta"):
        given = {"z": TWO, "mu": TWO, "logvar": TWO} | changed
        tensors = [given.pop(k) for k in ("z", "mu", "logvar")]
        if device == "meta" and name != "z_device":
            tensors = [t.to(device) for t in tensors]
        with pytest.raises(error, match=message):
            torch.ops.vaekernels.aggregate(*tensors, **given)
        saved = torch.zeros(2, 2, 4, device=device)
        with pytest.raises(error, match=message):
            torch.ops.vaekernels.aggregate_backward(None, None, *tensors, saved, **given)
        with pytest.raises(error, match=message):
            torch.ops.vaekernels.aggregate_backward_reference(None, None, *tensors, saved, **given)


@pytest.mark.parametrize("place", range(3))
def test_none_for_a_tensor_is_refused(place, kernels):
    """The dispatcher takes None for an undefined tensor."""
    tensors = [None if i == place else TWO for i in range(3)]
    for operator in (
        lambda: torch.ops.vaekernels.aggregate(*tensors),
        lambda: torch.ops.vaekernels.aggregate_backward(None, None, *tensors, torch.zeros(2, 2, 4)),
        lambda: torch.ops.vaekernels.aggregate_backward_reference(None, None, *tensors, TWO),
    ):
        with pytest.raises(TypeError, match=f"{('z', 'mu', 'logvar')[place]} must be"):
            operator()


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_backward_refuses_what_does_not_fit(kind, kernels):
    two = TWO.to(kind)
    saved, qz, dims = (torch.zeros(s, device=kind) for s in ((2, 2, 4), (2,), (2, 3)))
    operator = torch.ops.vaekernels.aggregate_backward
    assert all(g.shape == (2, 3) for g in operator(qz, dims, two, two, two, saved))
    for bad, error in (
        ((qz[:1], dims, two, two, two, saved), "grad_qz must be of the shape of log_qz"),
        ((qz, dims[:1], two, two, two, saved), "grad_dims must be of the shape of log_qz_dims"),
        ((qz, dims, two, two, two, saved[:, :, :3]), "saved must be two numbers for each sum"),
    ):
        with pytest.raises(ValueError, match=error):
            operator(*bad)
    with pytest.raises(TypeError, match="grad_qz must be of dtype"):
        operator(qz.double(), dims, two, two, two, saved)
    with pytest.raises(ValueError, match="grad_dims must be None without per_dim"):
        operator(qz, dims, two, two, two, saved[:, :, :1], per_dim=False)


# --- known truths -------------------------------------------------------------------------------------------


@pytest.mark.shim
def test_a_gaussian_linear_encoder(backend, device):
    """x ~ N(0, 1), z | x ~ N(a x, s^2): q(z) = N(0, a^2 + s^2), I = log(1 + a^2 / s^2) / 2."""
    a, s, n = 2.0, 0.5, 4000 if backend != "shim" else 1000
    draw = torch.Generator().manual_seed(3)
    x, eps = (torch.randn(n, 1, generator=draw, dtype=torch.float64).to(device) for _ in range(2))
    mu, logvar = a * x, torch.full_like(x, 2 * math.log(s))
    log_qz, dims = vk.log_aggregate_posterior(mu + s * eps, mu, logvar)
    truth = torch.distributions.Normal(0.0, math.hypot(a, s)).log_prob(mu + s * eps)[:, 0]
    torch.testing.assert_close(log_qz, dims[:, 0])
    assert (log_qz - truth).mean().abs() < 0.02 and (log_qz - truth).abs().median() < 0.1
    found = vk.mutual_information(mu + s * eps, mu, logvar).item()
    assert found == pytest.approx(0.5 * math.log(1 + a * a / s / s), abs=0.03)


@pytest.mark.shim
def test_clusters_and_copies(backend, device):
    """k clusters that are far apart carry log k nats; a posterior that is the same for all carries none."""
    for k in (2, 4):
        mu = (torch.arange(64.0, device=device)[:, None] % k) * 1000
        found = vk.mutual_information(mu + 0.5, mu, torch.zeros_like(mu)).item()
        assert found == pytest.approx(math.log(k), abs=1e-5)
    copied = torch.full((64, 3), 0.3, device=device)
    z = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).to(device)
    parts = vk.kl_decomposition(z, copied, copied)
    assert parts.mutual_information.item() == pytest.approx(0, abs=2e-6)
    assert parts.total_correlation.item() == pytest.approx(0, abs=2e-6)


@pytest.mark.shim
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_the_parts_add_up_to_the_kl_of_the_samples(weighting, backend, device):
    (z, mu, lv), _ = problem(60, 60, 4, device=device)
    parts = vk.kl_decomposition(z, mu, lv, **WEIGHTS[weighting])
    normal = torch.distributions.Normal
    of_samples = normal(mu, torch.exp(0.5 * lv)).log_prob(z) - normal(0.0, 1.0).log_prob(z)
    assert sum(parts).item() == pytest.approx(of_samples.sum(1).mean().item(), rel=1e-12)
    same = vk.mutual_information(z, mu, lv, **WEIGHTS[weighting])
    torch.testing.assert_close(parts.mutual_information, same)


@pytest.mark.shim
def test_the_parts_are_what_their_formulas_say(backend, device):
    (z, mu, lv), _ = problem(50, 50, 3, device=device)
    leaves = [t.clone().requires_grad_() for t in (z, mu, lv)]
    parts = vk.kl_decomposition(*leaves)
    doubles = [t.clone().requires_grad_() for t in (z, mu, lv)]
    log_qz, dims = dense(*doubles)
    normal = torch.distributions.Normal
    log_qzx = normal(doubles[1], torch.exp(0.5 * doubles[2])).log_prob(doubles[0]).sum(1)
    log_pz = normal(0.0, 1.0).log_prob(doubles[0]).sum(1)
    expected = ((log_qzx - log_qz).mean(), (log_qz - dims.sum(1)).mean(), (dims.sum(1) - log_pz).mean())
    for got, truth in zip(parts, expected, strict=True):
        torch.testing.assert_close(got, truth)
    weights_of_loss = (1.0, 6.0, 1.0)
    got = torch.autograd.grad(sum(w * p for w, p in zip(weights_of_loss, parts, strict=True)), leaves)
    truth = torch.autograd.grad(sum(w * p for w, p in zip(weights_of_loss, expected, strict=True)), doubles)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_the_decomposition_of_independent_dimensions_has_no_total_correlation():
    draw = torch.Generator().manual_seed(1)
    mu = torch.randn(3000, 2, generator=draw)
    z = mu + 0.5 * torch.randn(3000, 2, generator=draw)
    parts = vk.kl_decomposition(z, mu, torch.full_like(mu, 2 * math.log(0.5)))
    assert abs(parts.total_correlation.item()) < 0.05
    assert parts.mutual_information.item() == pytest.approx(2 * 0.5 * math.log(1 + 4), abs=0.06)


def test_bounds_from_both_sides():
    """With its own posterior the estimate is a lower bound of I, at most log M; without it, an upper one."""
    draw = torch.Generator().manual_seed(2)
    mu = 3 * torch.randn(64, 4, generator=draw)
    z = mu + 0.3 * torch.randn(64, 4, generator=draw)
    logvar = torch.full_like(mu, 2 * math.log(0.3))
    truth = 4 * 0.5 * math.log(1 + 9 / 0.09)
    lower = vk.mutual_information(z, mu, logvar).item()
    upper = vk.mutual_information(z, mu, logvar, leave_one_out=True).item()
    assert lower <= math.log(64) + 1e-5 and lower < truth < upper


def test_mutual_information_wants_its_own_samples():
    with pytest.raises(
        ValueError, match=r"log q\(z\|x\) needs the posterior of each row of z, got 2 samples and 3"
    ):
        vk.mutual_information(torch.zeros(2, 1), torch.zeros(3, 1), torch.zeros(3, 1))


def test_memory_does_not_grow_with_the_pairs(kernels):
    """16,384 x 16,384 x 2 densities would be 2 GiB."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    z = torch.randn(16384, 2, requires_grad=True)
    log_qz, _ = vk.log_aggregate_posterior(z, z.detach(), torch.zeros_like(z), per_dim=False)
    log_qz.mean().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert _native.has_kernels("cpu")
