"""NaN, inf and numbers at the ends, in every argument: what is NaN in plain float64 is NaN everywhere.

Each element of the problem is a group of its own, and the elements are all pairs (with a prior, all
quadruples) of the values below. Judges: the reference in float64, whose NaN must be NaN in every backend and
dtype; and where each is inf or NaN, the reference in the dtype of the arithmetic, or in float64 where less
overflows on the way. Where an argument is infinite itself, NaN and inf count as one: inf times what
underflows is either, by the order of the products.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import vaekernels as vk
from vaekernels import reference

pytestmark = pytest.mark.shim

PARAMETERIZATIONS = ["logvar", "log_std", "std", "softplus"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# NaN: quiet, of both signs, with payloads; signalling ones too.
NAN_BITS = {
    torch.float64: (
        torch.int64,
        [0x7FF8 << 48, -(0x0008 << 48), (0x7FF8 << 48) + 0x12345, 2**63 - 1, -1, (0x7FF0 << 48) + 1],
    ),
    torch.float32: (torch.int32, [0x7FC00000, -0x400000, 0x7FC12345, 0x7FFFFFFF, -1, 0x7F800001]),
    torch.bfloat16: (torch.int16, [0x7FC0, -0x40, 0x7FC5, 0x7FFF, -1, 0x7F81]),
    torch.float16: (torch.int16, [0x7E00, -0x200, 0x7E45, 0x7FFF, -1, 0x7C01]),
}


def nans(dtype: torch.dtype) -> Tensor:
    integer, bits = NAN_BITS[dtype]
    return torch.tensor(bits, dtype=integer).view(dtype)


def numbers(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    # A subnormal number of finite inverse. A large one of which what is computed overflows by far or not at
    # all; in float64, which has nothing wider for a judge, not at all.
    large = 1e150 if dtype == torch.float64 else info.max / 8
    ends = [info.smallest_normal, info.smallest_normal / 2, large, float("inf")]
    some = [0.0, 1e-3, 0.7, 1.0, 15.0, 45.0, 200.0]
    return torch.tensor([sign * x for x in (*some, *ends) for sign in (1.0, -1.0)], dtype=torch.float64).to(
        dtype
    )


def columns(values: Tensor, fewer: Tensor, prior: bool) -> list[Tensor]:
    """Every combination, one for an element: by rows of 1."""
    sizes = [len(values), len(values)] if not prior else [len(fewer)] * 4
    picked = torch.cartesian_prod(*(torch.arange(n) for n in sizes))
    of = fewer if prior else values
    return [of[picked[:, i]].unsqueeze(0) for i in range(len(sizes))]


def leaves_of(dtype: torch.dtype, prior: bool, all_of_them: bool) -> list[Tensor]:
    values = torch.cat([nans(dtype), numbers(dtype)])
    if all_of_them:
        fewer = torch.cat([nans(dtype)[:2], numbers(dtype)[::2], numbers(dtype)[-3:]])
    else:
        ends = torch.tensor([0.0, -0.7, 200.0, -200.0, float("inf"), -float("inf")], dtype=torch.float64)
        fewer = torch.cat([nans(dtype)[1:2], ends.to(dtype)])
    return columns(values, fewer, prior)


# How results and gradients are asked for: the outputs' names, and the options.
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("z", {}),
    ("kl", {"reduction": "elementwise"}),
    ("rate", {}),
    ("z kl", {"reduction": "elementwise"}),
    ("z rate", {"free_bits": 0.5}),
    ("kl", {"free_bits": 0.5, "clamp": "sample", "penalty": "floor", "reduction": "none"}),
]
# Whose gradients hang on no decision: a rate that leaves the range of float32 is NaN, and closes its group.
UNCLAMPED = [question for question in QUESTIONS if "free_bits" not in question[1]]


def answers(
    entry: Any, leaves: list[Tensor], asked: str, options: dict[str, Any], cotangent: float = 1.0
) -> dict[str, Tensor]:
    """The outputs that are asked for, and the gradients with respect to all leaves."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    state = torch.tensor([3, 0])
    scale = {k: v for k, v in options.items() if k in ("parameterization", "logvar_bounds")}
    sample, kl = "z" in asked, asked != "z"
    if entry is reference:
        state_or_none = state if sample else None
        prior = leaves[2:] if kl else ()
        given = options if kl else scale
        out = reference.latent(*leaves[:2], 1, state_or_none, *prior, sample=sample, kl=kl, **given)
    elif not kl:
        out = (vk.reparameterize(*leaves[:2], rng=state, **scale),)
    elif sample:
        out = vk.sample_kl(*leaves, rng=state, **options)
    else:
        out = (None, *vk.gaussian_kl(*leaves, return_per_group=True, **options))
    found = {name: t for name, t in zip(("z", "kl", "rate"), out, strict=False) if t is not None}
    used = [found[name] for name in asked.split()]
    grads = torch.autograd.grad(
        used, leaves, [torch.full_like(o, cotangent) for o in used], allow_unused=True
    )
    names = ("grad_mu", "grad_scale", "grad_prior_mu", "grad_prior_scale")
    return found | {n: g for n, g in zip(names, grads, strict=False) if g is not None}


def kind(t: Tensor, infinite: Tensor) -> Tensor:
    """0 for a number, 1 and -1 for the infinities, 2 for NaN; where an argument is infinite, for them too."""
    t = t.detach().flatten()
    either = infinite if t.numel() == infinite.numel() else infinite.any()
    return torch.where(t.isnan() | (t.isinf() & either), 2.0, torch.where(t.isinf(), t.sign(), 0.0))


def differences(
    dtype: torch.dtype, leaves: list[Tensor], asked: str, options: dict[str, Any], cotangent: float
) -> list[str]:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    ours = answers(vk, leaves, asked, options, cotangent)
    exact = answers(reference, [t.double() for t in leaves], asked, options, cotangent)
    plain = answers(reference, [t.to(compute) for t in leaves], asked, options, cotangent)
    assert ours.keys() == exact.keys()
    infinite = torch.stack([t.isinf() for t in leaves]).any(0).flatten() | math.isinf(cotangent)
    wrong = []

    def note(bad: Tensor, name: str, other: Tensor, what: str) -> None:
        for i in bad.nonzero().flatten().tolist()[:3]:
            at = [t.flatten()[i].item() for t in leaves] if bad.numel() == leaves[0].numel() else "all"
            got, wanted = (t.flatten()[i].item() for t in (ours[name], other))
            wrong.append(
                f"{dtype} {asked} {options} {name}{at}: {got}, {what} {wanted} ({int(bad.sum())} such)"
            )

    for name, got in ours.items():
        candidates = (got, exact[name], exact[name].to(got.dtype), plain[name].to(got.dtype))
        ours_is, exact_is, rounded_is, plain_is = (kind(t, infinite) for t in candidates)
        note((exact_is == 2) & (ours_is != 2), name, exact[name], "float64 has")
        note((ours_is != plain_is) & (ours_is != rounded_is), name, candidates[3], f"in {compute} it is")
    return wrong


def sweep(
    dtype: torch.dtype,
    parameterization: str,
    prior: bool,
    all_of_them: bool = False,
    cotangent: float = 1.0,
    questions: list[tuple[str, dict[str, Any]]] = QUESTIONS,
) -> list[str]:
    leaves = leaves_of(dtype, prior, all_of_them)
    wrong = []
    for (asked, options), bounds in product(questions, (None, (-3.0, 2.0))):
        options = options | {"parameterization": parameterization, "logvar_bounds": bounds}
        if not prior or asked != "z":
            wrong += differences(dtype, leaves, asked, options, cotangent)
    return wrong


@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_come_out(dtype, parameterization, prior, backend):
    wrong = sweep(dtype, parameterization, prior, all_of_them=False)
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("cotangent", [math.inf, math.nan])
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_outputs_that_are_not_finite(dtype, parameterization, prior, cotangent, backend):
    wrong = sweep(dtype, parameterization, prior, cotangent=cotangent, questions=UNCLAMPED)
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("second", [-1.0, 0.0, 1.0])
def test_gradient_of_the_sample_by_any_std(second, backend):
    """d(mu + std eps)/d std is eps; a negative std makes z NaN, and the gradient is not turned to 0."""
    rng = torch.tensor([3, 0])
    mu, std = torch.zeros(1, 4), torch.full((1, 4), second, requires_grad=True)
    eps = vk.reparameterize(mu, torch.ones_like(mu), rng=rng, parameterization="std")
    for cotangent in (1.0, math.inf):
        z = vk.reparameterize(mu, std, rng=rng, parameterization="std")
        (grad,) = torch.autograd.grad(z, std, torch.full_like(z, cotangent))
        assert z.isnan().all() == (second < 0)
        assert torch.equal(grad, eps.detach() * cotangent)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_no_samples(dtype, parameterization, backend):
    """Sums over no samples: 0, and NaN where they are multiplied by an infinite derivative, as PyTorch's."""
    second = torch.tensor([0.0, 0.7, math.inf, -math.inf, math.nan, 200.0], dtype=dtype).unsqueeze(0)
    options = {"parameterization": parameterization, "num_samples": 0, "rng": torch.tensor([3, 0])}
    found = []
    for entry in (vk, reference):
        mu, s = torch.zeros_like(second).requires_grad_(), second.clone().requires_grad_()
        if entry is vk:
            z = vk.reparameterize(mu, s, **options)
        else:
            z, *_ = reference.latent(
                mu,
                s,
                1,
                options["rng"],
                sample=True,
                kl=False,
                num_samples=0,
                parameterization=parameterization,
            )
        assert z.shape == (0, 1, 6)
        found.append(torch.autograd.grad(z, (mu, s), torch.zeros_like(z)))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("balance", [None, 0.0, 1.0])
@pytest.mark.parametrize("parameterization", ["std", "softplus"])
def test_gradients_in_range_whose_slopes_are_not(parameterization, balance, backend):
    """1 / sd of the prior or the posterior, times the square of a distance or of a ratio, is over float32's
    range; times the weight of a row, 1e-6 or 0, it is not. In float64 nothing overflows."""
    if parameterization == "std":
        second, prior_second = [2e-6, 1e-7, 1.0], [2e-13, 1e-25, 1.0]
    else:
        second, prior_second = [-13.1, -16.1, 0.5], [-29.2, -57.6, 0.5]
    columns = [7.3, 0.0, 0.1], second, [-88.5, 0.0, 0.2], prior_second
    leaves = [torch.tensor([column] * 2) for column in columns]
    weight = torch.tensor([1e-6, 0.0])
    found = []
    for dtype in (torch.float32, torch.float64):
        args = [t.to(dtype).requires_grad_() for t in leaves]
        kl = vk.gaussian_kl(
            *args, parameterization=parameterization, balance=balance, weight=weight, reduction="sum"
        )
        found.append(torch.autograd.grad(kl, args))
    for ours, exact in zip(*found, strict=True):
        assert (exact[1] == 0).all()
        torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-30)
