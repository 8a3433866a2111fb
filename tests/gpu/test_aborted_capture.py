"""A capture that is given up leaves no counter behind: later calls on the same stream give the same bits.

A failed capture leaves torch's generator and allocator of this process in a state of their own, so these
tests are a part of their own, pass their random state in, and fail a capture last.
"""

from __future__ import annotations

import gc

import gpu_problems
import pytest
import torch

NAMES = ["columns", "many_tiles", "rows", "whole", "cells", "row_sets", "weighted"]


class Calls:
    """Calls of some latents on a stream, and the bits that each gave before anything was captured."""

    def __init__(self, names: list[str], device: str) -> None:
        self.latents = [gpu_problems.on(gpu_problems.LATENTS[name], device) for name in names]
        self.inputs = [
            [t.detach() for t in gpu_problems.tensors(latent, torch.float32, device)]
            for latent in self.latents
        ]
        self.rng = torch.tensor([3, 4], device=device)
        self.stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self.expected = [[t.clone() for t in outputs] for outputs in self.outputs()]
        torch.cuda.synchronize()

    def outputs(self) -> list[list[torch.Tensor]]:
        pairs = zip(self.latents, self.inputs, strict=True)
        return [gpu_problems.call(latent, inputs, rng=self.rng) for latent, inputs in pairs]

    def assert_unchanged(self) -> None:
        """On the stream of the capture, on the default one, and on the first again."""
        for stream in (self.stream, torch.cuda.default_stream(), self.stream):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    for outputs, expected in zip(self.outputs(), self.expected, strict=True):
                        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_that_is_never_replayed(name, cuda):
    calls = Calls([name], cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=calls.stream):
        calls.outputs()
    del graph
    gc.collect()
    calls.assert_unchanged()


@pytest.mark.parametrize("name", NAMES)
def test_an_exception_while_capturing(name, cuda):
    calls = Calls([name], cuda)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(KeyError), torch.cuda.graph(graph, stream=calls.stream):
        calls.outputs()
        raise KeyError
    del graph
    gc.collect()
    calls.assert_unchanged()


def test_a_capture_that_cuda_declares_invalid(cuda):
    """Waiting for a stream is not permitted while it captures, and all that was captured is lost."""
    calls = Calls(NAMES, cuda)
    graph = torch.cuda.CUDAGraph()
    try:
        with pytest.raises(RuntimeError), torch.cuda.graph(graph, stream=calls.stream):
            calls.outputs()
            calls.stream.synchronize()
    finally:
        # torch leaves the capture's stream the current one when the end of a capture fails.
        torch.cuda.set_stream(torch.cuda.default_stream())
    assert not torch.cuda.is_current_stream_capturing()
    calls.assert_unchanged()
