"""Every kernel once, against the CPU's: short enough for compute-sanitizer (test_sanitizers.py).

Inputs are drawn on the CPU and results compared there, so that the GPU runs little besides our kernels.
"""

from __future__ import annotations

import os

import gpu_problems
import pytest
import torch

RNG = torch.tensor([2**40 + 7, 12])


@pytest.mark.parametrize("dtype", gpu_problems.DTYPES, ids=str)
@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_the_gpu_gives_what_the_cpu_gives(name, dtype, cuda):
    latent = gpu_problems.LATENTS[name]
    expected = gpu_problems.run(latent, dtype, "cpu", RNG)
    gpu_problems.assert_same(gpu_problems.run(latent, dtype, cuda, RNG), expected, dtype)


@pytest.mark.parametrize("name", ["columns", "rows", "cells", "row_sets", "weighted"])
def test_what_finishes_a_captured_call(name, cuda):
    """A graph takes other kernels to finish its sums."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        pytest.skip("PYTORCH_NO_CUDA_MEMORY_CACHING: nothing can be allocated while capturing")
    latent = gpu_problems.LATENTS[name]
    inputs = [t.detach() for t in gpu_problems.tensors(latent, torch.float32, cuda)]
    rng = RNG.to(cuda)
    latent = gpu_problems.on(latent, cuda)
    expected = gpu_problems.call(latent, inputs, rng=rng)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = gpu_problems.call(latent, inputs, rng=rng)
    graph.replay()
    torch.cuda.synchronize()
    for captured, eager in zip(outputs, expected, strict=True):
        assert torch.equal(captured.cpu(), eager.cpu())


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_pointers_that_no_vector_fits(shift, cuda):
    """Views that start in the middle of a 16-byte vector take the same kernels' narrow loads."""
    room = torch.randn(2, 64 * 33 + 4, generator=torch.Generator().manual_seed(3))

    def results(device: str) -> list[torch.Tensor]:
        mu, logvar = (row[shift : shift + 64 * 33].view(64, 33) for row in room.to(device))
        latent = gpu_problems.Latent((64, 33), {"free_bits": 0.3})
        return [t.cpu() for t in gpu_problems.call(latent, [mu, logvar], rng=RNG.to(device))]

    gpu_problems.assert_same(results(cuda), results("cpu"), torch.float32)
