"""Tensors without elements, whatever their layout: no batch rows, or no latent elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, cycle, islice
from typing import Any

import pytest
import torch
from torch import Tensor

import vaekernels as vk

pytestmark = pytest.mark.shim

LAMBDA = 0.186
# name: a tensor without elements, as a network hands it over.
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "no_rows": lambda: torch.empty(0, 5),
    "no_rows_nor_columns": lambda: torch.empty(0, 0),
    "no_rows_transposed": lambda: torch.empty(0, 5, 7).transpose(1, 2),
    "no_rows_batch_last": lambda: torch.empty(4, 6, 0).permute(2, 0, 1),
    "no_rows_channels_last": lambda: torch.empty(0, 4, 8, 8).to(memory_format=torch.channels_last),
    "no_rows_channels_last_3d": lambda: torch.empty(0, 2, 3, 4, 2).to(memory_format=torch.channels_last_3d),
    "no_rows_images": lambda: torch.empty(0, 5, 7, 3),
    "no_rows_expanded": lambda: torch.zeros(5).expand(0, 5),
    "no_rows_of_expanded": lambda: torch.zeros(1, 5).expand(4, 5)[:0],
    "no_rows_strided": lambda: torch.zeros(4, 6, 6)[:0, ::2, ::3],
    "no_columns": lambda: torch.empty(251, 0),
    "no_columns_transposed": lambda: torch.empty(0, 4, 6).permute(2, 0, 1),
    "no_columns_expanded": lambda: torch.randn(1, 0, 1, 2).expand(4, 0, 4, 2),
    "no_columns_images": lambda: torch.empty(13, 0, 4, 13),
    "no_columns_channels_last": lambda: torch.empty(3, 4, 0, 5).to(memory_format=torch.channels_last),
    "no_columns_strided": lambda: torch.zeros(4, 6, 6)[:, 6:, ::3],
    "no_columns_of_one_row": lambda: torch.empty(1, 3, 0),
}
FREE_BITS: list[dict[str, Any]] = [
    {},
    *(
        {"free_bits": LAMBDA, "clamp": c, "penalty": p}
        for c in ("batch", "sample")
        for p in ("floor", "hinge")
    ),
    *({"free_bits": torch.tensor(bits), "clamp": c} for c in ("batch", "sample") for bits in (LAMBDA, 0.0)),
]


def groupings(ndim: int) -> list[tuple[int, ...] | None]:
    latent = range(1, ndim)
    return [None, *(axes for n in range(ndim) for axes in combinations(latent, n))]


def expected(
    mu: Tensor, group_dims: tuple[int, ...] | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """kl and the rates by the contract: without rows no mean, without latents a KL of 0, clamped as any."""
    groups = range(1, mu.ndim) if group_dims is None else group_dims
    group_shape = [mu.shape[axis] for axis in groups]
    reduction = options.get("reduction", "batchmean")
    rows = mu.shape[0]
    rate = torch.full(group_shape, 0.0 if rows else math.nan)
    if reduction == "elementwise":
        return torch.empty_like(mu), rate
    floor = float(options.get("free_bits", 0.0)) if options.get("penalty", "floor") == "floor" else 0.0
    row = math.prod(group_shape) * floor
    if reduction == "none":
        return torch.full((rows,), row), rate
    mean = torch.tensor(row if rows else math.nan)
    if reduction == "sum":
        return torch.tensor(rows * row), rate
    return (mean / math.prod(mu.shape[1:]) if reduction == "mean" else mean), rate


def check(mu: Tensor, group_dims: tuple[int, ...] | None, options: dict[str, Any], prior: bool) -> None:
    leaves = [mu.detach().requires_grad_() for _ in range(4 if prior else 2)]
    wanted_kl, wanted_rate = expected(mu, group_dims, options)
    options = options | {"group_dims": group_dims}
    kl, rate = vk.gaussian_kl(*leaves, return_per_group=True, **options)
    sampled = vk.sample_kl(*leaves, num_samples=2 if prior else None, **options)
    for one, other in ((kl, rate), (sampled.kl, sampled.kl_per_group)):
        torch.testing.assert_close(one, wanted_kl, equal_nan=True)
        torch.testing.assert_close(other, wanted_rate, equal_nan=True)
    assert sampled.z.shape == ((2, *mu.shape) if prior else mu.shape)
    outputs = [kl, rate, *sampled]
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    assert all(g.shape == mu.shape and g.dtype == mu.dtype for g in grads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_grouping(layout, backend):
    mu = LAYOUTS[layout]()
    allowed = [
        bits | {"reduction": reduction}
        for reduction in ("batchmean", "sum", "mean", "none", "elementwise")
        for bits in FREE_BITS
        if not bits
        or reduction in ("batchmean", "sum", "mean")
        or (reduction == "none" and bits["clamp"] == "sample")
    ]
    # Every grouping meets some options, all options come by turns.
    turns = cycle(allowed)
    for i, group_dims in enumerate(groupings(mu.ndim) * 2):
        for options in islice(turns, 5):
            check(mu, group_dims, options, prior=i % 2 == 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype(dtype, layout, backend):
    mu = LAYOUTS[layout]()
    mu = torch.empty_strided(mu.shape, mu.stride(), dtype=dtype)
    leaves = [mu.detach().requires_grad_() for _ in range(2)]
    z, kl, rate = vk.sample_kl(*leaves, free_bits=LAMBDA, group_dims=())
    assert z.dtype == dtype and kl.dtype == rate.dtype
    assert kl.isnan() if mu.shape[0] == 0 else math.isclose(kl.item(), LAMBDA, rel_tol=1e-6)
    grads = torch.autograd.grad((z, kl), leaves, (torch.ones_like(z), torch.ones_like(kl)))
    assert all(g.shape == mu.shape and g.dtype == dtype for g in grads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed(layout, backend):
    """Of twice the size along each axis in turn, so that the halves are views of it."""
    half = LAYOUTS[layout]()
    turns = cycle(FREE_BITS)
    for dim in range(half.ndim):
        moments = torch.cat([half, half], dim).requires_grad_()
        mu = half.contiguous()
        for group_dims in groupings(half.ndim):
            for bits in islice(turns, 2):
                options = bits | {"group_dims": group_dims}
                wanted_kl, wanted_rate = expected(mu, group_dims, bits)
                z, kl, rate = vk.sample_kl_packed(moments, dim, **options)
                alone = vk.gaussian_kl_packed(moments, dim, **options)
                for value in (kl, alone):
                    torch.testing.assert_close(value, wanted_kl, equal_nan=True)
                torch.testing.assert_close(rate, wanted_rate, equal_nan=True)
                more = vk.reparameterize_packed(moments, dim, num_samples=3)
                assert z.shape == half.shape and more.shape == (3, *half.shape)
                outputs = [z, kl, rate, alone, more]
                (grad,) = torch.autograd.grad(outputs, moments, [torch.ones_like(o) for o in outputs])
                assert grad.shape == moments.shape


def test_a_cell_without_elements_is_clamped_as_any_other(backend):
    for shape, group_dims, groups in (((251, 0), (), 1), ((13, 0, 4, 13), 3, 13)):
        mu = torch.empty(shape)
        for clamp in ("batch", "sample"):
            kl = vk.gaussian_kl(mu, mu, group_dims=group_dims, clamp=clamp, free_bits=LAMBDA)
            assert float(kl) == pytest.approx(groups * LAMBDA, rel=1e-6)
        weight = torch.linspace(0, 2, shape[0])
        options = {"group_dims": group_dims, "clamp": "sample", "free_bits": LAMBDA, "weight": weight}
        total = vk.gaussian_kl(mu, mu, reduction="sum", **options)
        assert float(total) == pytest.approx(groups * LAMBDA * float(weight.sum()), rel=1e-5)


def test_compiled_functions_take_them_too(kernels):
    """The kernels' double, which gives shapes and strides, and the kernels agree."""
    torch._dynamo.reset()
    function = torch.compile(
        lambda mu, rng: vk.sample_kl(mu, mu, rng=rng, group_dims=1), backend="aot_eager", fullgraph=True
    )
    rng = torch.tensor([3, 4])
    for name in ("no_rows_channels_last", "no_columns_expanded", "no_rows_transposed"):
        mu = LAYOUTS[name]()
        for got, wanted in zip(function(mu, rng), vk.sample_kl(mu, mu, rng=rng, group_dims=1), strict=True):
            torch.testing.assert_close(got, wanted, equal_nan=True, check_stride=False)


@pytest.mark.parametrize("penalty", ["floor", "hinge", "mask"])
@pytest.mark.parametrize("threshold", [math.inf, 0.5])
def test_the_sum_over_no_rows_is_0_whatever_the_threshold(threshold, penalty, backend):
    """Also where the weights are all 0. A fuzzer found inf * 0 in the reference."""
    options: dict[str, Any] = {"free_bits": torch.tensor(threshold), "penalty": penalty, "reduction": "sum"}
    assert vk.gaussian_kl(torch.empty(0, 3), torch.empty(0, 3), **options) == 0
    x = torch.ones(2, 3)
    assert vk.gaussian_kl(x, x, weight=torch.zeros(2), **options) == 0
