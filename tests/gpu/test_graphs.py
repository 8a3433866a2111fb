"""Captured graphs: every replay draws afresh, and gives the bits of an eager call at the same offset."""

from __future__ import annotations

from collections.abc import Callable

import gpu_problems
import pytest
import torch
from torch import Tensor

import vaekernels as vk

REPLAYS = 100
NAMES = [
    "small",
    "columns",
    "many_tiles",
    "rows",
    "whole",
    "cells",
    "row_sets",
    "weighted",
    "packed",
    "samples",
]


def offset_of(device: str) -> int:
    return torch.cuda.default_generators[torch.device(device).index or 0].get_offset()


def step(latent: gpu_problems.Latent, inputs: list[Tensor], **more: object) -> list[Tensor]:
    """Forward and backward: outputs and gradients."""
    outputs = gpu_problems.call(latent, inputs, **more)
    grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
    # Detached: a graph of autograd that lives on would keep the stream of its capture.
    return [*(o.detach() for o in outputs), *grads]


def capture(
    function: Callable[[], list[Tensor]], warm_up: int = 3
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The graph of a call and its outputs, after a warm-up on a side stream, as torch's manual has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    # torch clears the generator's offset on the capture's stream, which no replay on another waits for.
    torch.cuda.synchronize()
    return graph, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_replays_are_fresh_and_equal_eager_calls(name, dtype, cuda):
    latent = gpu_problems.on(gpu_problems.LATENTS[name], cuda)
    inputs = gpu_problems.tensors(latent, dtype, cuda)
    torch.cuda.manual_seed(1234)
    graph, captured = capture(lambda: step(latent, inputs))
    seen: list[Tensor] = []
    for _ in range(REPLAYS):
        state = torch.tensor([1234, offset_of(cuda)], device=cuda)
        graph.replay()
        for a, b in zip(captured, step(latent, inputs, rng=state), strict=True):
            assert torch.equal(a, b)
        z = captured[0].clone()
        assert not any(torch.equal(z, old) for old in seen[-10:])
        seen.append(z)
    draws = torch.stack(seen).flatten(1)
    assert len(torch.unique(draws[:, :4].float(), dim=0)) == REPLAYS


def test_each_call_in_a_graph_has_numbers_of_its_own(cuda):
    """Three draws of ours and one of torch's, with eager draws between the replays."""
    zero = torch.zeros(4096, device=cuda)

    def draws() -> list[Tensor]:
        return [vk.reparameterize(zero, zero), vk.rng_state(zero), torch.randn_like(zero),
                vk.reparameterize(zero, zero), vk.sample_kl(zero, zero).z]  # fmt: skip

    torch.cuda.manual_seed(5)
    graph, captured = capture(draws)
    seen: list[Tensor] = []
    for _ in range(20):
        offset = offset_of(cuda)
        graph.replay()
        now = [captured[i].clone() for i in (0, 2, 3, 4)]
        assert captured[1].tolist() == [5, offset + 4]
        rng = torch.tensor([5, offset], device=cuda)
        assert torch.equal(now[0], vk.reparameterize(zero, zero, rng=rng))
        now.append(vk.reparameterize(zero, zero))
        for z in now:
            assert not any(torch.equal(z, old) for old in seen)
            seen.append(z)


def test_a_graph_may_be_replayed_on_any_stream_and_by_itself_twice_at_once(cuda):
    """The sums of a captured call need no counters, which belong to a stream."""
    latent = gpu_problems.on(gpu_problems.LATENTS["columns"], cuda)
    inputs = [t.detach() for t in gpu_problems.tensors(latent, torch.float32, cuda)]
    rng = torch.tensor([3, 4], device=cuda)
    expected = gpu_problems.call(latent, inputs, rng=rng)
    graphs = [capture(lambda: gpu_problems.call(latent, inputs, rng=rng)) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(25):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
        gpu_problems.call(latent, inputs, rng=rng)  # on the default stream, with counters, at the same time
        torch.cuda.synchronize()
        for _, captured in graphs:
            assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_new_inputs_are_read_at_every_replay(cuda):
    latent = gpu_problems.on(gpu_problems.LATENTS["columns"], cuda)
    inputs = [t.detach() for t in gpu_problems.tensors(latent, torch.float32, cuda)]
    rng = torch.tensor([3, 4], device=cuda)
    graph, captured = capture(lambda: gpu_problems.call(latent, inputs, rng=rng))
    for i in range(10):
        for t in inputs:
            t.copy_(torch.randn(t.shape, generator=torch.Generator(cuda).manual_seed(i), device=cuda))
        graph.replay()
        expected = gpu_problems.call(latent, inputs, rng=rng)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_make_graphed_callables(cuda):
    """Forward and backward in graphs of their own, which is how torch graphs a module."""

    class Layer(torch.nn.Module):
        def forward(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
            z, kl, _ = vk.sample_kl(mu, logvar, free_bits=0.3)
            return z, kl

    inputs = [torch.randn(300, 96, device=cuda).requires_grad_() for _ in range(2)]
    layer = torch.cuda.make_graphed_callables(Layer(), tuple(inputs))
    drawn = []
    for _ in range(3):
        z, kl = layer(*inputs)
        g_mu, _ = torch.autograd.grad([z, kl], inputs, [torch.ones_like(z), torch.ones_like(kl)])
        drawn.append(z.detach().clone())
        rate = 0.5 * (inputs[0] ** 2 + inputs[1].exp() - 1 - inputs[1]).mean(0)
        expected = 1 + (rate >= 0.3) * inputs[0] / 300
        torch.testing.assert_close(g_mu, expected.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
