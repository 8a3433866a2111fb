"""The ops on a GPU that is not the current one."""

from __future__ import annotations

import gpu_problems
import pytest
import torch

import vaekernels as vk


@pytest.fixture
def second(cuda) -> str:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    return "cuda:1"


@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_the_second_device_gives_the_bits_of_the_first(name, second):
    latent, rng = gpu_problems.LATENTS[name], torch.tensor([7, 4])
    first = gpu_problems.run(latent, torch.float32, "cuda:0", rng)
    assert torch.cuda.current_device() == 0
    other = gpu_problems.run(latent, torch.float32, second, rng)
    assert torch.cuda.current_device() == 0
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    else:
        gpu_problems.assert_same(other, first, torch.float32)


def test_each_device_draws_from_its_own_generator(second):
    zeros = [torch.zeros(64, 32, device=device) for device in ("cuda:0", second)]
    torch.cuda.manual_seed_all(11)
    draws = [vk.reparameterize(zero, zero) for zero in zeros]
    assert [z.device.index for z in draws] == [0, 1]
    assert (draws[0].cpu() - draws[1].cpu()).abs().max() <= 1e-5
    before = torch.cuda.default_generators[0].get_offset()
    state = vk.rng_state(zeros[1])
    assert state.device == zeros[1].device and state.tolist() == [11, 4]
    assert torch.cuda.default_generators[0].get_offset() == before


def test_a_side_stream_of_the_second_device(second):
    mu = torch.randn(300, 96, device=second)
    rng = torch.tensor([3, 4], device=second)
    expected = vk.sample_kl(mu, mu, rng=rng)
    stream = torch.cuda.Stream(device=second)
    stream.wait_stream(torch.cuda.current_stream(second))
    with torch.cuda.stream(stream):
        result = vk.sample_kl(mu, mu, rng=rng)
    torch.cuda.synchronize(second)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
