"""One kernel forward, one backward; no memset, no copy, no waiting for the GPU."""

from __future__ import annotations

import gpu_problems
import pytest
import torch

from vaekernels.bench.gpu import count_launches

ONE = {"kernel": 1}


@pytest.fixture(scope="module")
def seen() -> None:
    """Skips where the profiler does not see what the GPU runs."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    t = torch.zeros(1000, device="cuda")
    if count_launches(lambda: t.add_(1)) != ONE:
        pytest.skip("torch's profiler does not count the kernels of this GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_one_kernel_each_way(name, dtype, cuda, seen):
    latent = gpu_problems.on(gpu_problems.LATENTS[name], cuda)
    inputs = gpu_problems.tensors(latent, dtype, cuda)
    outputs = gpu_problems.call(latent, inputs)
    grads = gpu_problems.cotangents(outputs)
    assert count_launches(lambda: gpu_problems.call(latent, inputs)) == ONE
    assert count_launches(lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)) == ONE


@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_at_most_two_while_capturing(name, cuda, seen):
    latent = gpu_problems.on(gpu_problems.LATENTS[name], cuda)
    inputs = [t.detach() for t in gpu_problems.tensors(latent, torch.float32, cuda)]
    rng = torch.tensor([3, 4], device=cuda)
    gpu_problems.call(latent, inputs, rng=rng)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu_problems.call(latent, inputs, rng=rng)
    found = count_launches(graph.replay)
    assert set(found) == {"kernel"} and found["kernel"] <= 2


@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_nobody_waits_for_the_gpu(name, cuda):
    latent = gpu_problems.on(gpu_problems.LATENTS[name], cuda)
    inputs = gpu_problems.tensors(latent, torch.float32, cuda)
    grads = gpu_problems.cotangents(gpu_problems.call(latent, inputs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = gpu_problems.call(latent, inputs)
        torch.autograd.grad(outputs, inputs, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
