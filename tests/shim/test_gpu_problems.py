"""The problems of tests/gpu on the CUDA kernels of the shim: what a GPU will be asked is asked here first."""

from __future__ import annotations

import gpu_problems
import pytest
import shim_build
import torch
from conftest import require_kernels

import vaekernels as vk

RNG = torch.tensor([-77, 16])


@pytest.fixture
def shim():
    require_kernels("cpu")
    shim_build.require()
    return shim_build.library()


@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_the_shim_gives_what_the_cpu_gives(name, shim):
    """The comparison that test_equality.py makes between the GPU and the CPU."""
    latent = gpu_problems.LATENTS[name]
    for dtype in gpu_problems.DTYPES:
        expected = gpu_problems.run(latent, dtype, "cpu", RNG)
        with shim.used():
            gpu_problems.assert_same(gpu_problems.run(latent, dtype, "cpu", RNG), expected, dtype)


@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_each_problem_is_one_launch_each_way(name, shim):
    """What test_launches.py asks torch's profiler on a GPU."""
    latent = gpu_problems.LATENTS[name]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = gpu_problems.tensors(latent, dtype, "cpu")
        with shim.used():
            before = shim.launches()
            outputs = gpu_problems.call(latent, inputs)
            assert shim.launches() == before + 1
            torch.autograd.grad(outputs, inputs, gpu_problems.cotangents(outputs))
            assert shim.launches() == before + 2
            with torch.no_grad(), shim.capturing():
                gpu_problems.call(latent, inputs, rng=RNG)
            assert shim.launches() <= before + 2 + 2


def test_a_wrong_gradient_would_be_seen():
    latent = gpu_problems.LATENTS["columns"]
    expected = gpu_problems.run(latent, torch.float32, "cpu", RNG)
    for i in range(len(expected)):
        wrong = [t.clone() for t in expected]
        wrong[i].view(-1)[-1] += 1e-3 * max(1.0, float(wrong[i].abs().max()))
        with pytest.raises(AssertionError):
            gpu_problems.assert_same(wrong, expected, torch.float32)


@pytest.mark.parametrize("name", ["columns", "rows", "cells", "row_sets", "weighted", "whole"])
def test_an_aborted_capture_leaves_no_counter(name, shim):
    latent = gpu_problems.LATENTS[name]
    inputs = [t.detach() for t in gpu_problems.tensors(latent, torch.float32, "cpu")]
    with shim.used():
        expected = gpu_problems.call(latent, inputs, rng=RNG)
        with pytest.raises(KeyError), shim.capturing():
            gpu_problems.call(latent, inputs, rng=RNG)
            raise KeyError
        assert shim.dirty_counters() == 0
        for _ in range(3):
            result = gpu_problems.call(latent, inputs, rng=RNG)
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_offsets_in_a_capture_follow_each_other(shim):
    """A replay adds the generator's offset to that of the call within the graph, 4 for each call before."""
    zero = torch.zeros(64, 8)
    with shim.used():
        with shim.capturing():
            states = [vk.rng_state(zero), vk.rng_state(zero)]
            z = vk.sample_kl(zero, zero).z
        seed, first = states[0].tolist()
        assert states[1].tolist() == [seed, first + 4]
        assert torch.equal(z, vk.reparameterize(zero, zero, rng=torch.tensor([seed, first + 8])))
