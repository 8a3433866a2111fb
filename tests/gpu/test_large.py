"""bfloat16 tensors of more than 2^31 elements: indices that 32 bits do not hold."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

import vaekernels as vk

ELEMENTS = 2**31 + 2**20 + 8
SHAPES = {
    "flat": ((ELEMENTS,), ()),
    "columns": ((2**15 + 1, 2**16), None),  # 2^31 + 2^16
    "rows": ((3, 2, 2**28 + 2**26 + 2**24 + 2**23), 1),
}
EDGE = 4096


@pytest.fixture(autouse=True)
def room(cuda):
    """mu, logvar, z and two gradients, and as much again for what torch needs to make them."""
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], 8 * 2 * ELEMENTS
    if free < needed:
        pytest.skip(f"{free / 2**30:.0f} GiB are free, {needed / 2**30:.0f} GiB are needed")
    yield
    torch.cuda.empty_cache()


def normals(rng: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Elements first to first + count of the stream, in float64; `first` is a multiple of 4."""
    words = torch.ops.vaekernels._philox_words(rng.cpu(), count, first // 4)
    return torch.from_numpy(oracle.box_muller(words.numpy().reshape(-1, 4)).reshape(-1))


@pytest.mark.parametrize("name", SHAPES)
def test_sample_kl_and_its_gradients(name, cuda):
    shape, group_dims = SHAPES[name]
    n = math.prod(shape)
    assert n > 2**31
    rng = torch.tensor([2**33 + 1, 8], device=cuda)
    draw = torch.Generator(cuda).manual_seed(1)
    # Blocks of random numbers, repeated: other rates in every group, known sums, and little time to make.
    block = torch.randn(2**20, generator=draw, device=cuda).to(torch.bfloat16)
    times = -(-n // block.numel())
    mu = block.repeat(times)[:n].view(shape).requires_grad_()
    logvar = (0.5 * block.flip(0)).repeat(times)[:n].view(shape).requires_grad_()
    batch = shape[0] if len(shape) > 1 else n
    z, kl, rate = vk.sample_kl(mu, logvar, group_dims=group_dims, rng=rng)
    torch.autograd.backward([z, kl], [torch.ones_like(z), torch.ones_like(kl)])
    torch.cuda.synchronize()

    flat = [t.detach().view(-1) for t in (mu, logvar, z, mu.grad, logvar.grad)]
    for first in (0, 2**31 - EDGE, 2**31, (n - EDGE) // 4 * 4):
        m, lv, sampled, g_mu, g_lv = (t[first : first + EDGE].cpu().double() for t in flat)
        eps = normals(rng, first, m.numel() // 4 * 4)
        m, lv, sampled, g_mu, g_lv = (t[: eps.numel()] for t in (m, lv, sampled, g_mu, g_lv))
        sd = torch.exp(0.5 * lv)
        step = 2.0**-8
        torch.testing.assert_close(sampled, m + sd * eps, rtol=step, atol=1e-2 * step)
        torch.testing.assert_close(g_mu, 1 + m / batch, rtol=step, atol=1e-2 * step)
        expected = 0.5 * sd * eps + 0.5 * torch.expm1(lv) / batch
        torch.testing.assert_close(g_lv, expected, rtol=step, atol=1e-2 * step)

    m, lv = flat[0], flat[1]
    total = sum(
        float((0.5 * (a.double() ** 2 + torch.expm1(b.double()) - b.double())).sum())
        for a, b in zip(m.split(2**26), lv.split(2**26), strict=True)
    )
    assert abs(float(kl) * batch / total - 1) < 1e-5
    assert abs(float(rate.double().sum()) * batch / total - 1) < 1e-5


def test_many_samples_of_a_small_latent(cuda):
    """K times B times D passes 2^31, mu itself is small."""
    mu = torch.linspace(-1, 1, 2**20, device=cuda, dtype=torch.bfloat16).view(1024, 1024)
    rng = torch.tensor([5, 8], device=cuda)
    samples = 2**11 + 3
    z = vk.reparameterize(mu, torch.zeros_like(mu), num_samples=samples, rng=rng)
    for k in (0, 2**11 - 1, 2**11, samples - 1):
        eps = normals(rng, k * mu.numel(), EDGE)
        expected = mu.view(-1)[:EDGE].cpu().double() + eps
        torch.testing.assert_close(
            z[k].view(-1)[:EDGE].cpu().double(), expected, rtol=2.0**-8, atol=1e-2 * 2.0**-8
        )
