"""Calls on many streams at once, from one thread and from several, give the bits of calls one by one."""

from __future__ import annotations

import threading

import gpu_problems
import pytest
import torch
from torch import Tensor

import vaekernels as vk

ROUNDS = 30
NAMES = ["columns", "many_tiles", "rows", "whole", "cells", "row_sets", "weighted"]


def step(latent: gpu_problems.Latent, inputs: list[Tensor], rng: Tensor) -> list[Tensor]:
    outputs = gpu_problems.call(latent, inputs, rng=rng)
    grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
    return [*(o.detach() for o in outputs), *grads]


@pytest.mark.parametrize("name", NAMES)
def test_streams_side_by_side(name, cuda):
    latent = gpu_problems.on(gpu_problems.LATENTS[name], cuda)
    inputs = gpu_problems.tensors(latent, torch.float32, cuda)
    rng = torch.tensor([3, 4], device=cuda)
    expected = step(latent, inputs, rng)
    streams = [torch.cuda.Stream() for _ in range(8)]
    torch.cuda.synchronize()
    results = []
    for _ in range(ROUNDS):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(latent, inputs, rng))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_threads_with_streams_of_their_own(cuda):
    latents = [gpu_problems.on(gpu_problems.LATENTS[name], cuda) for name in NAMES]
    inputs = [gpu_problems.tensors(latent, torch.float32, cuda) for latent in latents]
    rng = torch.tensor([3, 4], device=cuda)
    expected = [step(latent, given, rng) for latent, given in zip(latents, inputs, strict=True)]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(first: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(ROUNDS):
                    at = (first + i) % len(latents)
                    result = step(latents[at], inputs[at], rng)
                    torch.cuda.current_stream().synchronize()
                    if not all(torch.equal(a, b) for a, b in zip(result, expected[at], strict=True)):
                        wrong.append(NAMES[at])
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_a_stream_made_is_used_by_another(cuda):
    """Outputs handed from stream to stream, their memory given back while kernels still run."""
    rng = torch.tensor([3, 4], device=cuda)
    mu, logvar = (torch.randn(2000, 512, device=cuda) for _ in range(2))
    expected, kl, _ = vk.sample_kl(mu, logvar, rng=rng)
    side = torch.cuda.Stream()
    for _ in range(ROUNDS):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z, loss, _ = vk.sample_kl(mu + 0, logvar + 0, rng=rng)
        torch.cuda.current_stream().wait_stream(side)
        for t in (z, loss):
            t.record_stream(torch.cuda.current_stream())
        assert torch.equal(z, expected) and torch.equal(loss, kl)


def test_backward_runs_on_the_stream_of_its_forward(cuda):
    rng = torch.tensor([3, 4], device=cuda)
    leaves = [torch.randn(2000, 512, device=cuda).requires_grad_() for _ in range(2)]

    def gradients() -> list[Tensor]:
        z, kl, _ = vk.sample_kl(*leaves, free_bits=0.3, rng=rng)
        return list(torch.autograd.grad(z.sum() + kl, leaves))

    expected = gradients()
    side = torch.cuda.Stream()
    for _ in range(ROUNDS):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z, kl, _ = vk.sample_kl(*leaves, free_bits=0.3, rng=rng)
            total = z.sum() + kl
        torch.cuda.current_stream().wait_stream(side)
        found = torch.autograd.grad(total, leaves)  # called on the default stream
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_many_streams(cuda):
    """More than torch's pool has, of either priority."""
    mu, logvar = (torch.randn(257, 33, device=cuda) for _ in range(2))
    rng = torch.tensor([3, 4], device=cuda)
    expected = vk.sample_kl(mu, logvar, rng=rng)
    torch.cuda.synchronize()
    for i in range(80):
        with torch.cuda.stream(torch.cuda.Stream(priority=-(i % 2))):
            result = vk.sample_kl(mu, logvar, rng=rng)
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
