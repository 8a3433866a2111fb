"""The same state gives the same numbers on the CPU, on the GPU, and in the reference on either."""

from __future__ import annotations

import gpu_problems
import pytest
import torch
from torch import Tensor

import vaekernels as vk
from vaekernels import _native, reference

STATES = [(0, 0), (1, 4), (-1, 2**32 - 4), (2**62 + 3, 2**40), (-(2**63), -4), (2**31, 2**34)]
FIRST_QUADS = [0, 1, 7, 2**31 - 2, 2**32 - 3, 2**61 - 2000]


def places(state: tuple[int, int], n: int, dtype: torch.dtype, cuda: str) -> dict[str, Tensor]:
    """The normals of a state by everybody who can compute them."""
    found = {}
    for device in ("cpu", cuda):
        rng, zero = torch.tensor(state, device=device), torch.zeros(n, dtype=dtype, device=device)
        found[f"kernels, {device}"] = vk.reparameterize(zero, zero, rng=rng).cpu()
        found[f"reference, {device}"] = reference.normals(rng, n, dtype, torch.device(device)).cpu()
    return found


@pytest.mark.parametrize("first", FIRST_QUADS)
@pytest.mark.parametrize("state", STATES)
def test_words_are_equal_bit_for_bit(state, first, cuda):
    for n in (1, 6, 4097):
        rng = torch.tensor(state)
        expected = torch.ops.vaekernels._philox_words(rng, n, first)
        assert torch.equal(torch.ops.vaekernels._philox_words(rng.to(cuda), n, first).cpu(), expected)
        assert torch.equal(reference.philox_words(rng, n, first), expected)
        assert torch.equal(reference.philox_words(rng.to(cuda), n, first).cpu(), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize("state", STATES)
def test_normals_are_equal_within_1e_5(state, dtype, tolerance, cuda):
    found = places(state, 10**6 + 3, dtype, cuda)
    first = found["kernels, cpu"]
    for name, other in found.items():
        assert torch.isfinite(other).all(), name
        assert (other - first).abs().max() <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_the_normals_of_float32(dtype, cuda):
    """Those of the same place: of two places a normal may lie on either side of the middle of two numbers."""
    half, single = (places((5, 8), 2**20, kind, cuda) for kind in (dtype, torch.float32))
    for name, normals in half.items():
        assert torch.equal(normals, single[name].to(dtype)), name


@pytest.mark.parametrize("dtype", gpu_problems.DTYPES, ids=str)
@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_results_and_gradients_of_every_kernel(name, dtype, cuda, monkeypatch):
    latent, rng = gpu_problems.LATENTS[name], torch.tensor([-77, 16])
    ours = gpu_problems.run(latent, dtype, cuda, rng)
    gpu_problems.assert_same(ours, gpu_problems.run(latent, dtype, "cpu", rng), dtype)
    monkeypatch.setattr(_native, "has_kernels", lambda device_type: False)
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "warn_fallback", lambda device_type: None)
    gpu_problems.assert_same(ours, gpu_problems.run(latent, dtype, cuda, rng), dtype)


@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_a_second_run_gives_the_same_bits(name, cuda):
    latent, rng = gpu_problems.LATENTS[name], torch.tensor([-77, 16])
    first = gpu_problems.run(latent, torch.float32, cuda, rng)
    for _ in range(5):
        again = gpu_problems.run(latent, torch.float32, cuda, rng)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
