"""Calls at default options skip the checks in Python: same numbers, same gradients, same complaints."""

from __future__ import annotations

import pytest
import torch
from conftest import require_kernels

import vaekernels as vk
from vaekernels import _native, ops

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


@pytest.mark.parametrize("grad", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_both_ways_give_the_same_bits(name, dtype, grad, device, monkeypatch):
    require_kernels(device)
    taken = []

    class Watched:
        def __getattr__(self, attribute):
            function = getattr(_native.C, attribute)
            return lambda *args: taken.append(result := function(*args)) or result

    monkeypatch.setattr(ops, "short_entry", Watched)
    short = run(CALLS[name], dtype, device, grad)
    assert len(taken) == 1 and taken[0] is not None
    monkeypatch.setattr(ops, "short_entry", lambda: None)
    long = run(CALLS[name], dtype, device, grad)
    assert len(short) == len(long)
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.requires_grad == b.requires_grad


# The options at their defaults, in the order in which the short way is given them.
KL = (None, None, "batch", "floor", 1, None, None, None, "batchmean", "logvar", None, None)
DRAW = (None, None, None)

ODD = {
    "another dtype": lambda t: (t, t.double(), 0.3),
    "another shape": lambda t: (t, t[:, :1], 0.3),
    "integers": lambda t: (t.int(), t.int(), 0.3),
    "no tensor": lambda t: (t, 1.0, 0.3),
    "no axes": lambda t: (t[0, 0], t[0, 0], 0.3),
    "negative free bits": lambda t: (t, t, -0.1),
    "NaN free bits": lambda t: (t, t, float("nan")),
    "free bits by group": lambda t: (t, t, t.detach()[0].abs()),
    "a bool": lambda t: (t, t, True),
    "too few arguments": lambda t: (t, t),
}


@pytest.mark.parametrize("name", ODD)
def test_what_it_does_not_serve_it_leaves_alone(name, kernels):
    assert _native.C.short_sample_kl(*ODD[name](torch.randn(3, 4)), KL, DRAW) is None


@pytest.mark.parametrize("dim", [2, -3, 0, 2**70, 1.0, None])
def test_a_bad_axis_of_packed_moments_is_left_alone(dim, kernels):
    assert _native.C.short_sample_kl_packed(torch.randn(3, 8), dim, None, KL, DRAW) is None


@pytest.mark.parametrize("place", range(len(KL) + len(DRAW)))
@pytest.mark.parametrize(
    "value", [2, True, "sum", (), torch.ones(3)], ids=["int", "bool", "str", "tuple", "tensor"]
)
def test_an_option_of_another_value_is_left_alone(place, value, kernels):
    mu, given = torch.randn(3, 4), [*KL, *DRAW]
    assert _native.C.short_sample_kl(mu, mu, None, KL, DRAW) is not None
    given[place] = value
    assert _native.C.short_sample_kl(mu, mu, None, tuple(given[: len(KL)]), tuple(given[len(KL) :])) is None


def test_a_string_counts_by_its_letters(kernels):
    mu = torch.randn(3, 4)
    made = tuple("".join(list(x)) if isinstance(x, str) else x for x in KL)
    assert made[2] is not KL[2] and _native.C.short_gaussian_kl(mu, mu, None, made) is not None


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
