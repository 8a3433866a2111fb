"""Properties over random shapes, strides and options (hypothesis).

VAEKERNELS_EXAMPLES: how many random problems each test tries, new ones each time; unset: 60, always the same.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import vaekernels as vk
from vaekernels import reference

pytestmark = pytest.mark.shim

EXAMPLES = os.environ.get("VAEKERNELS_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 60),
    deadline=None,
    derandomize=EXAMPLES is None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def strided(draw, shape: tuple[int, ...], seed: int, shift: float = 0.0) -> torch.Tensor:
    """A float32 tensor of this shape: permuted, with gaps, with a storage offset, or expanded."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    sizes = [shape[d] * gaps[d] for d in order]
    offset = draw(st.sampled_from([0, 0, 1, 5]))
    values = torch.randn(math.prod(sizes) + offset, generator=torch.Generator().manual_seed(seed)) + shift
    base = values[offset:].view(sizes).permute([order.index(d) for d in range(len(shape))])
    view = base[tuple(slice(None, None, g) for g in gaps)]
    if shape and shape[0] > 0 and draw(st.sampled_from([False, False, False, True])):
        view = view[:1].expand(shape)
    assert view.shape == shape
    return view


class Problem(NamedTuple):
    tensors: list[torch.Tensor]
    options: dict[str, Any]

    def __repr__(self) -> str:
        layouts = [(tuple(t.shape), t.stride(), t.storage_offset()) for t in self.tensors]
        return f"Problem({layouts}, {self.options})"


@st.composite
def problems(draw) -> Problem:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 17]), min_size=1, max_size=5)))
    while math.prod(shape) > 3000:
        shape = shape[:-1]
    batch_dims = draw(st.integers(0, len(shape)))
    latent = list(range(batch_dims, len(shape)))
    group_dims = draw(st.none() | st.lists(st.sampled_from(latent), unique=True) if latent else st.none())
    tensors = [draw(strided(shape, seed)) for seed in range(draw(st.sampled_from([2, 4])))]
    options = {
        "batch_dims": batch_dims,
        "group_dims": group_dims,
        "parameterization": draw(st.sampled_from(["logvar", "log_std"])),
        "reduction": draw(st.sampled_from(["batchmean", "sum", "mean", "none", "elementwise"])),
    }
    if options["reduction"] in ("batchmean", "sum", "mean") and draw(st.booleans()):
        weight = torch.rand(shape[:batch_dims], generator=torch.Generator().manual_seed(9)) + 0.1
        options["weight"] = (
            weight.transpose(0, -1).contiguous().transpose(0, -1) if weight.dim() > 1 else weight
        )
    return Problem(tensors, options)


def leaves_of(tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def terms_that_cancel() -> Problem:
    """growth + a^2 = -0.029: its rounding is that of terms of size 1."""
    tensors = [torch.randn(1, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    options = {"batch_dims": 0, "group_dims": None, "parameterization": "log_std", "reduction": "none"}
    return Problem(tensors, options)


@SETTINGS
@example(problem=terms_that_cancel())
@given(problem=problems())
def test_any_shape_and_strides_against_the_oracle(problem, device, backend):
    tensors, options = problem
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    rng = torch.tensor([17, 4], device=device)
    ours, exact, eager = (
        leaves_of([t.to(device) for t in tensors]),
        leaves_of(tensors, torch.float64),
        leaves_of(tensors),
    )
    z, kl, rate = vk.sample_kl(*ours, rng=rng, **options)
    eps = oracle.normals_like(tensors[0], rng.cpu())
    cpu = {k: v.cpu() if torch.is_tensor(v) else v for k, v in options.items()}
    true = oracle.objective(*exact, eps=eps, **cpu)
    usual = oracle.objective(*eager, eps=eps.float(), usual=True, **cpu)
    of_kl = torch.randn(true.kl.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cotangents = [None, of_kl, torch.ones_like(true.rate)]
    errors = oracle.errors(
        *(t.detach() for t in exact),
        accuracy=oracle.accuracy(device, torch.float32),
        eps=eps,
        own_normals=True,
        cotangents=cotangents,
        **cpu,
    )
    # 16: eager's own error in the sum of a few hundred is luck, and no yardstick
    oracle.assert_accurate(z, true.z, usual.z, errors.z, what="z")
    oracle.assert_accurate(kl, true.kl, usual.kl, errors.kl, ulps=16, what="kl")
    oracle.assert_accurate(rate, true.rate, usual.rate, errors.rate, ulps=16, what="kl_per_group")
    used = [(kl, true.kl, usual.kl), (rate, true.rate, usual.rate)]
    got, want, eager = (
        torch.autograd.grad(outputs, leaves, [c.to(o) for o, c in zip(outputs, cotangents[1:], strict=True)])
        for outputs, leaves in zip(zip(*used, strict=True), (ours, exact, eager), strict=True)
    )
    for i, results in enumerate(zip(got, want, eager, errors.gradients, strict=True)):
        oracle.assert_accurate(*results, what=f"gradient {i}")


@SETTINGS
@given(problem=problems(), clamp=st.sampled_from(["batch", "sample"]), lam=st.floats(0.0625, 5, width=32))
def test_relations_between_penalties(problem, clamp, lam, device, backend):
    """floor - hinge = lambda * G, hinge <= mask <= plain <= floor + 0; reductions differ by known factors."""
    tensors, options = problem
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()} | {
        "reduction": "batchmean"
    }
    tensors = [t.double().to(device) for t in tensors]
    plain, rate = vk.gaussian_kl(*tensors, return_per_group=True, **options)
    floor, hinge, mask = (
        vk.gaussian_kl(*tensors, free_bits=lam, clamp=clamp, penalty=p, **options)
        for p in ("floor", "hinge", "mask")
    )
    torch.testing.assert_close(floor - hinge, torch.full_like(floor, lam * rate.numel()))
    slack = 1e-9 * (1 + plain)
    assert hinge <= mask + slack and mask <= plain + slack and plain <= floor + slack
    torch.testing.assert_close(rate.sum(), plain)
    total = (
        options["weight"].double().sum()
        if "weight" in options
        else math.prod(tensors[0].shape[: options["batch_dims"]])
    )
    latent = math.prod(tensors[0].shape[options["batch_dims"] :])
    for name, factor in (("sum", total), ("mean", 1 / latent)):
        other = vk.gaussian_kl(*tensors, free_bits=lam, clamp=clamp, **(options | {"reduction": name}))
        torch.testing.assert_close(other, floor * factor)


@SETTINGS
@given(problem=problems(), order=st.randoms(use_true_random=False))
def test_rows_can_be_permuted(problem, order, device, backend):
    tensors, options = problem
    if options["batch_dims"] == 0:
        return
    rows = list(range(tensors[0].shape[0]))
    order.shuffle(rows)
    options = options | {"reduction": "batchmean"}
    tensors = [t.double().to(device) for t in tensors]
    moved = dict(options)
    if "weight" in options:
        options["weight"] = options["weight"].to(device)
        moved["weight"] = options["weight"][rows]
    for free_bits in (None, 0.4):
        a = vk.gaussian_kl(*tensors, free_bits=free_bits, **options)
        b = vk.gaussian_kl(*(t[rows] for t in tensors), free_bits=free_bits, **moved)
        torch.testing.assert_close(a, b)


@SETTINGS
@given(
    first=st.integers(0, 2**61 - 1),
    offset=st.integers(0, 2**62 - 1),
    seed=st.integers(0, 2**64 - 1),
    n=st.integers(0, 70),
)
def test_any_state_gives_philox_words(first, offset, seed, n, device, backend):
    signed = [value - 2**64 if value >= 2**63 else value for value in (seed, 4 * offset)]
    rng = torch.tensor(signed, device=device)
    words = reference.philox_words if backend == "reference" else torch.ops.vaekernels._philox_words
    first = min(first, 2**61 - 20)
    assert words(rng, n, first).tolist() == oracle.words(seed, 4 * offset, n, first).tolist()


@SETTINGS
@given(size=st.integers(1, 400), cut=st.integers(0, 400), samples=st.integers(1, 3))
def test_the_numbers_of_a_prefix_do_not_depend_on_the_rest(size, cut, samples, device, backend):
    cut = min(cut, size)
    rng = torch.tensor([3, 8], device=device)
    zero = torch.zeros(size, device=device)
    whole = vk.reparameterize(zero, zero, rng=rng, num_samples=samples).flatten()
    part = vk.reparameterize(zero[:cut], zero[:cut], rng=rng)
    assert torch.equal(whole[:cut], part)
