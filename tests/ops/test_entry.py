"""The compiled entry keeps what was checked: same numbers, gradients and errors, and no second check."""

from __future__ import annotations

import pytest
import torch
from conftest import require_kernels

import vaekernels as vk
from vaekernels import _dispatch, _native, ops

CALLS = {
    "reparameterize": lambda mu, lv: [vk.reparameterize(mu, lv)],
    "gaussian_kl": lambda mu, lv: [vk.gaussian_kl(mu, lv, free_bits=0.3)],
    "gaussian_kl per group": lambda mu, lv: list(vk.gaussian_kl(mu, lv, return_per_group=True)),
    "sample_kl": lambda mu, lv: list(vk.sample_kl(mu, lv, free_bits=0.3)),
    "reparameterize_packed": lambda mu, lv: [vk.reparameterize_packed(torch.cat([mu, lv], 1))],
    "gaussian_kl_packed": lambda mu, lv: [vk.gaussian_kl_packed(torch.cat([mu, lv], -1), -1, free_bits=0.3)],
    "sample_kl_packed": lambda mu, lv: list(vk.sample_kl_packed(torch.cat([mu, lv], 1))),
}


def run(call, dtype, device, grad):
    mu, logvar = (torch.linspace(-1, 1, 60, device=device, dtype=dtype).view(5, 12) * s for s in (1, 0.7))
    mu, logvar = (t.requires_grad_(grad) for t in (mu, logvar))
    torch.manual_seed(3)
    out = call(mu, logvar)
    gradients = torch.autograd.grad([t.sum() for t in out], [mu, logvar], allow_unused=True) if grad else []
    return [t for t in (*out, *gradients) if t is not None]


@pytest.fixture
def checks(monkeypatch):
    """The calls that were checked in Python since the entry was last emptied."""
    made = []
    check = _dispatch.check
    monkeypatch.setattr(
        _dispatch, "check", lambda *args, **options: made.append(args) or check(*args, **options)
    )
    for size in range(40, 72):  # more calls than are kept
        vk.gaussian_kl(torch.zeros(size, 2), torch.zeros(size, 2))
    made.clear()
    return made


@pytest.mark.parametrize("grad", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_kept_and_checked_calls_give_the_same_bits(name, dtype, grad, device, monkeypatch, checks):
    require_kernels(device)
    first = run(CALLS[name], dtype, device, grad)
    assert len(checks) == 1
    kept = run(CALLS[name], dtype, device, grad)
    assert len(checks) == 1
    monkeypatch.setattr(_dispatch, "entry", lambda: _dispatch.latent)
    monkeypatch.setattr(ops, "entry", lambda: _dispatch.latent)
    python = run(CALLS[name], dtype, device, grad)
    assert len(checks) == 2
    for other in (kept, python):
        assert len(first) == len(other)
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.requires_grad == b.requires_grad


T = torch.linspace(-1, 1, 12).view(3, 4)
FREE = torch.rand(4)
# Another call than `vk.gaussian_kl(T, T, free_bits=0.3)`: it is checked anew, or an error as it would be.
OTHER = {
    "another dtype": lambda: vk.gaussian_kl(T.double(), T.double(), free_bits=0.3),
    "another shape": lambda: vk.gaussian_kl(T[:2], T[:2], free_bits=0.3),
    "an option": lambda: vk.gaussian_kl(T, T, free_bits=0.3, penalty="mask"),
    "batch_dims": lambda: vk.gaussian_kl(T, T, free_bits=0.3, batch_dims=0),
    "group_dims": lambda: vk.gaussian_kl(T, T, free_bits=0.3, group_dims=()),
    "a tensor": lambda: vk.gaussian_kl(T, T, free_bits=FREE),
    "a weight": lambda: vk.gaussian_kl(T, T, free_bits=0.3, weight=FREE[:3]),
    "a prior": lambda: vk.gaussian_kl(T, T, T, T, free_bits=0.3),
    "none": lambda: vk.gaussian_kl(T, T),
    "bounds": lambda: vk.gaussian_kl(T, T, free_bits=0.3, logvar_bounds=(-1.0, 1.0)),
    "other bounds": lambda: vk.gaussian_kl(T, T, free_bits=0.3, logvar_bounds=(-1.0, 2.0)),
    "what requires grad": lambda: vk.gaussian_kl(T.clone().requires_grad_(), T, free_bits=0.3),
}
WRONG = {
    "a bool": ({"free_bits": True}, TypeError),
    "negative": ({"free_bits": -0.1}, ValueError),
    "NaN": ({"free_bits": float("nan")}, ValueError),
    "True for 1": ({"free_bits": 0.3, "batch_dims": True}, TypeError),
    "1.0 for 1": ({"free_bits": 0.3, "batch_dims": 1.0}, TypeError),
    "a group": ({"free_bits": 0.3, "group_dims": (True,)}, TypeError),
    "a constant that requires grad": ({"free_bits": FREE.clone().requires_grad_()}, ValueError),
    "a weight that requires grad": ({"weight": torch.rand(3, requires_grad=True)}, ValueError),
    "a balance": ({"balance": 2.0, "prior_mu": T, "prior_logvar": T}, ValueError),
    "a string": ({"clamp": "row"}, ValueError),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_call_is_checked_anew_and_once(name, kernels, checks):
    vk.gaussian_kl(T, T, free_bits=0.3)
    vk.gaussian_kl(T, T, free_bits=0.3, logvar_bounds=(-1.0, 1.5))
    before = len(checks)
    first = OTHER[name]()
    assert len(checks) == before + 1
    assert torch.equal(OTHER[name](), first) and len(checks) == before + 1


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_an_error_after_what_is_right(name, kernels):
    options, error = WRONG[name]
    vk.gaussian_kl(T, T, free_bits=0.3)
    vk.gaussian_kl(T, T, free_bits=FREE, group_dims=(1,))
    vk.gaussian_kl(T, T, weight=torch.rand(3))
    vk.gaussian_kl(T, T, T, T, balance=0.5)
    for _ in range(2):
        with pytest.raises(error) as first:
            vk.gaussian_kl(T, T, **options)
        with pytest.raises(error) as python:
            given = {name: options.get(name) for name in ("prior_mu", "prior_logvar", "weight")}
            rest = {name: value for name, value in options.items() if name not in given}
            _dispatch.latent(_dispatch.KL, T, T, 1, *given.values(), **rest)
        assert str(first.value) == str(python.value)


def test_numbers_are_read_in_every_call(kernels, checks):
    """Annealed thresholds and shares are not the call's first ones for ever, nor does each cost a check."""
    prior = T.clone().requires_grad_()
    for number in (0.0, 0.5, 1.0, 0.25):
        value, rate = vk.gaussian_kl(T, T, free_bits=number, return_per_group=True)
        torch.testing.assert_close(value, rate.clamp(min=number).sum())
        (grad,) = torch.autograd.grad(vk.gaussian_kl(T + 1, T, prior, T, balance=number), prior)
        (whole,) = torch.autograd.grad(vk.gaussian_kl(T + 1, T, prior, T, balance=1.0), prior)
        torch.testing.assert_close(grad, whole * number)
    assert len(checks) == 2


def test_a_list_that_changes_is_another_call(kernels):
    axes, x = [1], torch.ones(2, 3, 4)
    assert vk.gaussian_kl(x, x, group_dims=axes, return_per_group=True)[1].shape == (3,)
    axes[0] = 2
    assert vk.gaussian_kl(x, x, group_dims=axes, return_per_group=True)[1].shape == (4,)


def test_only_so_many_calls_are_kept(kernels, checks):
    for _ in range(2):
        for size in range(1, 65):
            vk.gaussian_kl(torch.zeros(size, 2), torch.zeros(size, 2))
    assert len(checks) == 128


def test_a_string_counts_by_its_letters(kernels, checks):
    for text in ("batch", "".join(["ba", "tch"])):
        vk.gaussian_kl(T, T, clamp=text)
    assert len(checks) == 1


def test_arguments_that_the_entry_does_not_take_are_errors(kernels):
    for arguments in ((), (1,), (1, T, T), (1, 2, 3, 4), ("a", T, T, 1)):
        with pytest.raises((TypeError, ValueError)):
            _native.C.latent(*arguments)
    with pytest.raises(TypeError):
        _native.C.latent(2, T, T, 1, prior_mu=T, prior_logvar=T)
    with pytest.raises(TypeError):
        _native.C.latent(2, T, T, 1, spelling="wrong")


OTHERS = {
    "prior": lambda t, rng: vk.gaussian_kl(t, t, t, t),
    "weight": lambda t, rng: vk.gaussian_kl(t, t, weight=t[:, 0].abs()),
    "packed prior": lambda t, rng: vk.gaussian_kl_packed(torch.cat([t, t], 1), 1, t, t),
    "sample, prior": lambda t, rng: vk.sample_kl(t, t, t, t),
    "sample, state": lambda t, rng: vk.sample_kl(t, t, rng=rng),
    "sample, weight": lambda t, rng: vk.sample_kl_packed(torch.cat([t, t], 1), weight=t[:, 0].abs()),
    "reparameterize, state": lambda t, rng: vk.reparameterize(t, t, rng=rng),
    "packed state": lambda t, rng: vk.reparameterize_packed(torch.cat([t, t], 1), rng=rng),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_tensor_is_compared_with_none(name, kernels, monkeypatch):
    """Which costs more than a small call: torch raises and catches an error on the way."""
    compared = []
    equal = torch.Tensor.__eq__
    monkeypatch.setattr(torch.Tensor, "__eq__", lambda a, b: compared.append(b) or equal(a, b))
    OTHERS[name](torch.randn(3, 4), torch.tensor([7, 4]))
    assert compared == []


def test_batch_dims_of_true_is_still_a_mistake(backend):
    mu = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="batch_dims must be an int"):
        vk.sample_kl(mu, mu, batch_dims=True)
